import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.planner.box import Box
from reshard.planner.entries import Entry, Kind, Segments
from reshard.planner.errors import InvalidIndexError
from reshard.planner.grid import Grid
from reshard.planner.index import CheckpointIndex
from tests.planner.boxes import cuts_of, shapes
from tests.planner.indexes import Saved, index_of


def good() -> CheckpointIndex:
    halves = [Box((0, 0), (4, 8)), Box((4, 0), (4, 8))]
    return index_of(
        Saved("a", Grid((8, 8), (2, 2)), halves, "float32", raw=False), Saved("b", Grid((8, 8), (2, 1)), halves)
    )


def test_index_finds_entries_shards_and_chunks() -> None:
    index = good()
    assert "a" in index
    assert "c" not in index
    assert index.shards_of(0) == [Box((0, 0), (4, 8)), Box((4, 0), (4, 8))]
    assert index.sizes[1][1] == 8 * 8 * 2
    assert index.chunks_of(1).stop == len(index.lengths)


def test_heads_and_tails_of_different_tensors_do_not_pair_up() -> None:
    whole = [Box.whole((8, 8))]
    index = index_of(*(Saved(name, Grid((8, 8), (1, 1)), whole, "float32", raw=False) for name in "ab"))
    assert index.segments.streams.tolist() == [1, 2, 1, 2]
    with pytest.raises(InvalidIndexError, match=r"'a'.* do not pair up"):
        segments(entries=np.array([0, 1, 1, 1]))(index)


def segments(**changes: Any) -> Callable[[CheckpointIndex], CheckpointIndex]:
    return lambda index: dataclasses.replace(index, segments=dataclasses.replace(index.segments, **changes))


def with_row(column: str, row: int, value: int) -> Callable[[CheckpointIndex], CheckpointIndex]:
    def change(index: CheckpointIndex) -> CheckpointIndex:
        changed = getattr(index.segments, column).copy()
        changed[row] = value
        return segments(**{column: changed})(index)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: dataclasses.replace(i, lengths=i.lengths[:-1]), "chunks, but the index has"),
        (lambda i: dataclasses.replace(i, checksums=i.checksums[:-1]), "checksums"),
        (lambda i: dataclasses.replace(i, objects=(("x", 10), ("y", 10))), "beyond the end"),
        (lambda i: dataclasses.replace(i, objects=(("x", -1), ("y", 10))), "impossible size"),
        (lambda i: dataclasses.replace(i, entries=(i.entries[0], i.entries[0])), "same name"),
        (lambda i: dataclasses.replace(i, lengths=np.full_like(i.lengths, 2**32 - 1)), "impossible length"),
        (with_row("objects", 0, 7), "in none of the 2 data objects"),
        (with_row("objects", 0, -1), "in none of the 2 data objects"),
        (with_row("entries", 0, 1), "not sorted"),
        (with_row("entries", -1, 9), "belongs to none of the 2 tensors"),
        (with_row("streams", 0, 2), "do not pair up"),
        (with_row("streams", 0, 9), "unknown stream"),
        (with_row("encodings", 0, 9), "unknown stream or encoding"),
        (with_row("starts", 0, -5), "beyond the end"),
        (with_row("starts", 0, 2**62), "beyond the end"),
        (with_row("offsets", 0, -1), "outside its shape"),
        (with_row("sizes", 0, 2**62), "outside its shape"),
        (with_row("sizes", 0, 0), "outside its shape"),
        (with_row("sizes", -1, 3), "hold 44 elements"),
        (with_row("offsets", -2, 2), "overlap"),
        (lambda i: dataclasses.replace(i, lengths=np.zeros_like(i.lengths)), "impossible length"),
        (lambda i: dataclasses.replace(i, lengths=i.lengths * 10_000), "impossible length"),
        (segments(offsets=np.zeros(3, np.int64)), "boxes of the shards need"),
        (segments(streams=np.zeros(1, np.uint8)), "differ in length"),
    ],
)
def test_contradictory_columns_raise_invalid_index_error(
    change: Callable[[CheckpointIndex], CheckpointIndex], message: str
) -> None:
    with pytest.raises(InvalidIndexError, match=message):
        change(good())


@pytest.mark.parametrize(
    ("dtype", "shape", "parts"),
    [
        ("quint8", (4,), (1,)),
        ("int8", (2**38,), (1,)),
        ("int64", (2**37, 2**37), (1, 1)),
        ("int8", (1,) * 33, (1,) * 33),
        ("int8", (-4,), (1,)),
        ("int8", (4,), (5,)),
        ("int8", (2**30,), (2**25,)),
    ],
)
def test_impossible_entry_raises_invalid_index_error(
    dtype: str, shape: tuple[int, ...], parts: tuple[int, ...]
) -> None:
    with pytest.raises(InvalidIndexError, match="'t' has the"):
        Entry("t", Kind.TENSOR, dtype, Grid(shape, parts))


def test_values_must_be_one_dimension_of_uint8() -> None:
    for dtype, shape in (("int64", (4,)), ("uint8", (2, 2))):
        with pytest.raises(InvalidIndexError, match="value 't' must be stored as one dimension"):
            Entry("t", Kind.JSON, dtype, Grid(shape, (1,) * len(shape)))


@given(st.data(), shapes)
def test_every_tiling_is_accepted_and_every_overlap_is_refused(data: st.DataObject, shape: tuple[int, ...]) -> None:
    boxes = data.draw(cuts_of(shape))
    index_of(Saved("t", Grid(shape, (1,) * len(shape)), boxes))
    twins = [(i, j) for i, a in enumerate(boxes) for j, b in enumerate(boxes) if i != j and a.sizes == b.sizes]
    if twins:
        i, j = data.draw(st.sampled_from(twins))
        boxes[i] = boxes[j]
        with pytest.raises(InvalidIndexError, match="overlap"):
            index_of(Saved("t", Grid(shape, (1,) * len(shape)), boxes))


def test_index_without_entries_is_valid() -> None:
    nothing = np.empty(0, np.int64)
    columns = Segments(nothing, nothing.astype(np.uint8), nothing.astype(np.uint8), nothing, nothing, nothing, nothing)
    index = CheckpointIndex((), (), columns, nothing.astype(np.uint32), nothing.astype(np.uint64))
    assert len(index.segments) == 0
