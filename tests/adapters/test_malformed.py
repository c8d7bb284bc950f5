"""Damaged and hostile adapter folders: none loads, none leaves a trace, each is named."""

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_oracle import shake
from safetensors.torch import load_file, save_file
from torch import nn
from zoo import build

from loralab.adapters import (
    LoRAConfig,
    adapter_parameters,
    attach,
    hosted,
    load_adapter,
    save_adapter,
)
from loralab.errors import AdapterError, LoralabError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Damage = Callable[[Path, random.Random], None]


def tensors(change: Callable[[dict[str, torch.Tensor], random.Random], None]) -> Damage:
    """Damage to the tensors, written as another tool would: without our checksum."""

    def damage(folder: Path, chance: random.Random) -> None:
        found = load_file(folder / WEIGHTS)
        change(found, chance)
        save_file(found, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def settings(**values: Any) -> Damage:
    """Settings that are wrong in themselves; one of the given."""

    def damage(folder: Path, chance: random.Random) -> None:
        raw = json.loads((folder / CONFIG).read_text())
        key = chance.choice(sorted(values))
        raw[key] = chance.choice(values[key])
        (folder / CONFIG).write_text(json.dumps(raw))
        tensors(lambda found, _: None)(folder, chance)

    return damage


def pick(found: dict[str, torch.Tensor], chance: random.Random, ending: str = "") -> str:
    return chance.choice(sorted(name for name in found if name.endswith(ending)))


def flip(folder: Path, chance: random.Random) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    (folder / WEIGHTS).write_bytes(data)


def truncate(folder: Path, chance: random.Random) -> None:
    file = folder / chance.choice([WEIGHTS, CONFIG])
    data = file.read_bytes()
    file.write_bytes(data[: chance.randrange(len(data) - 1)])


def oversized_header(folder: Path, chance: random.Random) -> None:
    data = (folder / WEIGHTS).read_bytes()
    length = chance.choice([2**63, 2**40, len(data), 10**8 + 1])
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + data[8:])


def header(change: Callable[[dict[str, Any], random.Random], str | None]) -> Damage:
    def damage(folder: Path, chance: random.Random) -> None:
        data = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        table = json.loads(data[8 : 8 + length])
        table["__metadata__"] = {"format": "pt"}
        text = change(table, chance) or json.dumps(table)
        raw = text.encode()
        raw += b" " * (-len(raw) % 8)
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])

    return damage


def _entry(table: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    return table[chance.choice(sorted(name for name in table if name != "__metadata__"))]


def _shape(table: dict[str, Any], chance: random.Random) -> None:
    _entry(table, chance)["shape"] = chance.choice([[-1, 4], [2**40, 2**40], ["x"], [3], None])


def _offsets(table: dict[str, Any], chance: random.Random) -> None:
    _entry(table, chance)["data_offsets"] = chance.choice([[0, 1], [64, 0], [-8, 8], [0, 2**60]])


def _dtype(table: dict[str, Any], chance: random.Random) -> None:
    _entry(table, chance)["dtype"] = chance.choice(["F99", "I32", "U64", 5])


def _twice(table: dict[str, Any], chance: random.Random) -> str:
    name = chance.choice(sorted(name for name in table if name != "__metadata__"))
    text = json.dumps(table)
    return text[:-1] + f", {json.dumps(name)}: {json.dumps(table[name])}" + "}"


def _spoil(found: dict[str, torch.Tensor], chance: random.Random) -> None:
    value = found[pick(found, chance)].view(-1)
    value[chance.randrange(len(value))] = chance.choice([float("nan"), float("inf"), -float("inf")])


def _drop(found: dict[str, torch.Tensor], chance: random.Random) -> None:
    del found[pick(found, chance)]


def _reshape(found: dict[str, torch.Tensor], chance: random.Random) -> None:
    name = pick(found, chance)
    found[name] = chance.choice(
        [found[name].mT.contiguous(), found[name][:-1], found[name].flatten(), found[name][None]]
    ).clone()


def _rename(found: dict[str, torch.Tensor], chance: random.Random) -> None:
    name = pick(found, chance)
    other = chance.choice(
        [
            name.replace("layers", "blocks"),
            name.replace("base_model.model.", ""),
            name.replace("base_model.model.", "base_model.model.../"),
            name.replace("model.layers", "model/layers"),
            name + ".extra",
            name.replace(".weight", ""),
            "",
        ]
    )
    if other == name:
        other = name + "2"
    found[other] = found.pop(name)


def _other_layer(found: dict[str, torch.Tensor], chance: random.Random) -> None:
    for name in sorted(name for name in found if ".layers.1." in name):
        found[name.replace(".layers.1.", ".layers.9.")] = found.pop(name)


def _part(found: dict[str, torch.Tensor], chance: random.Random) -> None:
    for name in [name for name in found if ".layers.0." in name and "q_proj" in name]:
        del found[name]


def _integers(found: dict[str, torch.Tensor], chance: random.Random) -> None:
    name = pick(found, chance, "lora_A.weight")
    found[name] = found[name].to(chance.choice([torch.int32, torch.int8, torch.bool]))


def no_file(folder: Path, chance: random.Random) -> None:
    (folder / chance.choice([WEIGHTS, CONFIG])).unlink()


def pickled(folder: Path, chance: random.Random) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def not_json(folder: Path, chance: random.Random) -> None:
    text = chance.choice(["", "[]", "null", "{", '{"r": 4, "r": 8}', "\x00\xff", "[" * 100_000])
    (folder / CONFIG).write_text(text, encoding="latin-1")


DAMAGES: dict[str, Damage] = {
    "bit": flip,
    "truncated": truncate,
    "oversized header": oversized_header,
    "shape in header": header(_shape),
    "offsets in header": header(_offsets),
    "dtype in header": header(_dtype),
    "name twice": header(_twice),
    "not finite": tensors(_spoil),
    "one tensor less": tensors(_drop),
    "another shape": tensors(_reshape),
    "another name": tensors(_rename),
    "other modules": tensors(_other_layer),
    "part of its modules": tensors(_part),
    "integers": tensors(_integers),
    "no file": no_file,
    "pickle": pickled,
    "no JSON": not_json,
    "rank": settings(r=[0, -1, 5, "4", 4.5, True, None, 10**9]),
    "peft_type": settings(peft_type=["LOHA", "", None, 3, "lora"]),
    "values": settings(
        lora_alpha=["x", float("nan"), float("inf"), 0, -1, []],
        lora_dropout=[2.0, -0.1, "x", float("nan")],
        target_modules=[3, {"a": 1}, [1], "(", ["q_proj", None]],
        rank_pattern=[[1], {"q_proj": "x"}, {"(": 4}, {"q_proj": 3}, 7],
        alpha_pattern=[{"q_proj": float("nan")}, {"q_proj": None}, "x"],
        modules_to_save=[5, [5], ["../up"], ["/etc"], {"a": 1}],
        exclude_modules=[["../q_proj"], ["C:\\q_proj"], 3],
        bias=["some", 3],
        use_rslora=["yes", 3],
        use_dora=[True, "no"],
        layers_to_transform=["all", [1.5], {"a": 1}],
        trainable_token_indices=["x", {"embed_tokens": "x"}, [1.5]],
        init_lora_weights=["pissa", "olora", "loftq", "pissa_niter_4", [1]],
        task_type=["SOMETHING", 5],
        base_model_name_or_path=["../../etc/passwd", "/etc/passwd", "C:\\base", "a\\..\\b", 5],
        layer_replication=[[[0, 1]]],
        alora_invocation_tokens=[[1, 2]],
        target_parameters=[["x"]],
        lora_bias=[True],
        never_heard_of=["x", 1],
    ),
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build("llama")


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("valid") / "adapter"
    donor = build("llama")
    attach(donor, LoRAConfig(rank=4, alpha=8.0, targets=["q_proj", "v_proj"]))
    shake(adapter_parameters(donor, "default").values())
    save_adapter(donor, "default", folder)
    return folder


def _try(model: nn.Module, valid: Path, place: Path, kind: str, seed: int) -> None:
    shutil.copytree(valid, place)
    DAMAGES[kind](place, random.Random(f"{kind}-{seed}"))
    before = [(name, id(p), p._version) for name, p in model.named_parameters()]
    types = [type(module) for module in model.modules()]
    try:
        load_adapter(model, place)
    except LoralabError:
        pass
    else:
        pytest.fail(f"{kind}, seed {seed}: loaded")
    finally:
        shutil.rmtree(place)
    assert hosted(model) == ()
    assert [(name, id(p), p._version) for name, p in model.named_parameters()] == before
    assert [type(module) for module in model.modules()] == types


@pytest.mark.parametrize("kind", DAMAGES)
def test_malformed_folders(model: nn.Module, valid: Path, tmp_path: Path, kind: str) -> None:
    for seed in range(8):
        _try(model, valid, tmp_path / "adapter", kind, seed)


@pytest.mark.slow
def test_two_thousand_malformed_folders(model: nn.Module, valid: Path, tmp_path: Path) -> None:
    for seed in range(2000 // len(DAMAGES)):
        for kind in DAMAGES:
            _try(model, valid, tmp_path / "adapter", kind, 1000 + seed)


def test_the_undamaged_folder_loads(valid: Path) -> None:
    load_adapter(build("llama"), valid)


def test_all_faults_come_in_one_error(model: nn.Module, valid: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(valid, folder)
    raw = json.loads((folder / CONFIG).read_text())
    raw |= {"peft_type": "LOHA", "r": "x", "use_bdlora": {"a": 1}}
    (folder / CONFIG).write_text(json.dumps(raw))
    (folder / WEIGHTS).write_bytes(b"short")
    with pytest.raises(AdapterError) as caught:
        load_adapter(model, folder)
    for word in ("LOHA", "r is 'x'", "use_bdlora", "damaged", "nothing was loaded"):
        assert word in str(caught.value)


def test_a_pickle_is_refused_with_the_conversion(
    model: nn.Module, valid: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(valid, folder)
    pickled(folder, random.Random(0))
    with pytest.raises(AdapterError, match=r"adapter_model.bin is a pickle.*weights_only=True"):
        load_adapter(model, folder)


def test_a_base_in_a_folder_of_this_machine_is_no_fault(valid: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    build("llama").save_pretrained(base)  # pyright: ignore
    folder = tmp_path / "adapter"
    shutil.copytree(valid, folder)
    raw = json.loads((folder / CONFIG).read_text()) | {"base_model_name_or_path": str(base)}
    (folder / CONFIG).write_text(json.dumps(raw))
    tensors(lambda found, _: None)(folder, random.Random(0))
    load_adapter(build("llama"), folder)
