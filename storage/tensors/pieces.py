"""What is read at once of tensors that are read as a whole: boxes of some MiB, in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from ...planner.box import Box
from ...planner.entries import ITEMSIZES, Kind
from ...planner.grid import Grid
from .dtypes import torch_dtype

PIECE_BYTES = 16 * 1024 * 1024
"""Values that are read at once. A constant: a conversion that is taken up again must be cut as it was."""


@dataclass(frozen=True, slots=True)
class Item:
    """A tensor or an object to write."""

    name: str
    source: str
    """Its name in the source."""
    kind: Kind
    dtype: str
    """As it is to be written."""
    shape: tuple[int, ...]

    @property
    def is_tensor(self) -> bool:
        return self.kind is Kind.TENSOR

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch_dtype(self.dtype)

    @property
    def nbytes(self) -> int:
        return Box.whole(self.shape).numel * ITEMSIZES[self.dtype]


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor, or an object as a whole."""

    item: Item
    box: Box

    @property
    def nbytes(self) -> int:
        return self.box.numel * ITEMSIZES[self.item.dtype]


class _HasBytes(Protocol):
    @property
    def nbytes(self) -> int: ...


_Grouped = TypeVar("_Grouped", bound=_HasBytes)


def in_groups(items: Iterable[_Grouped], max_bytes: int) -> Iterator[list[_Grouped]]:
    """Consecutive items of at most so many bytes together, or a single one that is larger."""
    group, nbytes = list[_Grouped](), 0
    for item in items:
        if group and nbytes + item.nbytes > max_bytes:
            yield group
            group, nbytes = [], 0
        group.append(item)
        nbytes += item.nbytes
    if group:
        yield group


def rows_of(shape: tuple[int, ...], dtype: str) -> Iterator[Box]:
    """Boxes whose values follow each other in the row-major tensor, of PIECE_BYTES at most, unless for one element.

    They end where a chunk of a native checkpoint does, so that none is read for two of them.
    """
    parts = Grid.choose(shape, ITEMSIZES[dtype]).parts[:1]
    lines = [shape[0] * i // parts[0] for i in range(parts[0] + 1)] if parts else []
    yield from _rows(shape, (), lines, max(1, PIECE_BYTES // ITEMSIZES[dtype]))


def _rows(shape: tuple[int, ...], at: tuple[int, ...], lines: Sequence[int], most: int) -> Iterator[Box]:
    """The part of a tensor below some leading indexes, in boxes of at most so many elements.

    `lines` are indexes of the next dimension at which boxes should end, from 0 to its extent, where they can.
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
            yield from _rows(shape, (*at, start), (), most)
            start += 1
            continue
        reach = min(start + most // row, rest[0])
        stop = max((line for line in lines if start < line <= reach), default=reach)
        yield Box((*at, start) + (0,) * (len(rest) - 1), (1,) * len(at) + (stop - start, *rest[1:]))
        start = stop
