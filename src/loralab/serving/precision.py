"""What decoding with coarser weights costs: the same texts, read by two runners."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from loralab.serving.requests import Entry
from loralab.serving.runner import Chunk, Runner

TEXTS = (  # what a server measures itself on when it starts
    "The ferry leaves the harbour at seven in the morning and comes back after dark. On board "
    "there is a small kitchen that sells soup, bread and coffee. Most passengers sleep through the "
    "first hour; the others stand at the railing and watch the islands go by, one after another, "
    "until the last lighthouse is out of sight.",
    "def read_lines(path):\n    with open(path) as file:\n        lines = [line.strip() for line "
    "in file]\n    return [line for line in lines if line and not line.startswith('#')]\n\n\n"
    "print(len(read_lines('settings.txt')))\n",
    "Question: A train travels 120 kilometres in one hour and a half. How fast is it on average?\n"
    "Answer: The average speed is the distance divided by the time. 120 divided by 1.5 is 80, so "
    "the train travels at 80 kilometres per hour.",
    "I ordered two of these lamps in March. The first one arrived broken, and it took four weeks "
    "until somebody answered my letters. The second one works, but the switch is loose and the "
    "light is much weaker than the picture promises. For this price I had expected more, and I "
    "would not buy from this company again.",
)


@dataclass(frozen=True)
class PrecisionCost:
    """How far the answers of the coarser runner are from the exact one's, a token.

    nats: log-likelihood of the texts that is lost (negative: gained), with its standard error over
        texts. divergence: mean Kullback-Leibler divergence from the exact distribution, in nats.
    spread: root of the mean square of single tokens' differences, in nats.
    agreement: share of places where both find the same token the likeliest.
    """

    num_tokens: int
    nats: float
    standard_error: float
    spread: float
    divergence: float
    agreement: float

    def __str__(self) -> str:
        return (
            f"{self.nats:+.4f} +- {self.standard_error:.4f} nats a token on {self.num_tokens} "
            f"tokens, divergence {self.divergence:.4f}, the likeliest token the same at "
            f"{self.agreement:.1%} of places"
        )


def precision_cost(
    exact: Runner, coarse: Runner, texts: Sequence[Sequence[int]], entry: Entry = None
) -> PrecisionCost:
    """Reads every text (token ids, at least two each) with both runners, through their slot 0.

    Raises `ValueError` for fewer than two texts.
    """
    if len(texts) < 2:
        raise ValueError("a standard error over texts needs two of them")
    lost, divergence, same = [], [], []
    for ids in texts:
        log_p, log_q = (_log_probabilities(each, ids, entry) for each in (exact, coarse))
        following = torch.tensor(ids[1:])[:, None]
        lost.append((log_p.gather(1, following) - log_q.gather(1, following))[:, 0])
        divergence.append((log_p.exp() * (log_p - log_q)).sum(-1))
        same.append(log_p.argmax(-1) == log_q.argmax(-1))
    all_lost = torch.cat(lost)
    return PrecisionCost(
        num_tokens=len(all_lost),
        nats=float(all_lost.mean()),
        standard_error=_standard_error(lost),
        spread=float(all_lost.square().mean().sqrt()),
        divergence=float(torch.cat(divergence).mean()),
        agreement=float(torch.cat(same).double().mean()),
    )


def _log_probabilities(
    runner: Runner, ids: Sequence[int], entry: Entry
) -> Float[Tensor, "tokens vocab"]:
    """Of what follows each token but the last."""
    return runner.all_logits(Chunk(0, ids, 0, entry))[:-1].double().log_softmax(-1)


def _standard_error(lost: Sequence[Float[Tensor, " _tokens"]]) -> float:
    """Of the mean over all tokens, where those of one text go together."""
    count = sum(map(len, lost))
    mean = sum(float(each.sum()) for each in lost) / count
    off = [float((each - mean).sum()) for each in lost]
    return math.sqrt(sum(o * o for o in off) * len(lost) / (len(lost) - 1)) / count
