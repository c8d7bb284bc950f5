"""What an adapter does to a model's outputs, and how much of it a merged model still does."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from loralab.adapters.probes import Probe
from loralab.errors import AdapterError

ProbeInput = Any  # a text, the model's keyword inputs, its positional inputs, or one input tensor


@dataclass(frozen=True)
class Effect:
    """Mean KL divergences (nats a position) from the adapter applied in fp32, the reference.

    kl_base is the adapter's own effect: how far the base alone is from the reference.
    """

    kl_merged: float
    kl_separate: float
    kl_base: float
    top1_agreement: float
    num_positions: int

    def kept(self, divergence: float) -> float:
        """`1 - divergence / kl_base`, at least 0; 1 for an adapter that changes nothing."""
        if self.kl_base <= 0:
            return 1.0
        return max(0.0, 1 - divergence / self.kl_base)


def measure_effect(
    reference: Callable[[Any], Any],
    merged: Callable[[Any], Any],
    separate: Callable[[Any], Any],
    base: Callable[[Any], Any],
    batches: Sequence[Any],
) -> Effect:
    """Runs all four on every batch. Padding (attention mask 0) does not count."""
    sums = torch.zeros(4, dtype=torch.float64)
    positions = 0
    for batch in batches:
        truth = _logits(reference(batch))
        real = _real_positions(batch, truth)
        outputs = [_logits(run(batch)) for run in (merged, separate, base)]
        expected = truth[real].log_softmax(-1)
        for index, logits in enumerate(outputs):
            found = logits[real].log_softmax(-1)
            sums[index] += (expected.exp() * (expected - found)).sum()
        sums[3] += (outputs[0][real].argmax(-1) == truth[real].argmax(-1)).sum()
        positions += int(real.sum())
    kl_merged, kl_separate, kl_base, agreement = (float(s) / positions for s in sums)
    return Effect(kl_merged, kl_separate, kl_base, agreement, positions)


def batches_of(model: nn.Module, probes: Sequence[ProbeInput]) -> list[Any]:
    """Probes as model inputs. Texts go through the tokenizer that the model's folder holds.

    Raises `AdapterError` for texts where no tokenizer is known, and for no probes at all.
    """
    if not probes:
        raise AdapterError("the list of probes is empty", "give texts or model inputs, or None.")
    device = next(model.parameters()).device
    tokenizer = _tokenizer(model) if any(isinstance(probe, str) for probe in probes) else None

    def as_input(probe: ProbeInput) -> Any:
        if isinstance(probe, Probe):
            return {"input_ids": torch.tensor([probe.input_ids], device=device)}
        if isinstance(probe, str) and tokenizer is not None:
            return dict(tokenizer(probe, return_tensors="pt").to(device))
        return probe

    return [as_input(probe) for probe in probes]


def runner(model: nn.Module) -> Callable[[Any], Any]:
    """Runs a model on a batch: a mapping as keywords, a tuple as positions, else as it is."""

    def run(batch: Any) -> Any:
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(*batch) if isinstance(batch, tuple | list) else model(batch)

    return run


def _tokenizer(model: nn.Module) -> Any:
    from transformers import AutoTokenizer  # slow to import, and only texts need it

    where = getattr(getattr(model, "config", None), "_name_or_path", "")
    try:
        return AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"probe texts need the model's tokenizer, and {where or 'this model'!r} brings none"
            f" ({type(error).__name__})",
            "give tokenized inputs instead: a list of mappings such as {'input_ids': ...}.",
        ) from None


def _logits(output: Any) -> Float[Tensor, "*positions classes"]:
    """The first floating-point tensor of an output, preferably called logits, in fp64.

    Divergences of small adapters are far below the rounding error of fp32.
    """
    return next(_candidates(output)).detach().double()


def _candidates(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
        return
    named = getattr(output, "logits", None)
    if isinstance(named, Tensor):
        yield named
    values = output.values() if isinstance(output, Mapping) else output
    yield from (v for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.ndim)


def _real_positions(batch: Any, logits: Tensor) -> Bool[Tensor, "*positions"]:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is not None and mask.shape == logits.shape[:-1]:
        return mask.bool()
    return torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
