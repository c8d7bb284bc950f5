"""Probes: what an adapted model said when it was saved, and whether a model says it still."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from loralab.adapters import Probe, use
from loralab.data import Encoded, sample
from loralab.errors import AdapterError
from loralab.models import evaluating

NUM_PROBES = 16
MAX_PROBE_TOKENS = 256
LEAST_APPLIED = 0.5  # of the adapter's effect on the probes, below which it was not applied
NOISE_NATS = 1e-3  # a probe: an effect below it proves nothing


def log_likelihoods(
    model: nn.Module, inputs: Sequence[Sequence[int]], *, route: str | None = None
) -> list[float]:
    """The log-likelihood in nats of each input, by the model in evaluation mode.

    Of a causal model: of all tokens after the first, summed; of a classifier: of its most probable
    class. Each input runs alone, without padding. `route` names the adapter in use; None leaves
    the route that is open.
    """
    device = next(model.parameters()).device
    routed: AbstractContextManager[object] = nullcontext() if route is None else use(model, route)
    with evaluating(model), torch.inference_mode(), routed:
        return [_log_likelihood(model, torch.tensor([ids], device=device)) for ids in inputs]


def make_probes(
    model: nn.Module,
    rows: Sequence[Encoded],
    *,
    route: str | None = None,
    count: int = NUM_PROBES,
) -> tuple[Probe, ...]:
    """Probes of `count` of the rows, chosen by the hash of their names, cut to 256 tokens."""
    inputs = [tuple(row.input_ids[:MAX_PROBE_TOKENS]) for row in sample(rows, count, "probes")]
    inputs = [ids for ids in inputs if len(ids) > 1]  # one token has nothing to predict it from
    found = log_likelihoods(model, inputs, route=route)
    return tuple(Probe(ids, value) for ids, value in zip(inputs, found, strict=True))


@dataclass(frozen=True)
class ProbeCheck:
    """What a model says to an adapter's probes: log-likelihoods in nats, one a probe.

    base: what it says with no adapter in use.
    """

    expected: tuple[float, ...]
    found: tuple[float, ...]
    base: tuple[float, ...]

    @property
    def largest_error(self) -> float:
        """The largest difference between found and expected, in nats."""
        return max(_errors(self.found, self.expected), default=0.0)

    @property
    def applied_share(self) -> float | None:
        """1 where every answer is the expected one, 0 where they are no nearer than the base's.

        None where the base's answers are the expected ones too: the probes prove nothing.
        """
        effect = sum(_errors(self.base, self.expected))
        if effect <= NOISE_NATS * len(self.expected):
            return None
        return max(0.0, 1 - sum(_errors(self.found, self.expected)) / effect)


def check_probes(model: nn.Module, probes: Sequence[Probe], route: str) -> ProbeCheck:
    """Run an attached adapter's probes along its route and along none.

    Raises `AdapterError` where the answers are nearer to the base's than to the expected ones: the
    adapter is hosted, and yet not applied (or to another model than the one it was trained on).
    """
    inputs = [probe.input_ids for probe in probes]
    found = log_likelihoods(model, inputs, route=route)
    with use(model, None):
        base = log_likelihoods(model, inputs)
    expected = tuple(float(probe.log_likelihood) for probe in probes)
    check = ProbeCheck(expected, tuple(found), tuple(base))
    share = check.applied_share
    if share is not None and share < LEAST_APPLIED:
        raise AdapterError(
            f"adapter {route!r} is loaded, but on its {len(probes)} probes the model answers "
            f"{check.largest_error:.3g} nats away from what it said when the adapter was saved "
            f"({share:.0%} of the effect is there)",
            "load the base it was trained on, with the same task, pooling and dtype.",
        )
    return check


def _log_likelihood(model: nn.Module, ids: Int[Tensor, "1 tokens"]) -> float:
    mask = torch.ones_like(ids)
    chances = model(input_ids=ids, attention_mask=mask).logits.double().log_softmax(-1)
    if chances.ndim == 2:
        return float(chances.max())
    return float(chances[0, :-1].gather(-1, ids[0, 1:, None]).sum())


def _errors(found: Sequence[float], expected: Sequence[float]) -> list[float]:
    return [abs(one - other) for one, other in zip(found, expected, strict=True)]
