"""Find the boxes of the saved shards, given the boxes of the segments that store them."""

from __future__ import annotations

import numpy as np

from .box import IntArray


def join_segments(objects: IntArray, starts: IntArray, offsets: IntArray, sizes: IntArray) -> tuple[IntArray, IntArray]:
    """Join the boxes of a tensor that are adjacent in one object and together form a larger box.

    Args:
        objects, starts: (n,) the object of each box, and the position of its first byte there.
        offsets, sizes: (n, ndim) the boxes.

    Returns:
        (m, ndim) offsets and sizes, sorted by offsets.
    """
    order = np.lexsort((starts, objects))
    objects, offsets, sizes = (column[order] for column in (objects, offsets, sizes))
    opens = np.concatenate(([True], objects[1:] != objects[:-1]))[: len(objects)]
    firsts = np.flatnonzero(opens)
    if len(firsts) < len(opens):
        low = np.minimum.reduceat(offsets, firsts)
        extent = np.maximum.reduceat(offsets + sizes, firsts) - low
        volumes = np.add.reduceat(sizes.prod(axis=1), firsts)
        ends = np.append(firsts[1:], len(opens))
        whole = volumes == extent.prod(axis=1)
        parts = [(low[whole], extent[whole])]
        parts += [_nested(offsets[a:b], sizes[a:b]) for a, b in zip(firsts[~whole], ends[~whole], strict=True)]
        offsets, sizes = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = np.lexsort(offsets.T[::-1]) if offsets.shape[1] else np.arange(len(offsets))
    return offsets[order], sizes[order]


def _nested(offsets: IntArray, sizes: IntArray) -> tuple[IntArray, IntArray]:
    """Join consecutive boxes: each one with those before it, for as long as they form a box together."""
    held: list[tuple[IntArray, IntArray]] = []
    for offset, size in zip(offsets, sizes, strict=True):
        held.append((offset, size))
        while len(held) > 1:
            (low_a, size_a), (low_b, size_b) = held[-2:]
            low = np.minimum(low_a, low_b)
            extent = np.maximum(low_a + size_a, low_b + size_b) - low
            if extent.prod() != size_a.prod() + size_b.prod():
                break
            held[-2:] = [(low, extent)]
    return np.stack([low for low, _ in held]), np.stack([extent for _, extent in held])
