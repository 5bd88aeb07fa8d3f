from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.planner import slabs
from reshard.planner.box import Box
from reshard.planner.chunk_reads import ChunkReads, WantedBox
from reshard.planner.coalesce import GapLimits
from reshard.planner.grid import Grid
from reshard.planner.read_plan import ReadPlan, plan_reads
from reshard.planner.request_costs import LOCAL_COSTS, REMOTE_COSTS
from tests.planner.boxes import boxes_in, cuts_of, paint, shapes
from tests.planner.indexes import Saved, index_of


def plan_of(shape: tuple[int, ...], shards: list[Box], wanted: Box, gap_limits: GapLimits) -> ReadPlan:
    parts = tuple(1 for _ in shape)
    index = index_of(Saved("t", Grid(shape, parts), shards, "float32", plain=True))
    return plan_reads(index, [WantedBox("t", wanted)], gap_limits=gap_limits)


def values_of(read: ChunkReads, row: int, content: list[bytes]) -> list[int]:
    """Return the values in the byte runs of a slab."""
    assert read.runs is not None
    count, nbytes, stride = (int(c[row]) for c in (read.runs.counts, read.runs.nbytes, read.runs.strides))
    start, data = int(read.starts[row, 0]), content[int(read.objects[row, 0])]
    runs = [data[start + i * stride : start + i * stride + nbytes] for i in range(count)]
    assert start + (count - 1) * stride + nbytes == int(read.stops[row, 0])
    found: list[int] = np.frombuffer(b"".join(runs), np.int32).tolist()
    return found


@given(st.data(), shapes, st.integers(0, 60), st.floats(0, 4), st.sampled_from([16, 64, 1024]))
def test_byte_runs_contain_each_wanted_value_exactly_once(
    data: st.DataObject, shape: tuple[int, ...], gap: int, over_read: float, slab: int
) -> None:
    shards, wanted = data.draw(cuts_of(shape)), data.draw(boxes_in(shape))
    tensor = np.arange(int(np.prod(shape)), dtype=np.int32).reshape(shape)
    content = [bytes(8) + tensor[shard.slices].tobytes() for shard in shards]
    with mock.patch.multiple(slabs, MAX_SLAB_BYTES=slab, MAX_SPAN_BYTES=4 * slab):
        plan = plan_of(shape, shards, wanted, GapLimits(gap, over_read))
    (read,) = plan.reads
    boxes = [
        Box(tuple(o), tuple(s)) for o, s in zip(read.chunk_offsets.tolist(), read.chunk_sizes.tolist(), strict=True)
    ]
    assert np.array_equal(paint(shape, boxes), paint(shape, [wanted]))
    for row, box in enumerate(boxes):
        assert values_of(read, row, content) == tensor[box.slices].ravel().tolist()
    needed = wanted.numel * 4
    assert read.bytes_wanted == needed
    assert needed <= plan.requests.nbytes <= needed * (1 + over_read) + 1
    (requests,) = plan.requests_of()
    assert (plan.requests.starts[requests] <= read.starts).all()
    assert (plan.requests.stops[requests] >= read.stops).all()


SHARD = [Box.whole((1024, 4096))]


@pytest.mark.parametrize(
    ("max_gap_bytes", "over_read", "fetched", "ranges"),
    [
        (0, 0.0, 1.0, 1024),  # one request per run
        (2**20, 1e9, 4.0, 1),  # one request for all runs
        (2**20, 1.0, 1.0, 1024),  # the gaps are three times the bytes wanted: beyond max_over_read
        (100, 1e9, 1.0, 1024),  # the gaps are larger than max_gap_bytes
    ],
)
def test_gap_limits_decide_whether_gaps_between_runs_are_read(
    max_gap_bytes: int, over_read: float, fetched: float, ranges: int
) -> None:
    wanted = Box((0, 1024), (1024, 1024))
    report = plan_of((1024, 4096), SHARD, wanted, GapLimits(max_gap_bytes, over_read)).report
    assert report.amplification == pytest.approx(fetched, rel=0.001)
    assert report.requests == ranges
    assert report.bytes_wanted == wanted.numel * 4


def test_adjacent_rows_are_one_request() -> None:
    plan = plan_of((1024, 4096), SHARD, Box((256, 0), (256, 4096)), GapLimits(0, 0))
    assert plan.report.amplification == 1
    assert len(plan.requests) == 1
    assert len(plan.reads[0]) == 4, "slabs of 1 MiB"


def test_rows_longer_than_a_slab_are_cut() -> None:
    plan = plan_of((2, 2**20), [Box.whole((2, 2**20))], Box((0, 0), (2, 2**20)), GapLimits(0, 0))
    assert len(plan.reads[0]) == 8
    assert plan.report.bytes_fetched == 8 * 2**20


def test_gap_limits_follow_from_request_costs() -> None:
    assert LOCAL_COSTS.gap_limits() == GapLimits(4000, 0.25)
    assert REMOTE_COSTS.gap_bytes == 187_500
    assert REMOTE_COSTS.measured(0.001, None).gap_bytes == 6250
    assert REMOTE_COSTS.measured(None, 400e6).gap_bytes == 375_000
    assert REMOTE_COSTS.gap_limits(0.5) == GapLimits(187_500, 0.5)


def test_gaps_that_are_read_over_inside_slabs_count_toward_the_limit() -> None:
    whole = Box.whole((200, 1000))
    matrix = Saved("w", Grid((200, 1000), (1, 1)), [whole], plain=True)
    rows = Saved("v", Grid((40, 1000), (1, 1)), [Box.whole((40, 1000))], plain=True)
    index = index_of(matrix, rows)
    wants = [WantedBox("w", Box((0, 0), (200, 900)))]  # gaps of 200 bytes in rows of 2000
    wants += [WantedBox("v", Box((at, 0), (1, 1000))) for at in range(0, 40, 2)]  # gaps of a row
    for fraction in (0.0, 0.05, 0.12, 0.2, 1.0):
        report = plan_reads(index, wants, gap_limits=GapLimits(4000, fraction)).report
        assert report.bytes_fetched - report.bytes_wanted <= fraction * report.bytes_wanted
    assert report.bytes_fetched > 1.1 * report.bytes_wanted
