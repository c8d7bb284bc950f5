"""A fused block is the block: same outputs, same gradients, or it is left alone."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from loralab.adapters import LoRAConfig, SharedInput, adapter_parameters, attach, use
from loralab.adapters.step import Part
from loralab.fusion import fused, matching_blocks
from loralab.fusion.block import Block, BlockStep
from loralab.fusion.gates import gate_of
from loralab.fusion.norms import HeadNorm, Norm, Norms, OtherNorm, RMSNorm
from loralab.fusion.pieces import Angles, Piece
from loralab.models import enable_activation_checkpointing

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 400,
    "pad_token_id": 0,
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    match name:
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True))
        case "mistral":
            model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5))
        case "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
        case "gemma":
            model = GemmaForCausalLM(GemmaConfig(**SIZES))
        case "olmo":
            model = OlmoForCausalLM(OlmoConfig(**SIZES))
        case "gemma2":
            model = Gemma2ForCausalLM(Gemma2Config(**SIZES))
        case "gemma3":
            config = Gemma3TextConfig(**SIZES, query_pre_attn_scalar=8, sliding_window=5)
            model = Gemma3ForCausalLM(config)
        case "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**SIZES))
        case "gpt2":
            model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4))
        case _:
            sizes = {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim")}
            model = BertForSequenceClassification(BertConfig(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases begin as ones and zeros
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.double()


def adapted(name: str, **settings: Any) -> Any:
    model = build(name)
    attach(model, LoRAConfig(rank=3, alpha=6, **settings), name="a", seed=1)
    for parameter in adapter_parameters(model, "a").values():
        parameter.data = torch.randn_like(parameter.double()) * 0.2
    return model.train()


def batch(width: int) -> dict[str, Any]:
    ids = torch.randint(1, 60, (3, width), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, width // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}


def num_fused(output: torch.Tensor) -> int:
    """How many fused blocks are in the graph of `output`."""
    waiting, seen = [output.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return sum(type(node).__name__ == "BlockStepBackward" for node in seen)


def gradients(model: Any, width: int, fusible: Any = (), expected: int = 0) -> dict[str, Any]:
    """The output and the gradient of every trained parameter; `expected` blocks are fused."""
    parameters = adapter_parameters(model, "a")
    for parameter in parameters.values():
        parameter.grad = None  # and not zero: the ones before are still held
    given = batch(width)
    with use(model, "a"), fused(fusible):
        logits = model(**given).logits
        assert num_fused(logits) == expected
        real = given["attention_mask"].bool()
        logits = logits[real] if logits.ndim == 3 else logits
        logits.square().sum().backward()
    return {"": logits.detach(), **{n: p.grad for n, p in parameters.items()}}


@pytest.mark.parametrize("width", [9, 140], ids=["short", "long"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3", "olmo"])
def test_fused_blocks_give_the_plain_outputs_and_gradients(name: str, width: int) -> None:
    model = adapted(name)
    fusible = matching_blocks(model)
    assert len(fusible) == 3
    plain, got = gradients(model, width), gradients(model, width, fusible, expected=3)
    for key, wanted in plain.items():
        torch.testing.assert_close(got[key], wanted, rtol=1e-8, atol=1e-10, msg=key)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_fused_blocks_in_fp32_are_as_exact_as_the_plain_ones(name: str) -> None:
    model = adapted(name)
    wanted = gradients(model, 9)
    model.float()
    errors = []
    for fusible, expected in (((), 0), (matching_blocks(model), 3)):
        got = gradients(model, 9, fusible, expected)
        errors.append(max(relative_error(got[key], wanted[key]) for key in wanted))
    plain, fused_error = errors
    assert fused_error < max(1e-4, 3 * plain)


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "bert"])
def test_blocks_of_another_formula_are_left_alone(name: str) -> None:
    assert matching_blocks(adapted(name)) == []


def test_a_block_that_only_looks_alike_is_found_out() -> None:
    model = adapted("llama")

    model.model.layers[1].self_attn.scaling *= 1.5  # which no structure shows
    others = {model.model.layers[0], model.model.layers[2]}
    assert {each.module for each in matching_blocks(model)} == others


@pytest.mark.parametrize("settings", [{"targets": ["q_proj", "up_proj"]}, {"targets": ["o_proj"]}])
def test_layers_without_a_pair_are_the_base_alone(settings: dict[str, Any]) -> None:
    model = adapted("llama", **settings)
    plain, got = gradients(model, 9), gradients(model, 9, matching_blocks(model), expected=3)
    for key, wanted in plain.items():
        torch.testing.assert_close(got[key], wanted, rtol=1e-8, atol=1e-10, msg=key)


@pytest.mark.parametrize(
    "settings",
    [{"dora": True}, {"biases": "targets"}, {"whole_modules": ("input_layernorm",)}],
    ids=["dora", "biases", "norms"],
)
def test_what_the_formula_lacks_runs_as_it_is(settings: dict[str, Any]) -> None:
    model = build("llama").float()
    attach(model, LoRAConfig(rank=3, alpha=6, **settings), name="a", seed=1)
    model.train()
    plain, got = gradients(model, 9), gradients(model, 9, matching_blocks(model))
    for key, wanted in plain.items():
        torch.testing.assert_close(got[key], wanted, rtol=1e-6, atol=1e-8, msg=key)


def test_hooks_on_the_parts_are_heard() -> None:
    model = adapted("llama")
    heard: list[int] = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: heard.append(1))
    fusible = matching_blocks(model)
    heard.clear()
    gradients(model, 9, fusible, expected=2)
    assert heard == [1]


NO_NORMS: dict[str, Norm] = {}
MORE_NORMS: dict[str, Norm] = {
    "queries": HeadNorm(RMSNorm(torch.tensor([0.5, 1.5, 1, 2]).double(), 1e-5), 4),
    "keys": RMSNorm(torch.tensor([1.5, 0.5, 2, 1]).double(), 1e-5),
    "attended": OtherNorm(nn.LayerNorm(8).double().requires_grad_(False)),
    "mapped": RMSNorm(torch.linspace(0.5, 1.5, 8).double(), 1e-5),
}


def random_block(dropout: float, norms: dict[str, Norm]) -> tuple[Block, list[torch.Tensor]]:
    """Two heads of size 4 that share one key, widths 8 and 10, rank 2 on all but the keys."""

    def inputs(width: int, outs: list[int], scales: list[float | None]) -> SharedInput:
        weights = tuple(torch.randn(out, width).double() for out in outs)
        biases = tuple(torch.randn(out).double() for out in outs)
        return SharedInput(weights, biases, (Part(tuple(scales), dropout),))

    norm = RMSNorm(torch.rand(8).double(), 1e-5)
    block = Block(
        norms=Norms(norm, norm, **norms),
        queries_keys_values=inputs(8, [8, 4, 4], [1.0, None, 0.5]),
        output=inputs(8, [8], [2.0]),
        gate_up=inputs(8, [10, 10], [1.0, -1.0]),
        down=inputs(10, [8], [1.0]),
        gate=gate_of(nn.SiLU()),
    )
    factors = []
    for shared in block.inputs:
        for weight, scale in zip(shared.weights, shared.parts[0].scales, strict=True):
            if scale is not None:
                out, width = weight.shape
                factors += [torch.randn(2, width).double(), torch.randn(out, 2).double()]
    return block, [factor.mul_(0.3).requires_grad_() for factor in factors]


@pytest.mark.parametrize("wanted", [None, [[2, 0], [1, 2]]], ids=["all", "some"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("tokens", [3, 130], ids=["short", "long"])
@pytest.mark.parametrize("norms", [NO_NORMS, MORE_NORMS], ids=["", "more norms"])
def test_gradients_are_right(
    norms: dict[str, Norm], tokens: int, dropout: float, wanted: Any
) -> None:
    wanted = None if wanted is None else torch.tensor(wanted)
    torch.manual_seed(0)
    block, factors = random_block(dropout, norms)
    angle = torch.rand(1, tokens, 2).double().repeat(1, 1, 2)
    angles = Angles(angle.cos(), angle.sin())

    def output(x: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)  # the same masks at every call
        piece = Piece(slice(0, 2 * tokens), 2, angles, None, wanted)
        return BlockStep.apply(x.flatten(0, 1), block, [piece], *factors)

    x = torch.randn(2, tokens, 8).double().requires_grad_()
    assert torch.autograd.gradcheck(output, (x, *factors), fast_mode=True)


def test_checkpointed_blocks_draw_the_same_masks_again() -> None:
    model = adapted("llama", dropout=0.3)
    fusible = matching_blocks(model)
    torch.manual_seed(3)
    plain = gradients(model, 9, fusible, expected=3)
    enable_activation_checkpointing(model)
    torch.manual_seed(3)
    got = gradients(model, 9, fusible, expected=3)
    for key, wanted in plain.items():
        torch.testing.assert_close(got[key], wanted, msg=key)


def test_checkpointed_blocks_keep_their_input_alone() -> None:
    kept = []
    for checkpointed in (False, True):
        model = adapted("llama")
        if checkpointed:
            enable_activation_checkpointing(model)
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        fusible = matching_blocks(model)
        with (
            use(model, "a"),
            fused(fusible),
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        ):
            hidden = model.model(**batch(9)).last_hidden_state
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept.append(sum(size for at, size in sizes.items() if at not in parameters))
        assert hidden.requires_grad
    assert kept[1] < 0.5 * kept[0]


def test_no_block_stays_fused_afterwards() -> None:
    model: Any = adapted("llama")
    fusible = matching_blocks(model)
    with fused(fusible), fused(fusible):
        assert all("forward" in vars(layer) for layer in model.model.layers)
    assert not any("forward" in vars(layer) for layer in model.model.layers)


def test_the_last_block_may_compute_only_what_is_read() -> None:
    model = adapted("llama")
    fusible = matching_blocks(model)
    read = torch.tensor([[8, 0, 1], [4, 2, 3], [8, 7, 6]])
    found = []
    for positions in (None, read):
        with use(model, "a"), fused(fusible, positions):
            logits = model(**batch(9)).logits.gather(1, read[..., None].expand(-1, -1, 60))
        parameters = adapter_parameters(model, "a").values()
        found.append([logits, *torch.autograd.grad(logits.square().sum(), list(parameters))])
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10)
