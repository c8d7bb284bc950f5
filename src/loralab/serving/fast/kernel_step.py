"""The decoding step as one call of the compiled kernel: every block, any mix of adapters.

The kernel reads the base's weights where they are, or int8 copies of them. An adapter is one piece
of memory in the kernel's layout, so that it comes and goes without touching another.
"""

import ctypes
import itertools
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from ctypes import c_int64, c_void_p
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from loralab.native import Kernel
from loralab.serving.fast.batch import Batch
from loralab.serving.fast.coverage import Table
from loralab.serving.fast.decoder import Decoder, Projection
from loralab.serving.fast.packing import Packed, pack
from loralab.serving.fast.steps import Cache
from loralab.serving.fast.structures import (
    NUM_PROJECTIONS,
    Block,
    Group,
    Linear,
    Model,
    Step,
    check_sizes,
)
from loralab.serving.fast.whole_numbers import Precision, WholeCopies

KERNEL = Kernel("decoder", Path(__file__).with_name("kernel"), ("-pthread",))

_INPUT_MULTIPLE = 32  # numbers of half precision in 64 bytes
_MOST_BLOCKS = 300
_REFERENCES_OF_POOL = 2  # the list and the argument of `getrefcount`
_SUFFIX = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def kernel_limits(decoder: Decoder) -> str | None:
    """Why the kernel cannot run this decoder; None where it can."""
    block = decoder.blocks[0]
    sizes = {projection.weight.shape[1] for projection in block.projections}
    if decoder.device.type != "cpu" or decoder.dtype not in _SUFFIX:
        return f"it runs {decoder.dtype} on {decoder.device}, not fp32 or bf16 on the CPU"
    if any(size % _INPUT_MULTIPLE for size in sizes) or decoder.head_size % _INPUT_MULTIPLE:
        return f"its layers and heads are no multiples of {_INPUT_MULTIPLE} wide"
    if len(decoder.blocks) > _MOST_BLOCKS:
        return f"it has more than {_MOST_BLOCKS} blocks"
    weights = [p.weight for each in decoder.blocks for p in each.projections]
    if not all(weight.is_contiguous() for weight in (*weights, decoder.output.weight)):
        return "its weights are not stored row by row"
    return None


def _groups(decoder: Decoder) -> list[list[Projection | nn.Linear]]:
    """All linear layers in order, those that read one input together."""
    groups: list[list[Projection | nn.Linear]] = [
        list(group)
        for block in decoder.blocks
        for _, group in itertools.groupby(block.projections, key=lambda each: each.input)
    ]
    return [*groups, [decoder.output]]


class _Pool:
    """Memory for logits, used again once nobody holds it: fresh pages cost more than filling them.

    A tensor made from an array holds it, and so does every view of that tensor.
    """

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    def take(self, rows: int, columns: int) -> Float[Tensor, "rows columns"]:
        for index in range(len(self._arrays)):
            is_free = sys.getrefcount(self._arrays[index]) == _REFERENCES_OF_POOL
            if is_free and self._arrays[index].shape == (rows, columns):
                return torch.from_numpy(self._arrays[index])
        self._arrays = [a for a in self._arrays if a.shape[0] == rows][-1:]
        self._arrays.append(np.empty((rows, columns), dtype=np.float32))
        return torch.from_numpy(self._arrays[-1])


class KernelStep:
    """A `Step` whose products, attention and norms are the kernel's.

    A token's logits depend on its sequence and its adapters alone, bit for bit: not on what else is
    in the batch, nor on how the text was cut into chunks, nor on the number of threads.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        decoder: Decoder,
        num_slots: int,
        max_tokens: int,
        precision: Precision = "base",
    ) -> None:
        suffix = _SUFFIX[decoder.dtype]
        read = "int8_" if precision == "int8" else ""
        self._run = getattr(library, f"loralab_run_{read}{suffix}")
        self._pack = getattr(library, f"loralab_pack_{suffix}")
        self._run.argtypes = (c_void_p, c_void_p, ctypes.c_int)
        self._pack.argtypes = (c_void_p, c_int64)
        self._run.restype = self._pack.restype = None
        check_sizes(library)
        self.decoder = decoder
        self.precision: Precision = precision
        self.cache = Cache(decoder, num_slots, max_tokens)
        self._adapters: dict[str, Packed] = {}
        self._copying = ThreadPoolExecutor(1, thread_name_prefix="packing")
        self._copies = WholeCopies() if precision == "int8" else None
        self._kept: list[Tensor] = []
        self._pool = _Pool()
        self._places: list[int] = []
        self._sources: list[tuple[dict[str, Any], str]] = [
            (cast(Any, module)._parameters, name)
            for module in (
                decoder.output,
                *(p.module for b in decoder.blocks for p in b.projections),
            )
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        self.base_changed()

    def base_changed(self) -> None:
        """Reads anew where the base's weights are, if they moved."""
        decoder, kept = self.decoder, []
        places = [p[name].data_ptr() for p, name in self._sources]
        if places == self._places:
            return
        self._places = places

        def place(tensor: Tensor | None) -> int | None:
            if tensor is None:
                return None
            kept.append(tensor.contiguous())
            return kept[-1].data_ptr()

        linears = self._linears(place)
        self._blocks = (Block * len(decoder.blocks))()
        for number, (block, made) in enumerate(zip(decoder.blocks, self._blocks, strict=True)):
            made.linears[:] = linears[number * NUM_PROJECTIONS :][:NUM_PROJECTIONS]
            norms = block.attention_norm, block.mlp_norm
            made.gains[:] = [place(norm.gain.float()) for norm in norms]
            made.epsilons[:] = [norm.epsilon for norm in norms]
        first = decoder.blocks[0].projections
        keys = self.cache.keys
        self._model = Model(
            num_blocks=len(decoder.blocks),
            width=first[0].weight.shape[1],
            num_heads=decoder.num_heads,
            num_kv_heads=decoder.num_kv_heads,
            head_size=decoder.head_size,
            mlp_width=first[4].weight.shape[0],
            vocab=decoder.output.weight.shape[0],
            num_slots=keys.shape[1],
            max_tokens=keys.shape[3],
            activation=decoder.activation,
            blocks=self._blocks,
            final_gain=place(decoder.final_norm.gain.float()),
            final_epsilon=decoder.final_norm.epsilon,
            output=linears[-1],
            cos=place(decoder.cos.float()),
            sin=place(decoder.sin.float()),
            keys=keys.data_ptr(),
            values=self.cache.values.data_ptr(),
        )
        self._kept = kept

    def _linears(self, place: Callable[[Tensor | None], int | None]) -> list[Linear]:
        """Of all blocks' projections and the output layer, where `place` says they are."""
        groups = _groups(self.decoder)
        if self._copies is None:
            return [Linear(place(p.weight), place(p.bias)) for group in groups for p in group]
        copies = self._copies.of([[p.weight for p in group] for group in groups])
        return [
            Linear(place(whole.values), place(p.bias), place(whole.rows), place(whole.columns))
            for group, wholes in zip(groups, copies, strict=True)
            for p, whole in zip(group, wholes, strict=True)
        ]

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        """Makes the target slot hold the first tokens of the source slot."""
        self.cache.copy_prefix(source, target, num_tokens)

    def prepare(self, table: Table) -> "Future[Packed]":
        """An adapter's factors in the kernel's layout, copied by a thread of its own."""
        copies, packed = pack(table, self.decoder.dtype)

        def copy() -> Packed:
            self._pack(copies.jobs, len(copies.jobs))
            return packed

        return self._copying.submit(copy)

    def put(self, name: str, prepared: "Future[Packed]") -> None:
        """Serves what was prepared under that name."""
        self._adapters[name] = prepared.result()

    def remove(self, name: str) -> None:
        """Lets an adapter go."""
        self._adapters.pop(name, None)

    @torch.no_grad()
    def run(self, batch: Batch) -> Float[Tensor, "wanted vocab"]:
        """fp32 logits after the wanted tokens; the cache holds all tokens afterwards."""
        used = [self._adapters[group.adapter] for group in batch.groups]
        groups, entries, at = (Group * len(used))(), [], 0
        for made, group, packed in zip(groups, batch.groups, used, strict=True):
            made.pairs = ctypes.addressof(packed.pairs)
            made.begin, made.end = at, at + len(group.tokens)
            at = made.end
            entries.extend(group.tokens)
        numbers = torch.tensor(
            [*batch.positions, *batch.slots, *batch.wanted, *entries], dtype=torch.int64
        )
        num_tokens, num_wanted = len(batch.ids), len(batch.wanted)
        weights = torch.tensor([w for group in batch.groups for w in group.weights])
        x = self.decoder.embedding(torch.tensor(batch.ids)).float()
        logits = self._pool.take(num_wanted, self._model.vocab)
        first = numbers.data_ptr()
        step = Step(
            num_tokens=num_tokens,
            num_wanted=num_wanted,
            num_groups=len(used),
            num_entries=len(entries),
            most_rank=max((packed.most_rank for packed in used), default=0),
            positions=first,
            slots=first + 8 * num_tokens,
            wanted=first + 16 * num_tokens,
            groups=ctypes.addressof(groups),
            entry_tokens=first + 16 * num_tokens + 8 * num_wanted,
            entry_weights=weights.data_ptr(),
            x=x.data_ptr(),
            logits=logits.data_ptr(),
        )
        self._run(ctypes.byref(self._model), ctypes.byref(step), torch.get_num_threads())
        return logits
