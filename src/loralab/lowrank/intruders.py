"""Intruder dimensions: directions that an adapted weight has and its base knows nothing of.

Shuttleworth et al. 2024, "LoRA vs Full Fine-tuning: An Illusion of Equivalence", 2410.21228. They
go with forgetting; shrinking them brings the base's own abilities back.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from loralab.lowrank.dense import Dense, dense_svd
from loralab.lowrank.factors import Number

TOP, EPSILON = 10, 0.5  # the paper's


@dataclass(frozen=True, eq=False)
class Intrusion:
    """The first left singular vectors y_j of an adapted weight, and where they come from.

    values: the adapted weight's singular values, falling.
    base_cosine: `max_i |cos(y_j, x_i)|` over all left singular vectors x_i of the base.
    delta_cosine: the length of y_j's projection on the delta's outputs, in [0, 1].
    """

    values: Float[Tensor, "top"]
    base_cosine: Float[Tensor, "top"]
    delta_cosine: Float[Tensor, "top"]
    epsilon: Number = EPSILON

    @property
    def intruders(self) -> Bool[Tensor, "top"]:
        """Which are near no direction of the base (the paper's rule) and near the delta's."""
        return self.strangers & (self.delta_cosine >= self.epsilon)

    @property
    def strangers(self) -> Bool[Tensor, "top"]:
        """Which are near no direction of the base: the paper's rule alone.

        Where the base has several nearly equal singular values, the least change turns their
        directions among themselves, and they then are "strangers" without anything new.
        """
        return self.base_cosine < self.epsilon


def intrusion(
    base: Dense,
    adapted: Float[Tensor, "out in"],
    outputs: Float[Tensor, "out rank"],
    *,
    top: int = TOP,
    epsilon: Number = EPSILON,
) -> Intrusion:
    """Looks at the first `top` directions of an adapted weight.

    outputs: orthonormal, the delta's left directions. Only where the base's first `4 * top`
    directions do not settle the largest cosine are all of them computed.
    """
    own = dense_svd(adapted, top)
    cosine = (own.U.mT @ base.svd(4 * top).U).abs()
    largest = cosine.amax(dim=1)
    rest = 1 - cosine.square().sum(dim=1)  # what all other directions together can hold
    if bool((largest.square() < rest).any()):
        largest = (own.U.mT @ base.svd().U).abs().amax(dim=1)
    return Intrusion(
        values=own.S,
        base_cosine=largest,
        delta_cosine=torch.linalg.vector_norm(outputs.mT.to(own.U) @ own.U, dim=0),
        epsilon=epsilon,
    )


def intruder_onset(values: Float[Tensor, "kept"], shape: tuple[int, int], top: int = TOP) -> float:
    """The singular value from which a change unrelated to the base becomes an intruder, estimated.

    values: all singular values s_i of the base, of shape (out, in), falling. A rank-one change of
    size theta in random directions u, v puts a singular value at z where `1 / theta^2 = D(z)`,
    `D = phi_out phi_in` and phi the mean of `z / (z^2 - s_i^2)` over the outputs or inputs; the
    part of its direction that is u is then `-2 phi_out(z) D / D'` (Benaych-Georges and Nadakuditi
    2012, 1103.2221, theorems 2.8 and 2.9). The onset is the first theta whose z is among the base's
    `top` values and of whose direction at least half is u. Within a factor of two of what single
    directions show. 0 for a base of zeros.
    """
    edge = float(values[min(top, len(values)) - 1])
    if edge <= 0:
        return 0.0
    squares = values[top:].double().square().numpy()

    def theta_and_share(z: float) -> tuple[float, float]:
        mean, slope = zip(*(_transform(z, squares, size) for size in shape), strict=True)
        product = mean[0] * mean[1]
        change = mean[0] * slope[1] + mean[1] * slope[0]
        return product**-0.5, -2 * mean[0] * product / change

    low, high = edge, 2 * edge
    while theta_and_share(high)[1] < 0.5:
        high *= 2
    while theta_and_share(low)[1] < 0.5 and high - low > 1e-6 * edge:
        middle = (low + high) / 2
        low, high = (middle, high) if theta_and_share(middle)[1] < 0.5 else (low, middle)
    return theta_and_share(high if low > edge else low)[0]


def _transform(z: float, squares: Float[np.ndarray, "kept"], size: int) -> tuple[float, float]:
    """(phi(z), phi'(z)) of `size` values: those with these squares, and zeros."""
    gaps = np.maximum(z**2 - squares, 1e-9 * z**2)
    zeros = size - len(squares)
    mean = float((z / gaps).sum()) + zeros / z
    slope = -float(((z**2 + squares) / gaps**2).sum()) - zeros / z**2
    return mean / size, slope / size
