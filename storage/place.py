"""Decoded values into a destination tensor, in place."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch

from .codec import Bytes
from .errors import DestinationError, DtypeError
from .tensors import from_bytes

_UNSIGNED = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}
Slices = tuple[slice, ...]


def check_destination(name: str, tensor: torch.Tensor, stored: torch.dtype) -> None:
    """Check that a tensor can be written in place with values of the stored dtype.

    Raises:
        DtypeError: torch does not cast the stored dtype to the tensor's (`torch.can_cast`).
        DestinationError: the tensor is on the meta device, is not strided, or has elements that share memory.
    """
    packed = any("_x2" in str(dtype) for dtype in (stored, tensor.dtype))  # two values an element: torch has no cast
    if stored != tensor.dtype and (packed or not torch.can_cast(stored, tensor.dtype)):
        raise DtypeError(f"{name!r} is stored as {stored}, which cannot be cast to the destination's {tensor.dtype}")
    if tensor.device.type == "meta":
        raise DestinationError(f"{name!r} is on the meta device: give it memory first (to_empty) to load into it")
    if tensor.layout is not torch.strided:
        raise DestinationError(f"{name!r} has the layout {tensor.layout}, only dense tensors are loaded into")
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        raise DestinationError(f"{name!r} is expanded: its elements share memory. Load into a clone of it")


class Destination:
    """A tensor that is written box by box, cast where its dtype is not that of the values."""

    def __init__(self, tensor: torch.Tensor, stored: torch.dtype) -> None:
        self._tensor = tensor.detach()
        self._stored = stored
        self._array: npt.NDArray[Any] | None = None
        plain = tensor.device.type == "cpu" and not tensor.is_conj() and not tensor.is_neg()
        if plain and tensor.dtype == stored and not stored.is_complex and stored.itemsize in _UNSIGNED:
            # numpy copies without torch's thread pool, which the threads that call here would contend for.
            self._array = self._tensor.view(_UNSIGNED[stored.itemsize]).numpy()

    def write(self, at: Slices, values: Bytes, chunk_shape: tuple[int, ...], part: Slices) -> None:
        """Write a part of a chunk.

        Args:
            at: where it goes, in the tensor.
            values: the bytes of the whole chunk, row-major, of shape `chunk_shape` and the stored dtype.
            part: the part of the chunk, of the sizes of `at`.
        """
        if self._array is None:
            self._tensor[at].copy_(from_bytes(values, self._stored, chunk_shape)[part])
        else:
            self._array[at] = values.view(self._array.dtype).reshape(chunk_shape)[part]
