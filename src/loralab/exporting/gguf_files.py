"""GGUF files for llama.cpp: a base model, and an adapter for it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, quantize
from gguf.quants import quant_shape_to_byte_shape
from safetensors import safe_open

from loralab.adapters import Adapter
from loralab.errors import AdapterError, ModelError
from loralab.exporting.gguf_layout import Layout
from loralab.exporting.gguf_vocabulary import write_vocabulary
from loralab.files import replacing
from loralab.models import StoredWeights, load_tokenizer

GGUFType = Literal["f32", "f16", "bf16", "q8_0"]
_TYPES: dict[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
GGUF_TYPES = tuple(_TYPES)
_STORED = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


def write_gguf_model(name: str, path: Path, *, dtype: GGUFType | None = None) -> None:
    """Writes the model `name` (as `load_model` takes it) as one GGUF file.

    dtype: of matrices, None keeps the stored one; vectors are fp32, as llama.cpp wants them. One
    tensor is in memory at a time. Raises `ModelError` for what GGUF cannot express, by name.
    """
    stored = StoredWeights(name)
    layout = Layout.of(stored.folder)
    tensors = dict(_named_tensors(stored, layout))
    kind, file_type = _TYPES[dtype or _stored_type(stored)]
    with replacing(path) as aside:
        writer = GGUFWriter(aside, layout.architecture.name)
        writer.add_type("model")
        writer.add_name(Path(name).name)
        layout.write_facts(writer)
        write_vocabulary(writer, load_tokenizer(name), layout.config.vocab_size)
        writer.add_file_type(file_type)
        writer.add_quantization_version(2)
        _write(writer, tensors, kind)


Values = Callable[[], np.ndarray]


def _named_tensors(
    stored: StoredWeights, layout: Layout
) -> Iterator[tuple[str, tuple[tuple[int, ...], Values]]]:
    """GGUF's name -> (shape, what reads the values) of every tensor."""
    factors = layout.rope_factors()
    if factors is not None:
        yield "rope_freqs.weight", (factors.shape, lambda: factors)
    unknown = []
    for own in stored.names:
        if own == "lm_head.weight" and layout.tied:
            continue
        full = own if own.startswith(("model.", "lm_head.")) else f"model.{own}"
        name = layout.tensor_name(full)
        if name is None:
            unknown.append(own)
            continue
        yield name, (_shape(stored, own), _reader(stored, layout, own, full))
    if unknown:
        raise ModelError(
            f"{stored.folder} holds {len(unknown)} tensors that have no name in GGUF's"
            f" {layout.architecture.name}: {', '.join(unknown[:4])}",
            "give a plain causal model; a classification head cannot be carried.",
        )


def _shape(stored: StoredWeights, own: str) -> tuple[int, ...]:
    with safe_open(stored.files[own], framework="pt") as handle:
        return tuple(handle.get_slice(own).get_shape())


def _reader(stored: StoredWeights, layout: Layout, own: str, full: str) -> Values:
    def read() -> np.ndarray:
        tensor = stored.read(own)
        assert tensor is not None  # its name is from the file
        return np.ascontiguousarray(layout.rows(full, tensor.float().numpy()))

    return read


def _stored_type(stored: StoredWeights) -> str:
    """The type of the matrices in the model's files; f32 where they differ."""
    found = set()
    for name, file in stored.files.items():
        with safe_open(file, framework="pt") as handle:
            part = handle.get_slice(name)
            if len(part.get_shape()) > 1:
                found.add(_STORED.get(part.get_dtype(), "f32"))
    return found.pop() if len(found) == 1 else "f32"


def _write(
    writer: GGUFWriter,
    tensors: dict[str, tuple[tuple[int, ...], Values]],
    kind: GGMLQuantizationType,
) -> None:
    """Header, then one tensor after the other."""
    kinds = {name: _kind(shape, kind) for name, (shape, _) in tensors.items()}
    for name, (shape, _) in tensors.items():
        size = quant_shape_to_byte_shape(shape, kinds[name])
        writer.add_tensor_info(
            name, size, np.dtype(np.uint8), int(np.prod(size)), raw_dtype=kinds[name]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, (_, read) in tensors.items():
        values = quantize(read(), kinds[name])
        writer.write_tensor_data(np.ascontiguousarray(values).view(np.uint8))
    writer.close()


def _kind(shape: tuple[int, ...], kind: GGMLQuantizationType) -> GGMLQuantizationType:
    if len(shape) < 2:
        return GGMLQuantizationType.F32
    if kind is GGMLQuantizationType.Q8_0 and shape[-1] % 32:
        return GGMLQuantizationType.F16  # its blocks are of 32
    return kind


def write_gguf_adapter(adapter: Adapter, base: Path, path: Path) -> None:
    """Writes a canonical adapter (one rank, alpha equal to it) for the model folder `base`.

    Pairs are fp32. Raises `AdapterError` that lists the modules which have no name in GGUF.
    """
    layout = Layout.of(base)
    tensors: dict[str, tuple[tuple[int, ...], Values]] = {}
    faults = []
    for module, (A, B) in adapter.pairs.items():
        name = layout.tensor_name(f"{module}.weight")
        if name is None or name.endswith("_norm.weight"):
            faults.append(f"{module}: no module of GGUF's {layout.architecture.name}")
            continue
        if layout.tied and name in ("token_embd.weight", "output.weight"):
            faults.append(
                f"{module}: the base's embedding is its output layer too, and llama.cpp would"
                " apply the pair to both"
            )
            continue
        down, up = A.float().numpy(), layout.rows(module, B.float().numpy())
        if name == "token_embd.weight":  # rows of A^T are looked up (llama-graph.cpp)
            down = np.ascontiguousarray(down.T)
        tensors[f"{name}.lora_a"] = _held(down)
        tensors[f"{name}.lora_b"] = _held(up)
    if faults:
        raise AdapterError(
            "\n  - ".join(["llama.cpp would not apply all of this adapter", *faults]),
            "merge instead (--merged), which carries all of it.",
        )
    with replacing(path) as aside:
        writer = GGUFWriter(aside, layout.architecture.name)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(adapter.config.alpha))
        writer.add_file_type(LlamaFileType.ALL_F32)
        _write(writer, tensors, GGMLQuantizationType.F32)


def _held(values: np.ndarray) -> tuple[tuple[int, ...], Values]:
    return values.shape, lambda: values
