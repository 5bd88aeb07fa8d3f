"""In what two checkpoints differ: by their manifests where those tell, by their values where they do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ..planner.box import Box
from ..planner.index import NATIVE, CheckpointIndex, Entry, Kind
from ..planner.read_plan import Want
from .errors import UnsafeObjectError
from .objects import encode_object
from .read import Blob, read_boxes
from .source import Source
from .targets.safetensors import rows_of
from .targets.target import Item


@dataclass(frozen=True, slots=True)
class Difference:
    """One name in which they differ."""

    name: str
    what: str
    """ "only in A", "only in B", "shape", "dtype", "object" or "values"."""
    a: str = ""
    b: str = ""
    """What it is in each, in words."""
    changed: int = 0
    """Values that differ."""
    largest: float = 0.0
    """The largest absolute difference of two of them."""


def diff(a: Source, b: Source) -> Iterator[Difference]:
    """The differences, by name. Reads what the manifests do not tell to be the same, in pieces.

    Raises CorruptCheckpointError, StoreError.
    """
    names = sorted({entry.name for entry in a.entries} | {entry.name for entry in b.entries})
    for name in names:
        if name not in b:
            yield Difference(name, "only in A", _in_words(a.entry(name)))
        elif name not in a:
            yield Difference(name, "only in B", "", _in_words(b.entry(name)))
        elif a.entry(name).kind is not Kind.TENSOR or b.entry(name).kind is not Kind.TENSOR:
            if _object(a, name) != _object(b, name):
                yield Difference(name, "object", _in_words(a.entry(name)), _in_words(b.entry(name)))
        else:
            yield from _of_tensor(a, b, name)


def _of_tensor(a: Source, b: Source, name: str) -> Iterator[Difference]:
    mine, other = a.entry(name), b.entry(name)
    if mine.shape != other.shape:
        yield Difference(name, "shape", _in_words(mine), _in_words(other))
        return
    if mine.dtype == other.dtype and _are_the_same(a.index([_all(mine)]), b.index([_all(other)]), name):
        return
    changed, largest = 0, 0.0
    for box in rows_of(Item(name, name, Kind.TENSOR, mine.dtype, mine.shape)):
        one, two = _values(a, name, box), _values(b, name, box)
        if mine.dtype == other.dtype and torch.equal(_bits(one), _bits(two)):
            continue
        unequal = (one != two) & ~(one.isnan() & two.isnan())
        changed += int(unequal.sum())
        apart = (_wide(one[unequal]) - _wide(two[unequal])).abs()
        largest = max(largest, float(apart.nan_to_num(float("inf")).max()) if len(apart) else 0.0)
    if mine.dtype != other.dtype:
        yield Difference(name, "dtype", _in_words(mine), _in_words(other), changed, largest)
    elif changed:
        yield Difference(name, "values", _in_words(mine), _in_words(other), changed, largest)


def _are_the_same(a: CheckpointIndex, b: CheckpointIndex, name: str) -> bool:
    """Whether the chunks of a tensor are the same by their checksums."""
    parts = []
    for index in (a, b):
        position = index.position(name)
        rows = index.segments_of(position)
        first, last = index.first_checksum[[rows.start, rows.stop]].tolist()
        if int(index.segments.encodings[rows].max(initial=0)) > max(NATIVE):
            return False
        columns = (index.segments.streams[rows], index.segments.encodings[rows], *index.shard_boxes(position))
        parts.append([*columns, index.lengths[index.chunks_of(position)], index.checksums[first:last]])
    same_grid = a.entry(name).grid == b.entry(name).grid
    return same_grid and all(np.array_equal(x, y) for x, y in zip(*parts, strict=True))


def _all(entry: Entry) -> Want:
    return Want(entry.name, Box.whole(entry.shape))


def _values(source: Source, name: str, box: Box) -> torch.Tensor:
    out = torch.empty(box.sizes, dtype=getattr(torch, source.entry(name).dtype))
    read_boxes(source, [Want(name, box)], [out])
    return out.to(torch.float64) if out.dtype.is_floating_point and out.itemsize == 1 else out


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.complex128 if values.is_complex() else torch.float64)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _object(source: Source, name: str) -> tuple[Kind, bytes]:
    """What is to be compared of an object: how reshard would store it; of one that needs pickle, its bytes."""
    if source.entry(name).kind is Kind.TENSOR:
        return Kind.TENSOR, b""
    blob = Blob(source, name)
    read_boxes(source, blob.wants, blob.tensors)
    try:
        return encode_object(blob.value())
    except UnsafeObjectError:
        return blob.kind, blob.data


def _in_words(entry: Entry) -> str:
    if entry.kind is not Kind.TENSOR:
        return f"object of {entry.numel} bytes"
    return f"{entry.dtype} {list(entry.shape)}"
