"""Whether two stored tensors hold the same values, as far as an index shows it."""

from __future__ import annotations

import numpy as np

from ...planner.entries import NATIVE_ENCODINGS
from ...planner.index import CheckpointIndex


def same_chunks(a: CheckpointIndex, name_a: str, b: CheckpointIndex, name_b: str) -> bool:
    """Whether the chunks of two tensors are the same: by their checksums, or since they are the same bytes.

    False where the index does not show it: the values may be the same all the same.
    """
    entries = a.entry(name_a), b.entry(name_b)
    if (entries[0].grid, entries[0].dtype, entries[0].order) != (entries[1].grid, entries[1].dtype, entries[1].order):
        return False
    parts = []
    places = []
    for index, name in ((a, name_a), (b, name_b)):
        position = index.position(name)
        rows = index.segments_of(position)
        first, last = index.first_checksum[[rows.start, rows.stop]].tolist()
        segments = index.segments
        columns = (segments.streams[rows], segments.encodings[rows], *index.segment_boxes(position))
        parts.append([*columns, index.lengths[index.chunks_of(position)], index.checksums[first:last]])
        places.append([segments.objects[rows], segments.starts[rows]])
    if not all(np.array_equal(x, y) for x, y in zip(*parts, strict=True)):
        return False
    has_checksums = int(parts[0][1].max(initial=0)) <= max(NATIVE_ENCODINGS)
    return has_checksums or (a is b and all(np.array_equal(x, y) for x, y in zip(*places, strict=True)))
