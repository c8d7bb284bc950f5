"""The singular values and directions of whole weights, through the Gram matrix of the short side.

A base weight has no factors. Its Gram matrix is as small as the weight's short side, whatever its
long one; in fp64 it gives values and directions more exactly than a dense SVD in fp32 does.
"""

import torch
from jaxtyping import Float
from scipy import linalg
from torch import Tensor

from loralab.errors import AdapterError
from loralab.lowrank.spectra import SVD

BLOCK_ELEMENTS = 1 << 22  # of a weight that are in fp64 at once: 32 MiB


def dense_svd(matrix: Float[Tensor, "out in"], num_directions: int | None = None) -> SVD:
    """The thin SVD of a whole matrix, or its first `num_directions`, in fp32.

    Values below 1e-8 of the largest are rounding error. A 1536 x 576 weight takes 60 ms (20 ms for
    10 directions). Raises `AdapterError` for NaN and Inf.
    """
    short = min(matrix.shape)
    kept = short if num_directions is None else min(num_directions, short)
    squares, vectors = _eigen(_gram(matrix), kept)
    values = squares.clamp_min(0).sqrt()
    vectors, across = vectors.to(torch.float32), matrix.to(torch.float32)
    # a direction without a value is any: divided by one, it stays (near) zero
    divisor = values.masked_fill(values <= values.max() * 1e-8, 1.0).to(torch.float32)
    if matrix.shape[0] <= matrix.shape[1]:
        U, Vh = vectors, (vectors.mT @ across) / divisor[:, None]
    else:
        U, Vh = (across @ vectors) / divisor, vectors.mT
    return SVD(U=U, S=values.to(torch.float32), Vh=Vh)


def _gram(matrix: Float[Tensor, "out in"]) -> Float[Tensor, "short short"]:
    """`M M'` or `M' M`, whichever is smaller, in fp64 by blocks of the long side."""
    tall = matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix
    height = max(1, BLOCK_ELEMENTS // max(1, tall.shape[1]))
    total = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64)
    for start in range(0, tall.shape[0], height):
        block = tall[start : start + height].double()
        total.addmm_(block.mT, block)
    if not bool(torch.isfinite(total).all()):
        raise AdapterError("a weight holds NaN or Inf", "fetch or train the model again.")
    return total


def _eigen(
    gram: Float[Tensor, "short short"], kept: int
) -> tuple[Float[Tensor, "kept"], Float[Tensor, "short kept"]]:
    """The `kept` largest eigenvalues, falling, and their vectors."""
    size = len(gram)
    if kept == size:
        values, vectors = torch.linalg.eigh(gram)
    else:  # LAPACK's solver for a part of the spectrum, several times faster
        some = linalg.eigh(gram.numpy(), subset_by_index=(size - kept, size - 1))
        values, vectors = (torch.from_numpy(part) for part in some)
    return values.flip(0), vectors.flip(1)
