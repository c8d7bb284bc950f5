"""What a rule says: a finding with its evidence and what to do, and the table of all rules."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from loralab.evidence.linting.experiment import Experiment

Level = Literal["error", "warning", "info"]


@dataclass(frozen=True)
class LintFinding:
    """error: the conclusion does not follow; warning: it is weaker than it reads; info: to know.

    name: the rule; evidence: the numbers that show it; next_step: what would mend it.
    """

    level: Level
    name: str
    message: str
    evidence: str
    next_step: str


Said = tuple[str, str, str]  # message, evidence, next step
Rule = Callable[[Experiment], Iterator[Said]]


@dataclass(frozen=True)
class NamedRule:
    """A rule under its name, with the level of what it finds."""

    name: str
    level: Level
    look: Rule

    def findings(self, experiment: Experiment) -> Iterator[LintFinding]:
        """All that the rule finds."""
        for message, evidence, next_step in self.look(experiment):
            yield LintFinding(self.level, self.name, message, evidence, next_step)


RULES: dict[str, NamedRule] = {}


def rule(name: str, level: Level) -> Callable[[Rule], Rule]:
    """Enters a function into the table of rules."""

    def enter(look: Rule) -> Rule:
        RULES[name] = NamedRule(name, level, look)
        return look

    return enter
