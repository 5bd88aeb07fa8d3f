from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.planner.box import Box, intersect_many
from tests.planner.boxes import boxes_in, paint, shapes


@given(st.data(), shapes)
def test_intersection_is_the_set_of_common_elements(data: st.DataObject, shape: tuple[int, ...]) -> None:
    a, b = data.draw(boxes_in(shape)), data.draw(boxes_in(shape))
    both = paint(shape, [a, b]) == 2
    found = a.intersect(b)
    assert np.array_equal(paint(shape, [found] if found else []) == 1, both)

    offsets = np.array([a.offsets], np.int64).reshape(1, len(shape))
    sizes = np.array([a.sizes], np.int64).reshape(1, len(shape))
    many_offsets, many_sizes = intersect_many(offsets, sizes, b)
    if found is None:
        assert (many_sizes <= 0).any()
    else:
        assert (tuple(many_offsets[0]), tuple(many_sizes[0])) == (found.offsets, found.sizes)


def test_relative_to_subtracts_offsets() -> None:
    box = Box((4, 6), (2, 3))
    assert box.relative_to(Box((3, 6), (9, 9))) == Box((1, 0), (2, 3))
    assert box.numel == 6
    assert str(box) == "[4:6, 6:9]"
    assert Box((), ()).numel == 1


@pytest.mark.parametrize(("offsets", "sizes"), [((0,), (1, 2)), ((-1,), (2,)), ((0,), (-2,))])
def test_invalid_offsets_and_sizes_raise_value_error(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"offsets|negative"):
        Box(offsets, sizes)


def test_fits_is_true_only_inside_the_shape() -> None:
    assert Box((1, 0), (2, 3)).fits((3, 3))
    assert not Box((2, 0), (2, 3)).fits((3, 3))
    assert not Box((0,), (1,)).fits((3, 3))


def test_whole_box_has_plain_integers_whatever_was_passed_before() -> None:
    shape: Any = np.int64(77), True
    assert Box.whole(shape) == Box.whole([77, 1])
    assert [type(n) for n in Box.whole((77, 1)).sizes] == [int, int]
