"""The one exception tree.

Every error a user can cause is a `LoralabError`: it says what is wrong (`cause`) and what to do
about it (`next_step`). The command line prints both and exits with `exit_code`; it prints no
traceback for them.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class LoralabError(Exception):
    """Something is wrong that the user can mend.

    `cause` names the thing that is wrong, `next_step` what to do about it.
    """

    exit_code = 2

    def __init__(self, cause: str, next_step: str) -> None:
        super().__init__(f"{cause}\n  Next: {next_step}")
        self.cause = cause
        self.next_step = next_step

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.cause, self.next_step)


class ConfigError(LoralabError):
    """Settings that are unknown, of the wrong kind, or contradict each other."""


class FetchError(LoralabError):
    """A catalogue entry or hub file that could not be brought here whole."""


class ModelError(LoralabError):
    """A model or tokenizer that cannot be found, read or used for the task."""


class CompileError(LoralabError):
    """Blocks that `torch.compile` cannot compile here: no compiler, or one that fails."""


class DataError(LoralabError):
    """Rows that are missing, unreadable or unusable for the task."""


class AdapterError(LoralabError):
    """An adapter that is damaged, does not fit the model, or cannot be expressed."""


class TargetError(AdapterError):
    """A target that matches no module of the model."""


class RouteError(AdapterError):
    """A forward whose rows cannot be told which adapter they use."""


class OutputError(LoralabError):
    """An output place that exists already or cannot be written."""


class RunError(LoralabError):
    """A folder that is no run, or a run that is not what the verb needs."""


class ResumeError(LoralabError):
    """A run that cannot be continued bit for bit."""


class PlanError(LoralabError):
    """A plan that cannot be made: an unknown device, a step that cannot be traced, no room."""


class UntraceableError(PlanError):
    """A step whose memory cannot be traced, since what it does depends on computed numbers."""


class RequestError(LoralabError):
    """A request that cannot be served as it is: a prompt that is too long, a bad parameter."""


class ConflictError(RequestError):
    """A request that what is there rules out: a name that is taken, a slot that must stay free."""


class ServerError(LoralabError):
    """Another server that answers otherwise than it should: no JSON, no such model, a refusal."""

    exit_code = 1


class CapacityError(LoralabError):
    """The server is full for now: the same request may succeed later."""

    exit_code = 1


class UnknownAdapterError(AdapterError):
    """A name that no adapter of a server has."""


class ForbiddenError(LoralabError):
    """A path out of the adapters' folder, or an adapter that is not for whoever asks."""


class TrainingError(LoralabError):
    """A training that ran and failed: a loss that is not a number, a gradient that never came."""

    exit_code = 1


class Interrupted(LoralabError):  # noqa: N818  (it is no error: the state is safe)
    """Ctrl-C after the state was saved; `next_step` holds the command that resumes."""

    exit_code = 130


def nearest(word: str, known: Iterable[str]) -> str:
    """The phrase that helps after an unknown word: the closest known one, or all of them."""
    known = sorted(known)
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known: " + ", ".join(known)
