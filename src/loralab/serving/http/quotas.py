"""How much each adapter may have: requests at a time, tokens a minute, places in the queue."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from loralab.errors import CapacityError
from loralab.serving.http.errors import QuotaError
from loralab.serving.scheduler import GREED

DEFAULT = "default"


@dataclass(frozen=True)
class Quota:
    """None: no bound. `tokens_per_minute` counts prompts and answers."""

    tokens_per_minute: int | None = None
    concurrent: int | None = None


class _Bucket:
    """Tokens that may still be used, refilled all the time up to a minute's worth."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_second, self.most = per_minute / 60, float(per_minute)
        self.level, self.then = self.most, now

    def refill(self, now: float) -> None:
        self.level = min(self.most, self.level + (now - self.then) * self.per_second)
        self.then = now


class Quotas:
    """Counts what every adapter has; may be used from any thread.

    max_in_flight: requests of all adapters that are being answered or wait.
    """

    def __init__(
        self,
        quotas: Mapping[str, Quota],
        *,
        max_in_flight: int = 512,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._quotas, self.max_in_flight, self._clock = dict(quotas), max_in_flight, clock
        self._lock = threading.Lock()
        self._in_flight: Counter[str] = Counter()
        self._tenants: Counter[str] = Counter()
        self._buckets: dict[str, _Bucket] = {}

    @contextmanager
    def admitted(self, names: Sequence[str], tenant: str, num: int = 1) -> Iterator[None]:
        """Counts `num` answers of these adapters while it is open. Raises as `enter`."""
        self.enter(names, tenant, num)
        try:
            yield
        finally:
            self.leave(names, tenant, num)

    def enter(self, names: Sequence[str], tenant: str, num: int = 1) -> None:
        """Counts answers in. Raises `QuotaError` for a quota, `CapacityError` for a full server."""
        with self._lock:
            for name in names:
                quota = self._of(name)
                if quota.concurrent is not None and self._in_flight[name] + num > quota.concurrent:
                    raise QuotaError(
                        f"{name!r} has {quota.concurrent} requests at a time, and all are in use",
                        "ask again when one has been answered.",
                    )
                bucket = self._bucket(name)
                if bucket is not None and bucket.level <= 0:
                    seconds = -bucket.level / bucket.per_second + 1
                    raise QuotaError(
                        f"{name!r} has {quota.tokens_per_minute} tokens a minute, all used up",
                        f"ask again in {seconds:.0f} seconds.",
                        seconds,
                    )
            free = self.max_in_flight - self._tenants.total()
            # what the last of them finds; the engine's queue asks the same one by one
            if self._tenants[tenant] + num - 1 >= GREED * (free - num + 1):
                raise CapacityError(
                    f"{self._tenants.total()} requests are in work, {self._tenants[tenant]} of "
                    f"them for {tenant!r}, and there are {self.max_in_flight} places",
                    "ask again in a few seconds, or with fewer requests at a time.",
                )
            self._tenants[tenant] += num
            for name in names:
                self._in_flight[name] += num

    def leave(self, names: Sequence[str], tenant: str, num: int = 1) -> None:
        """Counts answers out."""
        with self._lock:
            self._tenants[tenant] -= num
            for name in names:
                self._in_flight[name] -= num

    def charge(self, names: Sequence[str], num_tokens: int) -> None:
        """Tokens were used; what goes beyond the quota is owed."""
        with self._lock:
            for name in names:
                bucket = self._bucket(name)
                if bucket is not None:
                    bucket.level -= num_tokens

    def _of(self, name: str) -> Quota:
        return self._quotas.get(name) or self._quotas.get(DEFAULT) or Quota()

    def _bucket(self, name: str) -> _Bucket | None:
        per_minute = self._of(name).tokens_per_minute
        if per_minute is None:
            return None
        bucket = self._buckets.setdefault(name, _Bucket(per_minute, self._clock()))
        bucket.refill(self._clock())
        return bucket
