"""Merged equals unmerged, the certificate tells what it cost, restore gives the same bytes."""

import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from loralab.adapters import (
    LoRAConfig,
    adapter_parameters,
    attach,
    detach,
    fingerprint,
    merge,
    merge_in_place,
    restore,
    save_merged,
    use,
)
from loralab.adapters.certificate import content_sha256
from loralab.adapters.hosting import plain_tensors
from loralab.errors import AdapterError, RouteError


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.second = nn.Conv1d(8, 6, 3)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x).relu().flatten(2)
        return self.head(self.norm(self.second(hidden).relu()).mean(-1))


def llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    ).eval()


def convnet() -> ConvNet:
    torch.manual_seed(0)
    return ConvNet().eval()


IDS = torch.arange(24).view(2, 12) % 61
MODELS = {"llama": (llama, IDS), "gpt2": (gpt2, IDS), "conv": (convnet, torch.randn(3, 4, 6, 6))}
CONFIGS = {
    "plain": {},
    "rslora": {"scaling": "alpha/sqrt(rank)"},
    "patterns": {"rank_pattern": {".*1.*": 2}, "alpha_pattern": {".*0.*": 3.0}},
}


def attach_random(model: nn.Module, config: LoRAConfig, name: str = "a", std: float = 0.1) -> None:
    """An adapter whose every tensor is random, as after training."""
    attach(model, config, name, head="frozen")
    generator = torch.Generator().manual_seed(sum(name.encode()))
    with torch.no_grad():
        for parameter in adapter_parameters(model, name).values():
            parameter += std * torch.randn(parameter.shape, generator=generator)


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model(x)
    return getattr(found, "logits", found)


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in plain_tensors(model).items()}


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(
        first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8)
    )


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("which", MODELS)
def test_merged_is_the_adapted_model_and_the_given_one_is_untouched(which, kind):
    make, x = MODELS[which]
    model = make()
    keys, before = set(model.state_dict()), outputs(model, x)
    targets = "all-linear" if which != "conv" else ("first", "second", "head")
    attach_random(model, LoRAConfig(rank=4, alpha=8.0, targets=targets, **CONFIGS[kind]))
    held = snapshot(model)
    with use(model, "a"):
        expected = outputs(model, x)
    merged, certificate = merge(model, "a")
    assert torch.allclose(outputs(merged, x), expected, atol=1e-5)
    assert not torch.allclose(expected, before, atol=1e-3)
    assert set(merged.state_dict()) == keys
    assert type(merged) is type(make())
    assert certificate.relative_error < 1e-5
    assert all(same_bits(held[name], tensor) for name, tensor in plain_tensors(model).items())
    with use(model, None):
        assert torch.equal(outputs(model, x), before)


def test_untouched_tensors_are_shared_and_changed_ones_are_not():
    model = llama()
    attach_random(model, LoRAConfig(rank=2, targets=("q_proj",)))
    merged, _ = merge(model, "a")
    old, new = plain_tensors(model), plain_tensors(merged)
    for name in old:
        assert (old[name].data_ptr() == new[name].data_ptr()) == ("q_proj" not in name), name
    assert all(parameter.requires_grad for parameter in merged.parameters())
    assert not any(
        parameter.requires_grad
        for name, parameter in model.named_parameters()
        if "adapters" not in name
    )


def test_whole_modules_travel_into_the_merged_model():
    model = convnet()
    attach_random(model, LoRAConfig(rank=2, targets=("second",), whole_modules=("head", "norm")))
    with use(model, "a"):
        expected = outputs(model, MODELS["conv"][1])
    merged, _ = merge(model, "a")
    assert torch.allclose(outputs(merged, MODELS["conv"][1]), expected, atol=1e-6)


def test_an_embedding_merged_on_one_side_of_a_tie_leaves_the_other():
    model = llama(tied=True)
    attach_random(model, LoRAConfig(rank=2, targets=("embed_tokens",)))
    with use(model, "a"):
        expected = outputs(model, IDS)
    merged, _ = merge(model, "a")
    assert torch.allclose(outputs(merged, IDS), expected, atol=1e-5)
    assert merged.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert not merged.config.tie_word_embeddings
    assert model.config.tie_word_embeddings
    held = model.model.embed_tokens.weight
    merge_in_place(model, "a")
    assert model.lm_head.weight is held
    assert torch.allclose(outputs(model, IDS), expected, atol=1e-5)
    restore(model)
    assert model.model.embed_tokens.weight is model.lm_head.weight is held


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(1, 12),
    st.floats(1e-4, 1.0),
    st.integers(0, 999),
)
def test_one_rounding_of_the_exact_sum(dtype, rank, size, seed):
    """Oracle: the sum in fp64, rounded; fp32's own arithmetic may tip it to a neighbour."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 24)).to(dtype)
    attach_random(model, LoRAConfig(rank=rank, alpha=4.0), std=size)
    merged, certificate = merge(model, "a", limit=math.inf)
    pair = model[0].adapters.get("a").requires_grad_(False)
    delta = (4.0 / rank) * pair.B.double() @ pair.A.double()
    exact = model[0].weight.double() + delta
    weight = merged[0].weight.detach()
    spacing = torch.finfo(dtype).eps * exact.abs().clamp(min=torch.finfo(dtype).smallest_normal)
    slack = 1e-6 * (1 + exact.abs().max())
    assert ((weight.double() - exact).abs() <= spacing / 2 + slack).all()
    error = float((weight.double() - exact).norm() / delta.norm())
    assert certificate.relative_error == pytest.approx(error, rel=1e-2, abs=1e-6)
    unchanged = float((weight == model[0].weight).double().mean())
    assert certificate.unchanged_share == pytest.approx(unchanged)
    assert certificate.dtype == str(dtype).removeprefix("torch.")


def test_the_certificate_measures_probes_and_names_what_it_hashed():
    model = llama()
    attach_random(model, LoRAConfig(rank=4))
    mask = torch.ones_like(IDS)
    mask[1, 5:] = 0
    merged, certificate = merge(model, "a", probes=[{"input_ids": IDS, "attention_mask": mask}])
    assert certificate.num_positions == 17
    assert certificate.effect_kept == pytest.approx(1, abs=1e-4)
    assert certificate.logit_kl == pytest.approx(0, abs=1e-6)
    assert certificate.top1_agreement == 1
    with use(model, None):
        detach(model, "a")
    assert certificate.base_sha256 == content_sha256(plain_tensors(model))
    assert json.dumps(certificate.to_dict())
    again = merge_again(model)
    assert again.base_sha256 == certificate.base_sha256
    assert again.adapter_sha256 == certificate.adapter_sha256
    assert merged.training is False


def merge_again(model):
    attach_random(model, LoRAConfig(rank=4))
    return merge(model, "a")[1]


def test_a_16_bit_merge_says_how_much_of_the_effect_is_left():
    """Oracle: KL by hand between fp32 logits of base, adapted and merged models."""
    model = llama().bfloat16()
    exact = copy.deepcopy(model).float()
    config = LoRAConfig(rank=4)
    attach_random(model, config, std=0.03)
    attach_random(exact, config, std=0.03)
    merged, certificate = merge(model, "a", probes=[IDS, (IDS[:1],)])
    with use(exact, "a"):
        truth = outputs(exact, IDS).double().log_softmax(-1)
    with use(exact, None):
        base = outputs(exact, IDS).double().log_softmax(-1)
    found = outputs(merged, IDS).double().log_softmax(-1)

    def divergence(other):
        per_position = (truth.exp() * (truth - other)).sum(-1)
        return float(torch.cat([per_position, per_position[:1]]).mean())

    assert certificate.logit_kl == pytest.approx(divergence(found), rel=1e-3)
    kept = 1 - divergence(found) / divergence(base)
    assert certificate.effect_kept == pytest.approx(kept, rel=1e-3)
    assert 0.5 < certificate.effect_kept < 1
    assert certificate.separate_effect_kept is not None
    assert certificate.num_positions == 36


def test_a_small_adapter_in_16_bit_is_refused_unless_forced():
    model = llama().bfloat16()
    attach(model, LoRAConfig(rank=2), "tiny")
    with torch.no_grad():
        for name, parameter in adapter_parameters(model, "tiny").items():
            if name.endswith(".B"):
                parameter += 1e-5 * torch.randn_like(parameter)
    held = snapshot(model)
    with pytest.raises(AdapterError) as raised:
        merge(model, "tiny")
    assert "merging in bfloat16 would lose" in raised.value.cause
    assert "of the effect of 'tiny'" in raised.value.cause
    assert "the limit is 50%" in raised.value.cause
    assert "keep the adapter separate" in raised.value.next_step
    assert "float32" in raised.value.next_step
    assert all(same_bits(held[name], tensor) for name, tensor in plain_tensors(model).items())
    _, certificate = merge(model, "tiny", force=True)
    assert certificate.forced
    assert certificate.lost > 0.5
    assert certificate.unchanged_share > 0.5
    assert not merge(model, "tiny", limit=2.0)[1].forced
    with pytest.raises(AdapterError, match="even the separate adapter loses its effect"):
        merge(model, "tiny", probes=[IDS])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_hundred_merges_in_place_leave_every_byte(dtype):
    model = gpt2().to(dtype)
    held, prints = snapshot(model), fingerprint(model)
    for index in range(4):
        config = LoRAConfig(
            rank=1 + index, targets="all-linear" if index % 2 else ("wte", "c_attn")
        )
        attach_random(model, config, f"n{index}")
    for cycle in range(100):
        name = f"n{cycle % 4}"
        merge_in_place(model, name)
        if cycle < 4:
            changed = plain_tensors(model)
            assert any(not torch.equal(changed[key], held[key]) for key in held)
        restore(model)
    found = plain_tensors(model)
    assert list(found) == list(held)
    assert all(same_bits(held[name], found[name]) for name in held)
    assert fingerprint(model) == prints


def test_merged_in_place_serves_that_adapter_and_no_other():
    model = llama()
    attach_random(model, LoRAConfig(rank=2), "a")
    attach_random(model, LoRAConfig(rank=2), "b")
    with use(model, "a"):
        expected = outputs(model, IDS)
    merge_in_place(model, "a")
    assert torch.allclose(outputs(model, IDS), expected, atol=1e-5)
    with use(model, "a"):  # it is in the weights: nothing is added twice
        assert torch.allclose(outputs(model, IDS), expected, atol=1e-5)
    for route in ("b", None, ["a", None], {"a": 0.5}):
        with pytest.raises(RouteError, match="'a' is merged into this model"), use(model, route):
            pass
    for act in (lambda: merge_in_place(model, "b"), lambda: merge(model, "b")):
        with pytest.raises(AdapterError, match="'a' is merged into this model already"):
            act()
    with pytest.raises(AdapterError, match="'a' is merged"):
        detach(model, "a")
    restore(model)
    restore(model)  # nothing to do
    with use(model, "a"):
        assert torch.equal(outputs(model, IDS), expected)


def test_a_copy_of_a_merged_model_restores_on_its_own():
    model = llama()
    before = outputs(model, IDS)
    attach_random(model, LoRAConfig(rank=2), "a")
    merge_in_place(model, "a")
    twin = copy.deepcopy(model)
    restore(model)
    assert not torch.allclose(outputs(twin, IDS), before, atol=1e-3)
    restore(twin)
    with use(twin, None):
        assert torch.equal(outputs(twin, IDS), before)


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_merge_is_a_transformers_folder(tied, tmp_path):
    model = llama(tied)
    attach_random(model, LoRAConfig(rank=2, targets=("q_proj", "embed_tokens")))
    merged, certificate = merge(model, "a", probes=[IDS])
    save_merged(merged, certificate, tmp_path / "out")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(outputs(back, IDS), outputs(merged, IDS))
    told = json.loads((tmp_path / "out" / "merge_certificate.json").read_text())
    assert told == certificate.to_dict()
    card = (tmp_path / "out" / "README.md").read_text()
    assert certificate.base_sha256 in card
    assert "effect kept on 24 probe positions" in card
    assert not any("adapters" in key for key in load_file(tmp_path / "out" / "model.safetensors"))


def test_what_cannot_be_merged_or_probed_is_named(tmp_path):
    model = convnet()
    attach_random(model, LoRAConfig(rank=2, targets=("head",)))
    merged, certificate = merge(model, "a")
    with pytest.raises(AdapterError, match="hosts no adapter 'b'"):
        merge(model, "b")
    with pytest.raises(AdapterError, match="probe texts need the model's tokenizer"):
        merge(model, "a", probes=["a text"])
    with pytest.raises(AdapterError, match="list of probes is empty"):
        merge(model, "a", probes=[])
    with pytest.raises(AdapterError, match="ConvNet cannot be saved"):
        save_merged(merged, certificate, tmp_path / "out")
    assert not list(tmp_path.iterdir())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)


SPECIAL = {
    "dora": (llama, {"dora": True}),
    "dora of an embedding": (llama, {"dora": True, "targets": ("embed_tokens", "down_proj")}),
    "biases": (gpt2, {"biases": "all"}),
    "new tokens": (llama, {"token_rows": {"embed_tokens": [3, 60]}}),
    "tied new tokens": (lambda: llama(tied=True), {"token_rows": {"embed_tokens": [3, 60]}}),
    "moved base": (llama, {"init": "pissa"}),
    "packed attention": (Attention, {}),
}


@pytest.mark.parametrize("which", SPECIAL)
def test_everything_an_adapter_can_hold_is_merged(which):
    make, config = SPECIAL[which]
    torch.manual_seed(0)
    model = make().eval()
    x = torch.randn(2, 5, 16) if which == "packed attention" else IDS
    attach_random(model, LoRAConfig(rank=4, **config))
    held = snapshot(model)
    with use(model, "a"):
        expected = outputs(model, x)
    merged, certificate = merge(model, "a", probes=[x])
    assert torch.allclose(outputs(merged, x), expected, atol=2e-5)
    assert certificate.effect_kept == pytest.approx(1, abs=1e-3)
    merge_in_place(model, "a")
    assert torch.allclose(outputs(model, x), expected, atol=2e-5)
    restore(model)
    assert all(same_bits(held[name], tensor) for name, tensor in plain_tensors(model).items())


def test_new_tokens_of_a_tied_embedding_stay_tied():
    model = llama(tied=True)
    attach_random(model, LoRAConfig(rank=2, token_rows={"embed_tokens": [5]}))
    merged, _ = merge(model, "a")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings
