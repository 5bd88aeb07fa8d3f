"""Compares two stored tensors by their index."""

from __future__ import annotations

import numpy as np

from ...planner.entries import are_native
from ...planner.index import CheckpointIndex


def same_chunks(a: CheckpointIndex, name_a: str, b: CheckpointIndex, name_b: str) -> bool:
    """Return whether the index shows that two tensors have the same values.

    It shows this if all chunks have the same checksums, or if both tensors are the same bytes of the same objects. If
    the result is False, the values may still be the same.
    """
    entries = a.entry(name_a), b.entry(name_b)
    if (entries[0].grid, entries[0].dtype, entries[0].order) != (entries[1].grid, entries[1].dtype, entries[1].order):
        return False
    contents = []
    byte_ranges = []
    for index, name in ((a, name_a), (b, name_b)):
        position = index.position(name)
        rows = index.segments_of(position)
        first, last = index.first_checksum[[rows.start, rows.stop]].tolist()
        segments = index.segments
        columns = (segments.streams[rows], segments.encodings[rows], *index.segment_boxes(position))
        contents.append([*columns, index.lengths[index.chunks_of(position)], index.checksums[first:last]])
        byte_ranges.append([segments.objects[rows], segments.starts[rows]])
    if not all(np.array_equal(x, y) for x, y in zip(*contents, strict=True)):
        return False
    has_checksums = bool(are_native(contents[0][1]).all())
    return has_checksums or (a is b and all(np.array_equal(x, y) for x, y in zip(*byte_ranges, strict=True)))
