"""`tile` agrees with a count of each element."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.planner import index_checks
from reshard.planner.box import IntArray
from reshard.planner.errors import InvalidIndexError
from reshard.planner.index_checks import tile
from tests.planner.boxes import cuts_of, shapes


@given(st.data(), shapes, st.booleans())
def test_tile_agrees_with_counting_each_element(data: st.DataObject, shape: tuple[int, ...], moved: bool) -> None:
    boxes = data.draw(cuts_of(shape))
    offsets = np.array([box.offsets for box in boxes], np.int64).reshape(len(boxes), len(shape))
    sizes = np.array([box.sizes for box in boxes], np.int64).reshape(len(boxes), len(shape))
    if shape and moved:
        row, d = data.draw(st.integers(0, len(boxes) - 1)), data.draw(st.integers(0, len(shape) - 1))
        offsets[row, d] = data.draw(st.integers(0, shape[d] - int(sizes[row, d])))
    counts = np.zeros(shape, np.int64)
    for offset, size in zip(offsets, sizes, strict=True):
        counts[tuple(slice(begin, begin + n) for begin, n in zip(offset, size, strict=True))] += 1
    assert tile(shape, offsets, sizes) == bool((counts == 1).all())


def pinwheel(times: int) -> tuple[tuple[int, int], IntArray, IntArray]:
    """Return copies of five boxes that tile a square but that no straight cut separates."""
    offsets = np.array([[0, 0], [0, 2], [2, 1], [1, 0], [1, 1]])
    sizes = np.array([[1, 2], [2, 1], [1, 2], [2, 1], [1, 1]])
    shift = np.repeat(np.arange(times) * 3, 5)[:, None] * np.array([0, 1])
    return (3, 3 * times), np.tile(offsets, (times, 1)) + shift, np.tile(sizes, (times, 1))


def test_tile_accepts_boxes_that_are_not_grid_cells() -> None:
    shape, offsets, sizes = pinwheel(20_000)
    assert tile(shape, offsets, sizes)
    offsets[77] = offsets[78]
    assert not tile(shape, offsets, sizes)


def test_too_many_corners_raise_invalid_index_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_checks, "MAX_CORNERS", 1000)
    with pytest.raises(InvalidIndexError, match="1000 shards are cut along 2 dimensions, but not by a grid"):
        tile(*pinwheel(200))
