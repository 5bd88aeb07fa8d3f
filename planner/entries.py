"""The tensors and values of a checkpoint, and the segments that store them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from .box import Box, IntArray, columns_equal
from .errors import InvalidIndexError
from .grid import Grid

ITEMSIZES: Mapping[str, int] = MappingProxyType(
    {
        "bool": 1, "uint8": 1, "int8": 1,
        "uint16": 2, "int16": 2, "uint32": 4, "int32": 4, "uint64": 8, "int64": 8,
        "float8_e4m3fn": 1, "float8_e4m3fnuz": 1, "float8_e5m2": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
        "float4_e2m1fn_x2": 1, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8,
        "complex32": 4, "complex64": 8, "complex128": 16,
    }
)  # fmt: skip
"""Bytes per element, by torch's name of the dtype."""

MIN_PAGE_BYTES = 16 * 1024
"""The minimum size of a page. A raw chunk has one checksum per page, so that a part of it can be read and verified. A
page is a 16th of the largest chunk of its tensor, rounded up to a power of two, but at least this large."""

MAX_TOTAL_BYTES = 2**60
"""The maximum size of an object, of a tensor, and of all of them together. Below it, sums of int64 cannot overflow."""

MAX_TENSOR_DIMENSIONS = 32


class Kind(IntEnum):
    """What an entry is. A value that is not a tensor is stored as a one-dimensional tensor of bytes."""

    TENSOR = 0
    JSON = 1
    TORCH_SAVE = 2


class Stream(IntEnum):
    """Which bits of its values a segment stores."""

    WHOLE = 0
    HEAD = 1
    """The bfloat16 rounding of float32 values."""
    TAIL = 2
    """The remaining bits of float32 values. The segment of the tails is the row after the segment of their heads."""


class Encoding(IntEnum):
    """How the chunks of a segment are encoded. `docs/FORMAT.md` specifies the first two."""

    RAW = 0
    PLANES = 1
    PLAIN = 2
    """Written by another tool: row-major values without checksums. Any byte range can be read alone."""
    OPAQUE = 3
    """Written by another tool: serialised values that must be read and decoded as a whole."""


def are_native(encodings: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return which encodings are of reshard's own format. Their chunks have checksums.

    Args:
        encodings: (n,) the Encoding of each chunk.
    """
    return np.asarray(encodings < Encoding.PLAIN)


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a checkpoint, or a value that is stored as bytes."""

    name: str
    kind: Kind
    dtype: str
    """torch's name of the dtype, without `torch.`"""
    grid: Grid
    order: tuple[int, ...] | None = None
    """If the plain chunks of this tensor are not row-major: the dimensions from the outermost to the innermost."""
    unknown_itemsize: int = 0
    """Bytes per element of a dtype that is not in ITEMSIZES. Such a tensor can be verified, but not read."""
    itemsize: int = field(init=False, repr=False)
    """Bytes per element."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "itemsize", ITEMSIZES.get(self.dtype, self.unknown_itemsize))
        if self.dtype not in ITEMSIZES and self.unknown_itemsize < 1:
            raise InvalidIndexError(
                f"{self.name!r} has the unknown dtype {self.dtype!r}; known are {', '.join(ITEMSIZES)}"
            )
        possible = all(
            0 <= n < 2**38 and part <= max(1, min(n, 2**24))
            for n, part in zip(self.grid.shape, self.grid.parts, strict=True)
        )
        # An empty dimension counts as 1, as in the strides of a tensor without elements.
        span = math.prod(max(1, n) for n in self.grid.shape) * self.itemsize
        if not possible or len(self.grid.shape) > MAX_TENSOR_DIMENSIONS or span > MAX_TOTAL_BYTES:
            raise InvalidIndexError(
                f"{self.name!r} has the impossible shape {self.grid.shape}, cut into {self.grid.parts} parts"
            )
        if not self.is_tensor and (self.dtype != "uint8" or len(self.grid.shape) != 1):
            raise InvalidIndexError(
                f"the value {self.name!r} must be stored as one dimension of uint8, got {self.dtype} {self.grid.shape}"
            )

    @property
    def is_tensor(self) -> bool:
        return self.kind is Kind.TENSOR

    @property
    def shape(self) -> tuple[int, ...]:
        return self.grid.shape

    @property
    def whole(self) -> Box:
        """The box that covers the whole tensor."""
        return Box.whole(self.shape)

    @property
    def numel(self) -> int:
        return math.prod(self.grid.shape)

    @property
    def page_bytes(self) -> int:
        """The size of a page of the raw chunks of this entry."""
        sixteenth = -(-self.grid.cell_numel * self.itemsize // 16)
        return max(MIN_PAGE_BYTES, 1 << (sixteenth - 1).bit_length())


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """Segments in columns, sorted by entry: row i is segment i.

    A segment is the chunks of one box of a shard, stored one after another in one object.
    """

    entries: IntArray
    """(n,) the position of the entry in CheckpointIndex.entries."""
    streams: npt.NDArray[np.uint8]
    encodings: npt.NDArray[np.uint8]
    objects: IntArray
    """(n,) the position of the object in CheckpointIndex.objects."""
    starts: IntArray
    """(n,) the first byte of the first chunk in the object."""
    offsets: IntArray
    """The offsets of the boxes of all segments in their tensors, concatenated: ndim values per segment."""
    sizes: IntArray
    """The sizes of the boxes, in the same format as `offsets`."""

    def __len__(self) -> int:
        return len(self.entries)

    __eq__ = columns_equal
    __hash__ = None  # type: ignore[assignment]
