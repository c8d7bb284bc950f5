"""Adapters that PEFT made, of every kind that serving takes, over HTTP against PEFT itself."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from served_adapters import tokenizer
from served_http import serving
from serving_models import tiny_gpt2, tiny_llama
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

PROMPT = "A film about"
NUM_TOKENS = 4


def tiny_bert() -> PreTrainedModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.2,
        id2label={0: "bad", 1: "fair", 2: "good"},
    )
    return BertForSequenceClassification(config).eval()


BASES: dict[str, Any] = {
    "llama": (tiny_llama, "q_proj", "down_proj", "embed_tokens", "lm_head"),
    "tied": (
        lambda: tiny_llama(tie_word_embeddings=True),
        "v_proj",
        "up_proj",
        "embed_tokens",
        "lm_head",
    ),
    "gpt2": (tiny_gpt2, "c_attn", "c_fc", "wte", "lm_head"),
    "bert": (tiny_bert, "query", "output.dense", "word_embeddings", "classifier"),
}


def kinds_of(base: str) -> dict[str, Any]:
    """What PEFT is told for each kind of adapter."""
    _, first, second, table, output = BASES[base]
    both = [first, second]
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "rank-64": {"r": 64, "lora_alpha": 16},
        "rslora": {"use_rslora": True},
        "patterns": {"rank_pattern": {first: 3}, "alpha_pattern": {second: 40}},
        "layers": {"layers_to_transform": [1]},
        "dora": {"use_dora": True},
        "biases": {"bias": "all"},
        "output": {"target_modules": [*both, output]},
        "whole-output": {"modules_to_save": [output]},
        "table": {"target_modules": [*both, table]},
        "whole-table": {"modules_to_save": [table]},
        "rows": {"trainable_token_indices": [70, 71, 72, 37]},
    }
    usual = {"r": 4, "lora_alpha": 8, "target_modules": both}
    return {kind: LoraConfig(**(usual | changes)) for kind, changes in kinds.items()}


def write(base: PreTrainedModel, config: Any, folder: Path, seed: int) -> None:
    """Saves an adapter whose every trained tensor differs from what it was at random."""
    draw = torch.Generator().manual_seed(seed)
    theirs: Any = get_peft_model(copy.deepcopy(base), config)  # pyright: ignore
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                noise = 0.15 * torch.randn(parameter.shape, generator=draw)
                is_factor = ".lora_A." in name or ".lora_B." in name
                parameter.copy_(noise if is_factor else parameter + noise)
    theirs.save_pretrained(folder)


def score(model: Any, start: list[int], answer: list[int]) -> list[float]:
    """Log-likelihoods of the answer's tokens."""
    with torch.no_grad():
        found = model(torch.tensor([start + answer])).logits[0].log_softmax(-1)
    places = range(len(start) - 1, len(start) + len(answer) - 1)
    return [float(found[place, token]) for place, token in zip(places, answer, strict=True)]


def expected(model: Any, prompt: str) -> list[float]:
    """What transformers says: class probabilities, or the log-likelihoods of its greedy answer."""
    ids: list[int] = tokenizer()(prompt)["input_ids"]  # pyright: ignore
    if model.config.model_type == "bert":
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].softmax(-1).tolist()
    made = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    return score(model, ids, made[0, len(ids) :].tolist())


def served(server: Any, name: str, prompt: str) -> list[float]:
    """The same, by HTTP."""
    if "/v1/classify" in server.get("/openapi.json").json()["paths"]:
        answer = server.post("/v1/classify", {"model": name, "input": [prompt]})
        assert answer.status_code == 200, answer.text
        return answer.json()["data"][0]["probs"]
    asked = {"prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "logprobs": 1}
    answer = server.post("/v1/completions", {"model": name, "ignore_eos": True, **asked})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["logprobs"]["token_logprobs"]


@pytest.mark.filterwarnings("ignore")  # PEFT's, about tied and resized embeddings
@pytest.mark.parametrize("kind", BASES)
def test_every_kind_answers_as_peft_reads_it(kind: str, tmp_path: Path) -> None:
    base = BASES[kind][0]()
    folder = tmp_path / "adapters"
    for seed, (name, config) in enumerate(kinds_of(kind).items()):
        write(base, config, folder / name, seed)
    alone = expected(base, PROMPT)
    with serving(folder, copy.deepcopy(base), num_slots=4) as server:
        for name in kinds_of(kind):
            theirs: Any = PeftModel.from_pretrained(copy.deepcopy(base), folder / name).eval()
            wanted = expected(theirs, PROMPT)
            assert wanted != pytest.approx(alone, abs=1e-2), name  # else it would show nothing
            assert served(server, name, PROMPT) == pytest.approx(wanted, abs=1e-4), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LoraConfig(target_modules=["q_proj"], lora_bias=True), "lora_bias is True"),
        (LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"), "changed the base"),
        (
            LoraConfig(
                target_modules=["q_proj"], alora_invocation_tokens=[65], task_type="CAUSAL_LM"
            ),
            "alora_invocation_tokens",
        ),
        (
            LoraConfig(target_modules=["q_proj"], layer_replication=[(0, 2), (1, 2)]),
            "layer_replication",
        ),
        (IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "'IA3'; only LORA"),
    ],
    ids=["lora-bias", "pissa", "alora", "replicated", "ia3"],
)
def test_what_cannot_be_served_is_refused_by_name(config: Any, words: str, tmp_path: Path) -> None:
    base = tiny_llama()
    write(base, config, tmp_path / "odd", 0)
    with serving(tmp_path, base) as server:
        answer = server.post("/v1/completions", {"model": "odd", "prompt": "A", "max_tokens": 1})
    assert answer.status_code == 422
    message = answer.json()["error"]["message"]
    assert words in message and "adapter 'odd'" in message
    assert str(tmp_path) not in message  # where the server's files lie is nobody's business
