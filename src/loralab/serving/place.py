"""Adapters put into a running engine: attached between its steps, and proved by its own answers."""

import functools
import hashlib
import json
import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

from loralab.adapters import (
    Adapter,
    check_fingerprint,
    collector_paused,
    detach,
    fingerprint,
    hosted,
    misfits,
    put_on,
    walk,
)
from loralab.errors import AdapterError, OutputError, RequestError
from loralab.files import write_json
from loralab.serving.engine import Engine
from loralab.serving.heads import classification_head, kind_faults
from loralab.serving.proof import measure_effect, prove
from loralab.serving.requests import Entry
from loralab.serving.store import Proof, Version

logger = logging.getLogger("loralab")
PROOF_VERSION = 1  # counts up when a proof asks for more than before
MOST_BASE_ANSWERS = 4096  # kept: adapters of one project often share their probes
TENANT = "(proof)"  # no adapter's name: proofs take turns with the requests of all others


class EnginePlace:
    """Where an `AdapterStore` puts adapters: the model of a started engine.

    prompts: what an adapter without probes is measured on, as token ids.
    cache: the folder of earlier proofs, by base and adapter content; None proves every time.
    require_probes: refuses what cannot be proved.
    dtype: in which the engine reads the base, where that is not the model's own: "int8".
    """

    def __init__(
        self,
        engine: Engine,
        model: nn.Module,
        *,
        prompts: Sequence[Sequence[int]],
        cache: Path | None = None,
        require_probes: bool = False,
        dtype: str | None = None,
    ) -> None:
        self.engine, self.model = engine, model
        self.prompts, self.cache, self.require_probes = prompts, cache, require_probes
        self.dtype = dtype or str(next(model.parameters()).dtype).removeprefix("torch.")
        self._fingerprint = fingerprint(model)
        self.base = _hash(self._fingerprint)
        self._modules = dict(walk(model))
        self._head = classification_head(model)
        self._base_answers: dict[tuple[int, ...], float] = {}

    def misfits(self, outline: Adapter) -> list[str]:
        """Names and shapes that are not the model's. A head may have any number of classes."""
        faults = kind_faults(self.model, self._head, outline)
        return faults or misfits(outline, self._modules, self._head)

    def attach(self, version: Version, adapter: Adapter) -> Proof:
        """Hosts an adapter without `misfits` and proves it.

        What can be made ready beside the engine's steps is made on the caller's thread. Raises
        `AdapterError`; the adapter is not hosted then.
        """
        if adapter.base is not None:
            check_fingerprint(adapter.base, self._fingerprint)
        with collector_paused():
            if self.engine.runner is not None:
                self.engine.runner.prepare(version.hosted, adapter)
            self.engine.call(
                lambda: put_on(self.model, adapter, version.hosted, self._modules),
                only=(version.hosted,),
            ).result()
        try:
            return self._proof(version, adapter)
        except BaseException:
            self.detach(version)
            raise

    def detach(self, version: Version) -> None:
        """Takes the adapter off; its tensors are free then."""

        def take_off() -> None:
            if version.hosted in hosted(self.model):
                detach(self.model, version.hosted)

        self.engine.call(take_off, only=(version.hosted,)).result()

    # proof ------------------------------------------------------------------------------------

    def _proof(self, version: Version, adapter: Adapter) -> Proof:
        started = time.perf_counter()
        known = self._known(version, adapter)
        proof = known or self._made(version, adapter)
        proof = replace(
            proof,
            proof_ms=1e3 * (time.perf_counter() - started),
            cached=known is not None,
        )
        changed = adapter.facts.get("changed")
        if proof.state != "proved" and (changed or self.require_probes):
            reason = f"{changed}, and " if changed else "this server takes proved adapters only: "
            raise AdapterError(
                f"unproved: {reason}nothing shows that it is applied as trained ({proof.detail})",
                "save it with probes: `loralab train` does, and `loralab.save_adapter(..., "
                "probes=...)`.",
            )
        if known is None:
            self._keep(version, adapter, proof)
        return proof

    def _made(self, version: Version, adapter: Adapter) -> Proof:
        longest = self._max_tokens()
        probes = tuple(p for p in adapter.probes if len(p.input_ids) <= longest)
        try:
            if not probes:
                return measure_effect(self._ask, version.hosted, self.prompts)
            return prove(
                self._ask, version.hosted, replace(adapter, probes=probes), dtype=self.dtype
            )
        except RequestError as error:  # token ids that this base has not
            raise AdapterError(
                f"wrong base: its probes cannot be asked here ({error.cause})",
                "serve it on the base that it was trained on.",
            ) from None

    def _ask(self, inputs: Sequence[Sequence[int]], entry: Entry) -> list[float]:
        """What the serving path itself answers: no other copy of the model, no other kernels."""
        if entry is not None:
            return self._asked(inputs, entry)
        texts = [tuple(ids) for ids in inputs]
        known = {ids: self._base_answers[ids] for ids in texts if ids in self._base_answers}
        new = [ids for ids in texts if ids not in known]
        known |= dict(zip(new, self._asked(new, None), strict=True))
        if len(self._base_answers) + len(new) > MOST_BASE_ANSWERS:
            self._base_answers.clear()
        self._base_answers |= known  # the base never changes while it is served
        return [known[ids] for ids in texts]

    def _asked(self, inputs: Sequence[Sequence[int]], entry: Entry) -> list[float]:
        if self.engine.runner is None:
            classes = [self.engine.classify(ids, entry, tenant=TENANT) for ids in inputs]
            return [float(f.result().double().log_softmax(-1).max()) for f in classes]
        scores = [self.engine.score(ids, entry, tenant=TENANT) for ids in inputs]
        return [_sum(score) for score in scores]

    def _max_tokens(self) -> int:
        model = self.engine.runner or self.engine.encoder
        if model is None:
            raise RuntimeError("an engine without a model")
        return model.max_tokens

    # proofs of earlier times ------------------------------------------------------------------

    def _file(self, version: Version, adapter: Adapter) -> Path | None:
        """Everything that a proof depends on is in its name."""
        if self.cache is None:
            return None
        how = type(self.engine.runner or self.engine.encoder).__name__
        probes = [asdict(probe) for probe in adapter.probes]
        facts = [PROOF_VERSION, _version(), torch.__version__, self.dtype, how, probes]
        return self.cache / self.base[:16] / f"{version.content}-{_hash(facts)[:16]}.json"

    def _known(self, version: Version, adapter: Adapter) -> Proof | None:
        file = self._file(version, adapter)
        if file is None or not file.is_file():
            return None
        try:
            return Proof(**json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError, OSError) as error:
            logger.warning("%s is not readable (%s): the adapter is proved again", file, error)
            return None

    def _keep(self, version: Version, adapter: Adapter, proof: Proof) -> None:
        file = self._file(version, adapter)
        if file is None:
            return
        try:
            write_json(file, asdict(proof))
        except OutputError as error:
            logger.warning("the proof of %s is not kept: %s", version.fingerprint, error.cause)


def _sum(score: "Future[list]") -> float:
    """Of all tokens after the first."""
    return sum(chosen.logprob for chosen in score.result()[1:])


@functools.cache
def _version() -> str:
    return metadata.version("loralab")


def _hash(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
