"""`loralab evaluate --forgetting`: what an adapter costs its base, and the dial to turn it down."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from loralab.adapters import Adapter, Decomposed, write_adapter
from loralab.config import DataSection
from loralab.data import Encoded, Example, encode, halves, load_dataset, load_rows, sample
from loralab.errors import ConfigError, DataError, ModelError
from loralab.events import Listener, Phase, Progress, ignore
from loralab.evidence import (
    Dial,
    DialPoint,
    RowScores,
    forgetting_curve,
    forgetting_verdict,
    gain_and_loss,
)
from loralab.files import write_json
from loralab.lowrank import Dense, intruder_onset
from loralab.models import StoredWeights, load_tokenizer
from loralab.reports import write_forgetting_report
from loralab.runs.evaluate import FILE_SUFFIXES
from loralab.runs.folder import refuse_existing
from loralab.runs.rank_measuring import decompose
from loralab.runs.subject import (
    FEWEST_ROWS,
    HeldOut,
    Subject,
    groups_of,
    held_out,
    open_subject,
)

BUDGET = 0.02
"""Nats a token: the perplexity of the text to keep rises by 2 %."""

SCALES = (0.25, 0.5, 0.75, 1.0, 1.25)
CAPS = (0.25, 0.5, 1.0, 2.0)
KEPT_ROWS, KEPT_TOKENS = 128, 128
TASK_ROWS = 256


def forgetting(
    source: str | Path,
    keep: str,
    *,
    data: str | None = None,
    base: str | None = None,
    budget: float = BUDGET,
    output: str | Path | None = None,
    listen: Listener = ignore,
) -> dict[str, Any]:
    """What the adapter of `source` forgets of the text `keep`, and the setting that forgets less.

    source: a finished LoRA run, or an adapter's folder with `base` and `data` (task rows). keep:
    a text file (paragraphs are rows), any other file of rows, or a data set's name. budget: nats
    a token that may be forgotten. output: a new folder for the chosen adapter, forgetting.json
    and report.html.

    Returns the document that docs/forgetting.md describes. Raises `ModelError` for a base that is
    no language model, and any other `LoralabError`.
    """
    if not budget > 0:
        raise ConfigError(
            f"--budget {budget:g} nats: no adapter forgets that little for certain",
            f"give a budget above 0; {BUDGET:g} is the default.",
        )
    if output is not None:
        refuse_existing(Path(output))
    subject = open_subject(source, base=base, data=data)
    whole = decompose(subject)
    reader = _language_model(subject)
    kept = _kept_rows(subject, keep)
    rows = _fewer(held_out(subject, data, listen))
    meter = _Meter(subject, reader, rows, kept)
    weaker = list(_weakened(whole, subject.config.model.name, listen))
    listen(Phase("settings", len(weaker), "adapters"))
    none = meter.point(Weakened("scale", 0.0, whole.scaled(0.0)))
    measured = []
    for done, one in enumerate(weaker, start=1):
        measured.append(meter.point(one))
        listen(Progress(done))
    points = forgetting_curve(
        none.task,
        none.keep,
        measured,
        budget,
        task_groups=groups_of(rows.choose),
        keep_groups=groups_of(kept.choose),
    )
    index = next((i for i, point in enumerate(points) if point["chosen"]), None)
    chosen = None
    if index is not None:
        listen(Phase("confirming on fresh rows"))
        chosen = {**points[index], "confirm": meter.confirmed(whole, weaker[index])}
    document: dict[str, Any] = {
        "source": subject.source,
        "base": subject.config.model.name,
        "keep": keep,
        "unit": "nats a token" if subject.config.model.task == "causal" else "nats a row",
        "budget": budget,
        "rows": {"task": rows.facts(), "keep": kept.facts()},
        "before": {"task": none.task.figures(), "keep_nll": none.keep.figures()["nll"]},
        "points": points,
        "chosen": chosen,
    }
    document["verdict"] = forgetting_verdict(document)
    if output is not None:
        adapter = subject.adapter if index is None else weaker[index].adapter
        _store(subject, adapter, rows, document, Path(output))
    return document


@dataclass(frozen=True)
class Weakened:
    """What a dial at `value` makes of the adapter."""

    dial: Dial
    value: float
    adapter: Adapter


@dataclass(frozen=True)
class _Meter:
    """Scores of adapters on task rows, and as language models on the text to keep."""

    subject: Subject
    reader: Subject
    rows: HeldOut
    kept: HeldOut

    def point(self, one: Weakened, *, fresh: bool = False) -> DialPoint:
        """On the choosing rows, or the fresh ones."""
        rows = self.rows.confirm if fresh else self.rows.choose
        kept = self.kept.confirm if fresh else self.kept.choose
        task = self.subject.scores(one.adapter, rows)
        return DialPoint(one.dial, one.value, task, self._as_language_model(one.adapter, kept))

    def confirmed(self, whole: Decomposed, one: Weakened) -> dict[str, Any]:
        """What the choice gains and forgets on fresh rows."""
        none = self.point(Weakened("scale", 0.0, whole.scaled(0.0)), fresh=True)
        found = gain_and_loss(
            none.task,
            none.keep,
            self.point(one, fresh=True),
            groups_of(self.rows.confirm),
            groups_of(self.kept.confirm),
        )
        return {**found, "rows": len(self.rows.confirm), "keep_rows": len(self.kept.confirm)}

    def _as_language_model(self, adapter: Adapter, rows: Sequence[Encoded]) -> RowScores:
        reader = self.reader
        if reader is self.subject:
            return reader.scores(adapter, rows)
        known = {name for name, _ in reader.model.named_modules()}
        heads = {name for name in adapter.whole_modules if name not in known}
        extra = {n: t for n, t in adapter.extra.items() if n.rpartition(".")[0] not in heads}
        headless = replace(
            adapter,
            extra=extra,
            whole_modules=tuple(n for n in adapter.whole_modules if n not in heads),
            repeated={},
            base=None,  # of the base with the task's head, which this is not
        )
        return reader.scores(headless, rows)


def _language_model(subject: Subject) -> Subject:
    """The base with its language-model head in the place of the task's, loaded.

    Raises `ModelError` where the base has none.
    """
    config = subject.config
    if config.model.task == "causal":
        return subject
    plain = config.replace(model__task="causal", model__pooling="native", model__head_bias=False)
    reader = replace(subject, config=plain, adapter=replace(subject.adapter, probes=()))
    try:
        _ = reader.model
    except ModelError as error:
        raise ModelError(
            f"{config.model.name} is no language model, so it has no log-likelihood of text to"
            f" forget ({error.cause})",
            "measure instead what it does on rows of another task: loralab evaluate RUN --data"
            " ROWS.",
        ) from None
    return reader


def _weakened(whole: Decomposed, base: str, listen: Listener) -> Iterator[Weakened]:
    """The settings of both dials, each from its weakest; caps that change nothing are left out."""
    for scale in SCALES:
        yield Weakened("scale", scale, whole.scaled(scale))
    onsets = _onsets(whole, StoredWeights(base), listen)
    largest = {module: float(whole.svds[module].S[0]) for module in onsets}
    for cap in CAPS:
        limits = {module: cap * onset for module, onset in onsets.items()}
        if any(largest[module] > limit for module, limit in limits.items()):
            yield Weakened("cap", cap, whole.capped(limits))


def _onsets(whole: Decomposed, weights: StoredWeights, listen: Listener) -> dict[str, float]:
    """The size from which a direction of each module is an intruder, where it is known."""
    found = {}
    listen(Phase("the base's singular values", len(whole.svds), "modules"))
    for done, (module, svd) in enumerate(whole.svds.items(), start=1):
        matrix = _matrix(weights, module, (svd.U.shape[0], svd.Vh.shape[1]))
        if matrix is not None and len(svd.S):
            onset = intruder_onset(Dense(matrix).values, (matrix.shape[0], matrix.shape[1]))
            if onset > 0:
                found[module] = onset
        listen(Progress(done))
    return found


def _matrix(
    weights: StoredWeights, module: str, shape: tuple[int, int]
) -> Float[Tensor, "out in"] | None:
    """The module's stored weight as its delta is shaped; None where it is stored otherwise."""
    stored = weights.read(f"{module}.weight")
    if stored is None:
        return None
    flat = stored.float().flatten(1) if stored.ndim > 1 else stored.float()[None]
    if tuple(flat.shape) == shape:
        return flat
    return flat.mT.contiguous() if tuple(flat.mT.shape) == shape else None


def _kept_rows(subject: Subject, keep: str) -> HeldOut:
    """Text to keep, in two halves that share no document and no text."""
    path, name = Path(keep), subject.config.model.name
    if path.suffix.lower() in FILE_SUFFIXES:
        section = DataSection(train=keep)
        examples = list(load_rows(keep, section, task="causal", num_labels=2))
    elif path.is_file():
        examples = _paragraphs(path)
    else:
        dataset = load_dataset(DataSection(name=keep), task="causal", num_labels=2)
        examples = list(dataset.test)
    tokenizer = load_tokenizer(name)
    parts = []
    for part in halves(examples, "keep"):
        encoded = encode(part, tokenizer, task="causal", max_tokens=KEPT_TOKENS) if part else []
        parts.append(sample(encoded, KEPT_ROWS, "keep"))
    if min(map(len, parts)) < FEWEST_ROWS:
        raise DataError(
            f"{keep} has too few rows to measure forgetting on: {sum(map(len, parts))}",
            f"give a text of at least {3 * FEWEST_ROWS} paragraphs, with empty lines between.",
        )
    return HeldOut(parts[0], parts[1], keep)


def _paragraphs(path: Path) -> list[Example]:
    """The paragraphs of a text file, each a row."""
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(
            f"{path} cannot be read as text ({error})", "give a UTF-8 text file."
        ) from None
    parts = [part.strip() for part in re.split(r"\n\s*\n", text) if len(part.split()) > 1]
    return [Example(f"p{i}", f"p{i}", text=part) for i, part in enumerate(parts)]


def _fewer(rows: HeldOut) -> HeldOut:
    """At most 256 rows of each part, so that the dials take minutes."""
    return HeldOut(
        sample(rows.choose, TASK_ROWS, "forgetting"),
        sample(rows.confirm, TASK_ROWS, "forgetting"),
        rows.source,
    )


def _store(
    subject: Subject, adapter: Adapter, rows: HeldOut, document: dict[str, Any], output: Path
) -> None:
    probes = subject.probes(adapter, rows.choose)
    write_adapter(replace(adapter, probes=probes), output / "adapter")
    document["adapter"] = str(output / "adapter")
    document["report"] = str(output / "report.html")
    write_forgetting_report(document, output / "report.html")
    write_json(output / "forgetting.json", document)
