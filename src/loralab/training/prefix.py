"""Frozen lower blocks run once a row: their outputs are kept, the upper blocks train on them."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

from jaxtyping import Float
from torch import Tensor, nn

from loralab.data import Encoded, evaluation_batches
from loralab.errors import ConfigError
from loralab.models import blocks, replaced_prefix, run_prefix
from loralab.training.batches import batch_for
from loralab.training.identity import frozen_hash
from loralab.training.methods import Trainable


class PrefixCache:
    """The output of the first `num_blocks` blocks for every row, without padding."""

    def __init__(
        self,
        model: nn.Module,
        num_blocks: int,
        rows: Sequence[Encoded],
        *,
        batch_size: int,
    ) -> None:
        self._num_blocks = num_blocks
        self._rows = tuple(rows)  # keeps the objects, and so their identities, alive
        self._hidden: dict[int, Float[Tensor, "tokens width"]] = {}
        for indices in evaluation_batches([len(row.input_ids) for row in rows], batch_size):
            members = [rows[index] for index in indices]
            batch = batch_for(model, members)
            hidden = run_prefix(model, num_blocks, batch.input_ids, batch.attention_mask)
            for row, states in zip(members, hidden, strict=True):
                self._hidden[id(row)] = states[: len(row.input_ids)].clone()

    def in_place_of(
        self, model: nn.Module, rows: Sequence[Encoded]
    ) -> AbstractContextManager[object]:
        """Inside, a forward over `rows` (padded on the right) starts above the cached blocks."""
        hidden = nn.utils.rnn.pad_sequence(
            [self._hidden[id(row)] for row in rows], batch_first=True
        )
        return replaced_prefix(model, self._num_blocks, hidden)


class PrefixStore:
    """Caches that many runs share: the same base, the same frozen blocks, the same rows.

    A cache is made for exactly the rows of a run and never extended, since the bits of a row's
    hidden states depend on the batch it was computed in.
    """

    def __init__(self) -> None:
        self._caches: dict[tuple[object, ...], PrefixCache] = {}

    def __len__(self) -> int:
        return len(self._caches)

    def cache_for(self, trainable: Trainable, rows: Sequence[Encoded]) -> PrefixCache:
        """The cache of these rows (the same objects) below the trained blocks, made if need be."""
        batch_size = trainable.training.evaluation_batch_size
        num_blocks = trainable.num_frozen_blocks
        key = (frozen_hash(trainable), num_blocks, batch_size, tuple(id(row) for row in rows))
        if key not in self._caches:
            cache = PrefixCache(trainable.model, num_blocks, rows, batch_size=batch_size)
            self._caches[key] = cache
        return self._caches[key]


def prefix_cache(
    trainable: Trainable, rows: Sequence[Encoded], store: PrefixStore
) -> PrefixCache | None:
    """The cache that `training.cache_frozen_prefix` asks for, None where nothing can be cached.

    Raises `ConfigError` where the frozen blocks have dropout: without it they would be another
    model than the one the settings describe.
    """
    method = trainable.method
    embedding_trains = method.kind == "frozen" and not method.freeze_embedding
    cachable = trainable.num_frozen_blocks and trainable.route is None and not embedding_trains
    if not (trainable.training.cache_frozen_prefix and cachable):
        return None
    dropping = next(_dropouts_below(trainable), None)
    if dropping:
        raise ConfigError(
            f"training.cache_frozen_prefix: the frozen part of the model has dropout ({dropping})",
            "set model.dropout = 0, or training.cache_frozen_prefix = false.",
        )
    return store.cache_for(trainable, rows)


def _dropouts_below(trainable: Trainable) -> Iterator[str]:
    """Names of the modules in the embedding and the frozen blocks that drop something."""
    path, layers = blocks(trainable.model)
    frozen = tuple(f"{path}.{index}." for index in range(trainable.num_frozen_blocks))
    upper = tuple(f"{path}.{index}." for index in range(len(frozen), len(layers)))
    for name, module in trainable.model.named_modules():
        below = name.startswith(frozen) or "embed" in name
        if below and not name.startswith(upper) and _drops(module):
            yield name


def _drops(module: nn.Module) -> bool:
    if isinstance(module, nn.Dropout):
        return module.p > 0
    rates = (value for key, value in vars(module).items() if "dropout" in key)
    return any(isinstance(rate, float) and rate > 0 for rate in rates)
