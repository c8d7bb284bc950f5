"""`loralab rank --advice`: could the data fill a rank at all, before anything is trained."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from loralab.adapters import LoRAConfig, adapter_parameters, attach, detach
from loralab.config import RunConfig
from loralab.data import Encoded, sample
from loralab.errors import DataError
from loralab.events import Listener, Phase, ignore
from loralab.evidence import capacity, capacity_sentences, label_bits
from loralab.measuring import mean_over_seeds
from loralab.runs.workbench import base_model, open_workbench, settle_dtype
from loralab.training import choose_device, predict, use_threads

SAMPLED_ROWS = 64
ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
PROBE = "capacity"


def advice(config: RunConfig, *, listen: Listener = ignore) -> dict[str, Any]:
    """Bits in the training rows against the numbers of an adapter at each rank.

    Of completions: what the base itself says of 64 sampled rows, in bits, times the rows. Of
    labels: their entropy. Returns the document that docs/rank.md describes; raises `DataError`
    without training rows and any other `LoralabError` of the settings.
    """
    config.model.check_reads_text()
    config = settle_dtype(config, listen)
    bench = open_workbench(config, listen)
    rows = bench.rows["train"]
    if not rows:
        raise DataError("there is no row to train on", "check data.train.")
    use_threads(config.training)
    model = base_model(config).to(choose_device(config.training.device)).eval()
    bits, how = _bits(model, rows, config, listen)
    document = capacity(bits, _costs(model, config))
    document |= {
        "model": config.model.name,
        "task": config.model.task,
        "rows": len(rows),
        "how": how,
    }
    document["sentences"] = capacity_sentences(document)
    return document


def _bits(
    model: nn.Module, rows: Sequence[Encoded], config: RunConfig, listen: Listener
) -> tuple[dict[str, float], str]:
    """Bits in all rows with their 95 % interval, and how they were found."""
    if config.model.task == "classification":
        counts = Counter(row.label for row in rows)
        bits = label_bits(list(counts.values()))
        return dict.fromkeys(("mean", "low", "high"), bits), "the entropy of their labels"
    chosen = sample(rows, SAMPLED_ROWS, "capacity")
    listen(Phase(f"the base's own loss on {len(chosen)} rows"))
    found = predict(model, chosen, task="causal", batch_size=config.training.evaluation_batch_size)
    nats = np.array([prediction.nll for prediction in found])
    tokens = sum(prediction.num_targets for prediction in found)
    estimate = mean_over_seeds(nats[None, :], np.array([row.group for row in chosen]))
    low, high = estimate.interval()
    bits_of = len(rows) / math.log(2)
    ends = {"mean": estimate.value, "low": max(0.0, low), "high": high}
    each = nats.sum() / tokens / math.log(2)
    how = f"{each:.2f} bits a token by the base's own loss on {len(chosen)} rows"
    whole = len(chosen) == len(rows)  # nothing is left that was not looked at
    return {k: float(bits_of * (ends["mean"] if whole else v)) for k, v in ends.items()}, how


def _costs(model: nn.Module, config: RunConfig) -> dict[str, int]:
    """Numbers that one rank takes: on all linear layers, on attention alone, on own targets."""
    per_module = _cost_by_module(model, LoRAConfig(rank=1, alpha=1.0, layers=config.method.layers))
    attention = [cost for name, cost in per_module.items() if ATTENTION.search(name)]
    costs = {"all-linear": sum(per_module.values())}
    if attention and len(attention) < len(per_module):
        costs["attention"] = sum(attention)
    if config.method.targets != "all-linear" or config.method.exclude:
        own = LoRAConfig(
            rank=1,
            alpha=1.0,
            targets=config.method.targets,
            exclude=config.method.exclude,
            layers=config.method.layers,
        )
        costs["the recipe's targets"] = sum(_cost_by_module(model, own).values())
    return costs


def _cost_by_module(model: nn.Module, config: LoRAConfig) -> dict[str, int]:
    attach(model, config, PROBE, head="frozen")
    marker = f".adapters.{PROBE}."
    costs: Counter[str] = Counter()
    for name, parameter in adapter_parameters(model, PROBE).items():
        costs[name.partition(marker)[0]] += parameter.numel()
    detach(model, PROBE)
    return dict(costs)
