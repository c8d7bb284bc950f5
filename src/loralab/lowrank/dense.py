"""The singular values and directions of whole weights, through the Gram matrix of the short side.

A base weight has no factors. Its Gram matrix is as small as the weight's short side, whatever its
long one; in fp64 it gives values and directions more exactly than a dense SVD in fp32 does.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
from jaxtyping import Float
from scipy import linalg
from threadpoolctl import ThreadpoolController
from torch import Tensor

from loralab.errors import AdapterError
from loralab.lowrank.spectra import SVD

SMALL = 1024  # a side up to which a second thread brings less than waking it costs
(_syrk,) = linalg.get_blas_funcs(("syrk",), dtype=np.float64)
BLOCK_ELEMENTS = 1 << 22  # of a weight that are in fp64 at once: 32 MiB


@dataclass(frozen=True, eq=False)
class Dense:
    """A whole weight (out, in) on the CPU, whose Gram matrix is made once.

    Values below 1e-8 of the largest are rounding error. Everything raises `AdapterError` for a
    weight with NaN or Inf.
    """

    matrix: Float[Tensor, "out in"]

    @cached_property
    def values(self) -> Float[Tensor, "short"]:
        """All singular values, falling; a third of the time of `svd`."""
        with _threads(self.matrix):
            squares = linalg.eigvalsh(self.gram, lower=False, check_finite=False)
        return torch.from_numpy(squares[::-1].copy()).clamp_min(0).sqrt().to(torch.float32)

    def svd(self, num_directions: int | None = None) -> SVD:
        """The thin SVD, or its first `num_directions`, in fp32.

        A 1536 x 576 weight takes a core 80 ms, its first ten directions 40 ms.
        """
        short = min(self.matrix.shape)
        kept = short if num_directions is None else min(num_directions, short)
        some = None if kept == short else (short - kept, short - 1)
        with _threads(self.matrix):
            found = linalg.eigh(self.gram, lower=False, subset_by_index=some, check_finite=False)
        squares, columns = (torch.from_numpy(part).flip(-1) for part in found)
        values = squares.clamp_min(0).sqrt()
        vectors, across = columns.to(torch.float32), self.matrix.to(torch.float32)
        # a direction without a value is any: divided by one, it stays (near) zero
        divisor = values.masked_fill(values <= values.max() * 1e-8, 1.0).to(torch.float32)
        if self.matrix.shape[0] <= self.matrix.shape[1]:
            U, Vh = vectors, (vectors.mT @ across) / divisor[:, None]
        else:
            U, Vh = (across @ vectors) / divisor, vectors.mT
        return SVD(U=U, S=values.to(torch.float32), Vh=Vh)

    @cached_property
    def gram(self) -> Float[np.ndarray, "short short"]:
        """The upper triangle of `M M'` or `M' M`, whichever is smaller, in fp64.

        Summed over blocks of the long side.
        """
        out, into = self.matrix.shape
        short, long = min(out, into), max(out, into)
        width = max(1, BLOCK_ELEMENTS // max(1, short))
        upper = np.zeros((short, short), order="F")
        for start in range(0, long, width):
            part = slice(start, start + width)
            block = self.matrix[:, part] if out <= into else self.matrix[part]
            columns = block.double().contiguous().numpy().T  # as LAPACK lays them out
            with _threads(self.matrix):
                upper = _syrk(1.0, columns, trans=out <= into, beta=1.0, c=upper, overwrite_c=True)
        if not np.isfinite(upper).all():
            raise AdapterError("a weight holds NaN or Inf", "fetch or train the model again.")
        return upper


def dense_svd(matrix: Float[Tensor, "out in"], num_directions: int | None = None) -> SVD:
    """`Dense(matrix).svd(num_directions)`."""
    return Dense(matrix).svd(num_directions)


def _threads(matrix: Tensor) -> AbstractContextManager[object]:
    """One thread for small matrices: the pools of torch and LAPACK else wait on one another."""
    return _controller().limit(limits=1) if min(matrix.shape) <= SMALL else nullcontext()


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()
