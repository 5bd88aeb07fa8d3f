"""Decodes encoded chunks that are in memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from typing_extensions import Buffer

from reshard.storage.formats.native.codec import (
    Bytes,
    Planes,
    decode,
    decode_heads,
    decode_heads_and_tails,
    plane_shape,
)


def planes_of(chunks: Sequence[Buffer], count: int, numel: int, *, whole: bool = True) -> Planes:
    """Return the planes of chunks that are joined to one buffer."""
    ends = np.cumsum([len(memoryview(chunk)) for chunk in chunks])
    begins = np.concatenate(([0], ends[:-1]))
    return Planes.find(memoryview(b"".join(chunks)), begins, ends, count, numel, whole=whole)


def decode_chunks(streams: Sequence[Sequence[Buffer]], dtype: str, numel: int) -> Bytes:
    """Decode chunks of `numel` values.

    Args:
        streams: For each stream, the encoded bytes of each chunk.
    """
    counts = [1] * len(streams[0])
    if len(streams) == 2:
        heads, tails = planes_of(streams[0], 2, numel), planes_of(streams[1], 2, numel, whole=False)
        ends = np.cumsum([len(memoryview(chunk)) for chunk in streams[1]])
        parts = decode_heads_and_tails(heads, tails, ends, counts)
    else:
        parts = decode(planes_of(streams[0], *plane_shape(dtype, numel)), counts, dtype)
    return np.concatenate([part.view(np.uint8).copy() for part in parts])


def decode_head_chunks(chunks: Sequence[Buffer], numel: int) -> Bytes:
    """Decode the bfloat16 values of chunks from their heads."""
    return next(iter(decode_heads(planes_of(chunks, 2, numel), [len(chunks)]))).view(np.uint8).copy()
