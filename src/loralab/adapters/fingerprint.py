"""Which base an adapter belongs to: names, shapes and a fixed sample of values."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from loralab.adapters.targets import output_head, walk
from loralab.errors import AdapterError

SAMPLES = 8  # values a tensor


def fingerprint(
    model: nn.Module, read: Callable[[str], Tensor | None] | None = None
) -> dict[str, str]:
    """Parameter name -> its shape and sampled values rounded to bf16 (hexadecimal).

    Rounded, so that a base is the same in fp32 and bf16; without the output head, and of an
    embedding only its first rows, so that a new head or new tokens do not change it. Empty for a
    model without weights (meta device). `read` gives the weights by name where the model itself is
    only their structure.
    """
    heads = output_head(model)
    found: dict[str, str] = {}
    for prefix, module in walk(model):
        if any(prefix == head or prefix.startswith(head + ".") for head in heads):
            continue
        for name, tensor in module._parameters.items():
            full = f"{prefix}.{name}" if prefix else name
            if tensor is not None and read is not None:
                tensor = read(full)
            if tensor is not None and not tensor.is_meta and tensor.numel():
                found[full] = _sample(tensor, grows=isinstance(module, nn.Embedding))
    return found


def check_fingerprint(expected: Mapping[str, str], model: Mapping[str, str]) -> None:
    """Raises `AdapterError` where the bases differ, with how much differs and where first."""
    if not expected or not model or expected == model:
        return
    missing = sorted(set(expected) - set(model))
    changed = [name for name in expected if name in model and not _alike(expected, model, name)]
    added = sorted(set(model) - set(expected))
    if not (missing or changed or added):
        return
    kinds = [
        f"{len(names)} {what} (first: {names[0]})"
        for names, what in (
            (missing, "parameters missing"),
            (added, "parameters more"),
            (changed, "of other values or shape"),
        )
        if names
    ]
    raise AdapterError(
        f"the adapter was trained on another base: of {len(expected)} parameters "
        + ", ".join(kinds),
        "load the base it was trained on, or pass check_base=False where you know better.",
    )


def is_from_base(base: Mapping[str, str], name: str, tensor: Tensor) -> bool | None:
    """Whether a stored tensor is the fingerprint's parameter `name`; None where it knows none."""
    if name not in base:
        return None
    return _alike(base, {name: _sample(tensor, grows=base[name].startswith("*"))}, name)


def _alike(first: Mapping[str, str], second: Mapping[str, str], name: str) -> bool:
    """Same shape, and values at most one bf16 step apart (fp16 bases round twice)."""
    (shape_a, _, hex_a), (shape_b, _, hex_b) = (f[name].partition(":") for f in (first, second))
    if shape_a != shape_b or len(hex_a) != len(hex_b):
        return False
    words = [
        torch.frombuffer(bytearray.fromhex(h), dtype=torch.bfloat16).float() for h in (hex_a, hex_b)
    ]
    step = torch.maximum(words[0].abs(), words[1].abs()) / 128
    return bool(((words[0] - words[1]).abs() <= step + 1e-7).all())


def _sample(tensor: Tensor, grows: bool) -> str:
    rows, *rest = tensor.shape if tensor.ndim else (1,)
    shape = ["*" if grows else str(rows), *map(str, rest)]
    flat = tensor.detach().reshape(-1)
    reach = min(flat.numel(), SAMPLES * flat.numel() // rows) if grows else flat.numel()
    positions = _positions(reach, flat.device)
    values = flat[positions].to(torch.bfloat16).cpu().view(torch.int16)
    return "x".join(shape) + ":" + values.numpy().tobytes().hex()


_known_positions: dict[tuple[int, torch.device], Tensor] = {}


def _positions(reach: int, device: torch.device) -> Tensor:
    """Spread evenly over the first `reach` values."""
    key = (reach, device)
    if key not in _known_positions:
        count = min(SAMPLES, reach)
        places = [(2 * i + 1) * reach // (2 * count) for i in range(count)]
        _known_positions[key] = torch.tensor(places, device=device)
    return _known_positions[key]
