"""Loading, switching, merging and restoring adapters, against PEFT in the same run.

SmolLM2-135M, rank 16 on all linear layers, fp32. Both libraries host the same adapters on their own
copy of the base and take turns, so that what else the machine does hits both; each figure is a
median of milliseconds.

    python benchmarks/adapters.py --json
    python benchmarks/adapters.py --random --repeats 3      # no download: a model of that shape

Meaning of the figures:
load_ms: from the adapter's folder into a model that hosts so many others already.
switch_ms: to another hosted adapter.
merge_ms: to a new plain model while the base stays as it is; for PEFT that is a deepcopy and
    `merge_and_unload`.
certify_ms: measuring that merge and hashing base and adapter; PEFT has nothing like it.
merge_in_place_ms, restore_ms: the server's pair, bit for bit, which costs fresh memory; for PEFT
    `merge_adapter` and `unmerge_adapter`, which round.
svd_ms: of an 8192 x 2048 delta of rank 16; PEFT has dense SVDs only (`torch.linalg.svd`).
peft_best: PEFT with `low_cpu_mem_usage=True`, its fastest way to load.
"""

import argparse
import copy
import gc
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from loralab.adapters import (
    LoRAConfig,
    adapter_parameters,
    attach,
    detach,
    extract,
    load_adapter,
    merge_in_place,
    restore,
    save_adapter,
    use,
)
from loralab.adapters.merge import certify, merged_model
from loralab.lowrank import Factors, delta, factored_svd
from loralab.models import load_model

RANK = 16
HOSTED = (1, 8, 64)


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    model = _random_model() if arguments.random else load_model("smollm2", task="causal")
    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(model, Path(folder), arguments.repeats)
    result["conditions"] = {
        "model": "random weights" if arguments.random else "smollm2",
        "repeats": arguments.repeats,
        "threads": arguments.threads,
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "peft", "transformers")},
    }
    print(json.dumps(result, indent=None if arguments.json else 2))


def measure(base: nn.Module, folder: Path, repeats: int) -> dict[str, Any]:
    """Every figure, for both libraries."""
    adapter = _write_adapter(base, folder / "adapter")
    ours = copy.deepcopy(base)
    load_adapter(ours, adapter, name="h0")
    theirs: Any = PeftModel.from_pretrained(copy.deepcopy(base), str(adapter), adapter_name="h0")
    result: dict[str, Any] = {"load_ms": {}, "peft": {"load_ms": {}}, "peft_best": {"load_ms": {}}}
    result["floor"] = {"read_bytes_ms": _read_bytes(adapter, repeats)}
    for hosted in HOSTED:
        for index in range(len(theirs.peft_config), hosted):
            load_adapter(ours, adapter, name=f"h{index}")
            theirs.load_adapter(str(adapter), f"h{index}", low_cpu_mem_usage=True)
        times = _take_turns(_loading(ours, theirs, adapter), repeats)
        for place, milliseconds in zip(
            (result, result["peft"], result["peft_best"]), times, strict=True
        ):
            place["load_ms"][str(hosted)] = milliseconds
        if hosted == 8:
            switching = _take_turns(_switching(ours, theirs), 5 * repeats)
            result["switch_ms"], result["peft"]["switch_ms"] = switching
    _measure_merging(base, adapter, repeats, result)
    result["svd_ms"], result["peft"]["svd_ms"] = _svd(repeats)
    return result


Action = tuple[Callable[[], Any], Callable[[], Any]]  # what is timed, and what undoes it


def _take_turns(actions: list[Action], repeats: int) -> list[float]:
    """The median milliseconds of each action; one untimed round first."""
    times: list[list[float]] = [[] for _ in actions]
    for turn in range(repeats + 1):
        for index, (act, undo) in enumerate(actions):
            start = time.perf_counter()
            act()
            if turn:
                times[index].append(1000 * (time.perf_counter() - start))
            undo()
    return [round(statistics.median(found), 4) for found in times]


def _loading(ours: nn.Module, theirs: Any, adapter: Path) -> list[Action]:
    return [
        (lambda: load_adapter(ours, adapter, name="new"), lambda: detach(ours, "new")),
        (
            lambda: theirs.load_adapter(str(adapter), "new"),
            lambda: theirs.delete_adapter("new"),
        ),
        (
            lambda: theirs.load_adapter(str(adapter), "new", low_cpu_mem_usage=True),
            lambda: theirs.delete_adapter("new"),
        ),
    ]


def _switching(ours: nn.Module, theirs: Any) -> list[Action]:
    def switch() -> None:
        with use(ours, "h1"):
            pass

    return [
        (switch, _nothing),
        (lambda: theirs.set_adapter("h1"), lambda: theirs.set_adapter("h0")),
    ]


def _measure_merging(base: nn.Module, adapter: Path, repeats: int, result: dict[str, Any]) -> None:
    ours = copy.deepcopy(base)
    load_adapter(ours, adapter, name="a")
    theirs: Any = PeftModel.from_pretrained(copy.deepcopy(base), str(adapter), adapter_name="a")
    made: dict[str, Any] = {}

    def merge() -> None:
        made["adapter"] = extract(ours, "a")
        made["merged"] = merged_model(ours, made["adapter"])

    def merge_theirs() -> None:
        made["theirs"] = copy.deepcopy(theirs).merge_and_unload()

    def forget() -> None:
        made.clear()
        gc.collect()  # copies of models are cycles: each library frees its own, untimed

    result["merge_ms"], result["peft"]["merge_ms"] = _take_turns(
        [(merge, forget), (merge_theirs, forget)], repeats
    )
    in_place = [
        (lambda: merge_in_place(ours, "a"), lambda: restore(ours)),
        (theirs.merge_adapter, theirs.unmerge_adapter),
    ]
    result["merge_in_place_ms"], result["peft"]["merge_in_place_ms"] = _take_turns(
        in_place, repeats
    )
    merge_in_place(ours, "a")
    theirs.merge_adapter()
    restoring = _take_turns(
        [
            (lambda: restore(ours), lambda: merge_in_place(ours, "a")),
            (theirs.unmerge_adapter, theirs.merge_adapter),
        ],
        repeats,
    )
    restore(ours)
    result["restore_ms"], result["peft"]["restore_ms"] = restoring
    merge()
    certifying = [(lambda: certify(ours, made["merged"], made["adapter"]), _nothing)]
    (result["certify_ms"],) = _take_turns(certifying, min(repeats, 3))
    result["peft"]["certify_ms"] = None  # it has none


def _svd(repeats: int) -> tuple[float, float]:
    torch.manual_seed(0)
    pair = Factors(A=torch.randn(RANK, 2048), B=torch.randn(8192, RANK))
    (ours,) = _take_turns([(lambda: factored_svd(pair), _nothing)], 5 * repeats)
    dense = delta(pair)
    start = time.perf_counter()
    torch.linalg.svd(dense, full_matrices=False)
    return ours, round(1000 * (time.perf_counter() - start), 1)


def _read_bytes(adapter: Path, repeats: int) -> float:
    file = adapter / "adapter_model.safetensors"
    (found,) = _take_turns([(file.read_bytes, _nothing)], repeats)
    return found


def _write_adapter(base: nn.Module, folder: Path) -> Path:
    """An adapter as training leaves it: every factor differs from its start."""
    model = copy.deepcopy(base)
    attach(model, LoRAConfig(rank=RANK, alpha=32.0), "a")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapter_parameters(model, "a").values():
            parameter += 0.01 * torch.randn_like(parameter)
    save_adapter(model, "a", folder)
    return folder


def _random_model() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def _nothing() -> None:
    return None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--random", action="store_true", help="a model of random weights")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


if __name__ == "__main__":
    main()
