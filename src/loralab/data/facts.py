"""What a report states about a data set: counts, balance, what was left out, hashes."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from loralab.data.examples import Example
from loralab.data.splitting import normalise


def split_facts(
    examples: Sequence[Example], available: int, label_names: Sequence[str]
) -> dict[str, Any]:
    """Counts of one split; `available` is how many rows it had before it was capped."""
    facts: dict[str, Any] = {
        "rows": len(examples),
        "documents": len({example.group for example in examples}),
        "available_rows": available,
        "sha256": content_hash(examples),
    }
    if label_names:
        counts = Counter(example.label for example in examples)
        facts["classes"] = {name: counts[label] for label, name in enumerate(label_names)}
    return facts


def content_hash(examples: Sequence[Example]) -> str:
    """SHA-256 over all fields of all examples, in order."""
    digest = hashlib.sha256()
    for example in examples:
        line = json.dumps(asdict(example), sort_keys=True, ensure_ascii=True, default=str)
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def num_repeated(parts: Mapping[str, Sequence[Example]]) -> int:
    """Rows whose normalised text an earlier row has too."""
    counts = Counter(normalise(e.content) for examples in parts.values() for e in examples)
    return sum(counts.values()) - len(counts)
