"""Probes travel with an adapter, and a merge is measured on them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_oracle import shake
from zoo import build

from loralab.adapters import (
    LoRAConfig,
    Probe,
    adapter_parameters,
    attach,
    extract,
    load_adapter,
    merge,
    read_adapter,
    save_adapter,
    write_adapter,
)
from loralab.errors import AdapterError

PROBES = (Probe((3, 5, 8), -7.25), Probe((1, 2), 0.1 + 0.2))


def _saved(folder: Path, probes: Any = PROBES) -> Any:
    model = build("llama")
    attach(model, LoRAConfig(rank=2, targets=["q_proj"]))
    shake(adapter_parameters(model, "default").values())
    save_adapter(model, "default", folder, probes=probes)
    return model


def test_probes_travel_from_model_to_folder_and_back(tmp_path: Path) -> None:
    model = _saved(tmp_path / "first")
    assert extract(model, "default").probes == PROBES
    assert read_adapter(tmp_path / "first").probes == PROBES
    again = build("llama")
    load_adapter(again, tmp_path / "first")
    save_adapter(again, "default", tmp_path / "second")
    assert read_adapter(tmp_path / "second").probes == PROBES


def test_saving_without_probes_leaves_none_of_an_older_adapter(tmp_path: Path) -> None:
    _saved(tmp_path)
    _saved(tmp_path, probes=())
    assert read_adapter(tmp_path).probes == ()


def test_a_merge_is_measured_on_the_stored_probes(tmp_path: Path) -> None:
    model = _saved(tmp_path)
    _, certificate = merge(model, "default")
    _, given = merge(model, "default", [{"input_ids": torch.tensor([[3, 5, 8]])}, PROBES[1]])
    assert certificate.num_positions == 5
    assert certificate.logit_kl == given.logit_kl
    _, none = merge(_saved(tmp_path, probes=()), "default")
    assert none.logit_kl is None


@pytest.mark.parametrize("damage", ["value", "number", "text", "shape"])
def test_damaged_probes_are_found(tmp_path: Path, damage: str) -> None:
    _saved(tmp_path)
    file = tmp_path / "probes.json"
    told = json.loads(file.read_text())
    if damage == "value":
        told["probes"][0]["log_likelihood"] += 1e-9
    elif damage == "number":
        told["probes"][0]["input_ids"][1] = 6
    elif damage == "shape":
        told = told["probes"]
    file.write_text("{" if damage == "text" else json.dumps(told))
    with pytest.raises(AdapterError, match=r"probes\.json (differs|is not readable)"):
        read_adapter(tmp_path)


def test_probes_of_another_adapter_are_refused(tmp_path: Path) -> None:
    adapter = extract(_saved(tmp_path / "a"), "default")
    theirs = (tmp_path / "a" / "probes.json").read_bytes()
    A, B = next(iter(adapter.pairs.values()))
    A.mul_(2)
    write_adapter(adapter, tmp_path / "b")
    (tmp_path / "b" / "probes.json").write_bytes(theirs)
    with pytest.raises(AdapterError, match="belongs to another adapter"):
        read_adapter(tmp_path / "b")
    assert B is not None
