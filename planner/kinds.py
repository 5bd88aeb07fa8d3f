"""What an entry of a checkpoint is, and how its segments hold its values."""

from __future__ import annotations

from enum import IntEnum


class Kind(IntEnum):
    """What an entry of the checkpoint is. Objects are stored as tensors of bytes."""

    TENSOR = 0
    JSON = 1
    TORCH_SAVE = 2


class Stream(IntEnum):
    """Which part of its values a segment holds."""

    WHOLE = 0
    HEAD = 1
    """The bfloat16 rounding of float32 values."""
    TAIL = 2
    """What the heads leave of them. Its segment is the row after that of its heads."""


class Encoding(IntEnum):
    """How a segment's chunks are encoded."""

    RAW = 0
    PLANES = 1
    PLAIN = 2
    """Another format's: values row-major, without checksums. Any run of bytes can be read."""
    OPAQUE = 3
    """Another format's, serialised as a whole, and so read."""


NATIVE = (Encoding.RAW, Encoding.PLANES)
"""Those that reshard writes."""
