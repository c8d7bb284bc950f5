"""Few blocks -> many: every peak is a straight line in the number of blocks of a run."""

from collections.abc import Callable, Sequence

from loralab.planning.accounts import ROUNDING, Accounts, Peak, Stretch
from loralab.planning.blocks import Run

TRACED_PERIODS = 3

Bytes = float | int


def extended(trace: Callable[[Sequence[Run]], Accounts], runs: Sequence[Run]) -> Accounts:
    """The accounts of the whole model from traces of models with few blocks.

    `trace` gets the runs with the blocks to keep. A run of n is traced with three and with four
    periods; the difference is what one more adds to every stretch. Short runs are traced whole.
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
        if first is not None and second is not None:
            peaks[stretch] = _extended_peak(peak, first, second, times)
    return Accounts(
        peaks,
        _line(total.flops, base.flops, more.flops, times),
        _line(total.num_ops, base.num_ops, more.num_ops, times),
        _line(total.allocated_bytes, base.allocated_bytes, more.allocated_bytes, times),
    )


def _extended_peak(peak: Peak, first: Peak, second: Peak, times: int) -> Peak:
    """What the allocator leaves unsplit follows no line: it keeps its share."""
    rounded = _line(peak.rounded, first.rounded, second.rounded, times)
    unsplit = peak.unsplit / peak.rounded * rounded if peak.rounded else 0
    parts = {
        kind: _line(peak.parts.get(kind, 0), first.parts.get(kind, 0), held, times)
        for kind, held in second.parts.items()
        if kind != ROUNDING
    }
    parts = {kind: held for kind, held in parts.items() if held > 0}
    parts[ROUNDING] = max(0, rounded + unsplit - sum(parts.values()))
    return Peak(rounded, unsplit, parts)


def _line(value: Bytes, first: Bytes, second: Bytes, times: int) -> Bytes:
    return value + times * (second - first)
