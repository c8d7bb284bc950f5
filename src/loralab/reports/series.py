"""Lines made fit for a chart: smoothed, thinned, and the range of an axis they share."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from loralab.reports.formats import finite

LOG_RATIO = 10  # an axis whose values span more than this ratio is logarithmic
MAX_POINTS = 200  # a line is thinned to about so many points


def smooth(losses: Sequence[Sequence[Any]], span: int) -> list[tuple[int, float]]:
    """Exponential average of (step, loss) over about `span` points, without start-up bias.

    Values that are not finite are left out. Thinned to what a chart can show.
    """
    decay = 1 - 2 / (span + 1)
    mean, weight = 0.0, 0.0
    smoothed = []
    for step, loss in losses:
        if finite(loss) is None:
            continue
        mean = decay * mean + (1 - decay) * loss
        weight = decay * weight + (1 - decay)
        smoothed.append((int(step), mean / weight))
    return thin(smoothed)


def smoothing_span(num_points: int) -> int:
    """How many points a training loss is averaged over: a twentieth of them, 1 to 100."""
    return max(1, min(100, num_points // 20))


def thin(points: Sequence[Any]) -> list[Any]:
    """Every k-th point and the last, about `MAX_POINTS` of them."""
    stride = max(1, math.ceil(len(points) / MAX_POINTS))
    kept = list(points[::stride])
    if points and kept[-1] is not points[-1]:
        kept.append(points[-1])
    return kept


def padded_range(values: Iterable[Any]) -> list[float]:
    """Smallest and largest of the finite values with a margin of 6 %; [0, 1] without any."""
    known = [figure for value in values if (figure := finite(value)) is not None]
    if not known:
        return [0.0, 1.0]
    low, high = min(known), max(known)
    if low > 0 and high > LOG_RATIO * low:
        return [low / 1.15, high * 1.15]
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return [low - margin, high + margin]
