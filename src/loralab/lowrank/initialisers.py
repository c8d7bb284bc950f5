"""Where training starts: strategies `(weight, rank, scale, generator) -> Start`.

Those that need data are made from it: `eva(spectrum)` and `lora_ga(gradient)` return a strategy.
No strategy touches the weight. Those that move the base say by how much (`Start.base_change`), and
`to_plain` turns what was trained on the moved base into an adapter for the untouched one.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from loralab.errors import AdapterError, nearest
from loralab.lowrank.algebra import linear
from loralab.lowrank.dense import dense_svd
from loralab.lowrank.factors import Factors, Number


@dataclass(frozen=True, eq=False)
class Start:
    """A and B (fp32) at step 0, and what must be added to the base so that its output is kept.

    `base_change` is None where `B @ A` is zero at the start, so that the base stays as it is.
    A and B are contiguous: their layout decides the bits of everything that is computed with them,
    and a decomposition's is not the one that a file gives back.
    """

    A: Float[Tensor, "rank in"]
    B: Float[Tensor, "out rank"]
    base_change: Factors | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "A", self.A.contiguous())
        object.__setattr__(self, "B", self.B.contiguous())


Initialiser = Callable[[Float[Tensor, "out in"], int, Number, Generator | None], Start]


def to_plain(trained: Factors, start: Start) -> Factors:
    """What was trained on the moved base, as a pair for the *untouched* base: exact, no rounding.

    `W - s B_0 A_0 + s B A = W + s [B, -B_0] [A; A_0]`: the rank at most doubles.
    """
    if start.base_change is None:
        return trained
    return linear([trained, start.base_change], [1.0, 1.0])


def kaiming(
    weight: Float[Tensor, "out in"], rank: int, scale: Number, generator: Generator | None = None
) -> Start:
    """A uniform in +-1/sqrt(in), B zero (Hu et al. 2021; `kaiming_uniform_(a=sqrt(5))`)."""
    rows, columns = weight.shape
    bound = 1 / math.sqrt(columns)
    A = _empty(weight, rank, columns).uniform_(-bound, bound, generator=generator)
    return Start(A=A, B=_zeros(weight, rows, rank))


def gaussian(
    weight: Float[Tensor, "out in"], rank: int, scale: Number, generator: Generator | None = None
) -> Start:
    """A normal with std 1/rank, B zero: PEFT's "gaussian", whose first step depends on rank."""
    rows, columns = weight.shape
    A = _empty(weight, rank, columns).normal_(0, 1 / rank, generator=generator)
    return Start(A=A, B=_zeros(weight, rows, rank))


def orthogonal(
    weight: Float[Tensor, "out in"], rank: int, scale: Number, generator: Generator | None = None
) -> Start:
    """Both factors non-zero, their product zero: they use disjoint halves of an orthogonal Q.

    `A = Q_odd' R_1 / 10`, `B = R_2 Q_even / 10` with R normal (PEFT's "orthogonal"; an even rank).
    """
    if rank % 2:
        raise AdapterError(
            f"initialiser 'orthogonal' splits the rank in two halves; rank {rank} is odd",
            f"take rank {rank + 1}.",
        )
    rows, columns = weight.shape
    Q = torch.linalg.qr(_empty(weight, rank, rank).normal_(generator=generator)).Q
    inputs = _empty(weight, rank // 2, columns).normal_(generator=generator) / 10
    outputs = _empty(weight, rows, rank // 2).normal_(generator=generator) / 10
    return Start(A=Q[0::2].mT @ inputs, B=outputs @ Q[1::2])


def pissa(
    weight: Float[Tensor, "out in"], rank: int, scale: Number, generator: Generator | None = None
) -> Start:
    """`B = U sqrt(S/s)`, `A = sqrt(S/s) V'` of the weight's top directions; they leave the base.

    Meng et al. 2024 (2404.02948). Exact; `fast_pissa` is randomised.
    """
    _check_rank("pissa", rank, weight)
    return _split(*_leading(weight, rank), scale)


def fast_pissa(num_iterations: int = 16, oversampling: int = 8) -> Initialiser:
    """PiSSA with a randomised SVD (Halko et al. 2011), refined in so many power iterations."""

    def start(
        weight: Float[Tensor, "out in"],
        rank: int,
        scale: Number,
        generator: Generator | None = None,
    ) -> Start:
        _check_rank("fast pissa", rank, weight)
        matrix = weight.float()
        width = min(rank + oversampling, *matrix.shape)
        probes = _empty(matrix, matrix.shape[1], width).normal_(generator=generator)
        Q = torch.linalg.qr(matrix @ probes).Q
        for _ in range(num_iterations):
            Q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ Q).Q).Q
        U, S, Vh = torch.linalg.svd(Q.mT @ matrix, full_matrices=False)
        return _split((Q @ U)[:, :rank], S[:rank], Vh[:rank], scale)

    return start


def olora(
    weight: Float[Tensor, "out in"], rank: int, scale: Number, generator: Generator | None = None
) -> Start:
    """`B = Q[:, :rank]`, `A = R[:rank]` of the weight's QR decomposition (2406.01775)."""
    _check_rank("olora", rank, weight)
    Q, R = torch.linalg.qr(weight.float())
    return _moving(A=R[:rank].contiguous(), B=Q[:, :rank].contiguous(), scale=scale)


def lora_ga(gradient: Float[Tensor, "out in"], gamma: Number = 16.0) -> Initialiser:
    """A strategy whose first step comes closest to full fine-tuning's (LoRA-GA, 2407.05000).

    With the SVD `G = U S V'` of the weight's gradient: `A = c V'[:rank]`,
    `B = c U[:, rank:2 rank]`, `c = out^(1/4) / sqrt(gamma)`, as in the paper; PEFT multiplies the
    singular values into B as well. Needs 2 rank <= min(out, in).
    """

    def start(
        weight: Float[Tensor, "out in"],
        rank: int,
        scale: Number,
        generator: Generator | None = None,
    ) -> Start:
        if gradient.shape != weight.shape:
            raise AdapterError(
                f"LoRA-GA: the gradient is {tuple(gradient.shape)}, the weight"
                f" {tuple(weight.shape)}",
                "give the gradient of that weight.",
            )
        _check_rank("lora_ga", 2 * rank, weight)
        U, _, Vh = _leading(gradient, 2 * rank)
        factor = weight.shape[0] ** 0.25 / math.sqrt(gamma)
        return _moving(A=factor * Vh[:rank], B=factor * U[:, rank : 2 * rank], scale=scale)

    return start


@dataclass(frozen=True, eq=False)
class InputSpectrum:
    """The top right singular vectors of a layer's inputs, kept up batch by batch."""

    S: Float[Tensor, "kept"]
    Vh: Float[Tensor, "kept in"]
    squared_norm: float  # of all rows seen
    num_rows: int

    @property
    def explained_variance(self) -> Float[Tensor, "kept"]:
        """The share of the inputs' squared norm along each direction."""
        total = max(self.squared_norm, torch.finfo(torch.float32).tiny)
        return self.S.double().square() / total


def input_spectrum(
    inputs: Float[Tensor, "rows in"], kept: int, before: InputSpectrum | None = None
) -> InputSpectrum:
    """The spectrum after these rows: the SVD of `[S V'; inputs]`, cut to `kept` directions.

    Incremental SVD as EVA uses it (2410.07170), without centring: a LoRA's A sees the inputs as
    they are. Exact while no more than `kept` directions have been seen.
    """
    rows = inputs.detach().float()
    stacked = rows if before is None else torch.cat([before.S[:, None] * before.Vh, rows])
    _, S, Vh = _leading(stacked, min(kept, *stacked.shape))
    norm = float(rows.double().square().sum())
    seen = 1e-6 * S.max() < S  # what no input has is no direction
    return InputSpectrum(
        S=S[seen],
        Vh=Vh[seen],
        squared_norm=norm + (before.squared_norm if before else 0.0),
        num_rows=len(rows) + (before.num_rows if before else 0),
    )


def eva(spectrum: InputSpectrum) -> Initialiser:
    """A strategy with A = the top right singular vectors of the layer's inputs, B zero.

    Paischer et al. 2024 (2410.07170). The base stays untouched.
    """

    def start(
        weight: Float[Tensor, "out in"],
        rank: int,
        scale: Number,
        generator: Generator | None = None,
    ) -> Start:
        if rank > len(spectrum.S):
            raise AdapterError(
                f"EVA: rank {rank} needs as many input directions, {len(spectrum.S)} are known",
                "collect more input rows, keep more directions, or take a lower rank.",
            )
        A = spectrum.Vh[:rank].clone()
        return Start(A=A, B=_zeros(weight, weight.shape[0], rank))

    return start


def allocate_ranks(
    explained: Mapping[str, Float[Tensor, "_kept"]], rank: int, max_rank: int | None = None
) -> dict[str, int]:
    """EVA's redistribution: of all modules' directions, those that explain most get the ranks.

    `explained` holds each module's explained variance, falling. The budget is `rank` a module on
    average; no module gets more than `max_rank` (default: 2 rank, EVA's rho = 2), and one may get
    none, which means no adapter there. Equal values go to the module named first.
    """
    limit = 2 * rank if max_rank is None else max_rank
    directions = [
        (-float(value), position, module)
        for position, (module, values) in enumerate(explained.items())
        for value in values[:limit]
    ]
    ranks = dict.fromkeys(explained, 0)
    for _, _, module in sorted(directions)[: rank * len(explained)]:
        ranks[module] += 1
    return ranks


INITIALISERS: dict[str, Initialiser] = {
    "kaiming": kaiming,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
    "pissa": pissa,
    "olora": olora,
}
MOVES_THE_BASE = frozenset({"pissa", "olora", "lora_ga"})
"""Names of those whose `Start` has a `base_change`."""


def initialiser(name: str) -> Initialiser:
    """The strategy of that name. Raises `AdapterError` with the nearest name."""
    if name in INITIALISERS:
        return INITIALISERS[name]
    if name in ("eva", "lora_ga"):
        raise AdapterError(
            f"initialiser {name!r} is made from data",
            "collect inputs (`eva`) or a gradient (`lora_ga`) first and pass the strategy itself.",
        )
    raise AdapterError(f"unknown initialiser {name!r}", nearest(name, INITIALISERS))


def _leading(matrix: Float[Tensor, "out in"], num_directions: int) -> tuple[Tensor, Tensor, Tensor]:
    """(U, S, V') of the first directions, in fp32."""
    if matrix.device.type == "cpu":
        found = dense_svd(matrix.detach(), num_directions)
        return found.U, found.S, found.Vh
    U, S, Vh = torch.linalg.svd(matrix.detach().float(), full_matrices=False)
    return U[:, :num_directions], S[:num_directions], Vh[:num_directions]


def _split(
    U: Float[Tensor, "out rank"],
    S: Float[Tensor, "rank"],
    Vh: Float[Tensor, "rank in"],
    scale: Number,
) -> Start:
    root = (S / scale).sqrt()
    return _moving(A=root[:, None] * Vh, B=U * root, scale=scale)


def _moving(A: Float[Tensor, "rank in"], B: Float[Tensor, "out rank"], scale: Number) -> Start:
    return Start(A=A, B=B, base_change=Factors(A=A.clone(), B=B.clone(), scale=-scale))


def _check_rank(name: str, needed: int, weight: Tensor) -> None:
    if needed > min(weight.shape):
        raise AdapterError(
            f"initialiser {name!r} needs {needed} directions; a weight of"
            f" {weight.shape[0]} x {weight.shape[1]} has {min(weight.shape)}",
            "take a lower rank for this module.",
        )


def _empty(like: Tensor, rows: int, columns: int) -> Tensor:
    return torch.empty(rows, columns, dtype=torch.float32, device=like.device)


def _zeros(like: Tensor, rows: int, columns: int) -> Tensor:
    return torch.zeros(rows, columns, dtype=torch.float32, device=like.device)
