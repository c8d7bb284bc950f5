"""Laws of the hash splits, over random rows."""

from collections import defaultdict

from hypothesis import given, settings, strategies as st

from loralab.data import Example
from loralab.data.splitting import SPLITS, cap, hash_share, normalise, remove_leaks, split_by_hash

PAIRS = st.lists(
    st.tuples(st.sampled_from("abcdefghij"), st.sampled_from(["1", "2", "3", "4", "5", "6", ""])),
    max_size=40,
)


def rows(pairs):
    """Pairs of text and document ("" for none) as examples."""
    return [
        Example(f"row-{i}", group or f"row-{i}", text=text) for i, (text, group) in enumerate(pairs)
    ]


def linked(examples):
    """Brute force: the reachable rows of each row, over common texts and documents."""
    reach = {e.id: {e.id} for e in examples}
    for _ in examples:
        for a in examples:
            for b in examples:
                if normalise(a.text) == normalise(b.text) or a.group == b.group:
                    reach[a.id] |= reach[b.id]
    return reach


@settings(max_examples=30)
@given(PAIRS)
def test_linked_rows_are_on_one_side(pairs):
    examples = rows(pairs)
    parts = split_by_hash(examples)
    side = {e.id: split for split, part in parts.items() for e in part}
    assert sorted(side) == sorted(e.id for e in examples)
    for id, others in linked(examples).items():
        assert {side[other] for other in others} == {side[id]}


@given(PAIRS)
def test_sides_do_not_depend_on_the_order_of_rows(pairs):
    examples = rows(pairs)
    forth, back = split_by_hash(examples), split_by_hash(examples[::-1])
    assert {s: part[::-1] for s, part in back.items()} == forth


@given(PAIRS, st.integers(0, 40), st.integers(0, 40))
def test_caps_are_nested_and_keep_the_order(pairs, few, many):
    examples = rows(pairs)
    few, many = sorted((few, many))
    small, large = cap(examples, few), cap(examples, many)
    assert len(small) == min(few, len(examples))
    assert {e.id for e in small} <= {e.id for e in large}
    assert [e for e in large if e in small] == small
    assert cap(examples, None) == examples


@given(st.tuples(PAIRS, PAIRS, PAIRS))
def test_no_text_or_document_of_a_later_split_stays(parts):
    given_parts = dict(zip(SPLITS, map(rows, parts), strict=True))
    clean = remove_leaks(given_parts)
    assert clean["test"] == given_parts["test"]
    sides = defaultdict(set)
    for split, part in clean.items():
        for e in part:
            sides[normalise(e.text)].add(split)
            if e.group != e.id:
                sides[e.group].add(split)
    assert all(len(splits) == 1 for splits in sides.values())


def test_the_share_of_a_key_is_fixed():
    # SHA-256 of "loralab split 1\nhello" begins with these eight bytes
    assert hash_share("hello") == 0x78255C1FBE0CF0A3 / 2**64


def test_near_copies_are_equal():
    assert normalise("  Ｇreat\tFILM \n") == normalise("great film")
