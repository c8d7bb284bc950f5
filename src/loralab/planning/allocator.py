"""torch's caching allocator on CUDA, followed step by step without a GPU.

A request is rounded to 512 bytes. Small ones (up to 1 MiB) are cut from segments of 2 MiB, those
up to 10 MiB from segments of 20 MiB, larger ones get a segment of their own, rounded to 2 MiB.
A free block is taken where it fits best and split, unless what is left is too little to be of
use; what is not split off counts as allocated. Source: c10/cuda/CUDACachingAllocator.cpp.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

KIB, MIB = 2**10, 2**20
ROUNDING = 512
SMALL_REQUEST = MIB
SMALL_SEGMENT = 2 * MIB
LARGE_REQUEST = 10 * MIB
LARGE_SEGMENT = 20 * MIB
SEGMENT_ROUNDING = 2 * MIB


def rounded_size(num_bytes: int) -> int:
    """A request as the allocator rounds it."""
    return -(-num_bytes // ROUNDING) * ROUNDING


@dataclass(eq=False, slots=True)
class _Piece:
    """A stretch of a segment; neighbours are linked so that free ones merge."""

    size: int
    address: int
    is_small: bool
    before: "_Piece | None" = None
    after: "_Piece | None" = None
    is_free: bool = False


class CachingAllocator:
    """`allocated` and `reserved` bytes as `torch.cuda.memory_allocated` and `_reserved` say."""

    def __init__(self) -> None:
        self.allocated = 0
        self.reserved = 0
        self._free: dict[bool, list[tuple[int, int, _Piece]]] = {True: [], False: []}
        self._next_address = 0

    def allocate(self, num_bytes: int) -> _Piece | None:
        """The piece for a request; None for one of zero bytes."""
        if not num_bytes:
            return None
        size = rounded_size(num_bytes)
        piece = self._best_fit(size) or self._segment(size)
        self._split(piece, size)
        piece.is_free = False
        self.allocated += piece.size
        return piece

    def free(self, piece: _Piece | None) -> None:
        """Give a piece back and merge it with free neighbours."""
        if piece is None:
            return
        self.allocated -= piece.size
        for neighbour in (piece.before, piece.after):
            if neighbour is not None and neighbour.is_free:
                self._take(neighbour)
                _merge(piece, neighbour)
        self._put(piece)

    def _best_fit(self, size: int) -> _Piece | None:
        is_small = size <= SMALL_REQUEST
        pool = self._free[is_small]
        index = bisect_left(pool, (size, -1))  # pyright: ignore[reportArgumentType]
        if index == len(pool):
            return None
        return pool.pop(index)[2]

    def _segment(self, size: int) -> _Piece:
        if size <= SMALL_REQUEST:
            whole = SMALL_SEGMENT
        elif size < LARGE_REQUEST:
            whole = LARGE_SEGMENT
        else:
            whole = -(-size // SEGMENT_ROUNDING) * SEGMENT_ROUNDING
        self.reserved += whole
        address, self._next_address = self._next_address, self._next_address + whole
        return _Piece(whole, address, size <= SMALL_REQUEST)

    def _split(self, piece: _Piece, size: int) -> None:
        rest = piece.size - size
        if rest < ROUNDING if piece.is_small else rest <= SMALL_REQUEST:
            return
        other = _Piece(rest, piece.address + size, piece.is_small, piece, piece.after)
        if piece.after is not None:
            piece.after.before = other
        piece.after, piece.size = other, size
        self._put(other)

    def _put(self, piece: _Piece) -> None:
        piece.is_free = True
        insort(self._free[piece.is_small], (piece.size, piece.address, piece))

    def _take(self, piece: _Piece) -> None:
        pool = self._free[piece.is_small]
        del pool[bisect_left(pool, (piece.size, piece.address))]  # pyright: ignore[reportArgumentType]


def _merge(piece: _Piece, neighbour: _Piece) -> None:
    if neighbour is piece.before:
        piece.address, piece.before = neighbour.address, neighbour.before
        if piece.before is not None:
            piece.before.after = piece
    else:
        piece.after = neighbour.after
        if piece.after is not None:
            piece.after.before = piece
    piece.size += neighbour.size
