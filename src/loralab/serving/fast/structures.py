"""The kernel's structures, field by field as `model.h`, `pairs.h` and `packing.h` have them."""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_double, c_int64, c_void_p

NUM_PROJECTIONS = 7
"""Of a block: queries, keys, values, output, gate, up, down."""


class Linear(ctypes.Structure):
    _fields_ = (
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("rows", c_void_p),
        ("columns", c_void_p),
    )


class Block(ctypes.Structure):
    _fields_ = (
        ("linears", Linear * NUM_PROJECTIONS),
        ("gains", c_void_p * 2),
        ("epsilons", c_double * 2),
    )


class Model(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in (
            "num_blocks", "width", "num_heads", "num_kv_heads", "head_size", "mlp_width", "vocab",
            "num_slots", "max_tokens", "activation",
        )),
        ("blocks", POINTER(Block)),
        ("final_gain", c_void_p),
        ("final_epsilon", c_double),
        ("output", Linear),
        *((name, c_void_p) for name in ("cos", "sin", "keys", "values")),
    )  # fmt: skip


class Group(ctypes.Structure):
    _fields_ = (("pairs", c_void_p), ("begin", c_int64), ("end", c_int64))


class Pair(ctypes.Structure):
    _fields_ = (("A", c_void_p), ("B", c_void_p), ("rank", c_int64), ("scale", c_double))


class Packing(ctypes.Structure):
    _fields_ = (
        ("A", c_void_p),
        ("B", c_void_p),
        *((name, c_int64) for name in ("rank", "inputs", "outputs")),
        ("to_A", c_void_p),
        ("to_B", c_void_p),
    )


class Step(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in (
            "num_tokens", "num_wanted", "num_groups", "num_entries", "most_rank",
        )),
        *((name, c_void_p) for name in (
            "positions", "slots", "wanted", "groups", "entry_tokens", "entry_weights", "x",
            "logits",
        )),
    )  # fmt: skip


def check_sizes(library: ctypes.CDLL) -> None:
    """Raises `RuntimeError` where the library was compiled from other structures."""
    library.loralab_sizes.restype = c_int64
    sizes: Sequence[int] = [ctypes.sizeof(kind) for kind in (Model, Block, Step, Group)]
    if library.loralab_sizes() != sum(size * 1000**power for power, size in enumerate(sizes)):
        raise RuntimeError("the kernel's structures and those of structures.py differ")
