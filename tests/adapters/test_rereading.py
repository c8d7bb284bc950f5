"""A folder that was read before reads again as it did, from its bytes alone; memory comes back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft_oracle import peft_writes, shake
from torch import nn
from zoo import build

from loralab.adapters import (
    Adapter,
    LoRAConfig,
    Probe,
    adapter_parameters,
    attach,
    content_hash,
    outline_adapter,
    read_adapter,
    read_with_blueprint,
    save_adapter,
)
from loralab.adapters.buffers import MIB, Buffers
from loralab.errors import AdapterError

WEIGHTS = "adapter_model.safetensors"
SETTINGS: dict[str, dict[str, Any]] = {
    "patterns": {"rank_pattern": {"query": 2}, "use_rslora": True},
    "dora": {"use_dora": True},
    "embeddings": {"target_modules": ["query", "word_embeddings"]},
    "tokens": {"trainable_token_indices": {"word_embeddings": [3, 7, 1]}},
    "whole": {"modules_to_save": ["classifier"]},
    "biases": {"bias": "all"},
}


def tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    found = {f"{path} {i}": t for path, pair in adapter.pairs.items() for i, t in enumerate(pair)}
    for name in ("extra", "magnitudes", "repeated"):
        found |= {f"{name} {key}": value for key, value in getattr(adapter, name).items()}
    for path, (indices, rows) in adapter.token_rows.items():
        found |= {f"{path} indices": indices, f"{path} rows": rows}
    return found


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_a_folder_reads_again_as_it_did(setting: str, half: bool, tmp_path: Path) -> None:
    base = build("bert").bfloat16() if half else build("bert")
    peft_writes(base, tmp_path, **{"r": 4, "target_modules": ["query"], **SETTINGS[setting]})
    first, blueprint = read_with_blueprint(tmp_path)
    assert blueprint is not None
    again = blueprint.read(tmp_path)
    expected, found = tensors(first), tensors(again)
    assert found.keys() == expected.keys() and expected
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype and torch.equal(tensor, found[name]), name
    assert content_hash(again) == content_hash(read_adapter(tmp_path))
    for name in ("config", "layers", "whole_modules", "base", "facts"):
        assert getattr(again, name) == getattr(first, name)
    assert outline_adapter(tmp_path).pairs.keys() == again.pairs.keys()


def saved(folder: Path, model: nn.Module, **settings: Any) -> Path:
    attach(model, LoRAConfig(rank=1, **settings))
    shake(adapter_parameters(model, "default").values())
    save_adapter(model, "default", folder, probes=[Probe((1, 2), -0.5)])
    return folder


def test_probes_travel_and_another_length_is_noticed(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", nn.Sequential(nn.Linear(3, 4)), targets=["0"])
    _, blueprint = read_with_blueprint(folder)
    assert blueprint is not None and blueprint.read(folder).probes == (Probe((1, 2), -0.5),)
    file = folder / WEIGHTS
    sound = file.read_bytes()
    for changed in (sound[:-1], sound + b"x"):
        file.write_bytes(changed)
        with pytest.raises(AdapterError, match=r"changed while it was read \(it has another len"):
            blueprint.read(folder)
    file.unlink()
    with pytest.raises(AdapterError, match=r"changed while it was read \(No such file"):
        blueprint.read(folder)


def test_what_is_computed_from_the_file_has_no_blueprint(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", nn.Sequential(nn.Conv1d(4, 4, 1, groups=2)), targets=["0"])
    adapter, blueprint = read_with_blueprint(folder)
    assert blueprint is None and content_hash(adapter) == content_hash(read_adapter(folder))


def test_memory_comes_back_once_nobody_holds_it() -> None:
    buffers = Buffers(max_bytes=4 * MIB)
    memory = buffers.take(2 * MIB - 100)
    place = memory.data_ptr()
    view = memory[64:128].view(torch.float32).as_strided((2, 3), (3, 1), 1)
    view.fill_(5.0)
    del memory
    other = buffers.take(2 * MIB)
    assert buffers.num_bytes == 0 and other.data_ptr() != place
    assert bool((view == 5).all())
    del view
    assert buffers.num_bytes == 2 * MIB
    assert buffers.take(MIB // 2).data_ptr() != place  # small pieces are none of its
    again = buffers.take(int(1.5 * MIB))
    assert len(again) == 1.5 * MIB and again.data_ptr() == place
    held = [buffers.take(3 * MIB), buffers.take(3 * MIB)]
    del held
    assert 0 < buffers.num_bytes <= 4 * MIB
