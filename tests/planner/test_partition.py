import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.planner.box import Box
from reshard.planner.chunk_reads import WantedBox
from reshard.planner.errors import InvalidIndexError
from reshard.planner.grid import Grid
from reshard.planner.index import CheckpointIndex
from reshard.planner.layout import Layout
from reshard.planner.partition import choose_regions, partition
from reshard.planner.rank_plans import plan_ranks
from reshard.planner.read_plan import plan_reads
from reshard.planner.regions import MAX_REGIONS, Regions, regions_met
from reshard.planner.shard_boxes import join_segments
from tests.planner.boxes import boxes_in, cuts_of, shapes
from tests.planner.indexes import Saved, chunks_read, index_of


@given(st.data(), shapes, st.booleans(), st.sampled_from(["bfloat16", "float32"]))
def test_partitioned_index_reads_the_same_chunks(
    data: st.DataObject, shape: tuple[int, ...], raw: bool, dtype: str
) -> None:
    grid = Grid(shape, tuple(data.draw(st.integers(1, n)) for n in shape))
    parts = tuple(data.draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0])) for n in grid.parts)
    saved = [Saved(name, grid, data.draw(cuts_of(shape)), dtype, raw) for name in "abc"]
    whole = index_of(*saved)
    cut = partition(whole, [(1,) * len(shape), parts, (1,) * len(shape)])
    assert len(cut.regions) == 2 + int(np.prod(parts))
    assert cut.sizes == whole.sizes
    for name in "abc":
        want = WantedBox(name, data.draw(boxes_in(shape)))
        assert chunks_read(cut, want) == chunks_read(whole, want)


def rows(shape: tuple[int, ...], ranks: int) -> list[Box]:
    each = -(-shape[0] // ranks)
    return [Box((at, 0), (min(each, shape[0] - at), shape[1])) for at in range(0, shape[0], each)]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((4096, 1024), (8, 2)),  # an up projection: cut along the rows until regions are square
        ((1024, 4096), (2, 8)),  # a down projection: cut along the columns
        ((2048, 2048), (4, 4)),
    ],
)
def test_regions_follow_the_longest_dimension(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    index = index_of(Saved("t", Grid(shape, (64, 64)), rows(shape, 256), raw=False))
    parts = choose_regions(index, [int(np.prod(expected))])[0]
    assert parts == expected
    assert len(partition(index, [parts]).segments) <= len(index.segments) + len(index.lengths) // 8


def test_choose_regions_limits_the_number_of_added_segments() -> None:
    shape = (4096, 4096)
    index = index_of(Saved("t", Grid.choose(shape, 2), rows(shape, 4096), raw=False))
    parts = choose_regions(index, [10**6])[0]
    assert parts == (16, 2)  # 16 chunks per row: two pieces of 8
    assert len(partition(index, [parts]).segments) == 2 * 4096
    assert choose_regions(index_of(Saved("t", Grid((), ()), [Box((), ())])), [5]) == [()]


def test_index_of_some_regions_plans_boxes_inside_them() -> None:
    shape = (64, 64)
    whole = index_of(Saved("t", Grid(shape, (8, 8)), rows(shape, 16)))
    cut = partition(whole, [(2, 2)])
    some = only(cut, 2)
    box = Box((0, 32), (32, 32))  # the columns of a square tensor are the outermost dimension
    assert [column.tolist() for column in some.regions.boxes(some.entries, 2)] == [[0], [[0, 32]], [[32, 32]]]
    assert regions_met(shape, (2, 2), box).tolist() == [2]
    assert chunks_read(some, WantedBox("t", box)) == chunks_read(whole, WantedBox("t", box))
    with pytest.raises(InvalidIndexError, match=r"the shards of 't' cover 1024 of the 4096 elements"):
        plan_reads(some, [WantedBox("t", Box.whole(shape))])


def only(index: CheckpointIndex, region: int) -> CheckpointIndex:
    """Return the index of only one region, given the index of one matrix."""
    regions, segments = index.regions, index.segments
    begin, end = np.cumsum([0, *regions.segments])[[region, region + 1]].tolist()
    columns = {f.name: getattr(segments, f.name)[begin:end] for f in dataclasses.fields(segments)}
    columns |= {name: getattr(segments, name)[2 * begin : 2 * end] for name in ("offsets", "sizes")}
    return CheckpointIndex(
        index.entries,
        index.objects,
        dataclasses.replace(segments, **columns),
        index.lengths[index.first_chunk[begin] : index.first_chunk[end]],
        index.checksums[index.first_checksum[begin] : index.first_checksum[end]],
        Regions(regions.parts, regions.entries[[region]], regions.cells[[region]], regions.segments[[region]]),
    )


@given(st.data(), shapes, st.booleans())
def test_shards_of_returns_the_saved_shards(data: st.DataObject, shape: tuple[int, ...], raw: bool) -> None:
    grid = Grid(shape, shape)
    boxes = data.draw(cuts_of(shape))
    whole = index_of(Saved("t", grid, boxes, "float32", raw))
    parts = tuple(data.draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0])) for n in shape)
    assert partition(whole, [parts]).shards_of(0) == whole.shards_of(0) == sorted(boxes, key=lambda box: box.offsets)


def test_whole_shards_do_not_depend_on_regions() -> None:
    shape = (64, 64)
    whole = index_of(Saved("t", Grid(shape, (8, 8)), rows(shape, 16)))
    layout = Layout({"tp": 4}, {"t": "rowwise"})
    plans = [plan_ranks(index, layout) for index in (whole, partition(whole, [(2, 4)]))]
    assert plans[0].whole_shards == plans[1].whole_shards
    assert plans[0].whole_shards[0].nbytes == 64 * 64 * 2


def test_adjacent_segments_that_form_no_box_are_not_joined() -> None:
    offsets, sizes = (
        np.array([[0, 0], [0, 4], [2, 0], [2, 4], [4, 0]]),
        np.array([[2, 4], [2, 4], [2, 4], [2, 4], [4, 2]]),
    )
    starts = np.arange(5) * 8
    found = join_segments(np.zeros(5, int), starts, offsets, sizes)
    assert [column.tolist() for column in found] == [[[0, 0], [4, 0]], [[4, 8], [4, 2]]]
    found = join_segments(np.arange(5), starts, offsets, sizes)
    assert found[0].tolist() == offsets.tolist()


def test_regions_met_returns_the_regions_that_a_box_overlaps() -> None:
    assert regions_met((8, 6), (2, 3), Box((4, 0), (1, 6))).tolist() == [3, 4, 5]
    assert regions_met((8, 6), (2, 3), Box((3, 2), (2, 2))).tolist() == [1, 4]
    assert regions_met((8, 6), (1, 1), Box((4, 0), (1, 6))).tolist() == [0]
    assert regions_met((8, 6), (2, 3), Box((4, 3), (0, 2))).tolist() == [0]
    assert regions_met((8, 6), (2, 3), Box((4, 3), (5, 2))).tolist() == [0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": ((3, 1),)}, r"cannot be cut into \(3, 1\) regions"),
        ({"parts": ((2,),)}, r"cannot be cut into \(2,\) regions"),
        ({"parts": ((0, 2),)}, r"cannot be cut into \(0, 2\) regions"),
        ({"parts": ()}, "a tensor has no regions"),
        ({"entries": np.array([0, 0, 0, 1])}, "a tensor has no regions"),
        ({"cells": np.array([0, 1, 1, 3])}, "not in order"),
        ({"cells": np.array([0, 2, 1, 3])}, "not in order"),
        ({"cells": np.array([0, 1, 2, 4])}, "not in order"),
        ({"cells": np.array([-1, 1, 2, 3])}, "not in order"),
        ({"segments": np.array([8, 8, 8, 7])}, "not those of its tensor"),
        ({"segments": np.array([9, 7, 8, 8])}, "or outside its region"),
        ({"segments": np.array([16, 0, 8, 8])}, "hold 0 elements.*its region"),
    ],
)
def test_regions_that_contradict_the_index_raise_invalid_index_error(change: dict[str, Any], message: str) -> None:
    shape = (64, 64)
    cut = partition(index_of(Saved("t", Grid(shape, (8, 8)), rows(shape, 16))), [(2, 2)])
    with pytest.raises(InvalidIndexError, match=message):
        dataclasses.replace(cut, held=dataclasses.replace(cut.regions, **change))


def test_too_many_regions_raise_invalid_index_error() -> None:
    grid = Grid((2**20,), (2**20,))
    index = index_of(Saved("t", Grid((2**20,), (1,)), [Box((0,), (2**20,))]))
    entry = dataclasses.replace(index.entries[0], grid=grid)
    with pytest.raises(InvalidIndexError, match="cannot be cut into"):
        Regions(((2 * MAX_REGIONS,),), np.zeros(1, int), np.zeros(1, int), np.ones(1, int)).check(
            [entry], np.zeros(1, int)
        )
