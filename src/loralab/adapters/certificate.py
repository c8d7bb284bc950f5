"""What a merge cost: a value that travels with the merged model."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from loralab.adapters.effect import Effect
from loralab.errors import AdapterError

LIMIT = 0.5  # of the adapter's effect that a merge may lose


@dataclass(frozen=True)
class MergeCertificate:
    """The evidence of one merge.

    dtype: of the merged weights; several are joined with "+".
    relative_error: `||merged - (W + delta)||_F / ||delta||_F` over all adapted weights.
    unchanged_share: the share of adapted weights that the rounding left as they were.
    logit_kl, top1_agreement, effect_kept: on probes, against the adapter applied in fp32; None
        where nothing was probed. `effect_kept` is 1 - logit_kl / adapter_kl: 1 when the merged
        model is the adapted one, 0 when it is at least as far off as the base alone.
    adapter_kl: the adapter's own effect, KL(reference, base), both in fp32 (nats a position).
    separate_effect_kept: `effect_kept` of the adapter kept apart from the base, in its dtype.
    base_sha256, adapter_sha256: of the contents, whatever files hold them.
    limit, forced: the share of the effect that was allowed to be lost, and whether more was lost.
    """

    dtype: str
    relative_error: float
    unchanged_share: float
    num_weights: int
    base_sha256: str
    adapter_sha256: str
    logit_kl: float | None = None
    adapter_kl: float | None = None
    top1_agreement: float | None = None
    effect_kept: float | None = None
    separate_effect_kept: float | None = None
    num_positions: int = 0
    limit: float = LIMIT
    forced: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @property
    def lost(self) -> float:
        """The share of the effect that was lost: on probes where there are any, else in weights."""
        return self.relative_error if self.effect_kept is None else 1 - self.effect_kept


def effect_facts(effect: Effect | None) -> dict[str, Any]:
    """The certificate's entries about what was measured on probes."""
    if effect is None:
        return {}
    return {
        "logit_kl": effect.kl_merged,
        "adapter_kl": effect.kl_base,
        "top1_agreement": effect.top1_agreement,
        "effect_kept": effect.kept(effect.kl_merged),
        "separate_effect_kept": effect.kept(effect.kl_separate),
        "num_positions": effect.num_positions,
    }


def check_limit(certificate: MergeCertificate, name: str) -> None:
    """Raises `AdapterError` where more than the limit was lost, with what would keep it."""
    if certificate.lost <= certificate.limit or certificate.forced:
        return
    share = f"{certificate.lost:.0%} of the effect of {name!r}"
    measured = (
        "as the weights' rounding error over the delta"
        if certificate.effect_kept is None
        else f"on {certificate.num_positions} probe positions"
    )
    raise AdapterError(
        f"merging in {certificate.dtype} would lose {share} ({measured}; the limit is"
        f" {certificate.limit:.0%}, {certificate.unchanged_share:.0%} of the weights would not"
        " change at all)",
        f"{_ways_out(certificate)} Or pass force=True to merge all the same.",
    )


def _ways_out(certificate: MergeCertificate) -> str:
    higher = "load the base in float32 and merge there"
    separate = certificate.separate_effect_kept
    if separate is not None and 1 - separate > certificate.limit:
        return f"{higher}: in {certificate.dtype} even the separate adapter loses its effect."
    if certificate.dtype == "float32":
        return "keep the adapter separate (`loralab.use`)."
    return f"keep the adapter separate (`loralab.use`), or {higher}."


def content_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        if value.numel():
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
