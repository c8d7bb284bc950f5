"""Seeds' predictions -> differences with intervals, a winner if there is one, a verdict."""

from loralab.evidence.capacity import capacity, capacity_sentences, label_bits
from loralab.evidence.comparison import build_comparison
from loralab.evidence.contest import Contest, Pair, hold_contest
from loralab.evidence.forgetting import (
    Dial,
    DialPoint,
    forgetting_curve,
    forgetting_verdict,
    gain_and_loss,
)
from loralab.evidence.losing import RowScores, holds, last_holding, loss_of, losses, lost_rights
from loralab.evidence.rank_curve import (
    Candidate,
    Rule,
    chosen_index,
    confirmation,
    rank_curve,
    rank_verdict,
)
from loralab.evidence.results import MethodResult, RatePoint, SeedPredictions, TestSet

__all__ = [
    "Candidate",
    "Contest",
    "Dial",
    "DialPoint",
    "MethodResult",
    "Pair",
    "RatePoint",
    "RowScores",
    "Rule",
    "SeedPredictions",
    "TestSet",
    "build_comparison",
    "capacity",
    "capacity_sentences",
    "chosen_index",
    "confirmation",
    "forgetting_curve",
    "forgetting_verdict",
    "gain_and_loss",
    "hold_contest",
    "holds",
    "label_bits",
    "last_holding",
    "loss_of",
    "losses",
    "lost_rights",
    "rank_curve",
    "rank_verdict",
]
