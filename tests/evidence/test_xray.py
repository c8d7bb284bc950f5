"""The X-ray against dense SVDs, planted spectra, PEFT's adapters and merged models."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

from loralab.adapters import Adapter, Layer, LoRAConfig, adapter_of_difference, read_adapter
from loralab.errors import AdapterError, DataError
from loralab.evidence.xray import dimension, figures, summarise, xray, xray_difference
from loralab.lowrank import Factors, amplification
from loralab.models import StoredWeights

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT and transformers warn of each other


class Table:
    """Weights in memory."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    def read(self, parameter: str) -> torch.Tensor | None:
        return self.tensors.get(parameter)


def tiny() -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
    )
    return LlamaForSequenceClassification(config)


def weights_of(model: nn.Module) -> Table:
    return Table({name: p.detach().clone() for name, p in model.named_parameters()})


def of_peft(folder: Path, **settings: Any) -> tuple[nn.Module, Table, Adapter]:
    """A random adapter that PEFT made and saved, PEFT's model and the base's weights."""
    base = tiny()
    weights = weights_of(base)
    config = peft.LoraConfig(task_type="SEQ_CLS", **settings)
    model = peft.get_peft_model(base, config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding" in name:
            nn.init.normal_(parameter, std=0.2)
        if "magnitude" in name:
            parameter.data.mul_(1.1)
    model.save_pretrained(folder)
    return model, weights, read_adapter(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "target_modules": "all-linear"},
        {"r": 6, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]},
        {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
        {"r": 4, "use_dora": True, "target_modules": ["q_proj", "down_proj"]},
    ],
)
def test_every_figure_is_that_of_the_dense_matrices(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    model, weights, adapter = of_peft(tmp_path, **settings)
    found = xray(adapter, weights=weights)
    assert {module.module for module in found.modules} == set(adapter.pairs)
    merged = weights_of(model.merge_and_unload())  # type: ignore[operator]
    for module in found.modules:
        A, B = adapter.pairs[module.module]
        delta = (adapter.scale(module.module) * B @ A).double().numpy()
        values = np.linalg.svd(delta)[1][: len(module.singular_values)]
        np.testing.assert_allclose(module.singular_values, values, rtol=1e-5, atol=1e-5 * values[0])
        assert module.norm == pytest.approx(np.linalg.norm(delta), rel=1e-5)
        assert module.stable_rank == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-4)
        held = (values**2).cumsum() / (values**2).sum()
        assert module.directions_90 == 1 + int((held < 0.9).sum())
        assert module.norm_B == pytest.approx(np.linalg.norm(B.numpy(), 2), rel=1e-5)
        weight = weights.tensors[f"{module.module}.weight"]
        weight = weight.mT if module.layer_kind == "embedding" else weight
        base = module.base
        assert base is not None
        own = np.linalg.svd(weight.numpy())[1]
        assert base.relative_spectral_norm == pytest.approx(values[0] / own[0], rel=1e-4)
        assert base.relative_norm == pytest.approx(module.norm / np.linalg.norm(weight), rel=1e-4)
        pair = Factors(A=A, B=B, scale=adapter.scale(module.module))
        assert base.amplification == pytest.approx(amplification(pair, weight), rel=1e-4)
        adapted = merged.tensors[f"{module.module}.weight"]
        adapted = adapted.mT if module.layer_kind == "embedding" else adapted
        assert base.strangers == strangers(weight, adapted)
        assert (base.magnitude_change is not None) == bool(settings.get("use_dora"))


def strangers(weight: torch.Tensor, adapted: torch.Tensor) -> int:
    """PEFT's and the paper's rule, with two dense SVDs."""
    X = torch.linalg.svd(weight.double(), full_matrices=False)[0]
    Y = torch.linalg.svd(adapted.double(), full_matrices=False)[0][:, :10]
    return int(((Y.mT @ X).abs().amax(1) < 0.5).sum())


def test_rewriting_the_factors_changes_no_figure_but_theirs(tmp_path: Path) -> None:
    _, weights, adapter = of_peft(tmp_path, r=4, target_modules=["q_proj"])
    name = next(iter(adapter.pairs))
    A, B = adapter.pairs[name]
    M = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) + 3 * torch.eye(4)
    other = Adapter(adapter.config, {name: (torch.linalg.solve(M, A), B @ M)})
    one = next(m for m in xray(adapter, weights=weights).modules if m.module == name)
    two = xray(other, weights=weights, against={"it": adapter})
    changed = two.modules[0]
    np.testing.assert_allclose(one.singular_values, changed.singular_values, rtol=1e-4)
    assert one.base is not None and changed.base is not None
    assert one.base.amplification == pytest.approx(changed.base.amplification, rel=1e-4)
    assert one.balance != pytest.approx(changed.balance, rel=1e-2)
    shared = two.overlaps[0].modules[0]
    assert shared.inputs.shared == pytest.approx(1, abs=1e-5)
    assert shared.cosine == pytest.approx(1, abs=1e-5)
    assert shared.inputs.expected == 4 / 32


def test_random_adapters_share_what_chance_gives(tmp_path: Path) -> None:
    def random(seed: int, rank: int) -> Adapter:
        g = torch.Generator().manual_seed(seed)
        pairs = {
            f"layers.{i}.q": (
                torch.randn(rank, 64, generator=g),
                torch.randn(48, rank, generator=g),
            )
            for i in range(40)
        }
        return Adapter(LoRAConfig(rank=rank, targets=["q"]), pairs)

    found = xray(random(0, 8), against={"other": random(1, 4)})
    overlap = found.overlaps[0]
    assert abs(overlap.cosine) < 0.05
    assert np.mean([m.inputs.shared for m in overlap.modules]) == pytest.approx(4 / 64, rel=0.15)
    assert sum(m.inputs.above_chance for m in overlap.modules) <= 2
    assert overlap.outputs[7][3] == pytest.approx(8 / 48, rel=0.15)
    assert len(overlap.inputs) == 8 and len(overlap.inputs[0]) == 4
    assert any("(0.06 by chance)" in line for line in summarise(found))


def test_the_summary_says_how_many_directions_are_used() -> None:
    pairs = {}
    for block in range(10):  # two strong directions of sixteen
        generator = torch.Generator().manual_seed(block)
        B = torch.linalg.qr(torch.randn(40, 16, generator=generator)).Q
        A = torch.linalg.qr(torch.randn(40, 16, generator=generator)).Q.mT
        sizes = torch.tensor([1.0, 0.9] + [0.02] * 14)
        pairs[f"model.layers.{block}.mlp.up"] = (sizes[:, None] * A, B)
    found = xray(Adapter(LoRAConfig(rank=16, alpha=16, targets=["up"]), pairs))
    lines = summarise(found)
    assert lines[0].startswith(
        "Rank 16, but 90 % of the change lies in 2 directions or fewer in 100%"
    )
    assert "Cut to rank 2 it would keep 99.7% of the squared norm" in lines[1]
    assert figures(found)["directions_for_most"] == 2
    assert [module.block for module in found.modules] == list(range(10))


def test_an_untrained_adapter_is_said_to_change_nothing() -> None:
    pairs = {"a.0.q": (torch.randn(4, 8), torch.zeros(8, 4))}
    found = xray(
        Adapter(LoRAConfig(rank=4, targets=["q"]), pairs),
        weights=Table({"a.0.q.weight": torch.randn(8, 8)}),
    )
    assert summarise(found)[0].startswith("Rank 4: it changes no weight at all (B is zero")
    assert found.modules[0].directions_90 == 0
    assert found.modules[0].base is not None and found.modules[0].base.intruders == 0


def test_convolutions_are_seen_as_their_flat_kernels() -> None:
    base = Table({"conv.weight": torch.randn(6, 4, 3, 3)})
    A, B = torch.randn(2, 4 * 9), torch.randn(6, 2)
    plain = Layer(kind="conv2d", kernel=(3, 3))
    config = LoRAConfig(rank=2, alpha=2, targets=["conv"])
    found = xray(Adapter(config, {"conv": (A, B)}, layers={"conv": plain}), weights=base).modules[0]
    np.testing.assert_allclose(found.singular_values, torch.linalg.svdvals(B @ A)[:2], rtol=1e-4)
    assert found.base is not None and found.base.intruders is not None
    # PEFT's grouped form: two groups share the rank of four, A sees all eight channels
    A, B = torch.randn(4, 8 * 9), torch.randn(6, 2)
    grouped = Layer(kind="conv2d", kernel=(3, 3), groups=2, base_groups=2)
    config = LoRAConfig(rank=4, alpha=4, targets=["conv"])
    adapter = Adapter(config, {"conv": (A, B)}, layers={"conv": grouped})
    dense = torch.cat([b @ a for a, b in zip(A.chunk(2), B.chunk(2), strict=True)])
    found = xray(adapter, weights=base).modules[0]
    np.testing.assert_allclose(found.singular_values, torch.linalg.svdvals(dense)[:4], rtol=1e-4)
    assert found.base is None and "all groups" in found.notes[0]


def test_another_base_is_refused_with_everything_that_does_not_fit(tmp_path: Path) -> None:
    _, weights, adapter = of_peft(tmp_path, r=4, target_modules=["q_proj", "up_proj"])
    short = Table({name: tensor[:-1] for name, tensor in weights.tensors.items()})
    with pytest.raises(AdapterError) as caught:
        xray(adapter, weights=short)
    assert caught.value.cause.count("the base's weight is") == 8
    with pytest.raises(AdapterError, match="none of its 8 modules"):
        xray(adapter, weights=Table({}))


def test_stored_weights_are_found_with_and_without_the_prefix(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    tensor = torch.randn(3, 3)
    save_file({"encoder.layer.0.q.weight": tensor}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    weights = StoredWeights(folder)
    for name in ("bert.encoder.layer.0.q.weight", "encoder.layer.0.q.weight", "0.q.weight"):
        assert torch.equal(weights.read(name), tensor)  # type: ignore[arg-type]
    assert weights.read("bert.encoder.layer.1.q.weight") is None


def tuned_by(base: LlamaForSequenceClassification, rank: int) -> Table:
    """The base with a change of that rank in every linear layer, and norms and a head besides."""
    tensors = weights_of(base).tensors
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            out, into = tensor.shape
            B = torch.randn(out, rank, generator=generator)
            tensors[name] = tensor + 0.02 * B @ torch.randn(rank, into, generator=generator)
        elif "norm" in name:
            tensors[name] = tensor + 0.1
    return Table(tensors)


def test_a_tuned_checkpoint_becomes_the_best_adapter_of_its_rank() -> None:
    base = tiny()
    before, after = weights_of(base), tuned_by(base, rank=3)
    exact = adapter_of_difference(base, before.read, after.read, 3)
    assert exact.kept_share == pytest.approx(1, abs=1e-6)
    assert set(exact.adapter.whole_modules) == {n[:-7] for n in after.tensors if "norm" in n}
    cut = adapter_of_difference(base, before.read, after.read, 1)
    for module, (A, B) in cut.adapter.pairs.items():
        name = f"{module}.weight"
        delta = after.tensors[name] - before.tensors[name]
        values = torch.linalg.svdvals(delta.double())
        assert cut.kept[module] == pytest.approx(
            float(values[0] ** 2 / (values**2).sum()), rel=1e-4
        )
        missed = torch.linalg.matrix_norm(delta - cut.adapter.scale(module) * B @ A)
        assert float(missed) == pytest.approx(float((values[1:] ** 2).sum() ** 0.5), rel=1e-4)
    found = xray_difference(after, before)
    assert {module.numerical_rank for module in found.modules} == {3}
    assert len(found.others) == 9 and found.rank is None
    assert summarise(found)[0].startswith("Full rank, but 90 % of the change lies in")
    assert any(line.startswith("9 more tensors are replaced") for line in summarise(found))
    one = replace(found, others=found.others[:1])
    assert any(line.startswith("1 more tensor is replaced") for line in summarise(one))


def test_the_extracted_adapter_on_the_base_is_the_tuned_model(tmp_path: Path) -> None:
    from loralab.adapters import install, use

    base = tiny()
    after = tuned_by(base, rank=2)
    after.tensors["score.weight"] = torch.randn(2, 32)
    after.tensors["model.embed_tokens.weight"] = after.tensors[
        "model.embed_tokens.weight"
    ] + 0.1 * torch.randn(40, 2) @ torch.randn(2, 32)
    found = adapter_of_difference(base, weights_of(base).read, after.read, 2)
    tuned = tiny()
    tuned.load_state_dict(after.tensors)
    ids = torch.tensor([[3, 7, 9, 4]])
    install(base, found.adapter, "extracted")
    with torch.no_grad(), use(base.eval(), "extracted"):
        logits = base(input_ids=ids).logits
    with torch.no_grad():
        torch.testing.assert_close(logits, tuned.eval()(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_that_is_its_base_or_another_model_is_refused() -> None:
    base = tiny()
    with pytest.raises(AdapterError, match="nothing changed"):
        adapter_of_difference(base, weights_of(base).read, weights_of(base).read, 2)
    with pytest.raises(AdapterError, match="no tensor in common"):
        xray_difference(weights_of(base), Table({}))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_dimension_of_a_curved_sheet_is_found(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    flat = torch.rand(1500, size, generator=generator)
    mixing = torch.randn(size, 30, generator=generator)
    curved = torch.cat([flat @ mixing, torch.sin(2 * flat @ mixing)], dim=1)
    found = dimension(curved)
    assert found.intrinsic == pytest.approx(size, rel=0.2)
    assert found.low < found.intrinsic < found.high


def test_too_few_rows_have_no_dimension() -> None:
    with pytest.raises(DataError, match="too few"):
        dimension(torch.ones(100, 4))
