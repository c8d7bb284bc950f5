"""What the routes share: an engine, a store, a tokenizer, keys, quotas, metrics."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from transformers import PreTrainedTokenizerBase

from loralab.errors import CapacityError, RequestError, UnknownAdapterError, nearest
from loralab.serving.engine import Engine
from loralab.serving.http.errors import ClientGoneError, TookTooLongError
from loralab.serving.http.keys import Caller, Keys
from loralab.serving.http.metrics import Metrics
from loralab.serving.http.quotas import Quotas
from loralab.serving.http.targets import Resolved, Target, parse_target, resolve
from loralab.serving.store import AdapterStore, Lease

LONG_TEXT = 20_000  # characters; longer ones are read in a thread, so that streams go on


@dataclass(frozen=True)
class Limits:
    """What one request may be, and take.

    body_bytes: of a request. max_in_flight: answers in work or waiting, of all requests together.
    lease_seconds: how long it waits for its adapters' slots. request_seconds: for its whole answer.
    """

    body_bytes: int = 2**20
    body_seconds: float | int = 30
    max_in_flight: int = 512
    lease_seconds: float | int = 60
    request_seconds: float | int = 600


@dataclass(eq=False)
class Service:
    """Everything that answers. Its engine is started.

    base: the name that requests call the base by; fingerprint: what answers of it are told by.
    labels: names of the classes, where the model is a classifier.
    """

    engine: Engine
    store: AdapterStore
    tokenizer: PreTrainedTokenizerBase
    base: str
    fingerprint: str
    metrics: Metrics
    keys: Keys = field(default_factory=Keys)
    limits: Limits = field(default_factory=Limits)
    labels: Sequence[str] = ()
    base_head_is_untrained: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.quotas = Quotas(self.keys.quotas, max_in_flight=self.limits.max_in_flight)
        self._tokenizing = threading.Lock()

    def now(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    @property
    def max_tokens(self) -> int:
        """Of a prompt and its answer together."""
        model = self.engine.runner or self.engine.encoder
        return model.max_tokens if model is not None else 0

    @property
    def writes(self) -> bool:
        """Whether the model writes text."""
        return self.engine.runner is not None

    @property
    def classifies(self) -> bool:
        """Whether the model tells classes apart."""
        return self.engine.encoder is not None and self.engine.encoder.classifies

    def unknown(self, model: str) -> UnknownAdapterError:
        """The error that names the nearest of all names, the base's among them."""
        hint = nearest(model, [self.base, *self.store.names()])
        return UnknownAdapterError(f"there is no model {model[:120]!r}", hint)

    def target(self, model: str, caller: Caller) -> Target:
        """What the request is for. Raises `ForbiddenError` and `UnknownAdapterError`."""
        target = parse_target(model, self.base)
        caller.check_use([*target.named, *target.counted])
        try:
            self.store.check_known(target.named)
        except UnknownAdapterError as error:
            if len(target.named) == 1:
                raise self.unknown(target.named[0]) from error
            raise
        return target

    @asynccontextmanager
    async def admitted(self, target: Target, num: int = 1) -> AsyncIterator["Admission"]:
        """A place for `num` answers and a lease on the adapters; both are given back at the end,
        unless `Admission.hand_over` gave them to answers that are still being written."""
        started = time.perf_counter()
        self.quotas.enter(target.counted, target.tenant, num)
        admission: Admission | None = None
        try:
            admission = Admission(self, target, num, await self._lease(target), started)
            yield admission
        finally:
            if admission is None:
                self.quotas.leave(target.counted, target.tenant, num)
            else:
                admission.settle()

    async def _lease(self, target: Target) -> Lease | None:
        if not target.names:
            return None
        started = time.perf_counter()
        future = self.store.lease(target.names)
        try:
            lease = await asyncio.wait_for(asyncio.wrap_future(future), self.limits.lease_seconds)
        except TimeoutError:
            raise CapacityError(
                f"the slots were busy for {self.limits.lease_seconds:g} seconds",
                "ask again in a moment, or start the server with more --slots.",
            ) from None
        self.metrics.lease_seconds.labels(target.label).observe(time.perf_counter() - started)
        return lease

    # tokens -------------------------------------------------------------------------------------

    async def encode(self, inputs: Any) -> list[tuple[int, ...]]:
        """Texts or token ids, one or several, as prompts."""
        if isinstance(inputs, str) or isinstance(inputs[0], int):
            inputs = [inputs]
        return [await self._encode_one(item) for item in inputs]

    async def _encode_one(self, item: str | list[int]) -> tuple[int, ...]:
        if not isinstance(item, str):
            return tuple(item)
        return await self.in_thread_if_long(len(item), lambda: self._ids(item))

    async def in_thread_if_long(self, size: int, function: Callable[[], Any]) -> Any:
        """The function's result; of much text it is made in a thread."""
        return await asyncio.to_thread(function) if size > LONG_TEXT else function()

    def _ids(self, text: str) -> tuple[int, ...]:
        with self._tokenizing:
            return tuple(self.tokenizer(text, verbose=False)["input_ids"])  # pyright: ignore

    def chat_ids(self, messages: list[dict[str, str]]) -> tuple[int, ...]:
        """A conversation in the base's own template. Raises `RequestError` where it has none."""
        if not self.tokenizer.chat_template:
            raise RequestError(
                f"{self.base!r} has no chat template", "use /v1/completions with a plain prompt."
            )
        try:
            with self._tokenizing:
                text = self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
                )
                ids = self.tokenizer(str(text), add_special_tokens=False, verbose=False)
                return tuple(ids["input_ids"])  # pyright: ignore
        except Exception as error:  # templates raise their own errors, of any kind
            raise RequestError(
                f"messages: the chat template of {self.base!r} refuses them ({error})",
                "give turns in the order that the model knows.",
            ) from None

    def check_length(self, prompt_ids: Sequence[int], max_tokens: int, param: str) -> None:
        """Raises `RequestError` where prompt and answer do not fit the context."""
        if not prompt_ids:
            raise RequestError(f"{param}: it is empty", "give some text.")
        if len(prompt_ids) + max_tokens > self.max_tokens:
            raise RequestError(
                f"{param}: {len(prompt_ids)} tokens and max_tokens={max_tokens} are more than this "
                f"server's {self.max_tokens}",
                "shorten the prompt, or ask for fewer tokens.",
            )

    def caller(self, request: Request) -> Caller:
        """Whose key came with the request."""
        return self.keys.caller(request.headers.get("authorization"))


class Admission:
    """A request's place and lease, until its last answer has ended. started: when it came."""

    def __init__(
        self, service: Service, target: Target, num: int, lease: Lease | None, started: float
    ) -> None:
        self.service, self.target, self.num, self.lease = service, target, num, lease
        self.started = started
        empty = Lease((), lambda lease: None)
        self.resolved: Resolved = resolve(target, lease or empty, service.fingerprint)
        self._handed_over = False
        self._ended = False

    def hand_over(self) -> None:
        """From now on whoever calls `end` gives the place back."""
        self._handed_over = True

    def end(self) -> None:
        """Gives place and lease back; later calls do nothing."""
        if self._ended:
            return
        self._ended = True
        self.service.quotas.leave(self.target.counted, self.target.tenant, self.num)
        if self.lease is not None:
            self.lease.release()

    def settle(self) -> None:
        """The request's own part is over."""
        if not self._handed_over:
            self.end()

    def charge(self, num_tokens: int) -> None:
        """Tokens were used."""
        self.service.quotas.charge(self.target.counted, num_tokens)


async def within(seconds: float | int, request: Request, work: Any) -> Any:
    """What `work` gives, unless the client goes away or it takes longer: it is cancelled then.

    Raises `TookTooLongError`; `asyncio.CancelledError` for a client that is gone.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        done, _ = await asyncio.wait(
            {task, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
        )
        if task in done:
            return task.result()
        if gone in done:
            raise ClientGoneError
        raise too_long(seconds)
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def too_long(seconds: float | int) -> TookTooLongError:
    """The error of an answer that was not ready in time."""
    return TookTooLongError(
        f"the answer took longer than {seconds:g} seconds", "ask for fewer tokens, or stream it."
    )


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
