"""Seeds' predictions -> differences with intervals, a winner if there is one, a verdict."""

from loralab.evidence.comparison import build_comparison
from loralab.evidence.contest import Contest, Pair, hold_contest
from loralab.evidence.results import MethodResult, RatePoint, SeedPredictions, TestSet

__all__ = [
    "Contest",
    "MethodResult",
    "Pair",
    "RatePoint",
    "SeedPredictions",
    "TestSet",
    "build_comparison",
    "hold_contest",
]
