"""Strided views are split into boxes that have exactly their elements: compared with numpy."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

from reshard.planner.box import Box
from reshard.planner.strided import MAX_PARTS, StridedView, split

Array = npt.NDArray[np.int64]


def view_of(array: Array, base: Array) -> StridedView:
    """Describe a numpy view of a base array, in elements."""
    offset = (array.__array_interface__["data"][0] - base.__array_interface__["data"][0]) // 8
    return StridedView(array.shape, tuple(stride // 8 for stride in array.strides), offset)


def at(memory: Array, view: StridedView) -> Array:
    flat = memory.reshape(-1)[view.offset :]
    return as_strided(flat, view.sizes, [stride * 8 for stride in view.strides])


def random_view(array: Array, random: Random) -> Array:
    """Apply one random operation that returns a view."""
    d = random.randrange(array.ndim) if array.ndim else 0
    kind = random.choice(["slice", "slice", "select", "permute", "split", "flatten", "diagonal", "repeat", "step"])
    if kind == "repeat":
        return np.broadcast_to(array, (random.randint(1, 3), *array.shape))
    if array.ndim == 0:
        return array[None]
    if kind == "slice":
        begin = random.randint(0, array.shape[d])
        return array[(slice(None),) * d + (slice(begin, random.randint(begin, array.shape[d])),)]
    if kind == "step":
        return array[(slice(None),) * d + (slice(random.randint(0, 1), None, random.randint(1, 3)),)]
    if kind == "select" and array.shape[d]:
        return array[(slice(None),) * d + (random.randrange(array.shape[d]), ...)]
    if kind == "permute":
        return array.transpose(random.sample(range(array.ndim), array.ndim))
    if kind == "diagonal" and array.ndim > 1:
        return np.diagonal(array, random.randint(-1, 1))
    shape: tuple[int, ...] = (-1,)
    if kind == "split" and array.size:
        shape = random.choice([(n, -1) for n in range(1, array.size + 1) if array.size % n == 0])
    reshaped = array.reshape(shape)
    return reshaped if np.shares_memory(reshaped, array) else array


def random_destination(sizes: tuple[int, ...], random: Random) -> Array:
    """Return a strided array of some sizes, with the value -1."""
    order = random.sample(range(len(sizes)), len(sizes))
    outer = [sizes[d] * random.randint(1, 2) + random.randint(0, 1) for d in order]
    index: Any = (..., *(slice(0, sizes[d]) for d in order))
    part: Array = np.full(outer, -1)[index]
    turned: Array = part.transpose([order.index(d) for d in range(len(sizes))])
    return turned


@given(st.lists(st.integers(1, 7), max_size=4), st.integers(0, 6), st.randoms(use_true_random=False))
def test_the_parts_of_a_view_have_its_elements(shape: list[int], operations: int, random: Random) -> None:
    base = np.arange(math.prod(shape)).reshape(shape)
    view = base
    for _ in range(operations):
        view = random_view(view, random)
    destination = random_destination(view.shape, random)
    owner = destination if destination.base is None else destination.base
    memory = owner if owner.base is None else owner.base
    into = view_of(destination, memory)
    for part in split(base.shape, view_of(view, base)):
        assert part.box.fits(base.shape)
        boxes = part.boxes_in(into, 1)
        if boxes is None:
            at(memory, part.of(into))[...] = at(base[part.box.slices].copy(), part.view)
        else:
            for box, to in boxes:
                assert to.sizes == box.sizes
                at(memory, to)[...] = base[box.slices]
    assert np.array_equal(destination, view)


CONTIGUOUS = {
    "rows": (lambda w: w[2:5], 1),
    "columns": (lambda w: w[:, 8:16], 1),
    "transposed": (lambda w: w.T[3:9], 1),
    "one expert of a stack": (lambda w: w.reshape(4, 2, 16)[1], 1),
    "heads": (lambda w: w.reshape(4, 2, 16)[1:3], 1),
    "rows of a flattened matrix": (lambda w: w.reshape(-1)[32:64], 1),
    "a slice of a flattened matrix": (lambda w: w.reshape(-1)[10:70], 3),
    "halves of rows": (lambda w: w.reshape(8, 2, 8)[:, 1], 1),
    "every second head": (lambda w: w.reshape(4, 2, 16)[::2], 2),
    "interleaved halves of heads": (lambda w: w.reshape(2, 4, 16).swapaxes(0, 1), 2),
}


@pytest.mark.parametrize("name", CONTIGUOUS)
def test_slices_that_engines_take_are_read_without_other_elements(name: str) -> None:
    base = np.arange(8 * 16).reshape(8, 16)
    take, expected = CONTIGUOUS[name]
    view = take(base)  # type: ignore[no-untyped-call]
    destination = np.empty(view.shape, np.int64)
    found = []
    for part in split(base.shape, view_of(view, base)):
        boxes = part.boxes_in(view_of(destination, destination), 1)
        assert boxes is not None
        found += boxes
    assert len(found) == expected
    assert sum(box.numel for box, _ in found) == view.size


def test_a_view_of_very_many_boxes_becomes_the_rows_that_contain_it() -> None:
    base = np.arange(3000 * 7).reshape(3000, 7)
    view = StridedView((1500,), (11,), 2)
    (part,) = split(base.shape, view)
    assert part.box == Box((0, 0), (2356, 7))
    assert np.array_equal(at(base[part.box.slices].copy(), part.view), base.reshape(-1)[2 : 2 + 1500 * 11 : 11])


def test_small_boxes_are_read_with_the_elements_between_them() -> None:
    base = np.arange(64).reshape(16, 4)
    (part,) = split(base.shape, view_of(base[::2], base))
    destination = StridedView.whole((8, 4))
    assert part.boxes_in(destination, 5) is None
    boxes = part.boxes_in(destination, 4)
    assert boxes is not None
    assert len(boxes) == 8
    assert MAX_PARTS > 8


def test_small_boxes_far_from_each_other_are_read_one_by_one() -> None:
    count = MAX_PARTS + 10
    view = StridedView((count, 4), (4000, 1), 0)
    (part,) = split((1000 * count, 4), view)
    boxes = part.boxes_in(StridedView.whole((count, 4)), 3000)
    assert boxes is not None
    assert len(boxes) == count
    assert part.boxes_in(StridedView.whole((count, 4)), 5000) is None


def test_an_empty_view_has_no_parts() -> None:
    assert split((4, 4), StridedView((0, 4), (4, 1), 0)) == []
    assert split((0,), StridedView((0,), (1,), 0)) == []
