"""How many dimensions a cloud of activations really has, whatever the width of the layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from loralab.errors import DataError

MIN_POINTS = 20


@dataclass(frozen=True)
class Dimension:
    """intrinsic: of the manifold, curved or not, with its 95 % interval; linear: participation
    ratio, how many directions of equal variance would spread as far."""

    intrinsic: float
    low: float
    high: float
    linear: float
    num_points: int


@dataclass(frozen=True)
class LayerDimension:
    """One hidden state, before and after fine-tuning, on the same rows. layer 0: the embeddings."""

    layer: int
    before: Dimension
    after: Dimension


def dimension(points: Float[Tensor, "rows width"]) -> Dimension:
    """The dimension of a cloud of points.

    intrinsic: TwoNN (Facco et al. 2017, Scientific Reports 7:12140): with mu the ratio of the
    distances to the second and the first neighbour, `(N - 1) / sum log mu` is the unbiased
    estimate of its one parameter, and d / sqrt(N) its error. linear: `(sum l)^2 / sum l^2` over
    the eigenvalues of the covariance. Points that coincide count once. Raises `DataError` for
    fewer than 20.
    """
    cloud = np.unique(points.double().numpy(), axis=0)
    if len(cloud) < MIN_POINTS:
        raise DataError(
            f"{len(cloud)} different rows are too few to estimate a dimension from",
            f"give at least {MIN_POINTS}; a few hundred are better.",
        )
    unique = torch.from_numpy(cloud)
    nearest = torch.cdist(unique, unique).topk(3, largest=False).values  # the first is itself
    ratios = (nearest[:, 2] / nearest[:, 1]).log()
    count = len(cloud)
    estimate = float((count - 1) / ratios.sum())
    error = 1.96 * estimate / sqrt(count)
    variances = torch.linalg.svdvals(unique - unique.mean(0)).square()
    linear = float(variances.sum() ** 2 / variances.square().sum())
    return Dimension(estimate, estimate - error, estimate + error, linear, count)


def layer_dimensions(
    before: Sequence[Float[Tensor, "rows width"]], after: Sequence[Float[Tensor, "rows width"]]
) -> tuple[LayerDimension, ...]:
    """The dimensions of each hidden state of the same rows before and after."""
    return tuple(
        LayerDimension(layer, dimension(old), dimension(new))
        for layer, (old, new) in enumerate(zip(before, after, strict=True))
    )
