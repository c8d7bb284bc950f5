"""Choosing the next token from logits, by each request's own settings and its own randomness.

The order is transformers': repetition penalty, temperature, top-k, top-p.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from loralab.serving.requests import Sampling

NARROW = 256
"""So many best tokens are looked at first for top-p: sorting a whole vocabulary takes longer."""

BLOCK = 256
"""Shares are summed by blocks of so many, as running sums over a vocabulary take longer."""


@dataclass(frozen=True)
class Chosen:
    """A token, with what the model itself thought of it and of the best ones."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Sampler:
    """One request's settings, its random numbers, and the tokens that it has seen.

    A token takes one random number, and tokens are looked up in the order of the vocabulary. So an
    answer depends on the seed and the logits alone, and rounding seldom changes a choice.
    """

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int]) -> None:
        self.sampling = sampling
        self._random = random.Random(sampling.seed)
        self._seen = set(prompt_ids)

    @property
    def takes_best(self) -> bool:
        """Whether the token is the best one of the logits as they are."""
        s = self.sampling
        return s.logprobs is None and s.repetition_penalty == 1 and s.temperature == 0

    def choose(self, logits: Float[Tensor, " vocab"]) -> Chosen:
        """The next token. `logits` are left as they are."""
        s = self.sampling
        scores = self._penalised(logits)
        if s.temperature == 0:
            token = int(scores.argmax())
        else:
            token = self._draw(*kept(scores / s.temperature, s.top_k, s.top_p))
        self._seen.add(token)
        return Chosen(token) if s.logprobs is None else judged(token, logits, s.logprobs)

    def _penalised(self, logits: Float[Tensor, " vocab"]) -> Float[Tensor, " vocab"]:
        penalty = self.sampling.repetition_penalty
        if penalty == 1:
            return logits
        seen = torch.tensor(sorted(self._seen), device=logits.device)
        own = logits[seen]
        return logits.index_put((seen,), torch.where(own < 0, own * penalty, own / penalty))

    def _draw(self, tokens: Int[Tensor, " kept"], shares: Float[Tensor, " kept"]) -> int:
        """The token at a random height of the summed shares: first its block, then its place."""
        blocks = functional.pad(shares, (0, -len(shares) % BLOCK)).view(-1, BLOCK)
        sums = blocks.sum(1, dtype=torch.float64)
        reached = sums.cumsum(0)
        height = self._random.random() * reached[-1]
        block = torch.searchsorted(reached, height, right=True).clamp(max=len(reached) - 1)
        inside = blocks[block].double().cumsum(0)
        above = height - (reached[block] - sums[block])
        place = BLOCK * block + torch.searchsorted(inside, above, right=True)
        return int(tokens[place.clamp(max=len(tokens) - 1)])


def kept(
    scores: Float[Tensor, " vocab"], top_k: int, top_p: float | int
) -> tuple[Int[Tensor, " kept"], Float[Tensor, " kept"]]:
    """Tokens that top-k and then top-p leave, in the order of the vocabulary, with their shares.

    Top-p keeps the best tokens up to and with the one that makes their probability reach `top_p`,
    as `TopPLogitsWarper` of transformers does; shares are not normalised.
    """
    vocab = scores.shape[0]
    if top_k == 0 and top_p == 1:
        return torch.arange(vocab, device=scores.device), torch.softmax(scores, 0)
    top_k = min(top_k or vocab, vocab)
    num_best = min(top_k, NARROW) if top_k == vocab else top_k
    whole = torch.logsumexp(scores, 0) if num_best < top_k else None
    while True:
        best, tokens = scores.topk(num_best)
        shares = (best - (torch.logsumexp(best, 0) if whole is None else whole)).exp()
        if num_best == top_k or float(shares.sum()) >= top_p:
            break
        num_best = min(16 * num_best, top_k)
    if top_p < 1:
        before = shares.double().cumsum(0) - shares.double()
        num_kept = int((before < top_p).sum())  # the best one always: nothing is before it
        tokens, shares = tokens[:num_kept], shares[:num_kept]
    order = tokens.argsort()
    return tokens[order], shares[order]


def choose_tokens(
    logits: Float[Tensor, "rows vocab"], samplers: Sequence[Sampler]
) -> list[Chosen | None]:
    """Each row's next token; None where its logits are not numbers."""
    best = _best(logits)
    # the greatest is NaN or +inf where any is; all of them may be -inf
    sound = logits.gather(1, best[:, None])[:, 0].isfinite().tolist()
    chosen: list[Chosen | None] = []
    for row, (sampler, token, fine) in enumerate(zip(samplers, best.tolist(), sound, strict=True)):
        if not fine:
            chosen.append(None)
        elif sampler.takes_best:
            chosen.append(Chosen(token))
        else:
            chosen.append(sampler.choose(logits[row]))
    return chosen


def _best(logits: Float[Tensor, "rows vocab"]) -> Int[Tensor, " rows"]:
    """The place of each row's greatest logit, or of its first NaN."""
    if logits.device.type == "cpu":  # numpy's is vectorised, and takes a tenth of torch's time
        return torch.from_numpy(logits.numpy().argmax(axis=1))
    return logits.argmax(dim=1)


def judged(token: int, logits: Float[Tensor, " vocab"], num_best: int) -> Chosen:
    """The token with the model's own log-probabilities, before any penalty or filter."""
    logprobs = torch.log_softmax(logits, 0)
    values, tokens = logprobs.topk(min(num_best, len(logprobs)))
    top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
    return Chosen(token, float(logprobs[token]), top)
