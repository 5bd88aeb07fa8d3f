"""Hypothesis strategies for the property tests of the planner: shapes, boxes and tilings."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from reshard.planner.box import Box

shapes = st.lists(st.integers(1, 9), min_size=0, max_size=3).map(tuple)


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    """Draw a box inside a shape, with at least one element."""
    offsets, sizes = [], []
    for n in shape:
        start = draw(st.integers(0, n - 1))
        offsets.append(start)
        sizes.append(draw(st.integers(1, n - start)))
    return Box(tuple(offsets), tuple(sizes))


@st.composite
def cuts_of(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    """Draw boxes that tile a shape, by repeatedly cutting a box in two along a random dimension."""
    boxes = [Box.whole(shape)]
    for _ in range(draw(st.integers(0, 5))):
        at = draw(st.integers(0, len(boxes) - 1))
        box = boxes[at]
        cuttable = [d for d, n in enumerate(box.sizes) if n > 1]
        if not cuttable:
            continue
        d = draw(st.sampled_from(cuttable))
        first = draw(st.integers(1, box.sizes[d] - 1))
        low = list(box.sizes)
        high = list(box.sizes)
        offsets = list(box.offsets)
        low[d] = first
        high[d] -= first
        offsets[d] += first
        boxes[at : at + 1] = [Box(box.offsets, tuple(low)), Box(tuple(offsets), tuple(high))]
    return boxes


def paint(shape: tuple[int, ...], boxes: list[Box]) -> npt.NDArray[np.int64]:
    """Return for each element the number of boxes that cover it."""
    counts = np.zeros(shape, np.int64)
    for box in boxes:
        counts[box.slices] += 1
    return counts
