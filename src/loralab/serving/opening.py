"""A model, a folder of adapters and some settings, put together to a running service."""

import logging
import math
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loralab.catalogue import cache_folder
from loralab.errors import ModelError
from loralab.serving.encoder import ModelEncoder
from loralab.serving.engine import Engine
from loralab.serving.fast import FastRunner, Precision, fast_runner
from loralab.serving.http import Keys, Limits, Metrics, Service
from loralab.serving.merged import MergedMode
from loralab.serving.place import EnginePlace
from loralab.serving.plain_runner import PlainRunner
from loralab.serving.precision import TEXTS, precision_cost
from loralab.serving.runner import Runner
from loralab.serving.store import AdapterStore, Registry
from loralab.serving.text import end_tokens

logger = logging.getLogger("loralab")
PROOFS = "proofs"  # in the user's cache
PROMPTS = (  # what an adapter without probes is measured on
    "The film was better than I had expected, and",
    "Write a short answer: what is the capital of France?",
    "Dear customer, thank you for your order. We",
    "def add(first, second):\n    return",
)


@dataclass(frozen=True)
class ServeSettings:
    """What a server is told once, at its start.

    base: the name that requests call the base by.
    max_batch_size: answers written at a time; a sixteenth more of adapters that had none yet.
    max_tokens: of a prompt and its answer together; None: the model's, at most 2048.
    weights: "int8": text is decoded with int8 copies of the base's weights, half the bytes; what
        that costs is measured and said at the start. Adapters stay as they are, apart from them.
    require_probes: adapters that cannot be proved are refused.
    merging: an adapter that is alone for long is merged into the weights meanwhile.
    proofs: where proofs of earlier times lie; None proves at every load.
    """

    base: str
    num_slots: int = 8
    max_batch_size: int = 32
    max_tokens: int | None = None
    weights: Precision = "base"
    require_probes: bool = False
    merging: bool = True
    labels: tuple[str, ...] = ()
    keys: Keys = field(default_factory=Keys)
    limits: Limits = field(default_factory=Limits)
    proofs: Path | None = field(default_factory=lambda: cache_folder() / PROOFS)


@contextmanager
def open_service(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapters: Path | None,
    settings: ServeSettings,
    *,
    aliases: dict[str, str] | None = None,
) -> Iterator[Service]:
    """A service whose engine runs until the `with` ends; answers that are being written are
    finished then.

    adapters: the folder of adapters; None for none.
    aliases: name -> folder in it, where adapters are to have other names than their folders; a
        folder that has one is not served under its own.
    Raises `AdapterError` for a folder that is none, `ModelError` for a model that cannot be served.
    """
    with ExitStack() as stack:
        if adapters is None:
            adapters = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        registry = Registry(adapters)
        metrics = Metrics()
        engine = _engine(model, tokenizer, settings)
        place = EnginePlace(
            engine,
            model,
            prompts=[tuple(tokenizer(text)["input_ids"]) for text in PROMPTS],  # pyright: ignore
            cache=settings.proofs,
            require_probes=settings.require_probes,
            dtype=None if settings.weights == "base" else settings.weights,
        )
        engine.start()
        stack.callback(engine.close)
        aliases = aliases or {}
        hidden = [folder for name, folder in aliases.items() if name != folder]
        store = AdapterStore(
            registry,
            place,
            num_slots=settings.num_slots,
            max_leases=2 * settings.max_batch_size,
            reserved=(settings.base, *hidden),
            on_event=metrics.hear,
        )
        stack.callback(store.close)
        for name, folder in aliases.items():
            store.load(name, folder).result().release()
        read = "" if settings.weights == "base" else f"-{settings.weights}"
        fingerprint = f"{settings.base}{read}@{place.base[:12]}"
        service = Service(
            engine,
            store,
            tokenizer,
            settings.base,
            fingerprint,
            metrics,
            keys=settings.keys,
            limits=settings.limits,
            labels=settings.labels,
            base_head_is_untrained=getattr(model, "_loralab_fresh_head", None) is not None,
        )
        survey = threading.Thread(target=store.survey, name="survey", daemon=True)
        survey.start()
        yield service


def _engine(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: ServeSettings
) -> Engine:
    writes, is_exact = model.get_output_embeddings() is not None, settings.weights == "base"
    longest = _max_tokens(model, settings)
    spare_slots = math.ceil(settings.max_batch_size / 16)
    num_slots = settings.max_batch_size + spare_slots
    runner: Runner | None = None
    if writes:

        def plain() -> Runner:
            return PlainRunner(model, num_slots=num_slots, max_tokens=longest)

        runner = fast_runner(
            model,
            plain,
            num_slots=num_slots,
            max_tokens=longest,
            precision=settings.weights,
        )
        _say_cost(runner, tokenizer)
    elif settings.weights != "base":
        raise ModelError(
            f"{settings.base} writes no text: its classes and vectors are not computed in "
            f"{settings.weights}",
            "serve the weights as they are (`--weights base`).",
        )
    return Engine(
        runner,
        tokenizer,
        encoder=ModelEncoder(model, max_tokens=longest),
        max_waiting=settings.limits.max_in_flight,
        spare_slots=spare_slots,
        eos_ids=end_tokens(model, tokenizer),
        # merged weights would be rounded to whole numbers, and most of an adapter be lost in it
        merging=MergedMode(model) if writes and settings.merging and is_exact else None,
    )


def _say_cost(runner: Runner, tokenizer: PreTrainedTokenizerBase) -> None:
    """What reading the base's weights otherwise than they are costs on some texts, in the log."""
    if not isinstance(runner, FastRunner) or runner.precision == "base":
        return
    texts = [tokenizer(text)["input_ids"][: runner.max_tokens] for text in TEXTS]  # pyright: ignore
    exact = runner.in_base_precision(max(map(len, texts)))
    cost = precision_cost(exact, runner, texts)
    logger.info("weights in %s cost %s", runner.precision, cost)


def _max_tokens(model: PreTrainedModel, settings: ServeSettings) -> int:
    if settings.max_tokens is not None:
        return settings.max_tokens
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", 2048)
    return min(positions, 2048)
