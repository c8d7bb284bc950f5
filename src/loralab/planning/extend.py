"""Few blocks -> many: every peak is a straight line in the number of blocks of a run."""

from collections.abc import Callable, Mapping, Sequence

from loralab.planning.accounts import Accounts, Peak, Stretch
from loralab.planning.blocks import Run

TRACED_PERIODS = 2

Bytes = float | int


def extended(trace: Callable[[Sequence[Run]], Accounts], runs: Sequence[Run]) -> Accounts:
    """The accounts of the whole model from traces of models with few blocks.

    `trace` gets the runs with the blocks to keep. A run of n is traced with two and with three
    periods; the difference is what one more period adds to every stretch. Short runs are traced
    whole.
    """
    few = [run.keeping(TRACED_PERIODS * run.period) for run in runs]
    cost = sum(run.kept for run in few) * (1 + sum(run.kept < run.length for run in few))
    if cost >= sum(run.length for run in runs):
        return trace(runs)
    base = trace(few)
    total = base
    for run in few:
        missing = (run.length - run.kept) // run.period
        if missing:
            more = [other.keeping(other.kept + other.period * (other is run)) for other in few]
            total = _plus(total, trace(more), base, missing)
    return total


def _plus(total: Accounts, more: Accounts, base: Accounts, times: int) -> Accounts:
    """`total` and `times` the difference between `more` and `base`."""
    peaks: dict[Stretch, Peak] = {}
    for stretch, peak in total.peaks.items():
        first, second = base.peaks.get(stretch), more.peaks.get(stretch)
        if first is None or second is None:
            continue
        peaks[stretch] = Peak(
            _line(peak.allocated, first.allocated, second.allocated, times),
            _line(peak.reserved, first.reserved, second.reserved, times),
            _lines(peak.parts, first.parts, second.parts, times),
        )
    return Accounts(
        peaks,
        _line(total.flops, base.flops, more.flops, times),
        _line(total.num_ops, base.num_ops, more.num_ops, times),
        _line(total.allocated_bytes, base.allocated_bytes, more.allocated_bytes, times),
    )


def _line(value: Bytes, first: Bytes, second: Bytes, times: int) -> Bytes:
    return value + times * (second - first)


def _lines(
    parts: Mapping[str, Bytes], first: Mapping[str, Bytes], second: Mapping[str, Bytes], times: int
) -> dict[str, Bytes]:
    kinds = dict.fromkeys((*parts, *first, *second))
    found = {
        kind: _line(parts.get(kind, 0), first.get(kind, 0), second.get(kind, 0), times)
        for kind in kinds
    }
    return {kind: held for kind, held in found.items() if held > 0}
