"""Metrics with their intervals, statistics of comparisons, probes, meters of memory and time."""

from loralab.measuring.memory import Watched, live_bytes, peak_live_bytes, watch_peak
from loralab.measuring.metrics import (
    Interval,
    classification_metrics,
    completion_metrics,
    confusion_matrix,
    wilson,
)
from loralab.measuring.probes import ProbeCheck, check_probes, log_likelihoods, make_probes
from loralab.measuring.statistics import (
    POWER,
    CountsBound,
    Estimate,
    McNemar,
    PairedDifference,
    holm,
    mcnemar,
    mean_over_seeds,
    paired_difference,
    paired_difference_from_counts,
)
from loralab.measuring.timing import median_step_seconds

__all__ = [
    "POWER",
    "CountsBound",
    "Estimate",
    "Interval",
    "McNemar",
    "PairedDifference",
    "ProbeCheck",
    "Watched",
    "check_probes",
    "classification_metrics",
    "completion_metrics",
    "confusion_matrix",
    "holm",
    "live_bytes",
    "log_likelihoods",
    "make_probes",
    "mcnemar",
    "mean_over_seeds",
    "median_step_seconds",
    "paired_difference",
    "paired_difference_from_counts",
    "peak_live_bytes",
    "watch_peak",
    "wilson",
]
