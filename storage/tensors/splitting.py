"""Split tensors into boxes of bounded size, and group items by their size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

from ...planner.box import Box
from ...planner.entries import ITEMSIZES
from ...planner.grid import Grid

MAX_PIECE_BYTES = 16 * 1024 * 1024
"""How many bytes of values are read at once. A constant, because a conversion that is resumed must split as before."""


class _HasBytes(Protocol):
    @property
    def nbytes(self) -> int: ...


_Grouped = TypeVar("_Grouped", bound=_HasBytes)


def group_by_bytes(items: Iterable[_Grouped], max_bytes: int) -> Iterator[list[_Grouped]]:
    """Yield groups of consecutive items of at most `max_bytes` bytes. A larger item is a group by itself."""
    group, nbytes = list[_Grouped](), 0
    for item in items:
        if group and nbytes + item.nbytes > max_bytes:
            yield group
            group, nbytes = [], 0
        group.append(item)
        nbytes += item.nbytes
    if group:
        yield group


def row_boxes(shape: tuple[int, ...], dtype: str, max_bytes: int = MAX_PIECE_BYTES) -> Iterator[Box]:
    """Yield boxes that are contiguous in the row-major tensor, of at most `max_bytes` or a single element.

    The boxes end at chunk boundaries of a native checkpoint if possible, so that no chunk is read for two boxes.
    """
    parts = Grid.choose(shape, ITEMSIZES[dtype]).parts[:1]
    lines = [shape[0] * i // parts[0] for i in range(parts[0] + 1)] if parts else []
    yield from _split_rows(shape, (), lines, max(1, max_bytes // ITEMSIZES[dtype]))


def _split_rows(shape: tuple[int, ...], at: tuple[int, ...], lines: Sequence[int], most: int) -> Iterator[Box]:
    """Yield the part of a tensor at some leading indexes, in boxes of at most `most` elements.

    Args:
        at: the leading indexes.
        lines: indexes of the next dimension at which boxes should end if possible, from 0 to its size.
    """
    rest = shape[len(at) :]
    numel = Box.whole(rest).numel
    if numel <= most:
        if numel:
            yield Box(at + (0,) * len(rest), (1,) * len(at) + rest)
        return
    row = numel // rest[0]
    start = 0
    while start < rest[0]:
        if row > most:
            yield from _split_rows(shape, (*at, start), (), most)
            start += 1
            continue
        reach = min(start + most // row, rest[0])
        stop = max((line for line in lines if start < line <= reach), default=reach)
        yield Box((*at, start) + (0,) * (len(rest) - 1), (1,) * len(at) + (stop - start, *rest[1:]))
        start = stop
