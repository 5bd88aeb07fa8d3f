import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.planner.box import Box
from reshard.planner.grid import EIGHTHS, FLOOR_BYTES, MIN_CHUNK_BYTES, RAW_FLOOR_BYTES, TARGET_BYTES, Grid
from reshard.storage.formats.native.native_source import MAX_CHUNK_BYTES
from tests.planner.boxes import boxes_in, paint, shapes


def as_boxes(offsets: np.ndarray, sizes: np.ndarray) -> list[Box]:
    return [Box(tuple(o), tuple(s)) for o, s in zip(offsets.tolist(), sizes.tolist(), strict=True)]


@given(st.data(), shapes)
def test_chunks_tile_their_shard(data: st.DataObject, shape: tuple[int, ...]) -> None:
    parts = tuple(data.draw(st.integers(1, n)) for n in shape)
    grid = Grid(shape, parts)
    shard = data.draw(boxes_in(shape))
    ordinals, offsets, sizes = grid.chunks(shard)
    assert ordinals.tolist() == list(range(len(ordinals)))
    assert np.array_equal(paint(shape, as_boxes(offsets, sizes)), paint(shape, [shard]))
    boxes = np.array([shard.offsets], np.int64).reshape(1, -1), np.array([shard.sizes], np.int64).reshape(1, -1)
    assert grid.cells(*boxes)[1].prod() == len(ordinals)


@given(st.data(), shapes)
def test_split_keeps_the_chunks_and_their_order(data: st.DataObject, shape: tuple[int, ...]) -> None:
    grid = Grid(shape, tuple(data.draw(st.integers(1, n)) for n in shape))
    shard = data.draw(boxes_in(shape))
    most = data.draw(st.integers(1, 40))
    boxes = grid.split(shard, most)
    chunks = [chunk for box in boxes for chunk in as_boxes(*grid.chunks(box)[1:])]
    assert chunks == as_boxes(*grid.chunks(shard)[1:])
    assert all(box.numel <= most or len(grid.chunks(box)[0]) == 1 for box in boxes)


@given(st.data(), shapes)
def test_chunks_within_a_box_are_the_chunks_that_overlap_it(data: st.DataObject, shape: tuple[int, ...]) -> None:
    grid = Grid(shape, tuple(data.draw(st.integers(1, n)) for n in shape))
    shard, wanted = data.draw(boxes_in(shape)), data.draw(boxes_in(shape))
    every = as_boxes(*grid.chunks(shard)[1:])
    ordinals, offsets, sizes = grid.chunks(shard, within=wanted)
    meeting = [i for i, chunk in enumerate(every) if chunk.intersect(wanted)]
    assert sorted(ordinals.tolist()) == meeting
    assert as_boxes(offsets, sizes) == [every[i] for i in ordinals.tolist()]


@pytest.mark.parametrize("tp", [2, 4, 8, 16])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(4096, 14336), (14336, 4096), (8192, 8192), (128256, 4096)])
def test_tensor_parallel_cuts_are_at_grid_lines(shape: tuple[int, int], dim: int, tp: int) -> None:
    part = [n // tp if d == dim else n for d, n in enumerate(shape)]
    offsets = [n if d == dim else 0 for d, n in enumerate(part)]
    rank = Box(tuple(offsets), tuple(part))
    _, _, sizes = Grid.choose(shape, 2).chunks(Box.whole(shape), within=rank)
    assert sizes.prod(axis=1).sum() == rank.numel


@pytest.mark.parametrize(
    ("shape", "itemsize"),
    [
        ((), 4),
        ((1,), 8),
        ((7,), 2),
        ((10**7,), 4),
        ((3, 5), 4),
        ((0, 5), 4),
        ((1, 2**22), 2),
        ((1024, 4096), 2),
        ((128256, 8192), 4),
        ((64, 2048, 1408), 2),
        ((512, 512, 3, 3), 4),
    ],
)
@pytest.mark.parametrize(("raw", "floor"), [(False, FLOOR_BYTES), (True, RAW_FLOOR_BYTES)])
def test_cell_sizes_are_between_floor_and_target(shape: tuple[int, ...], itemsize: int, raw: bool, floor: int) -> None:
    grid = Grid.choose(shape, itemsize, raw=raw)
    cell = math.prod(n / part for n, part in zip(shape, grid.parts, strict=True)) * itemsize
    assert cell <= TARGET_BYTES
    assert cell >= floor or all(part == 1 for part in grid.parts)


@pytest.mark.parametrize(("shape", "dim"), [((4096, 1024), 0), ((1024, 4096), 1), ((2048, 2048), 1)])
def test_chunks_of_a_shard_that_one_rank_needs_are_consecutive(shape: tuple[int, int], dim: int) -> None:
    """FSDP saves shards of rows. Tensor parallelism cuts up projections by rows and down projections by columns."""
    grid = Grid.choose(shape, 2)
    shard = Box((shape[0] // 4, 0), (shape[0] // 4, shape[1]))
    part = [n // 8 if d == dim else n for d, n in enumerate(shape)]
    for rank in range(8):
        wanted = Box(tuple(rank * n if d == dim else 0 for d, n in enumerate(part)), tuple(part))
        ordinals = np.sort(grid.chunks(shard, within=wanted)[0])
        assert (np.diff(ordinals) == 1).all()


def test_experts_are_outermost() -> None:
    grid = Grid.choose((8, 4096, 2048), 2)
    assert grid.order == (0, 1, 2)
    assert Grid.choose((8, 2048, 4096), 2).order == (0, 2, 1)


def test_invalid_grid_raises_value_error() -> None:
    with pytest.raises(ValueError, match="a grid needs one number of parts"):
        Grid((4, 4), (2,))
    with pytest.raises(ValueError, match="a grid needs one number of parts"):
        Grid((4,), (0,))


@pytest.mark.parametrize("shape", [(1024, 4096), (4096, 1024), (8, 512, 1024), (3, 700, 900), (100_000,), (5, 7), ()])
def test_eighths_keep_the_chunks_and_their_order(shape: tuple[int, ...]) -> None:
    grid = Grid.choose(shape, 2)
    for begin, end in ((0, 4), (1, 3), (2, 3)):
        offsets = tuple(n * begin // 4 if d == 0 else 0 for d, n in enumerate(shape))
        sizes = tuple(n * end // 4 - n * begin // 4 if d == 0 else n for d, n in enumerate(shape))
        shard = Box(offsets, sizes)
        eighths, parts = zip(*grid.eighths(shard), strict=True)
        assert list(eighths) == sorted(set(eighths))
        assert max(eighths) < 8
        for of_parts, of_shard in zip(zip(*map(grid.chunks, parts), strict=True), grid.chunks(shard), strict=True):
            if of_shard.ndim == 2:
                assert np.concatenate(of_parts).tolist() == of_shard.tolist()


@given(st.lists(st.integers(1, 1500), min_size=1, max_size=3).map(tuple), st.integers(1, 5000), st.booleans())
def test_small_shards_merge_cells_down_to_eighths(shape: tuple[int, ...], ranks: int, raw: bool) -> None:
    default = Grid.choose(shape, 2, raw=raw)
    shard = (-(-shape[0] // ranks), *shape[1:])
    grid = Grid.choose(shape, 2, raw=raw, shard=shard)
    box = Box((0,) * len(shape), shard)
    chunks, of_default = (len(one.chunks(box)[0]) for one in (grid, default))
    assert chunks < of_default or grid == default
    if math.prod(shard) * 2 >= MIN_CHUNK_BYTES * of_default:
        assert all(part == known or part >= EIGHTHS for known, part in zip(default.parts, grid.parts, strict=True))
    assert grid.cell_numel * 2 <= MAX_CHUNK_BYTES


@pytest.mark.parametrize("shape", [(4096, 14336), (14336, 4096), (8192, 8192), (2048, 64, 64)])
def test_shards_of_many_ranks_have_few_chunks(shape: tuple[int, ...]) -> None:
    for ranks in (1, 4, 16):
        shard = (shape[0] // ranks, *shape[1:])
        assert Grid.choose(shape, 2, shard=shard) == Grid.choose(shape, 2)
    shard = (shape[0] // 1024, *shape[1:])
    grid = Grid.choose(shape, 2, shard=shard)
    assert len(grid.chunks(Box((0,) * len(shape), shard))[0]) <= EIGHTHS
    sizes = grid.chunks(Box((0,) * len(shape), shard))[2]
    assert int(sizes.prod(axis=1).min()) * 2 >= MIN_CHUNK_BYTES
    for tp in (2, 4, 8):
        offsets = [n // tp if d == 1 else 0 for d, n in enumerate(shape)]
        rank = Box(tuple(offsets), (shape[0], shape[1] // tp, *shape[2:]))
        if len(shape) == 2:
            assert grid.chunks(Box.whole(shape), within=rank)[2].prod(axis=1).sum() == rank.numel


def test_a_grid_of_shards_does_not_depend_on_small_differences() -> None:
    """The largest shard decides: the last rank may hold fewer rows."""
    assert Grid.choose((1000, 8192), 2, shard=(4, 8192)).parts == Grid.choose((1000, 8192), 2, shard=(3, 8192)).parts
