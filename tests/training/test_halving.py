"""Successive halving decides by what the runs have written, whenever it is asked."""

import math
import random
from dataclasses import replace

from loralab.training.halving import Contender, Stop, losers


def contender(name: str, *nll: float, every: int = 2, total: int = 16, **more: int) -> Contender:
    """A run that was validated every few steps."""
    found = {(index + 1) * every: value for index, value in enumerate(nll)}
    return Contender(name, total, found, **more)


def test_the_worse_half_stops_at_each_rung() -> None:
    late = {"a": 1.0, "b": 4.0, "c": 2.0, "d": 3.0}
    runs = [contender(name, 9.0, nll, nll, nll) for name, nll in late.items()]
    assert losers(runs) == {1: Stop(4, 4.0), 3: Stop(4, 3.0), 2: Stop(8, 2.0)}


def test_nothing_is_decided_before_all_have_been_validated_there() -> None:
    runs = [contender("a", 9.0, 1.0), contender("b", 9.0)]
    assert losers(runs) == {}
    assert losers([*runs[:1], contender("b", 9.0, 2.0)]) == {1: Stop(4, 2.0)}


def test_a_rung_takes_the_best_so_far_and_nothing_later() -> None:
    runs = [contender("a", 1.0, 5.0, 5.0), contender("b", 3.0, 2.0, 0.1)]
    assert losers(runs)[1] == Stop(4, 2.0)


def test_who_ends_before_a_rung_holds_nobody_up_and_takes_no_place() -> None:
    runs = [
        contender("a", 9.0, 1.0),
        contender("b", 9.0, 2.0),
        contender("c", 0.5, ended_at=3),  # failed, or stopped by its patience
        contender("d", 9.0, 3.0),
    ]
    assert losers(runs) == {3: Stop(4, 3.0)}
    late = [*runs[:2], replace(runs[2], ended_at=6), runs[3]]
    assert losers(late) == {3: Stop(6, 3.0)}  # when it was known


def test_equals_are_told_apart_by_name_in_any_order() -> None:
    runs = [contender(name, 9.0, 1.0) for name in "abcd"]
    for seed in range(5):
        order = random.Random(seed).sample(runs, 4)
        assert {order[number].name for number in losers(order)} == {"c", "d"}


def test_a_contest_decides_the_same_however_much_has_happened_since() -> None:
    """Runs validated at different steps: every prefix decides what the whole one does."""
    draw = random.Random(0)
    for _ in range(200):
        every = [draw.choice((1, 2, 3)) for _ in range(6)]
        nll = [[draw.random() for _ in range(16 // gap)] for gap in every]
        whole = [contender(str(n), *nll[n], every=gap, ended_at=16) for n, gap in enumerate(every)]
        final = losers(whole)
        for now in range(17):
            seen = [
                Contender(
                    run.name,
                    run.total_steps,
                    {step: value for step, value in run.validations.items() if step <= now},
                    ended_at=run.ended_at if now == 16 else None,
                )
                for run in whole
            ]
            decided = losers(seen)
            assert decided == {n: stop for n, stop in final.items() if n in decided}
            assert all(n in decided for n, stop in final.items() if stop.step <= now)
        assert len(final) == 6 - math.ceil(math.ceil(6 / 2) / 2)
