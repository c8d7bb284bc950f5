"""Which split a row belongs to: decided by hashes alone, fixed for ever.

    share(key) = first 8 bytes of SHA-256("loralab split 1\\n" + key), big-endian, / 2^64

A row's key is its document, or its normalised text where it has no document. Rows that are linked
by a common document or a common normalised text form a component and share the smallest key
among them, so that neither a document nor a text is ever on two sides.
"""

import hashlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar, runtime_checkable

from loralab.data.examples import Example

SPLITS = ("train", "validation", "test")
SHARES: Mapping[str, float] = {"train": 0.7, "validation": 0.1, "test": 0.2}

_SPACES = re.compile(r"\s+")


@runtime_checkable
class _Named(Protocol):
    @property
    def id(self) -> str: ...


AnyRow = TypeVar("AnyRow", bound=_Named)


def normalise(text: str) -> str:
    """Texts that differ only in case, spaces or Unicode compatibility forms become equal."""
    return _SPACES.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()


def hash_share(key: str, purpose: str = "split") -> float:
    """A number in [0, 1) that depends on nothing but the key and what it is used for."""
    digest = hashlib.sha256(f"loralab {purpose} 1\n{key}".encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_by_hash(
    examples: Sequence[Example], into: Sequence[str] = SPLITS
) -> dict[str, list[Example]]:
    """Parts the examples among the splits `into`, by their `SHARES`, in the order given."""
    total = sum(SHARES[split] for split in into)
    parts: dict[str, list[Example]] = {split: [] for split in into}
    for example, key in zip(examples, component_keys(examples), strict=True):
        parts[_side(hash_share(key) * total, into)].append(example)
    return parts


def _side(share: float, into: Sequence[str]) -> str:
    for split in into[:-1]:
        share -= SHARES[split]
        if share < 0:
            return split
    return into[-1]


def component_keys(examples: Sequence[Example]) -> list[str]:
    """The smallest key in each example's component (see the head of this file)."""
    components = _Components(len(examples))
    first_with: dict[tuple[str, str], int] = {}
    keys: list[str] = []
    for index, example in enumerate(examples):
        text = normalise(example.content)
        keys.append(example.group if has_document(example) else text)
        for link in (("text", text), ("document", example.group)):
            components.join(index, first_with.setdefault(link, index))
    smallest: dict[int, str] = {}
    for index, key in enumerate(keys):
        root = components.root(index)
        smallest[root] = min(key, smallest.get(root, key))
    return [smallest[components.root(index)] for index in range(len(keys))]


def halves(examples: Sequence[Example], purpose: str) -> tuple[list[Example], list[Example]]:
    """Two parts of about equal size that share no document and no text, decided by hash."""
    parts: tuple[list[Example], list[Example]] = ([], [])
    for example, key in zip(examples, component_keys(examples), strict=True):
        parts[hash_share(key, purpose) >= 0.5].append(example)
    return parts


def has_document(example: Example) -> bool:
    """Whether the example is part of a document, not a group of its own."""
    return example.group != example.id


def cap(examples: Sequence[Example], num_rows: int | None) -> list[Example]:
    """At most `num_rows` of the examples, in their order, chosen by hash.

    A smaller cap keeps a subset of what a larger one keeps.
    """
    if num_rows is None or len(examples) <= num_rows:
        return list(examples)
    shares = [hash_share(f"{e.id}\n{normalise(e.content)}", "cap") for e in examples]
    chosen = sorted(range(len(examples)), key=lambda index: (shares[index], index))[:num_rows]
    return [examples[index] for index in sorted(chosen)]


def sample(rows: Sequence[AnyRow], count: int, purpose: str) -> list[AnyRow]:
    """At most `count` rows, chosen and ordered by the hash of their names."""
    shares = [hash_share(row.id, purpose) for row in rows]
    chosen = sorted(range(len(rows)), key=lambda index: (shares[index], index))
    return [rows[index] for index in chosen[:count]]


def remove_leaks(parts: Mapping[str, Sequence[Example]]) -> dict[str, list[Example]]:
    """Drops from train what is also in validation or test, and from validation what is in test.

    A row is in a split if its normalised text is there, or a row of its document.
    """
    seen: set[tuple[str, str]] = set()
    clean: dict[str, list[Example]] = {}
    for split in reversed(SPLITS):
        if split not in parts:
            continue
        clean[split] = [example for example in parts[split] if not _marks(example) & seen]
        seen.update(*map(_marks, clean[split]))
    return {split: clean[split] for split in SPLITS if split in clean}


def _marks(example: Example) -> set[tuple[str, str]]:
    marks = {("text", normalise(example.content))}
    return marks | {("document", example.group)} if has_document(example) else marks


class _Components:
    """Union-find with path halving."""

    def __init__(self, size: int) -> None:
        self._parents = list(range(size))

    def root(self, index: int) -> int:
        parents = self._parents
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    def join(self, first: int, second: int) -> None:
        self._parents[self.root(first)] = self.root(second)
