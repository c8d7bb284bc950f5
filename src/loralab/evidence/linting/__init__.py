"""Would this conclusion survive? Rules over runs, comparisons, recipes and descriptions."""

# imported for the rules that they enter into the table
from loralab.evidence.linting import arm_rules, claim_rules, training_rules  # noqa: F401
from loralab.evidence.linting.experiment import Arm, Claim, Data, Experiment, parse_description
from loralab.evidence.linting.findings import RULES, LintFinding

__all__ = [
    "RULES",
    "Arm",
    "Claim",
    "Data",
    "Experiment",
    "LintFinding",
    "lint",
    "parse_description",
]

_ORDER = {"error": 0, "warning": 1, "info": 2}


def lint(experiment: Experiment) -> list[LintFinding]:
    """Everything the rules find, errors first."""
    found = [finding for rule in RULES.values() for finding in rule.findings(experiment)]
    return sorted(found, key=lambda finding: _ORDER[finding.level])
