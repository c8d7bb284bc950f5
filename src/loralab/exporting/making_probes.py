"""Making a probe file: a model runs texts with its adapter, without it, and with parts of it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from loralab.adapters import Adapter, adapter_parameters, content_hash, extract, use
from loralab.errors import DataError
from loralab.exporting.probe_file import ADAPTER, BASE, ProbeFile, ServerProbe
from loralab.models import evaluating

# Wrong scales that engines have used: 1 / sqrt(rank), 1 / rank, twice the alpha ...; what lies
# between two of these is found by interpolation.
FACTORS = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0)
MAX_TEXTS = 16
USUAL_TEXTS = 8
MAX_TOKENS = 64
NUM_NEXT = 5  # likeliest next tokens of every variant: as many as a server tells
CONTINUED_TOKENS = 8

TEXTS = (
    "The weather forecast for tomorrow says that",
    "Question: What is the capital of France? Answer:",
    "I watched the film last night, and I have to say that it was",
    "Dear customer, thank you for contacting us about your order.",
    "To compute the area of a circle, multiply the square of its radius by",
    'def add(first, second):\n    """Return the sum."""\n    return',
    "The committee met on Monday to discuss the new budget, which",
    "Once upon a time, in a small village by the sea, there lived",
)


def make_server_probes(
    model: nn.Module,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str] = TEXTS,
    *,
    task: Literal["causal", "classification"] = "causal",
    served_name: str = "",
    base: str = "",
    original: Mapping[str, Any] | None = None,
    tick: Callable[[int], None] = lambda _: None,
) -> ProbeFile:
    """Probes of a model that hosts the exported adapter as `name`; at most 16 texts are used.

    Every variant runs each text alone, in evaluation mode; the adapter is as before afterwards.
    Raises `DataError` where no text has two tokens.
    """
    rows = [_shortened(tokenizer, text) for text in texts[:MAX_TEXTS]]
    rows = [(text, ids) for text, ids in rows if len(ids) > 1]
    if not rows:
        raise DataError("no text of the probes has two tokens", "give longer texts.")
    adapter = extract(model, name)
    scales, variants = _variants(model, name, plain=not adapter.magnitudes)
    logits: dict[str, list[Tensor]] = {}
    with evaluating(model), torch.no_grad():
        for done, (variant, change) in enumerate(variants.items(), start=1):
            with change():
                logits[variant] = [_log_chances(model, ids) for _, ids in rows]
            tick(done)
        probes = tuple(
            _probe(text, ids, {v: found[i] for v, found in logits.items()}, tokenizer, task)
            for i, (text, ids) in enumerate(rows)
        )
        if task == "causal":
            probes = tuple(_continued(probe, model, name, tokenizer) for probe in probes)
    return ProbeFile(
        name=served_name or name,
        base=base,
        task=task,
        adapter_sha256=content_hash(adapter),
        probes=probes,
        scales=scales,
        original=dict(original or {}),
    )


def probe_texts(adapter: Adapter, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Eight texts: of the rows that the adapter was saved with, then neutral ones."""
    own = [
        _decoded(tokenizer, list(probe.input_ids[:MAX_TOKENS]), skip_special_tokens=True)
        for probe in adapter.probes[:USUAL_TEXTS]
    ]
    return tuple(text for text in (*own, *TEXTS) if text.strip())[:USUAL_TEXTS]


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], **options: Any) -> str:
    return str(tokenizer.decode(list(ids), **options))


def _shortened(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[str, tuple[int, ...]]:
    """The text and its tokens; a long one is cut to where it has about 64."""
    ids = tokenizer(text).input_ids
    if len(ids) > MAX_TOKENS:
        text = _decoded(tokenizer, ids[:MAX_TOKENS], skip_special_tokens=True)
        ids = tokenizer(text).input_ids[: MAX_TOKENS + 8]
    return text, tuple(ids)


Change = Callable[[], Any]


def _variants(
    model: nn.Module, name: str, *, plain: bool
) -> tuple[dict[str, float], dict[str, Change]]:
    """Variant -> factor for those that are the adapter at another scale, and what makes each."""
    ups = {p: t for p, t in adapter_parameters(model, name).items() if p.endswith(".B")}
    whole = len(ups) * 2 < len(adapter_parameters(model, name))

    @contextmanager
    def with_factors(factor: Callable[[str], float]) -> Iterator[None]:
        kept = {path: up.detach().clone() for path, up in ups.items()}
        for path, up in ups.items():
            up.mul_(factor(path))
        try:
            with use(model, name):
                yield
        finally:
            for path, up in ups.items():
                up.copy_(kept[path])

    def constant(factor: float) -> Change:
        return lambda: with_factors(lambda _: factor)

    def without(part: str) -> Change:
        return lambda: with_factors(lambda path: 0.0 if f".{part}." in path else 1.0)

    variants: dict[str, Change] = {
        BASE: lambda: use(model, None),
        ADAPTER: lambda: use(model, name),
    }
    # an adapter's own head stays where its pairs are left out, so that is no base
    scales = {"pairs left out" if whole else BASE: 0.0, ADAPTER: 1.0}
    if not plain:  # DoRA: there is no scale between the base and the adapter
        return {BASE: 0.0, ADAPTER: 1.0}, variants
    if whole:
        variants["pairs left out"] = constant(0.0)
    for factor in FACTORS:
        if factor not in (0.0, 1.0):
            scales[f"scale {factor:g}"] = factor
            variants[f"scale {factor:g}"] = constant(factor)
    for part in _parts(ups):
        variants[f"without {part}"] = without(part)
    return scales, variants


def _parts(ups: Mapping[str, Tensor]) -> list[str]:
    """The kinds of modules (`q_proj`), and of what holds them (`mlp`), where there are several."""
    names = [path.split(".adapters.")[0].split(".") for path in ups]
    found = []
    for place in (-1, -2):
        kinds = sorted({name[place] for name in names if len(name) >= -place})
        found += [kind for kind in kinds if len(kinds) > 1 and not kind.isdigit()]
    return found


def _log_chances(model: nn.Module, ids: Sequence[int]) -> Tensor:
    """Log-probabilities of one text (tokens, vocabulary), or of a classifier's labels (labels,)."""
    device = next(model.parameters()).device
    inputs = torch.tensor([list(ids)], device=device)
    logits = model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits
    return logits[0].double().log_softmax(-1).cpu()


def _probe(
    text: str,
    ids: tuple[int, ...],
    chances: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    task: str,
) -> ServerProbe:
    if task == "classification":
        labels = tuple((i, str(i)) for i in range(chances[BASE].shape[-1]))
        return ServerProbe(
            text, ids, labels, {}, {v: tuple(row.tolist()) for v, row in chances.items()}
        )
    following = torch.tensor(ids[1:])
    tokens = {
        variant: tuple(rows[:-1].gather(-1, following[:, None])[:, 0].tolist())
        for variant, rows in chances.items()
    }
    num_next = min(NUM_NEXT, chances[BASE].shape[-1])
    likely = [rows[-1].topk(num_next).indices for rows in chances.values()]
    choices = torch.unique(torch.cat(likely))
    named = tuple((int(number), _decoded(tokenizer, [int(number)])) for number in choices)
    then = {variant: tuple(rows[-1, choices].tolist()) for variant, rows in chances.items()}
    return ServerProbe(text, ids, named, tokens, then)


def _continued(
    probe: ServerProbe, model: nn.Module, name: str, tokenizer: PreTrainedTokenizerBase
) -> ServerProbe:
    """The probe with what follows it greedily, for servers that tell no log-likelihoods."""
    found = {}
    for variant, route in ((BASE, None), (ADAPTER, name)):
        ids = list(probe.token_ids)
        with use(model, route):
            for _ in range(CONTINUED_TOKENS):
                ids.append(int(_log_chances(model, ids)[-1].argmax()))
        found[variant] = _decoded(tokenizer, ids[len(probe.token_ids) :])
    return ServerProbe(probe.text, probe.token_ids, probe.choices, probe.tokens, probe.next, found)
