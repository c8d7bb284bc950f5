"""Leases: while a request holds one, its adapters stay where they are."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType

from loralab.serving.store.versions import Version


class Lease:
    """The right to use certain versions until `release`; a context manager."""

    def __init__(self, versions: Sequence[Version], release: Callable[["Lease"], None]) -> None:
        self.versions = tuple(versions)
        self._release = release
        self._lock = threading.Lock()
        self._released = False

    def release(self) -> None:
        """Gives it back; later calls do nothing."""
        with self._lock:
            if self._released:
                return
            self._released = True
        self._release(self)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


@dataclass(eq=False)
class Waiter:
    """A request that waits for its adapters, which it names."""

    names: tuple[str, ...]
    future: "Future[Lease]" = field(default_factory=Future)


def hand_over(done: "Sequence[tuple[Waiter, Lease | Exception]]") -> None:
    """Tells the waiting what they got; outside the store's lock, since they may call back."""
    for waiter, outcome in done:
        if isinstance(outcome, Exception):
            fail(waiter, outcome)
        elif waiter.future.set_running_or_notify_cancel():
            waiter.future.set_result(outcome)
        else:
            outcome.release()


def fail(waiter: Waiter, error: Exception) -> None:
    """Tells a waiting request that it gets nothing."""
    if waiter.future.set_running_or_notify_cancel():
        waiter.future.set_exception(error)
