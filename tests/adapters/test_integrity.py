"""Damage to a saved adapter is found wherever it is; its identity does not hang on its file."""

import json
from pathlib import Path

import pytest
import torch
from peft_oracle import shake
from safetensors.torch import load_file, save_file
from torch import nn

from loralab.adapters import (
    LoRAConfig,
    Probe,
    adapter_parameters,
    attach,
    content_hash,
    extract,
    install,
    read_adapter,
    save_adapter,
    use,
)
from loralab.errors import AdapterError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Conv1d(4, 4, 1, groups=2), nn.Linear(5, 2))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tiny()
    attach(model, LoRAConfig(rank=1, targets=["0", "1"], whole_modules=["2"]))
    shake(adapter_parameters(model, "default").values())
    save_adapter(model, "default", tmp_path / "a", probes=[Probe((1, 2), -0.5)])
    return tmp_path / "a"


def regions(folder: Path) -> dict[str, tuple[str, range]]:
    """Which bytes of which file, by what they are."""
    data = (folder / WEIGHTS).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    found = {"length": (WEIGHTS, range(8)), "header": (WEIGHTS, range(8, start, 3))}
    found["tensors"] = (WEIGHTS, range(start, len(data)))
    for name in (CONFIG, "probes.json"):
        found[name] = (name, range(0, len((folder / name).read_bytes()), 2))
    return found


@pytest.mark.parametrize("region", ["length", "header", "tensors", CONFIG, "probes.json"])
def test_one_flipped_bit_is_found_anywhere(folder: Path, region: str) -> None:
    name, places = regions(folder)[region]
    data = (folder / name).read_bytes()
    lost = []
    for position in places:
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position * 5 % 8)
        (folder / name).write_bytes(flipped)
        try:
            read_adapter(folder)
            lost.append(position)
        except AdapterError:
            pass
    (folder / name).write_bytes(data)
    read_adapter(folder)
    assert lost == []


def test_settings_may_be_laid_out_otherwise(folder: Path) -> None:
    raw = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(dict(sorted(raw.items(), reverse=True))))
    read_adapter(folder)


def test_a_changed_setting_is_named(folder: Path) -> None:
    raw = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(raw | {"lora_alpha": 33.0}))
    with pytest.raises(AdapterError, match=r"adapter_config\.json differs from what was saved"):
        read_adapter(folder)


def test_the_hash_is_of_the_content(folder: Path) -> None:
    identity = content_hash(read_adapter(folder))
    found = load_file(folder / WEIGHTS)
    save_file(dict(sorted(found.items(), reverse=True)), folder / WEIGHTS, metadata={"a": "b"})
    (folder / "probes.json").unlink()
    again = read_adapter(folder)
    assert content_hash(again) == identity
    model = tiny()
    install(model, again)
    assert content_hash(extract(model, "default")) == identity


def test_an_installed_value_stays_as_it_is(folder: Path) -> None:
    value = read_adapter(folder)
    identity = content_hash(value)
    first, second = tiny(), tiny()
    install(first, value)
    install(second, value)
    with torch.no_grad():
        for parameter in adapter_parameters(first, "default").values():
            parameter.add_(1)
    assert content_hash(value) == identity
    assert content_hash(extract(second, "default")) == identity


class Attention(nn.Module):
    """Packed attention, or attention whose key and value have sizes of their own."""

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **sizes)
        self.line = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side = x[..., : self.attn.kdim]
        return self.line(self.attn(x, side, side, need_weights=False)[0])


SEPARATE = "attn' has separate weights for query, key and value"


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["attn"], f"target '{SEPARATE}"),
        ("all-linear", "separate weights"),
        ("attn.*", "exclude=['attn']"),
    ],
)
def test_attention_without_packed_weights_is_refused(targets: list[str] | str, words: str) -> None:
    model = Attention(kdim=6, vdim=6)
    with pytest.raises(AdapterError) as caught:
        attach(model, LoRAConfig(rank=2, targets=targets))
    assert words in str(caught.value)
    attach(model, LoRAConfig(rank=2, targets="all-linear", exclude=["attn"]))
    with use(model, "default"):
        model(torch.randn(2, 3, 8))


def test_attention_without_packed_weights_is_refused_on_loading_too(tmp_path: Path) -> None:
    donor = Attention()
    attach(donor, LoRAConfig(rank=2, targets=["attn"]))
    save_adapter(donor, "default", tmp_path)
    model = Attention(kdim=6, vdim=6)
    with pytest.raises(AdapterError, match="attn has separate weights for query, key and value"):
        install(model, read_adapter(tmp_path), check_base=False)


@pytest.mark.parametrize("key", ["lora_dropout", "use_dora"])
def test_packed_attention_takes_neither_dropout_nor_dora(tmp_path: Path, key: str) -> None:
    donor = Attention()
    setting: dict[str, float] = {"dropout": 0.1} if key == "lora_dropout" else {"dora": True}
    words = "attn takes neither dropout nor DoRA"
    with pytest.raises(AdapterError, match=words):
        attach(donor, LoRAConfig(rank=2, targets=["attn"], **setting))  # pyright: ignore
    attach(donor, LoRAConfig(rank=2, targets=["attn"]))
    save_adapter(donor, "default", tmp_path)
    raw = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(raw | {key: 0.1 if key == "lora_dropout" else True}))
    tensors = load_file(tmp_path / WEIGHTS)
    if key == "use_dora":
        for name in [name for name in tensors if name.endswith("lora_B.weight")]:
            vector = name.replace("lora_B.weight", "lora_magnitude_vector")
            tensors[vector] = torch.ones(len(tensors[name]))
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError, match=words):
        install(Attention(), read_adapter(tmp_path))


def test_an_output_projection_alone_is_not_for_peft(tmp_path: Path) -> None:
    model = Attention()
    attach(model, LoRAConfig(rank=2, targets=["out_proj"]))
    with pytest.raises(AdapterError, match=r"attn.out_proj: PEFT applies no adapter on an"):
        save_adapter(model, "default", tmp_path / "a")
    save_adapter(model, "default", tmp_path / "a", portable=False)
    install(Attention(), read_adapter(tmp_path / "a"), check_base=False)


def test_patterns_inside_packed_attention_come_back(tmp_path: Path) -> None:
    model, x = Attention().eval(), torch.randn(2, 3, 8)
    alphas = {"attn": 6.0, "out_proj": 3.0}
    attach(model, LoRAConfig(rank=2, alpha=5.0, targets=["attn"], alpha_pattern=alphas))
    shake(adapter_parameters(model, "default").values())
    save_adapter(model, "default", tmp_path)
    again = Attention().eval()
    again.load_state_dict(model.state_dict(), strict=False)
    install(again, read_adapter(tmp_path), check_base=False)
    with use(model, "default"), use(again, "default"):
        torch.testing.assert_close(again(x), model(x), atol=1e-6, rtol=1e-6)
    value, found = extract(model, "default"), read_adapter(tmp_path)
    assert content_hash(value) == content_hash(found)
