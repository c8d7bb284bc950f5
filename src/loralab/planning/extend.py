"""Few blocks -> many: every peak is a straight line in the number of blocks of a run."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from loralab.planning.accounts import ROUNDING, Accounts, Peak, Stretch
from loralab.planning.blocks import Run

TRACED_PERIODS = 4

Bytes = float | int


def extended(trace: Callable[[Sequence[Run]], Accounts], runs: Sequence[Run]) -> Accounts:
    """The accounts of the whole model from traces of models with few blocks.

    `trace` gets the runs with the blocks to keep. A run of n is traced with three and with four
    periods; the difference is what one more adds to every stretch. Two would not do: the last block
    may compute few tokens and the first no gradient of its input, so that neither shows what a
    block in the middle holds for a while. Short runs are traced whole.
    """
    few = [run.keeping(TRACED_PERIODS * run.period) for run in runs]
    longer = [run for run in few if run.kept < run.length]
    cost = sum(run.kept for run in few) * (1 + len(longer)) - sum(run.period for run in longer)
    if cost >= sum(run.length for run in runs):
        return trace(runs)
    base = trace(few)
    total = base
    for run in longer:
        fewer = trace([one.keeping(one.kept - one.period * (one is run)) for one in few])
        total = _plus(total, base, fewer, run)
    return total


def _plus(total: Accounts, base: Accounts, fewer: Accounts, run: Run) -> Accounts:
    """`total`, and for each period of `run` that was not traced what sets `base` and `fewer`
    apart."""
    times = (run.length - run.kept) // run.period
    peaks: dict[Stretch, Peak] = {}
    for stretch, peak in total.peaks.items():
        like = _in_both(stretch, run)
        first, second = fewer.peaks.get(like), base.peaks.get(like)
        if first is not None and second is not None:
            peaks[stretch] = _extended_peak(peak, first, second, times)
    return Accounts(
        peaks,
        _line(total.flops, fewer.flops, base.flops, times),
        _line(total.num_ops, fewer.num_ops, base.num_ops, times),
        _line(total.allocated_bytes, fewer.allocated_bytes, base.allocated_bytes, times),
    )


def _in_both(stretch: Stretch, run: Run) -> Stretch:
    """The stretch, or one of another block on its side that the shorter model has too.

    More blocks add the same to all that are counted from one end.
    """
    if stretch.block is None or stretch.run != run.number:
        return stretch
    if stretch.block >= run.period:
        return replace(stretch, block=stretch.block - run.period)
    if stretch.block < -run.period:
        return replace(stretch, block=stretch.block + run.period)
    return stretch


def _extended_peak(peak: Peak, first: Peak, second: Peak, times: int) -> Peak:
    """What the allocator leaves unsplit follows no line: it keeps its share."""
    rounded = _line(peak.rounded, first.rounded, second.rounded, times)
    unsplit = peak.unsplit / peak.rounded * rounded if peak.rounded else 0
    parts = {
        kind: _line(
            peak.parts.get(kind, 0), first.parts.get(kind, 0), second.parts.get(kind, 0), times
        )
        for kind in (*peak.parts, *(kind for kind in second.parts if kind not in peak.parts))
        if kind != ROUNDING
    }
    parts = {kind: held for kind, held in parts.items() if held > 0}
    parts[ROUNDING] = max(0, rounded + unsplit - sum(parts.values()))
    return Peak(rounded, unsplit, parts)


def _line(value: Bytes, first: Bytes, second: Bytes, times: int) -> Bytes:
    return value + times * (second - first)
