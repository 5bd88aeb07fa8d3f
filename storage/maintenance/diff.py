"""Comparing two checkpoints, by their metadata if that is sufficient, otherwise by their values."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from ...planner.box import Box
from ...planner.chunk_reads import Want
from ...planner.entries import Entry, Kind
from ..conversion.source_stream import SourceStream
from ..conversion.work_items import Item, Piece
from ..errors import UnsafeValueError
from ..formats.detect import open_source
from ..formats.source import Source
from ..formats.value_codec import encode_value
from ..reading.read_tensors import read_boxes
from ..reading.same_chunks import same_chunks
from ..reading.value_reads import ValueRead
from ..runtime.torch_modes import undisturbed
from ..stores.base import Store
from ..tensors.splitting import row_boxes

MAX_SHOWN_VALUE_CHARACTERS = 40
"""Of a value that is shown."""


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


@undisturbed()
def diff(
    a: str | os.PathLike[str] | Store,
    b: str | os.PathLike[str] | Store,
    *,
    a_options: Mapping[str, Any] | None = None,
    b_options: Mapping[str, Any] | None = None,
) -> list[Difference]:
    """Return the names, shapes, dtypes and values that differ between two checkpoints of any format, sorted by name.

    Tensors that are equal according to the checksums of two native checkpoints are not read. Others are read in pieces.

    Args:
        a, b: paths, URIs that fsspec can open, or Stores.
        a_options, b_options: options for fsspec.

    Raises:
        CorruptCheckpointError, StoreError: the bytes cannot be read.
        Also what `reshard.open` raises.
    """
    return list(_differences(open_source(a, a_options), open_source(b, b_options)))


def _differences(a: Source, b: Source) -> Iterator[Difference]:
    unreadable = {**b.unreadable, **a.unreadable}
    names = sorted({entry.name for entry in (*a.entries, *b.entries)} | unreadable.keys())
    to_read = _to_read(a, b, [name for name in names if name in a and name in b and name not in unreadable])
    with closing(_of_values(a, b, to_read)) as values:
        for name in names:
            if name in unreadable:
                why_a, why_b = (of.unreadable[name].reason if name in of.unreadable else "" for of in (a, b))
                yield Difference(name, "unreadable", why_a, why_b)
            elif name not in b:
                yield Difference(name, "only in A", _describe(a.entry(name)))
            elif name not in a:
                yield Difference(name, "only in B", "", _describe(b.entry(name)))
            elif name in to_read:
                yield from next(values)
            elif not _is_tensor(a, name) or not _is_tensor(b, name):
                one, two = _object(a, name), _object(b, name)
                if one != two:
                    yield Difference(name, "value", _describe(a.entry(name), *one), _describe(b.entry(name), *two))
            elif a.entry(name).shape != b.entry(name).shape:
                yield Difference(name, "shape", _describe(a.entry(name)), _describe(b.entry(name)))


def _is_tensor(source: Source, name: str) -> bool:
    return source.entry(name).is_tensor


def _to_read(a: Source, b: Source, names: Iterable[str]) -> dict[str, tuple[Entry, Entry]]:
    """The tensors of both, of one shape, that the manifests do not tell to be the same."""
    both = {name: (a.entry(name), b.entry(name)) for name in names if _is_tensor(a, name) and _is_tensor(b, name)}
    both = {name: (mine, other) for name, (mine, other) in both.items() if mine.shape == other.shape}
    told = [name for name, (mine, other) in both.items() if mine.dtype == other.dtype]
    if not told or (a.format, b.format) != ("reshard", "reshard"):
        return both
    of_a, of_b = (source.index([Want(name, Box.whole(both[name][0].shape)) for name in told]) for source in (a, b))
    same = {name for name in told if same_chunks(of_a, name, of_b, name)}
    return {name: entries for name, entries in both.items() if name not in same}


def _of_values(
    a: Source, b: Source, names: Mapping[str, tuple[Entry, Entry]]
) -> Generator[list[Difference], None, None]:
    """What differs in each tensor, if anything does, in order."""
    boxes = {name: list(row_boxes(mine.shape, mine.dtype)) for name, (mine, _) in names.items()}

    def pieces(which: int) -> Iterator[Piece]:
        for name, entries in names.items():
            item = Item(name, name, Kind.TENSOR, entries[which].dtype, entries[which].shape)
            yield from (Piece(item, box) for box in boxes[name])

    with closing(SourceStream(a, 0, None, _ignore)) as values_a, closing(SourceStream(b, 0, None, _ignore)) as values_b:
        pairs = zip(values_a.tensors(pieces(0)), values_b.tensors(pieces(1)), strict=True)
        for name, (mine, other) in names.items():
            changed, largest = 0, 0.0
            for one, two in islice(pairs, len(boxes[name])):
                more, apart = _compared(one, two)
                changed, largest = changed + more, max(largest, apart)
            words = _describe(mine), _describe(other)
            if mine.dtype != other.dtype:
                yield [Difference(name, "dtype", *words, changed, largest)]
            else:
                yield [Difference(name, "elements", *words, changed, largest)] if changed else []


def _ignore(nbytes: int) -> None:
    pass


def _compared(one: torch.Tensor, two: torch.Tensor) -> tuple[int, float]:
    """How many values differ, and by how much at most; two NaNs do not."""
    if one.dtype == two.dtype and torch.equal(_bits(one), _bits(two)):
        return 0, 0.0
    one, two = _comparable(one), _comparable(two)
    unequal = (one != two) & ~(one.isnan() & two.isnan())
    apart = (_wide(one[unequal]) - _wide(two[unequal])).abs()
    return int(unequal.sum()), float(apart.nan_to_num(float("inf")).max()) if len(apart) else 0.0


def _comparable(values: torch.Tensor) -> torch.Tensor:
    """torch does not compare floats of a byte."""
    return values.to(torch.float64) if values.dtype.is_floating_point and values.itemsize == 1 else values


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.complex128 if values.is_complex() else torch.float64)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _object(source: Source, name: str) -> tuple[Kind, bytes]:
    """What is to be compared of an object: how reshard would store it; of one that needs pickle, its bytes."""
    if source.entry(name).is_tensor:
        return Kind.TENSOR, b""
    blob = ValueRead(source, name)
    read_boxes(source, blob.wants, blob.tensors)
    try:
        return encode_value(blob.value())
    except UnsafeValueError:
        return blob.kind, blob.data


def _describe(entry: Entry, kind: Kind | None = None, data: bytes = b"") -> str:
    if kind is Kind.JSON:
        text = data.decode()
        return text if len(text) <= MAX_SHOWN_VALUE_CHARACTERS else f"{text[:MAX_SHOWN_VALUE_CHARACTERS]}…"
    if not entry.is_tensor:
        return f"value of {entry.numel} bytes"
    return f"{entry.dtype} {list(entry.shape)}"
