"""Comparing two checkpoints, by their metadata if that is sufficient, otherwise by their values."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from ...planner.chunk_reads import WantedBox
from ...planner.entries import Entry, Kind
from ..conversion.source_stream import SourceStream
from ..conversion.work_items import Item, Piece
from ..errors import UnsafeValueError
from ..formats.detect import open_source
from ..formats.source import Source
from ..formats.value_codec import encode_value
from ..reading.read_tensors import read_boxes
from ..reading.same_chunks import same_chunks
from ..reading.value_buffers import ValueBuffer
from ..runtime.torch_modes import without_torch_modes
from ..stores.base import Store
from ..tensors.splitting import row_boxes

MAX_SHOWN_VALUE_CHARACTERS = 40
"""A longer value is truncated in a description."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A name for which two checkpoints differ."""

    name: str
    what: str
    """One of "only in A", "only in B", "shape", "dtype", "value", "elements" and "unreadable" (not comparable)."""
    a: str = ""
    b: str = ""
    """A description of the tensor or value in each checkpoint."""
    changed: int = 0
    """The number of elements that differ."""
    largest: float = 0.0
    """The largest absolute difference of two elements."""


@without_torch_modes()
def diff(
    a: str | os.PathLike[str] | Store,
    b: str | os.PathLike[str] | Store,
    *,
    a_options: Mapping[str, Any] | None = None,
    b_options: Mapping[str, Any] | None = None,
) -> list[Difference]:
    """Return the names, shapes, dtypes and values that differ between two checkpoints of any format, sorted by name.

    Tensors that are equal according to the checksums of two native checkpoints are not read, so damage is not detected:
    use `Checkpoint.verify` for that. Others are read in pieces.

    Args:
        a, b: paths, URIs that fsspec can open, or Stores.
        a_options, b_options: options for fsspec.

    Raises:
        CorruptCheckpointError, StoreError: the bytes cannot be read.
        CheckpointError: a checkpoint cannot be opened; see `reshard.open`.
    """
    return list(_differences(open_source(a, a_options), open_source(b, b_options)))


def _differences(a: Source, b: Source) -> Iterator[Difference]:
    unreadable = {**b.unreadable, **a.unreadable}
    names = sorted({entry.name for entry in (*a.entries, *b.entries)} | unreadable.keys())
    to_read = _tensors_to_read(a, b, [name for name in names if name in a and name in b and name not in unreadable])
    with closing(_compare_tensors(a, b, to_read)) as compared:
        for name in names:
            if name in unreadable:
                in_a, in_b = (of.unreadable[name].reason if name in of.unreadable else "" for of in (a, b))
                yield Difference(name, "unreadable", in_a, in_b)
            elif name not in b:
                yield Difference(name, "only in A", _describe(a.entry(name)))
            elif name not in a:
                yield Difference(name, "only in B", "", _describe(b.entry(name)))
            elif name in to_read:
                yield from next(compared)
            elif not _is_tensor(a, name) or not _is_tensor(b, name):
                value_a, value_b = _value_to_compare(a, name), _value_to_compare(b, name)
                if value_a.is_safe != value_b.is_safe:
                    yield Difference(name, "unreadable", value_a.description, value_b.description)
                elif (value_a.kind, value_a.data) != (value_b.kind, value_b.data):
                    yield Difference(name, "value", value_a.description, value_b.description)
            elif a.entry(name).shape != b.entry(name).shape:
                yield Difference(name, "shape", _describe(a.entry(name)), _describe(b.entry(name)))


def _is_tensor(source: Source, name: str) -> bool:
    return source.entry(name).is_tensor


def _tensors_to_read(a: Source, b: Source, names: Iterable[str]) -> dict[str, tuple[Entry, Entry]]:
    """Return the tensors of the same shape in both sources, except those that the manifests show to be equal."""
    both = {name: (a.entry(name), b.entry(name)) for name in names if _is_tensor(a, name) and _is_tensor(b, name)}
    both = {name: (in_a, in_b) for name, (in_a, in_b) in both.items() if in_a.shape == in_b.shape}
    same_dtype = [name for name, (in_a, in_b) in both.items() if in_a.dtype == in_b.dtype]
    if not same_dtype or (a.format, b.format) != ("reshard", "reshard"):
        return both
    wants = [WantedBox(name, both[name][0].whole) for name in same_dtype]
    index_a, index_b = a.index(wants), b.index(wants)
    same = {name for name in same_dtype if same_chunks(index_a, name, index_b, name)}
    return {name: entries for name, entries in both.items() if name not in same}


def _compare_tensors(
    a: Source, b: Source, tensors: Mapping[str, tuple[Entry, Entry]]
) -> Generator[list[Difference], None, None]:
    """Read tensors in pieces. Yield a list for each, which is empty if they are equal."""
    boxes = {name: list(row_boxes(in_a.shape, in_a.dtype)) for name, (in_a, _) in tensors.items()}

    def pieces(which: int) -> Iterator[Piece]:
        for name, entries in tensors.items():
            item = Item(name, name, Kind.TENSOR, entries[which].dtype, entries[which].shape)
            yield from (Piece(item, box) for box in boxes[name])

    with closing(SourceStream(a, 0, None, _ignore)) as stream_a, closing(SourceStream(b, 0, None, _ignore)) as stream_b:
        pairs = zip(stream_a.tensors(pieces(0)), stream_b.tensors(pieces(1)), strict=True)
        for name, (in_a, in_b) in tensors.items():
            changed, largest = 0, 0.0
            for piece_a, piece_b in islice(pairs, len(boxes[name])):
                more, difference = _compare(piece_a, piece_b)
                changed, largest = changed + more, max(largest, difference)
            descriptions = _describe(in_a), _describe(in_b)
            if in_a.dtype != in_b.dtype:
                yield [Difference(name, "dtype", *descriptions, changed, largest)]
            else:
                yield [Difference(name, "elements", *descriptions, changed, largest)] if changed else []


def _ignore(nbytes: int) -> None:
    pass


def _compare(a: torch.Tensor, b: torch.Tensor) -> tuple[int, float]:
    """Return how many elements differ, and the largest difference. Two NaNs are equal."""
    if a.dtype == b.dtype and torch.equal(_bits(a), _bits(b)):
        return 0, 0.0
    a, b = _comparable(a), _comparable(b)
    unequal = (a != b) & ~(a.isnan() & b.isnan())
    differences = (_wide(a[unequal]) - _wide(b[unequal])).abs()
    largest = float(differences.nan_to_num(float("inf")).max()) if len(differences) else 0.0
    return int(unequal.sum()), largest


def _comparable(values: torch.Tensor) -> torch.Tensor:
    """Cast 8-bit floats, which torch cannot compare."""
    return values.to(torch.float64) if values.dtype.is_floating_point and values.itemsize == 1 else values


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.complex128 if values.is_complex() else torch.float64)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@dataclass(frozen=True, slots=True)
class _Value:
    """A value as reshard would store it. One that needs an unsafe pickle keeps its bytes. A tensor has none."""

    entry: Entry
    kind: Kind
    data: bytes
    is_safe: bool = True

    @property
    def description(self) -> str:
        if self.kind is Kind.JSON:
            text = self.data.decode()
            return text if len(text) <= MAX_SHOWN_VALUE_CHARACTERS else f"{text[:MAX_SHOWN_VALUE_CHARACTERS]}…"
        return _describe(self.entry) if self.is_safe else "a pickle that could run code"


def _value_to_compare(source: Source, name: str) -> _Value:
    entry = source.entry(name)
    if entry.is_tensor:
        return _Value(entry, Kind.TENSOR, b"")
    [read] = ValueBuffer.of(source, [name])
    read_boxes(source, read.wants, read.tensors)
    try:
        return _Value(entry, *encode_value(read.value()))
    except UnsafeValueError:
        return _Value(entry, read.kind, read.data, is_safe=False)


def _describe(entry: Entry) -> str:
    if not entry.is_tensor:
        return f"value of {entry.numel} bytes"
    return f"{entry.dtype} {list(entry.shape)}"
