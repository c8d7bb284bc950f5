"""The figures of one changed weight, from its change and, where it is at hand, from its base.

Everything is computed from the change `delta` itself, so that rewriting (B, A) as (B M, M^-1 A)
changes no figure; only `norm_A`, `norm_B` and `balance` are of the factors.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from loralab.lowrank import (
    SVD,
    Dense,
    effective_rank,
    energy,
    intruder_onset,
    intrusion,
    stable_rank,
)

MAX_VALUES = 256  # of a full-rank change that are kept for charts


@dataclass(frozen=True)
class BaseFigures:
    """What a change is to the weight it is added to.

    relative_norm: `||delta||_F / ||W||_F`; relative_spectral_norm: `s_1(delta) / s_1(W)`.
    along_delta, along_own, along_random: `||U' W V||_F` for the delta's directions, for the base's
        first ones, and expected for random ones (Hu et al. 2021, table 7).
    amplification: `||delta||_F / along_delta`: how much stronger the delta acts along its own
        directions than the base did. None where the base has nothing there.
    intruders, strangers, onset: see `loralab.lowrank.intruders`; None where the base's directions
        were not computed.
    onset_scale: times the delta, at which its first direction would become an intruder.
    magnitude_change: DoRA's `m / ||W + s B A||` a row: least, mean and greatest.
    """

    weight_norm: float
    weight_spectral_norm: float | None
    relative_norm: float
    relative_spectral_norm: float | None
    along_delta: float
    along_own: float | None
    along_random: float
    amplification: float | None
    intruders: int | None
    strangers: int | None
    onset: float | None
    onset_scale: float | None
    magnitude_change: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class ModuleFigures:
    """One changed weight. `rank` and the factors' norms are None for a change of full rank.

    directions_90, directions_99: how many directions hold that share of `||delta||_F^2`.
    balance: `||B||_2 / ||A||_2`, of the factors as they are stored.
    notes: what of this has another meaning here, or none, and why.
    """

    module: str
    block: int | None
    kind: str
    layer_kind: str
    shape: tuple[int, int]
    num_parameters: int
    num_bytes: int
    singular_values: tuple[float, ...]
    norm: float
    spectral_norm: float
    numerical_rank: int
    directions_90: int
    directions_99: int
    effective_rank: float
    stable_rank: float
    rank: int | None = None
    scale: float | None = None
    norm_A: float | None = None  # noqa: N815  (A and B are the factors' names)
    norm_B: float | None = None  # noqa: N815
    balance: float | None = None
    base: BaseFigures | None = None
    notes: tuple[str, ...] = ()


def spectrum_figures(svd: SVD) -> dict[str, Any]:
    """The fields of `ModuleFigures` that are functions of the delta's singular values."""
    held = energy(svd.S)
    changes = svd.numerical_rank > 0
    return {
        "singular_values": tuple(svd.S[:MAX_VALUES].tolist()),
        "norm": float(torch.linalg.vector_norm(svd.S.double())),
        "spectral_norm": float(svd.S[0]) if len(svd.S) else 0.0,
        "numerical_rank": svd.numerical_rank,
        "directions_90": _directions(held, 0.90) if changes else 0,
        "directions_99": _directions(held, 0.99) if changes else 0,
        "effective_rank": effective_rank(svd.S),
        "stable_rank": stable_rank(svd.S),
    }


def base_figures(
    svd: SVD,
    weight: Float[Tensor, "out in"],
    adapted: Float[Tensor, "out in"],
    outputs: Float[Tensor, "out _rank"],
    *,
    directions: bool = True,
    magnitude_change: tuple[float, float, float] | None = None,
) -> BaseFigures:
    """Figures of a delta against its base weight (both fp32).

    adapted: the weight with the change in it; outputs: an orthonormal basis of what the change can
    put out. `directions=False` leaves out what needs the base's SVD: milliseconds, not tenths.
    """
    kept = svd.numerical_rank
    U, S, Vh = svd.U[:, :kept], svd.S[:kept], svd.Vh[:kept]
    norm, weight_norm = float(torch.linalg.vector_norm(S)), _norm(weight)
    along = float(torch.linalg.matrix_norm(U.mT @ weight @ Vh.mT)) if kept else 0.0
    found: dict[str, Any] = dict.fromkeys(
        (
            "weight_spectral_norm",
            "relative_spectral_norm",
            "along_own",
            "intruders",
            "strangers",
            "onset",
            "onset_scale",
        )
    )
    if directions:
        found = _directions_figures(svd, Dense(weight), adapted, outputs)
    return BaseFigures(
        weight_norm=weight_norm,
        relative_norm=norm / weight_norm if weight_norm > 0 else 0.0,
        along_delta=along,
        along_random=kept * weight_norm / (weight.shape[0] * weight.shape[1]) ** 0.5,
        amplification=norm / along if along > 0 else None,
        magnitude_change=magnitude_change,
        **found,
    )


def _directions_figures(
    svd: SVD,
    base: Dense,
    adapted: Float[Tensor, "out in"],
    outputs: Float[Tensor, "out _rank"],
) -> dict[str, Any]:
    first, strongest = float(svd.S[0]) if len(svd.S) else 0.0, float(base.values[0])
    onset = intruder_onset(base.values, (adapted.shape[0], adapted.shape[1]))
    seen = intrusion(base, adapted, outputs) if first > 0 else None
    return {
        "weight_spectral_norm": strongest,
        "relative_spectral_norm": first / strongest if strongest > 0 else 0.0,
        "along_own": float(torch.linalg.vector_norm(base.values[: svd.numerical_rank])),
        "intruders": int(seen.intruders.sum()) if seen else 0,
        "strangers": int(seen.strangers.sum()) if seen else 0,
        "onset": onset,
        "onset_scale": onset / first if first > 0 else None,
    }


def _directions(held: Float[Tensor, "kept"], share: float) -> int:
    return min(int((held < share).sum()) + 1, len(held))


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
