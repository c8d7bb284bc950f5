"""What the proof of application tells apart, and what it costs a second time."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from served_adapters import llama, place, running, write_adapter_folder

from loralab.adapters import LoRAConfig, hosted, read_adapter, write_adapter
from loralab.errors import AdapterError
from loralab.serving.proof import prove
from loralab.serving.store import AdapterStore, Proof, Registry

WEIGHTS = "adapter_model.safetensors"


def proof_of(root: Path, name: str = "red", **settings: Any) -> Proof:
    """What a server of the usual base finds; fails as it refuses."""
    model = llama()
    with running(model) as engine:
        store = AdapterStore(Registry(root), place(engine, model, **settings))
        try:
            store.lease([name]).result(60).release()
            proof = store.describe()[0].proof
            assert proof is not None
            return proof
        finally:
            store.close()
            if "red" not in str(hosted(model)):
                assert hosted(model) == ()  # what was refused is not left behind


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def save_as_others_do(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Without our metadata, the probes beside it."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)


def test_a_trained_adapter_is_proved_and_its_proof_is_kept(tmp_path: Path) -> None:
    write_adapter_folder(tmp_path / "root" / "red")
    first = proof_of(tmp_path / "root", cache=tmp_path / "cache")
    assert first.state == "proved" and not first.cached
    assert first.effect_nats is not None and first.effect_nats > 0.5
    assert first.error_nats is not None and first.error_nats < 1e-3
    second = proof_of(tmp_path / "root", cache=tmp_path / "cache")
    assert second.cached and second.effect_nats == first.effect_nats
    assert second.proof_ms < 20
    [file] = (tmp_path / "cache").rglob("*.json")
    file.write_text("{")
    assert not proof_of(tmp_path / "root", cache=tmp_path / "cache").cached


def test_settings_that_mean_the_same_do_no_harm(tmp_path: Path) -> None:
    edit(write_adapter_folder(tmp_path / "red"), base_model_name_or_path="somewhere-else")
    assert proof_of(tmp_path).state == "proved"


@pytest.mark.parametrize(
    ("changes", "factor"),
    [({"lora_alpha": 32.0}, "0.25 times"), ({"use_rslora": True}, "0.5 times its scale")],
)
def test_another_scale_is_named(tmp_path: Path, changes: dict[str, Any], factor: str) -> None:
    edit(write_adapter_folder(tmp_path / "red", rank=4), **changes)
    with pytest.raises(AdapterError, match=f"wrong scale: .*{factor}"):
        proof_of(tmp_path)


def test_a_lost_rslora_is_named(tmp_path: Path) -> None:
    folder = write_adapter_folder(tmp_path / "red", rank=4, scaling="alpha/sqrt(rank)")
    edit(folder, use_rslora=False)
    with pytest.raises(AdapterError, match=r"with 2 times .*sqrt of rank 4: .*with use_rslora"):
        proof_of(tmp_path)


def test_an_unlikely_scale_is_measured(tmp_path: Path) -> None:
    adapter = read_adapter(write_adapter_folder(tmp_path / "made", effect=0.02))
    config = replace(adapter.config, alpha=adapter.config.alpha * 1.7)
    write_adapter(replace(adapter, config=config), tmp_path / "root" / "red")
    with pytest.raises(AdapterError, match=r"wrong scale: .*with 0\.5[89]\d* times"):
        proof_of(tmp_path / "root")


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = write_adapter_folder(tmp_path / "red")
    tensors = load_file(folder / WEIGHTS)
    zeros = {n: torch.zeros_like(t) for n, t in tensors.items() if "down_proj.lora_B" in n}
    save_as_others_do(folder, tensors | zeros)
    with pytest.raises(AdapterError, match=r"partly applied: .*2 of 14 pairs are zero \(down_proj"):
        proof_of(tmp_path)
    save_as_others_do(folder, {n: t for n, t in tensors.items() if "down_proj" not in n})
    with pytest.raises(AdapterError, match="the config targets it, the adapter has no pair for it"):
        proof_of(tmp_path)


def test_an_adapter_without_effect_is_refused(tmp_path: Path) -> None:
    write_adapter_folder(tmp_path / "red", effect=0.0)
    with pytest.raises(AdapterError, match=r"no effect: .*3 probes exactly as the base does"):
        proof_of(tmp_path)
    folder = write_adapter_folder(tmp_path / "red")
    zeros = {name: torch.zeros_like(t) for name, t in load_file(folder / WEIGHTS).items()}
    save_as_others_do(folder, zeros)
    with pytest.raises(AdapterError, match=r"no effect: .*trained, it moved them by"):
        proof_of(tmp_path)


def test_another_base_is_named(tmp_path: Path) -> None:
    folder = write_adapter_folder(tmp_path / "red", base_seed=7)
    with pytest.raises(AdapterError, match="the adapter was trained on another base"):
        proof_of(tmp_path)
    save_as_others_do(folder, load_file(folder / WEIGHTS))
    with pytest.raises(AdapterError, match=r"wrong base: .*neither a scale nor a part"):
        proof_of(tmp_path)


def test_an_adapter_made_elsewhere_is_unproved_or_refused(tmp_path: Path) -> None:
    folder = write_adapter_folder(tmp_path / "red", probes=False)
    save_as_others_do(folder, load_file(folder / WEIGHTS))
    proof = proof_of(tmp_path)
    assert (proof.state, proof.detail) == ("unproved", "no probes")
    assert proof.effect_nats is not None and proof.effect_nats > 0.1
    with pytest.raises(AdapterError, match="unproved: this server takes proved adapters only"):
        proof_of(tmp_path, require_probes=True)


def test_changed_settings_without_probes_are_refused(tmp_path: Path) -> None:
    edit(write_adapter_folder(tmp_path / "red", probes=False), lora_alpha=32.0)
    with pytest.raises(AdapterError, match=r"adapter_config.json differs from what was saved"):
        proof_of(tmp_path)


def test_an_effect_below_rounding_is_unproved(tmp_path: Path) -> None:
    adapter = read_adapter(write_adapter_folder(tmp_path / "red"))
    assert isinstance(adapter.config, LoRAConfig)
    expected = [float(probe.log_likelihood) for probe in adapter.probes]

    def ask(inputs: Any, entry: Any) -> list[float]:
        by_ids = {p.input_ids: value for p, value in zip(adapter.probes, expected, strict=True)}
        return [by_ids[tuple(ids)] + (0.01 if entry is None else 0.0) for ids in inputs]

    assert prove(ask, "red", adapter, dtype="float32").state == "proved"
    found = prove(ask, "red", adapter, dtype="bfloat16")
    assert found.state == "unproved" and "below the rounding of a base in bfloat16" in found.detail
