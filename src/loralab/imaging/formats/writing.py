"""Adapters as LoRA files that diffusers, kohya-ss and the programs around them load."""

from pathlib import Path
from typing import Literal

from safetensors.torch import save_file
from torch import Tensor, tensor

from loralab.adapters import Adapter
from loralab.errors import AdapterError
from loralab.files import cannot_write, replacing
from loralab.imaging.formats.names import COMPONENTS, DENOISERS, kind_of, listed

FORMATS = ("diffusers", "kohya")


def write_image_adapter(
    adapter: Adapter, path: str | Path, layout: Literal["diffusers", "kohya"] = "diffusers"
) -> None:
    """Writes one safetensors file, whole or not at all.

    layout: "diffusers" has `unet.….lora_A.weight` and the scale multiplied into `lora_B`, so that
        readers that know no metadata apply it too; "kohya" has `lora_unet_….lora_down.weight`,
        `lora_up` and the same alpha for each layer (B takes up the difference), by the names of
        diffusers' model.

    Raises `AdapterError` that lists what such files cannot hold (whole modules, biases, DoRA,
    token rows, embeddings, grouped convolutions), and for SD3 and Flux as kohya-ss files, where
    that world's q, k and v are one layer.
    """
    path = Path(path)
    _check(adapter, path, layout)
    tensors: dict[str, Tensor] = {}
    only = kind_of(adapter.pairs)
    several = any(name.startswith("text_encoder_2.") for name in adapter.pairs)
    # diffusers 0.42 loses the alphas of attention layers where they differ, so the file has one
    alphas = [adapter.scale(name) * len(A) for name, (A, _) in adapter.pairs.items()]
    alpha = max(dict.fromkeys(alphas), key=alphas.count)
    for full, (A, B) in adapter.pairs.items():
        component, name = _split(full, only)
        kernel = adapter.layer(full).kernel
        A = A.detach().cpu().reshape(A.shape[0], -1, *kernel)
        B = B.detach().cpu().reshape(*B.shape, *(1 for _ in kernel))
        if layout == "diffusers":
            tensors[f"{component}.{name}.lora_A.weight"] = A.contiguous()
            tensors[f"{component}.{name}.lora_B.weight"] = (B * adapter.scale(full)).contiguous()
        else:
            inner = name.removeprefix("text_model.")
            stem = _kohya_prefix(component, several) + inner.replace(".", "_")
            tensors[f"{stem}.lora_down.weight"] = A.contiguous()
            own = adapter.scale(full) * A.shape[0]
            tensors[f"{stem}.lora_up.weight"] = (B * (own / alpha)).contiguous()
            tensors[f"{stem}.alpha"] = tensor(alpha)
    shared = {key: value.clone() for key, value in tensors.items()}
    try:
        with replacing(path) as aside:
            save_file(shared, aside, metadata={"format": "pt"})
    except OSError as error:
        raise cannot_write(path, error) from error


def _check(adapter: Adapter, path: Path, layout: str) -> None:
    faults = [] if layout in FORMATS else [f"unknown layout {layout!r}; {', '.join(FORMATS)}"]
    if path.suffix != ".safetensors":
        faults.append(f"{path} does not end in .safetensors")
    if not adapter.pairs:
        faults.append("the adapter has no pairs")
    faults += [f"{name}: a tensor of its own" for name in adapter.extra]
    faults += [f"{name}: a DoRA magnitude" for name in adapter.magnitudes]
    faults += [f"{name}: token rows" for name in adapter.token_rows]
    faults += [f"{name}: {said}" for name in adapter.pairs if (said := _odd(adapter, name))]
    only = kind_of(adapter.pairs)
    parts = {_split(name, only)[0] for name in adapter.pairs}
    if layout == "kohya" and "transformer" in parts:
        faults.append("kohya-ss files of SD3 and Flux have q, k and v in one layer")
    if faults:
        raise AdapterError(
            f"no LoRA file of this layout can hold the adapter: {listed(faults)}",
            "write it with `loralab.save_adapter` (PEFT's format), or mend what is named.",
        )


def _odd(adapter: Adapter, name: str) -> str:
    layer = adapter.layer(name)
    if layer.kind in ("embedding", "attention"):
        return f"an adapter on an {layer.kind}"
    if layer.groups > 1 or layer.base_groups > 1:
        return "an adapter on a grouped convolution"
    return layer.apart


def _split(full: str, only: str) -> tuple[str, str]:
    first, _, rest = full.partition(".")
    return (first, rest) if first in COMPONENTS else (only, full)


def _kohya_prefix(component: str, several: bool) -> str:
    if component in DENOISERS:
        return "lora_unet_"
    number = component.removeprefix("text_encoder").removeprefix("_")
    if not number:
        return "lora_te1_text_model_" if several else "lora_te_text_model_"
    return f"lora_te{number}_text_model_"
