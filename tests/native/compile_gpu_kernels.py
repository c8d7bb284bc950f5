"""Compiles the kernels for GPUs as `on_gpu` runs them, for several kinds; prints a line for each.

Fails where one keeps many registers in memory, or needs more shared memory than such a GPU has.
"""

import io
import os
import re
import sys
import tempfile
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import Tensor
from triton import compile as compiled, knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loralab.native import gpu_kernels, on_gpu
from loralab.native.pairs import ACTIVATIONS, Mask, Pair

SHARED_KIB = {80: 163, 86: 99, 90: 227, 120: 99}
"""Of shared memory that a program may have, by compute capability."""

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int64: "i64",
}

FEW_BYTES = 64

seen: set[str] = set()


def main() -> None:
    on_gpu._run = compile_instead
    knobs.nvidia.dump_ptxas_log = True
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        for dtype in (torch.bfloat16, torch.float32):
            a_step(dtype)
            known = seen.copy()
            for tokens in (1, 37):
                a_step(dtype, tokens=tokens)
            assert seen == known, f"other numbers of rows compile anew: {seen - known}"


def a_step(dtype: torch.dtype, *, tokens: int = 512, width: int = 2048, inner: int = 8192) -> None:
    """Every kernel at the sizes of a Llama-3.2-1B."""
    x, wide = (torch.empty(tokens, size, dtype=dtype) for size in (width, inner))
    flips, places = torch.empty(1 << 19, dtype=torch.uint8), torch.empty(tokens, dtype=torch.int64)
    for rank in (8, 16, 64):
        A, B = torch.empty(rank, width), torch.empty(inner, rank)
        pairs, mask = [Pair(B, 2.0, wide)], Mask(flips, places)
        on_gpu.add_pairs(x, [A], pairs, mask)
        on_gpu.pairs_backward(x, [A], pairs, mask, torch.empty_like(x))
    gain, angles = torch.empty(width, dtype=dtype), torch.empty(1, tokens, 64, dtype=dtype)
    _, inverse = on_gpu.norm(x, gain, 1e-5)
    on_gpu.norm_backward(x, x, inverse, gain, x)
    for number in range(len(ACTIVATIONS)):
        on_gpu.gated(wide, wide, number)
        on_gpu.gated_backward(wide, wide, wide, number)
    for back in (False, True):
        on_gpu.rotated(x, angles, angles, back=back)


def compile_instead(name: str, _grid: tuple[int, ...], *given: Any, **constants: Any) -> None:
    """In the place of a run: compiles what would be run, once for each kind of GPU."""
    kernel = getattr(gpu_kernels, name)
    signature: dict[str, str] = {}
    values: dict[tuple[int], Any] = {}
    divisible: dict[tuple[int], Any] = {}
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages") if key in constants}
    named = dict(zip(kernel.arg_names, given, strict=False)) | constants
    for at, argument in enumerate(kernel.arg_names):
        value = named[argument]
        is_known = isinstance(value, int) and not kernel.params[at].do_not_specialize
        if argument in constants or (is_known and value == 1):
            signature[argument], values[at,] = "constexpr", value
        elif isinstance(value, float):
            signature[argument] = "fp32"
        else:
            signature[argument] = f"*{TYPES[value.dtype]}" if isinstance(value, Tensor) else "i32"
            if isinstance(value, Tensor) or (is_known and value % 16 == 0):
                divisible[at,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=values, attrs=divisible)
    if (key := f"{name} {signature} {values}") not in seen:
        seen.add(key)
        for capability, most in SHARED_KIB.items():
            log = io.StringIO()
            with redirect_stdout(log):
                made = compiled(source, target=GPUTarget("cuda", capability, 32), options=options)
            told = re.search(r"(\d+) bytes spill stores", log.getvalue())
            assert told is not None, log.getvalue()
            line = f"{name} {capability} {values}: {made.metadata.shared} bytes shared, {told[0]}"
            sys.stdout.write(line + "\n")
            assert int(told[1]) <= FEW_BYTES
            assert made.metadata.shared <= most * 1024


if __name__ == "__main__":
    main()
