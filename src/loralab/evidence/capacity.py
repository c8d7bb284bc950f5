"""Bits in the data against numbers in the adapter: how much rank could there be a use for.

What a training can store is at most what the data hold beyond what the base knows: the sum of the
first epoch's losses in bits, of which the base's own loss is an upper estimate; of labels at most
their entropy. A trained number keeps about 2 bits after a thousand exposures and about 1 after a
hundred (Allen-Zhu and Li 2024, 2404.05405, on whole models); up to 3.6 bits were measured of
random strings (Morris et al. 2025, 2505.24832). "LoRA Without Regret" (Schulman et
al. 2025) reads the rule for adapters. It is a rule of thumb: how far it holds for adapters has been
measured roughly, and tasks that generalise need far less than their bits. So it can say that a rank
is more than enough; that one is too small it can only suspect.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

BITS_PER_PARAMETER = 2.0
LEAST_BITS, MOST_BITS = 1.0, 4.0
"""Of what a number may keep: the range that is stated with every rank."""

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def capacity(
    bits: Mapping[str, float], costs: Mapping[str, int], ranks: Sequence[int] = RANKS
) -> dict[str, Any]:
    """The table of ranks and the smallest that could hold the bits, for each choice of targets.

    bits: `mean`, `low` and `high` of the whole training set. costs: choice of targets -> numbers
    that one rank of it takes, the sum of `in + out` over its modules.
    """
    return {
        "bits": dict(bits),
        "bits_per_parameter": {
            "value": BITS_PER_PARAMETER,
            "low": LEAST_BITS,
            "high": MOST_BITS,
        },
        "ranks": [
            {
                "rank": rank,
                **{
                    name: {
                        "parameters": rank * cost,
                        "bits": BITS_PER_PARAMETER * rank * cost,
                        "enough": BITS_PER_PARAMETER * rank * cost >= bits["mean"],
                    }
                    for name, cost in costs.items()
                },
            }
            for rank in ranks
        ],
        "smallest": {
            name: {
                "rank": _rank(bits["mean"], BITS_PER_PARAMETER, cost),
                "low": _rank(bits["low"], MOST_BITS, cost),
                "high": _rank(bits["high"], LEAST_BITS, cost),
            }
            for name, cost in costs.items()
        },
    }


def _rank(bits: float, bits_per_parameter: float, cost: int) -> int:
    return max(1, math.ceil(bits / (bits_per_parameter * cost)))


def label_bits(counts: Sequence[int]) -> float:
    """The entropy of labels with these counts, times their number, in bits."""
    total = sum(counts)
    shares = [count / total for count in counts if count]
    return -total * sum(share * math.log2(share) for share in shares)


def capacity_sentences(document: Mapping[str, Any]) -> list[str]:
    """What the figures say, and how far to trust it."""
    found: Mapping[str, Mapping[str, int]] = document["smallest"]
    bits = document["bits"]
    lines = [
        f"{document['rows']:,} training rows hold at most {_count(bits['mean'])} bits"
        f" ({document['how']})."
    ]
    for name, smallest in found.items():
        lines.append(
            f"{name}: at {BITS_PER_PARAMETER:g} bits a number rank {smallest['rank']} could hold"
            f" them all ({smallest['low']} to {smallest['high']} at {MOST_BITS:g} to"
            f" {LEAST_BITS:g} bits a number)."
        )
    lines.append(
        "This is an upper bound by a rule of thumb, good to about a factor of two at best: what"
        " generalises needs far fewer bits. It tells when capacity cannot be the trouble; which"
        " rank is enough, `loralab rank` measures."
    )
    if {"all-linear", "attention"} <= set(found):
        lines.append(
            "Attention alone was worse than all linear layers even at equal numbers of parameters"
            " (LoRA Without Regret; LoRA Learns Less and Forgets Less), so a higher rank there does"
            " not make up for it."
        )
    return lines


def _count(value: float) -> str:
    for size, suffix in ((1e9, " billion"), (1e6, " million")):
        if value >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:,.0f}"
