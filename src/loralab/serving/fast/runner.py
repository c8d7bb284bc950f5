"""The fast runner: a decoding step of our own where its formula holds, the plain runner elsewhere.

What decides is looked at when the runner is made (the model) and whenever adapters change (each
adapter): whole modules' copies, DoRA, biases, rows of embeddings and pairs outside the blocks are
the plain runner's.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loralab.adapters import Adapter, hosted, merged_name
from loralab.errors import ModelError, RouteError
from loralab.native import load_kernel
from loralab.serving.fast.batch import flatten, mix_of
from loralab.serving.fast.coverage import Hosts, Sites, Version
from loralab.serving.fast.decoder import Decoder, find_decoder
from loralab.serving.fast.kernel_step import KERNEL, KernelStep, kernel_limits
from loralab.serving.fast.steps import Step, TorchStep
from loralab.serving.fast.whole_numbers import Precision
from loralab.serving.runner import Chunk, Runner

log = logging.getLogger("loralab")


def fast_runner(
    model: nn.Module,
    plain: Callable[[], Runner],
    *,
    num_slots: int,
    max_tokens: int,
    precision: Precision = "base",
) -> Runner:
    """The fastest runner of the model there is; `plain` makes the one that serves what is left.

    Freezes the model. Says in one line of the log why a model is left to the plain runner.
    precision: "int8" decodes with int8 copies of the base's weights; what the plain runner serves
        reads the model's own.
    Raises `ModelError` where int8 is asked for and the kernel does not run this model.
    """
    model.requires_grad_(False).eval()
    decoder = find_decoder(model, max_tokens)
    if isinstance(decoder, str):
        _refuse_int8(precision, decoder)
        log.info("the plain runner serves this model: %s", decoder)
        return plain()
    step = _best_step(decoder, num_slots, max_tokens, precision)
    return FastRunner(model, decoder, step, plain, num_slots, max_tokens)


def _best_step(decoder: Decoder, num_slots: int, max_tokens: int, precision: Precision) -> Step:
    """The kernel where it is there and covers the decoder, torch's operations elsewhere."""
    limits = kernel_limits(decoder)
    if limits is not None:
        _refuse_int8(precision, limits)
        log.info("decoding runs on torch's operations: the kernel does not cover it: %s", limits)
        return TorchStep(decoder, num_slots, max_tokens)
    library = load_kernel(KERNEL)
    if library is None:
        _refuse_int8(precision, "there is none here, as a warning before this says")
        return TorchStep(decoder, num_slots, max_tokens)
    return KernelStep(library, decoder, num_slots, max_tokens, precision)


def _refuse_int8(precision: Precision, reason: str) -> None:
    if precision == "int8":
        raise ModelError(
            f"int8 weights need the compiled kernel, which does not run this model: {reason}",
            "serve the weights as they are (`--weights base`).",
        )


@dataclass
class _Held:
    """What a slot holds, and in whose cache: the step's or the plain runner's."""

    is_fast: bool = True
    token_ids: list[int] = field(default_factory=list)


class FastRunner:
    """A `Runner` over one decoder. uncovered: adapter -> why the plain runner serves it."""

    def __init__(
        self,
        model: nn.Module,
        decoder: Decoder,
        step: Step,
        plain: Callable[[], Runner],
        num_slots: int,
        max_tokens: int,
    ) -> None:
        self.num_slots, self.max_tokens = num_slots, max_tokens
        self.vocab_size = decoder.output.weight.shape[0]
        self.step = step
        self.uncovered: dict[str, str] = {}
        self._model, self._decoder, self._sites = model, decoder, Sites(model, decoder)
        self._make_plain = plain
        self._plain: Runner | None = None
        self._held = [_Held() for _ in range(num_slots)]
        self._versions: dict[str, Version] = {}  # of those that the step has
        self._prepared: dict[str, Any] = {}  # of those that come
        self._order: dict[str, int] = {}
        self._merged: str | None = None
        self.adapters_changed()

    @property
    def precision(self) -> Precision:
        """In which decoding reads the base's weights."""
        return self.step.precision

    def in_base_precision(self, max_tokens: int) -> "FastRunner":
        """The same model for one sequence, decoded with its weights as they are."""
        step = _best_step(self._decoder, 1, max_tokens, "base")
        return FastRunner(self._model, self._decoder, step, self._make_plain, 1, max_tokens)

    def forward(self, chunks: Sequence[Chunk]) -> Float[Tensor, "chunks vocab"]:
        """fp32 logits after the last token of each chunk; the slots hold the tokens afterwards.

        Raises `RouteError` for entries that the model does not host now.
        """
        mine = [self._is_covered(chunk) for chunk in chunks]
        ready = [self._resumed(chunk, own) for chunk, own in zip(chunks, mine, strict=True)]
        if all(mine):
            return self.step.run(flatten(self._routed(ready), self._order.__getitem__))
        logits = torch.empty(len(chunks), self.vocab_size)
        for own in (True, False):
            rows = [row for row, each in enumerate(mine) if each is own]
            if rows:
                logits[rows] = self._run([ready[row] for row in rows], own).cpu()
        return logits

    def all_logits(self, chunk: Chunk) -> Float[Tensor, "tokens vocab"]:
        """fp32 logits after every token of one chunk; the slot holds the tokens afterwards."""
        own = self._is_covered(chunk)
        ready = self._resumed(chunk, own)
        if own:
            routed = self._routed([ready])
            logits = self.step.run(flatten(routed, self._order.__getitem__, every_token=True))
        else:
            logits = self._plain_runner().all_logits(ready)
        return logits[-len(chunk.token_ids) :]

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        """Makes the target slot hold the first tokens of the source slot."""
        held = self._held[source]
        if held.is_fast:
            self.step.copy_prefix(source, target, num_tokens)
        else:
            self._plain_runner().copy_prefix(source, target, num_tokens)
        self._held[target] = _Held(held.is_fast, held.token_ids[:num_tokens])

    def prepare(self, name: str, adapter: Adapter) -> None:
        """Copies the factors of an adapter that is about to be hosted; from any thread."""
        table = self._sites.factors_of(adapter)
        if table is not None:
            self._prepared[name] = self.step.prepare(table)

    def adapters_changed(self, only: Collection[str] | None = None) -> None:
        """Adapters were attached, detached, merged into the weights, or the base was restored."""
        hosts, names = self._sites.hosts(), hosted(self._model)
        for name in self._order.keys() - set(names):
            self._forget(name)
            del self._order[name]
        self.uncovered = {n: why for n, why in self.uncovered.items() if n in self._order}
        for name in names:
            if only is not None and name not in only and name in self._order:
                continue  # looking at hundreds of pairs of every adapter takes its time
            self._order.setdefault(name, max(self._order.values(), default=-1) + 1)
            self.uncovered.pop(name, None)
            known = self._versions.get(name)
            if known is None or not known.holds(hosts, name):
                self._make_ready(hosts, name)
        for name in only or ():
            self._prepared.pop(name, None)  # it was not hosted after all
        if only is None:
            self._merged = merged_name(self._model)
            self.step.base_changed()
        if self._plain is not None:
            self._plain.adapters_changed()

    def _make_ready(self, hosts: Hosts, name: str) -> None:
        prepared = self._prepared.pop(name, None)
        if prepared is None:
            table = self._sites.factors(hosts, name)
            if isinstance(table, str):
                self.uncovered[name] = table
                self._forget(name)
                return
            prepared = self.step.prepare(table)
        self.step.put(name, prepared)
        self._versions[name] = Version(hosts, name)

    def _forget(self, name: str) -> None:
        if self._versions.pop(name, None) is not None:
            self.step.remove(name)

    def _is_covered(self, chunk: Chunk) -> bool:
        """Whether the step serves the chunk; raises where nothing does."""
        names = mix_of(chunk.entry)
        unknown = [n for n in names if n not in self._versions and n not in self.uncovered]
        if unknown:
            raise RouteError(
                f"the model hosts no adapter {unknown[0]!r}",
                "attach or load it and call `adapters_changed`.",
            )
        if self._merged is not None and names and names != {self._merged: 1.0}:
            raise RouteError(
                f"adapter {self._merged!r} is merged into this model: it serves no other entry",
                "call `loralab.restore(model)` first.",
            )
        in_force = [*names, *([] if self._merged is None else [self._merged])]
        return not any(name in self.uncovered for name in in_force)

    def _routed(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """The chunks; an adapter that is in the weights already adds nothing more to them."""
        if self._merged is None:
            return list(chunks)
        return [replace(chunk, entry=None) for chunk in chunks]

    def _run(self, chunks: Sequence[Chunk], is_fast: bool) -> Float[Tensor, "chunks vocab"]:
        if is_fast:
            return self.step.run(flatten(self._routed(chunks), self._order.__getitem__))
        return self._plain_runner().forward(chunks)

    def _resumed(self, chunk: Chunk, is_fast: bool) -> Chunk:
        """The chunk, with what its slot holds before it where that is in the other's cache.

        Notes what the slot holds afterwards.
        """
        held = self._held[chunk.slot]
        if held.is_fast is not is_fast and chunk.start:
            before = held.token_ids[: chunk.start]
            chunk = replace(chunk, token_ids=[*before, *chunk.token_ids], start=0)
        held.is_fast = is_fast
        del held.token_ids[chunk.start :]
        held.token_ids.extend(chunk.token_ids)
        return chunk

    def _plain_runner(self) -> Runner:
        if self._plain is None:
            self._plain = self._make_plain()
        return self._plain
