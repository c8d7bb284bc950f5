"""The step as a curve: what is held at each stretch, in the order of time."""

from typing import Any

from loralab.planning.accounts import Peak, Stretch
from loralab.planning.plan import Plan, block_name, whole_numbers


def curve(plan: Plan) -> list[dict[str, Any]]:
    """The highest moment of every stretch: {"moment", "bytes", "parts"}, as plain data.

    Stretches outside of blocks that follow each other in one phase are told as one, by their
    highest. Of a run of alike blocks the first and the last few stand: between them is a line.
    """
    points: list[tuple[str, Peak]] = []
    for stretch, peak in plan.accounts.peaks.items():
        name = _name(stretch)
        if points and points[-1][0] == name:
            points[-1] = max(points[-1], (name, peak), key=lambda point: point[1].allocated)
        else:
            points.append((name, peak))
    return [
        {
            "moment": name,
            "bytes": round(peak.allocated),
            "parts": whole_numbers(peak.parts, round(peak.allocated)),
        }
        for name, peak in points
    ]


def _name(stretch: Stretch) -> str:
    if stretch.block is not None:
        number = f" of run {stretch.run + 1}" if stretch.run else ""
        return f"{stretch.phase}: {block_name(stretch.block)}{number}"
    return f"{stretch.phase}: outside of blocks"
