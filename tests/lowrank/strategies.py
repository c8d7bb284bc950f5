"""Random factor pairs for the laws."""

import torch
from hypothesis import strategies as st

from loralab.lowrank import Factors

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def random_pair(
    out: int, into: int, rank: int, *, seed: int = 0, scale: float = 1.0, dtype=torch.float64
) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, into, generator=generator, dtype=torch.float64).to(dtype)
    B = torch.randn(out, rank, generator=generator, dtype=torch.float64).to(dtype)
    return Factors(A=A, B=B, scale=scale)


@st.composite
def pairs(draw, count: int | None = None, dtypes=DTYPES) -> list[Factors]:
    """Pairs of one (out, in), each of its own rank, scale and dtype."""
    out, into = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    number = count or draw(st.integers(1, 4))
    return [
        random_pair(
            out,
            into,
            draw(st.integers(1, 9)),
            seed=draw(st.integers(0, 2**16)),
            scale=draw(st.sampled_from([0.5, 2.0, -1.0, 1 / 3])),
            dtype=draw(st.sampled_from(dtypes)),
        )
        for _ in range(number)
    ]


def dense(pair: Factors) -> torch.Tensor:
    """The oracle: the delta in fp64."""
    return pair.scale * pair.B.double() @ pair.A.double()


def tolerance(*pairs: Factors) -> float:
    """Rounding error that a thin product may have, relative to the norms of the factors."""
    working = [pair.working().A.dtype for pair in pairs]
    eps = 1e-12 if all(dtype == torch.float64 for dtype in working) else 5e-6
    norms = sum(
        abs(p.scale) * float(p.A.double().norm()) * float(p.B.double().norm()) for p in pairs
    )
    return eps * (norms + 1e-30)
