"""What is lost, the order of testing, and capacity: against scipy, by simulation, by hand."""

import numpy as np
import pytest
from scipy import stats

from loralab.evidence import (
    Candidate,
    DialPoint,
    RowScores,
    capacity,
    capacity_sentences,
    forgetting_curve,
    forgetting_verdict,
    label_bits,
    last_holding,
    loss_of,
    lost_rights,
    rank_curve,
    rank_verdict,
)


def scores(nll: np.ndarray) -> RowScores:
    return RowScores(nll, (nll < 0.7).astype(float))


def candidate(rank: int, nll: np.ndarray) -> Candidate:
    return Candidate("uniform", rank, {"m": rank}, rank, 4 * rank, 0.0, scores(nll))


def test_the_bound_is_the_one_sided_t_bound_of_the_paired_differences() -> None:
    chance = np.random.default_rng(0)
    before, after = chance.random(50), chance.random(50)
    found = loss_of(before, after)
    difference = after - before
    error = difference.std(ddof=1) / 50**0.5
    assert found["mean"] == pytest.approx(difference.mean())
    assert found["upper"] == pytest.approx(difference.mean() + stats.t.ppf(0.95, 49) * error)
    low, high = stats.t.interval(0.95, 49, difference.mean(), error)
    assert (found["low"], found["high"]) == pytest.approx((low, high))
    half = loss_of(before, after, confidence=0.975)
    assert half["upper"] == pytest.approx(high)


def test_rows_of_one_document_count_together_and_infinite_ones_not_at_all() -> None:
    before = np.zeros(40)
    after = np.repeat(np.random.default_rng(1).normal(size=10), 4)
    documents = np.repeat(np.arange(10), 4)
    apart, together = loss_of(before, after), loss_of(before, after, documents)
    assert together["upper"] is not None and apart["upper"] is not None
    assert together["upper"] - together["mean"] > 1.8 * (apart["upper"] - apart["mean"])
    after[3] = np.inf
    assert set(loss_of(before, after).values()) == {None}


def test_no_discordant_row_is_no_certainty_about_accuracy() -> None:
    same = np.ones(30)
    found = lost_rights(same, same)
    assert found["low"] < 0 < found["high"] < 0.1


def test_the_same_outputs_lose_no_log_likelihood() -> None:
    nll = np.random.default_rng(6).random(30)
    assert set(loss_of(nll, nll).values()) == {0.0}
    curve = rank_curve(scores(nll), [candidate(2, nll), candidate(1, nll)], 1e-6)
    assert [row["chosen"] for row in curve] == [False, True]


def test_the_choice_is_the_last_before_the_first_failure() -> None:
    assert [last_holding(p) for p in ([], [False, True], [True, True, False, True])] == [0, 0, 2]
    reference = np.full(60, 0.5)
    steady = np.random.default_rng(2).normal(0, 0.001, 60)
    lost = {8: 0.0, 4: 0.005, 2: 0.1, 1: 0.0}  # rank 1 would hold, but rank 2 does not
    curve = rank_curve(
        scores(reference), [candidate(r, reference + x + steady) for r, x in lost.items()], 0.01
    )
    assert [row["holds"] for row in curve] == [True, True, False, True]
    assert [row["rank"] for row in curve if row["chosen"]] == [4]


def test_a_rank_that_truly_loses_too_much_is_chosen_in_at_most_5_percent_of_repeats() -> None:
    chance = np.random.default_rng(3)
    repeats, wrong = 300, 0
    truly = {16: 0.004, 8: 0.01, 4: 0.01, 2: 0.011, 1: 0.012}  # from 8 down: not below 0.01
    for _ in range(repeats):
        base = chance.gamma(1.0, 0.5, 120)
        others = [candidate(r, base + x + chance.normal(0, 0.03, 120)) for r, x in truly.items()]
        curve = rank_curve(scores(base), others, 0.01)
        wrong += any(row["chosen"] and row["rank"] <= 8 for row in curve)
    assert wrong <= stats.binom.ppf(0.999, repeats, 0.05)


def test_the_dial_takes_the_largest_gain_among_what_holds() -> None:
    chance = np.random.default_rng(4)
    task, keep = chance.random(80), chance.random(80)

    def point(dial: str, value: float, gain: float, forgotten: float) -> DialPoint:
        noise = chance.normal(0, 0.001, 80)
        return DialPoint(dial, value, scores(task - gain), scores(keep + forgotten + noise))

    points = [
        point("scale", 0.5, 0.2, 0.005),
        point("scale", 1.0, 0.4, 0.05),
        point("cap", 1.0, 0.3, 0.008),
        point("cap", 2.0, 0.35, 0.03),
    ]
    found = forgetting_curve(scores(task), scores(keep), points, 0.02)
    assert [(p["dial"], p["value"]) for p in found if p["chosen"]] == [("cap", 1.0)]
    assert found[0]["gain"]["mean"] == pytest.approx(0.2)
    none = forgetting_curve(scores(task), scores(keep), points[1:2], 0.02)
    assert not none[0]["chosen"]


def test_text_that_the_adapter_is_better_at_is_not_called_forgotten() -> None:
    chance = np.random.default_rng(7)
    task, keep = chance.random(80), chance.random(80)

    def verdict(forgotten: float) -> str:
        noise = chance.normal(0, 0.001, 80)
        point = DialPoint("scale", 1.0, scores(task - 0.2), scores(keep + forgotten + noise))
        half = DialPoint("scale", 0.5, scores(task - 0.1), scores(keep + forgotten / 2 + noise))
        points = forgetting_curve(scores(task), scores(keep), [half, point], 0.06)
        chosen = next(p for p in points if p["chosen"])
        told = {"points": points, "chosen": {**chosen, "confirm": points[0]}, "budget": 0.06}
        return forgetting_verdict({**told, "unit": "nats a row", "keep": "general.txt"})

    assert "on its task and wins 0.05 (0.05 to 0.05) nats a token" in verdict(-0.05)
    assert "on its task and forgets 0.1 (0.1 to 0.1) nats a token" in verdict(0.1)
    assert "Scaled by 0.5 it forgets at most 0.05 (budget 0.06); on fresh rows it" in verdict(0.1)


def test_capacity_by_hand() -> None:
    assert label_bits([2000, 2000]) == 4000 and label_bits([10, 0]) == 0
    bits = {"mean": 1e6, "low": 0.8e6, "high": 1.2e6}
    found = capacity(bits, {"all-linear": 50_000, "attention": 10_000}, ranks=(8, 16))
    assert found["smallest"]["all-linear"] == {"rank": 10, "low": 4, "high": 24}
    assert found["smallest"]["attention"] == {"rank": 50, "low": 20, "high": 120}
    assert [row["all-linear"]["enough"] for row in found["ranks"]] == [False, True]
    told = capacity_sentences({**found, "rows": 4000, "how": "so"})
    assert "rank 10 could hold them all (4 to 24" in " ".join(told)
    assert "rule of thumb" in " ".join(told)


def test_the_verdict_calls_a_gain_a_gain() -> None:
    document = {
        "tolerance": 0.01,
        "unit": "nats a row",
        "rows": {"choose": 60},
        "full": {"rank": 16, "bytes": 100},
        "chosen": {
            "rank": 4,
            "rule": "uniform",
            "bytes": 25,
            "lost_nll": {"upper": 0.004},
            "confirm": {
                "rows": 50,
                "within": True,
                "lost_nll": {"mean": 0.002, "low": -0.001, "high": 0.005},
            },
        },
    }
    assert rank_verdict(document) == (
        "Rank 4 is enough: it loses at most 0.004 nats a row (95 %) on 60 rows, within the"
        " tolerance of 0.01; on 50 fresh rows it loses 0.002 (−0.001 to 0.005). 25 % of the bytes"
        " of rank 16."
    )
    document["chosen"]["lost_nll"] = {"upper": -0.003}
    document["chosen"]["confirm"]["lost_nll"] = {"mean": -0.005, "low": -0.009, "high": -0.001}
    told = rank_verdict(document)
    assert "it gains at least 0.003 nats a row (95 %)" in told
    assert "it gains 0.005 (0.001 to 0.009)" in told
