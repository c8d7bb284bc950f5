"""What `loralab serve --weights int8` costs on movie reviews, for the base and a trained adapter.

    python benchmarks/serving_precision.py RUN/adapter --texts 200

The adapter is a folder, trained on SmolLM2 (`loralab train smollm2-reviews model.task=causal`).
Meaning of the figures: `loralab.serving.precision.PrecisionCost`. base_nats: what the base loses a
token in bf16; adapter_gain: how much less the adapter loses, in bf16. probe_error: the 95th
percentile of a text's difference over the root of its tokens, which proofs must allow for.
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loralab.adapters import load_adapter
from loralab.catalogue import fetch
from loralab.data.rated import read_rated
from loralab.models import load_model, load_tokenizer
from loralab.serving.fast import FastRunner, fast_runner
from loralab.serving.plain_runner import PlainRunner
from loralab.serving.precision import precision_cost
from loralab.serving.runner import Chunk, Runner

MAX_TOKENS = 96


def main() -> None:
    """Measures and prints one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model: Any = load_model("smollm2", task="causal", dtype="bfloat16").eval()
    load_adapter(model, given.adapter, name="trained")
    coarse = fast_runner(
        model,
        lambda: PlainRunner(model, num_slots=1, max_tokens=MAX_TOKENS),
        num_slots=1,
        max_tokens=MAX_TOKENS,
        precision="int8",
    )
    assert isinstance(coarse, FastRunner)
    exact, texts = coarse.in_base_precision(MAX_TOKENS), _texts(given.texts)
    result: dict[str, Any] = {}
    for name, entry in (("base", None), ("adapter", "trained")):
        result[name] = asdict(precision_cost(exact, coarse, texts, entry))
    base, adapted, rounded = (
        [_log_likelihood(runner, ids, entry) for ids in texts]
        for runner, entry in ((exact, None), (exact, "trained"), (coarse, "trained"))
    )
    count = sum(len(ids) - 1 for ids in texts)
    result["base_nats"] = -sum(base) / count
    result["adapter_gain"] = (sum(adapted) - sum(base)) / count
    off = [abs(a - r) / len(i) ** 0.5 for a, r, i in zip(adapted, rounded, texts, strict=True)]
    result["probe_error"] = float(np.quantile(off, 0.95))
    print(json.dumps(result))


def _texts(count: int) -> list[list[int]]:
    file = fetch("movie-reviews") / "movieReviewSnippets_GroundTruth.txt"
    reviews = [rated.text for rated in read_rated(file)]
    tokenizer = load_tokenizer("smollm2")
    chosen = random.Random(0).sample(reviews, count)
    found = [list(tokenizer(text)["input_ids"][:MAX_TOKENS]) for text in chosen]
    return [ids for ids in found if len(ids) > 1]


def _log_likelihood(runner: Runner, ids: Sequence[int], entry: str | None) -> float:
    """Of all tokens after the first, in nats."""
    log_p = runner.all_logits(Chunk(0, ids, 0, entry))[:-1].double().log_softmax(-1)
    return float(log_p.gather(1, torch.tensor(ids[1:])[:, None]).sum())


if __name__ == "__main__":
    main()
