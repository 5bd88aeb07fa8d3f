import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.planner.box import Box
from reshard.planner.chunk_reads import ChunkReads, WantedBox
from reshard.planner.errors import MissingTensorError, ShapeMismatchError
from reshard.planner.grid import Grid
from reshard.planner.layout import Layout
from reshard.planner.rank_plans import plan_ranks
from reshard.planner.read_plan import plan_reads
from tests.planner.boxes import boxes_in, cuts_of, paint, shapes
from tests.planner.indexes import Saved, index_of


def pieces(read: ChunkReads) -> list[Box]:
    return [
        Box(tuple(o), tuple(s)) for o, s in zip(read.wanted_offsets.tolist(), read.wanted_sizes.tolist(), strict=True)
    ]


@given(st.data(), shapes, st.booleans(), st.sampled_from(["bfloat16", "float32"]))
def test_pieces_tile_the_wanted_box(data: st.DataObject, shape: tuple[int, ...], raw: bool, dtype: str) -> None:
    grid = Grid(shape, tuple(data.draw(st.integers(1, n)) for n in shape))
    index = index_of(Saved("t", grid, data.draw(cuts_of(shape)), dtype, raw))
    wanted = data.draw(boxes_in(shape))
    plan = plan_reads(index, [WantedBox("t", wanted)])
    (read,) = plan.reads
    assert np.array_equal(paint(shape, pieces(read)), paint(shape, [wanted]))
    (requests,) = plan.requests_of()
    assert (plan.requests.starts[requests] <= read.starts).all()
    assert (plan.requests.stops[requests] >= read.stops).all()
    assert (plan.requests.objects[requests] == read.objects).all()
    assert read.objects.shape[1] == (2 if dtype == "float32" and not raw else 1)


@given(st.data(), shapes)
def test_byte_ranges_of_different_chunks_are_disjoint(data: st.DataObject, shape: tuple[int, ...]) -> None:
    grid = Grid(shape, tuple(data.draw(st.integers(1, n)) for n in shape))
    index = index_of(Saved("t", grid, data.draw(cuts_of(shape)), "float32", raw=False))
    (read,) = plan_reads(index, [WantedBox("t", Box.whole(shape))]).reads
    ranges = sorted(
        zip(read.objects.ravel().tolist(), read.starts.ravel().tolist(), read.stops.ravel().tolist(), strict=True)
    )
    assert all(a[0] != b[0] or a[2] <= b[1] for a, b in itertools.pairwise(ranges))
    assert sum(stop - start for _, start, stop in ranges) == int(index.lengths.sum())
    assert sorted(read.checksums.ravel().tolist()) == list(range(len(index.checksums)))


def test_heads_only_reads_no_tails() -> None:
    index = index_of(Saved("t", Grid((64, 64), (2, 2)), [Box.whole((64, 64))], "float32", raw=False))
    (both,) = plan_reads(index, [WantedBox("t", Box.whole((64, 64)))]).reads
    (heads,) = plan_reads(index, [WantedBox("t", Box.whole((64, 64)), heads_only=True)]).reads
    assert np.array_equal(heads.starts, both.starts[:, :1])
    assert heads.itemsize == 2
    assert heads.bytes_needed * 2 == both.bytes_needed


def test_heads_only_is_ignored_without_heads() -> None:
    index = index_of(Saved("t", Grid((8,), (1,)), [Box.whole((8,))], "float32", raw=True))
    (read,) = plan_reads(index, [WantedBox("t", Box.whole((8,)), heads_only=True)]).reads
    assert not read.heads_only
    assert read.itemsize == 4


def test_raw_chunks_are_read_by_pages() -> None:
    shape = (1024, 256)  # 512 bytes per row: a page is a 16th of the chunk, so it has 64 rows
    index = index_of(Saved("t", Grid(shape, (1, 1)), [Box.whole(shape)], "bfloat16", raw=True))
    (read,) = plan_reads(index, [WantedBox("t", Box((100, 0), (50, 256)))]).reads
    assert read.skipped.tolist() == [64 * 512]
    assert (read.stops - read.starts).tolist() == [[2 * 64 * 512]]
    assert (read.checksums.tolist(), read.checksum_counts.tolist()) == ([[1]], [2])


def test_whole_raw_chunks_have_one_checksum() -> None:
    shape = (1024, 256)
    saved = Saved("t", Grid(shape, (1, 1)), [Box.whole(shape)], "bfloat16", raw=True)
    want = [WantedBox("t", Box.whole(shape))]
    (read,) = plan_reads(index_of(saved), want).reads
    assert (read.checksums.tolist(), read.checksum_counts.tolist()) == ([[16]], [1])
    (read,) = plan_reads(index_of(saved, whole_checksums=False), want).reads
    assert (read.checksums.tolist(), read.checksum_counts.tolist()) == ([[0]], [16])


def test_adjacent_shards_are_read_with_one_request() -> None:
    grid = Grid.choose((4096, 1024), 2)
    shards = [Box((i * 512, 0), (512, 1024)) for i in range(8)]
    index = index_of(*(Saved(f"{i}.up", grid, shards) for i in range(4)))
    plans = plan_ranks(index, Layout(4, {"*.up": "colwise"}))
    assert len(plans) == 4
    assert [plan.report.amplification for plan in plans] == [1.0] * 4
    assert [plan.report.requests for plan in plans] == [2] * 4, (
        "one request for each of two objects, which contain shards of all four tensors"
    )
    assert "4 ranks" in str(plans)


def test_unknown_names_and_boxes_outside_the_shape_raise_errors() -> None:
    index = index_of(Saved("t", Grid((8, 8), (2, 2)), [Box.whole((8, 8))]))
    with pytest.raises(MissingTensorError, match="'u'"):
        plan_reads(index, [WantedBox("u", Box.whole((8, 8)))])
    with pytest.raises(ShapeMismatchError, match=r"'t' has shape \(8, 8\)"):
        plan_reads(index, [WantedBox("t", Box((4, 0), (8, 8)))])


def test_plans_compare_by_value() -> None:
    index = index_of(Saved("t", Grid((8, 8), (2, 2)), [Box.whole((8, 8))]))
    plan = plan_reads(index, [WantedBox("t", Box.whole((8, 8)))])
    assert plan == plan_reads(index, [WantedBox("t", Box.whole((8, 8)))])
    assert plan != plan_reads(index, [WantedBox("t", Box((0, 0), (4, 8)))])


def test_plan_of_empty_tensors_has_no_requests() -> None:
    index = index_of(Saved("t", Grid((0, 8), (1, 1)), []))
    plan = plan_reads(index, [WantedBox("t", Box.whole((0, 8)))])
    assert len(plan.requests) == 0
    assert plan.report.amplification == 0
    assert len(plan_reads(index, []).requests) == 0


@given(st.data(), shapes, st.booleans())
def test_planning_many_boxes_equals_planning_each_alone(
    data: st.DataObject, shape: tuple[int, ...], wide: bool
) -> None:
    """The boxes are of tensors with the same grid and others, in any order. A tensor may occur several times."""
    grid = Grid(shape, tuple(data.draw(st.integers(1, n)) for n in shape))
    kinds = [("float32", False), ("float32", True), ("bfloat16", False), ("bfloat16", True)]
    saved = [
        Saved(f"{dtype} {raw} {i}", grid, data.draw(cuts_of(shape)), dtype, raw) for dtype, raw in kinds for i in "ab"
    ]
    index = index_of(*saved, Saved("one", Grid(shape, (1,) * len(shape)), [Box.whole(shape)], plain=True))
    names = data.draw(st.lists(st.sampled_from([entry.name for entry in index.entries]), max_size=12))
    wants = [WantedBox(name, data.draw(boxes_in(shape)), heads_only=not wide) for name in names]
    together = plan_reads(index, wants).reads
    assert list(together) == [plan_reads(index, [want]).reads[0] for want in wants]
