"""Attaching and detaching: what is trained, what it costs, what is refused."""

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_oracle import peft_writes, shake
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from zoo import MODELS, build, inputs, logits

from loralab.adapters import (
    LoRAConfig,
    adapter_parameters,
    attach,
    count_parameters,
    detach,
    eva_starts,
    extract,
    hosted,
    install,
    load_adapter,
    lora_ga_starts,
    targets,
    use,
)
from loralab.errors import AdapterError, ConfigError, TargetError

CONVNET = ["first", "second", "line", "cube"]


def config_for(name: str, **changes: Any) -> LoRAConfig:
    settings: dict[str, Any] = {"rank": 4, "alpha": 8.0}
    if name == "convnet":
        settings["targets"] = CONVNET
    return LoRAConfig(**(settings | changes))


@pytest.mark.parametrize("name", MODELS)
def test_attach_changes_no_output_and_detach_leaves_no_trace(name: str) -> None:
    model, batch = build(name), inputs(name)
    with torch.no_grad():  # torch chooses kernels by requires_grad too
        before = logits(model(**batch))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    traces = [(type(m), dict(m.__dict__)) for m in model.modules()]
    names = [key for key, _ in model.named_parameters()]
    attach(model, config_for(name))
    assert [key for key, _ in model.named_parameters() if ".adapters." not in key] == names
    with use(model, "default"), torch.no_grad():
        assert torch.equal(logits(model(**batch)), before)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert trained == set(adapter_parameters(model, "default"))
    assert all(key.endswith((".adapters.default.A", ".adapters.default.B")) for key in trained)
    detach(model, "default")
    assert [type(m) for m in model.modules()] == [cls for cls, _ in traces]
    assert all(
        m.__dict__.keys() == d.keys() for m, (_, d) in zip(model.modules(), traces, strict=True)
    )
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(logits(model(**batch)), before)


def test_flags_of_the_base_come_back() -> None:
    model = build("llama")
    frozen: Any = model.get_input_embeddings()  # pyright: ignore
    frozen.weight.requires_grad_(False)
    attach(model, config_for("llama"), "a")
    attach(model, config_for("llama"), "b")
    detach(model, "a")
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".adapters." not in n)
    detach(model, "b")
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == [
        "model.embed_tokens.weight"
    ]


def test_the_start_depends_on_seed_and_module_alone() -> None:
    model = build("llama")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    attach(model, config_for("llama"), "all", seed=5)
    attach(model, config_for("llama", targets=["v_proj"]), "few", seed=5)
    attach(model, config_for("llama"), "other", seed=6)
    assert torch.equal(torch.get_rng_state(), before)
    found = dict(model.named_parameters())
    path = "model.layers.1.self_attn.v_proj.adapters"
    assert torch.equal(found[f"{path}.all.A"], found[f"{path}.few.A"])
    assert not torch.equal(found[f"{path}.all.A"], found[f"{path}.other.A"])
    bound = 1 / 16**0.5
    A = torch.cat([p.flatten() for n, p in found.items() if n.endswith("q_proj.adapters.all.A")])
    assert A.abs().max() <= bound and A.abs().max() > 0.9 * bound
    assert not any(p.any() for n, p in found.items() if n.endswith(".B"))


def test_all_linear_leaves_the_head_out_and_counts_are_exact() -> None:
    model = build("qwen2")
    _, total = count_parameters(model)
    attach(model, LoRAConfig(rank=2, whole_modules=["score"]))
    expected = sum(
        2 * sum(m.weight.shape)
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and "layers" in n
    )
    assert count_parameters(model) == (expected + 48, total + expected + 48)
    paths = {key.split(".adapters.")[0] for key in adapter_parameters(model, "default")}
    assert "score" in paths and len(paths) == 15


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ["q_proj", "v_prj"]}, r"target 'v_prj' matches no module.*'v_proj'"),
        ({"targets": "q_proj"}, r"must match the whole name.*\['q_proj'\]"),
        ({"targets": ["mlp"]}, r"LlamaMLP, which has no low-rank form.*inside it.*gate_proj"),
        ({"exclude": ["o_prj"]}, r"exclusion 'o_prj' matches no module"),
        ({"whole_modules": ["scor"]}, r"whole module 'scor' matches no module"),
        ({"layers": [1, 7]}, r"layers \[7\] match no module.*blocks 0 to 1"),
        ({"token_rows": {"embed": [1]}}, r"'embed' matches no embedding"),
        ({"token_rows": {"embed_tokens": [99]}}, r"no distinct rows of 40"),
        ({"targets": ["a1", "b2"]}, r"'a1'[\s\S]*'b2'"),
    ],
)
def test_a_target_that_matches_nothing_is_named(changes: dict[str, Any], message: str) -> None:
    model = build("llama")
    with pytest.raises(TargetError, match=message):
        attach(model, config_for("llama", **changes))
    assert hosted(model) == () and all(p.requires_grad for p in model.parameters())


def test_targets_by_layer_suffix_and_exclusion() -> None:
    model = build("llama")
    attach(model, LoRAConfig(rank=1, layers=[1], exclude=["mlp.down_proj", "k_proj"]))
    paths = {key.split(".adapters.")[0] for key in adapter_parameters(model, "default")}
    ends = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj")
    assert paths == {n for n, _ in model.named_modules() if "layers.1" in n and n.endswith(ends)}


def test_bad_settings_come_in_one_error() -> None:
    with pytest.raises(ConfigError) as caught:
        LoRAConfig(rank=0, alpha=-1.0, dropout=1.5, init="kaimin", targets="(")
    for words in (
        "rank is 0",
        "alpha is -1.0",
        "dropout is 1.5",
        "'kaiming'",
        "regular expression",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "a\nb"])
def test_names_that_cannot_be_parts_of_names(name: str) -> None:
    with pytest.raises(AdapterError, match="cannot name an adapter"):
        attach(build("llama"), config_for("llama"), name)


def test_any_other_name_goes_and_none_twice() -> None:
    model, batch = build("llama"), inputs("llama")
    for name in ("keys", "forward", "weight", "A", "lora", "日本"):
        attach(model, config_for("llama"), name)
        with use(model, name):
            model(**batch)
    with pytest.raises(AdapterError, match="hosts an adapter 'keys' already"):
        attach(model, config_for("llama"), "keys")
    with pytest.raises(AdapterError, match="no adapter 'kys'"):
        detach(model, "kys")


def test_a_fresh_head_must_be_trained() -> None:
    model: Any = build("qwen2")
    model._loralab_fresh_head = "score"
    with pytest.raises(AdapterError, match=r"'score' was initialised just now.*\n.*whole_modules"):
        attach(model, config_for("qwen2"))
    attach(model, config_for("qwen2"), head="frozen")
    attach(model, config_for("qwen2", whole_modules=["score"]), "b")


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "gaussian"])
def test_initialisers_leave_the_base_and_its_output(init: str) -> None:
    model, batch = build("llama"), inputs("llama")
    before, weights = logits(model(**batch)), [p.clone() for p in model.parameters()]
    attach(model, config_for("llama", init=init, targets=["q_proj", "up_proj"]))
    base = [p for n, p in model.named_parameters() if ".adapters." not in n]
    assert all(torch.equal(a, b) for a, b in zip(base, weights, strict=True))
    with use(model, "default"):
        torch.testing.assert_close(logits(model(**batch)), before, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        for parameter in adapter_parameters(model, "default").values():
            parameter.add_(0.05)
    with use(model, "default"):
        trained = logits(model(**batch))
    plain = build("llama")
    install(plain, extract(model, "default"))
    with use(plain, "default"):
        torch.testing.assert_close(logits(plain(**batch)), trained, atol=1e-5, rtol=1e-5)
    twin = copy.deepcopy(model)
    with use(twin, "default"):
        assert torch.equal(logits(twin(**batch)), trained)


def test_starts_from_data() -> None:
    model, batch = build("llama"), inputs("llama", 8)
    batch = batch | {"labels": batch["input_ids"]}
    config = config_for("llama", targets=["q_proj", "down_proj"])
    before = logits(model(**batch))
    starts, changed = eva_starts(model, config, [batch])
    attach(model, changed, "eva", starts=starts)
    ranks = [p.shape[0] for n, p in adapter_parameters(model, "eva").items() if n.endswith(".A")]
    assert sum(ranks) == 4 * 4 and max(ranks) <= 8
    gradients = lora_ga_starts(model, config, [batch])
    attach(model, config, "ga", starts=gradients)
    for name in ("eva", "ga"):
        with use(model, name):
            torch.testing.assert_close(logits(model(**batch)), before, atol=1e-5, rtol=1e-5)
    with pytest.raises(AdapterError, match="made from data"):
        attach(model, config_for("llama", init="eva"), "no")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_bases_keep_fp32_adapters(dtype: torch.dtype) -> None:
    model, batch = build("llama").to(dtype), inputs("llama")
    attach(model, config_for("llama", whole_modules=["lm_head"]))
    parameters = adapter_parameters(model, "default")
    shake(parameters.values(), size=0.1)
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    with use(model, "default"):
        output = logits(model(**batch))
    assert output.dtype == dtype
    output.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in parameters.values())


def test_one_side_of_tied_weights() -> None:
    model, batch = build("gpt2"), inputs("gpt2")
    attach(model, LoRAConfig(rank=2, targets=["wte"]), "input")
    attach(model, LoRAConfig(rank=2, targets=["lm_head"]), "output")
    for name in ("input", "output"):
        shake(adapter_parameters(model, name).values())
    hidden = model.transformer(**batch).last_hidden_state  # pyright: ignore
    with use(model, "output"):
        assert torch.equal(model.transformer(**batch).last_hidden_state, hidden)  # pyright: ignore
    with use(model, "input"):
        changed = model.transformer(**batch).last_hidden_state  # pyright: ignore
        assert torch.equal(logits(model(**batch)), model.lm_head(changed))  # pyright: ignore


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.tanh(self.layer(x)))


def test_a_module_used_twice() -> None:
    model, x = Twice(), torch.randn(3, 6)
    attach(model, LoRAConfig(rank=2, alpha=2.0))
    shake(adapter_parameters(model, "default").values())
    A, B = (p for p in adapter_parameters(model, "default").values())
    weight = model.layer.weight + B @ A
    expected = nn.functional.linear(
        torch.tanh(nn.functional.linear(x, weight, model.layer.bias)), weight, model.layer.bias
    )
    with use(model, "default"):
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_convolutions_add_their_delta_to_the_kernel(groups: int, mode: str) -> None:
    for dimension, cls in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), 1):
        conv = cls(8, 12, 3, stride=2, padding=2, dilation=2, groups=groups, padding_mode=mode)  # pyright: ignore
        model = nn.Sequential(conv)
        x = torch.randn(2, 8, *(7,) * dimension)
        attach(model, LoRAConfig(rank=3, alpha=6.0, targets=["0"]))
        shake(adapter_parameters(model, "default").values())
        A, B = adapter_parameters(model, "default").values()
        merged = copy.deepcopy(model)
        detach(merged, "default")
        merged[0].weight.data += 2 * (B @ A).view_as(conv.weight)
        with use(model, "default"):
            torch.testing.assert_close(model(x), merged(x), atol=1e-4, rtol=1e-4)


def test_the_fused_encoder_path_does_not_pass_adapters_by() -> None:
    torch.manual_seed(0)  # two paths of one fp32 product: rounding comes close to the bound
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 8)
    attach(model, LoRAConfig(rank=2))
    shake(adapter_parameters(model, "default").values())
    with use(model, "default"):
        expected = model(x)
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected)
    twin = copy.deepcopy(model)
    for name in sorted({key.split(".adapters.")[0] for key in adapter_parameters(twin, "default")}):
        shake([p for n, p in twin.named_parameters() if n.startswith(name + ".adapters")], 9)
        with use(twin, "default"):
            changed = twin(x)
        assert not torch.allclose(changed, expected), name
        expected = changed


def test_the_tree_tells_what_a_choice_costs() -> None:
    model = build("llama")
    tree = targets(model, rank=4)
    attach(model, LoRAConfig(rank=4))
    assert tree.all_linear_parameters == count_parameters(model)[0]
    by_name = {choice.name: choice for choice in tree}
    assert by_name["k_proj"].shape == (8, 16) and by_name["k_proj"].num_modules == 2
    assert not by_name["lm_head"].all_linear and not by_name["embed_tokens"].all_linear
    assert "all-linear: " in str(tree) and "k_proj" in str(tree)


def test_a_hosting_model_survives_pickling() -> None:
    model, x = Twice(), torch.randn(3, 6)
    attach(model, LoRAConfig(rank=2))
    shake(adapter_parameters(model, "default").values())
    again = pickle.loads(pickle.dumps(model))
    with use(model, "default"), use(again, "default"):
        assert torch.equal(model(x), again(x))


def test_attaching_while_another_thread_runs_harms_nobody() -> None:
    model, batch = build("llama"), inputs("llama")
    attach(model, config_for("llama"), "a")
    shake(adapter_parameters(model, "a").values())
    with use(model, "a"), torch.no_grad():
        expected = logits(model(**batch))
    wrong: list[str] = []

    def serve() -> None:
        with use(model, "a"), torch.no_grad():
            wrong.extend(
                "differs" for _ in range(20) if not torch.equal(logits(model(**batch)), expected)
            )

    thread = threading.Thread(target=serve)
    thread.start()
    for number in range(10):
        attach(model, config_for("llama"), f"x{number}")
    for number in range(10):
        detach(model, f"x{number}")
    thread.join()
    assert not wrong


def test_a_sequence_may_be_trained_whole_and_a_list_may_not() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4))
            self.ends = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 3)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert len(self.body) == 3 and self.body[-1].out_features == 4
            return self.ends[0](self.body(x)) + self.ends[1](self.body[:2](x)[:, :4])[:, :2]

    model, x = Net().eval(), torch.randn(2, 4)
    before = model(x)
    attach(model, LoRAConfig(rank=2, targets=[], whole_modules=["body"]))
    with use(model, None):
        assert torch.equal(model(x), before)
    with use(model, "default"):
        assert torch.equal(model(x), before)
    with pytest.raises(
        TargetError, match=r"'ends' is a ModuleList.*name its members: ends\.0, ends"
    ):
        attach(model, LoRAConfig(rank=2, targets=[], whole_modules=["ends"]), "b")


@pytest.mark.parametrize(
    "settings",
    [
        {"targets": ["embed_tokens"]},
        {"targets": ["lm_head"]},
        {"targets": ["q_proj"], "whole_modules": ["lm_head"]},
    ],
)
def test_rows_of_a_tied_table_are_not_changed_twice(settings: dict[str, list[str]]) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=20, num_hidden_layers=1, tie_word_embeddings=True, **sizes)
    model = LlamaForCausalLM(config)
    rows = {"embed_tokens": [1, 2]}
    with pytest.raises(TargetError, match=r"token_rows of model\.embed_tokens.* another change"):
        attach(model, LoRAConfig(rank=2, token_rows=rows, **settings))  # pyright: ignore
    assert hosted(model) == ()


def test_an_exclusion_may_be_an_expression() -> None:
    model = build("llama")
    every = LoRAConfig(rank=2, targets="all-linear", exclude=r".*layers\.0\..*|.*\.(q|k)_proj")
    attach(model, every)
    found = set(extract(model, "default").pairs)
    kinds = ("self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
    assert found == {f"model.layers.1.{kind}" for kind in (*kinds, "mlp.down_proj")}
    with pytest.raises(TargetError, match=r"exclusion 'nothing' .* matches no module"):
        attach(model, LoRAConfig(rank=2, exclude="nothing"), "b")


def test_what_peft_excludes_by_an_expression_is_not_missed(tmp_path: Path) -> None:
    base = build("llama")
    theirs = {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.0\..*"}
    peft_writes(base, tmp_path, r=2, **theirs)
    load_adapter(base, tmp_path)
    assert list(extract(base, "default").pairs) == ["model.layers.1.self_attn.q_proj"]
