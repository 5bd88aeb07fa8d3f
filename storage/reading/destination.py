"""Writes decoded values to a destination tensor, in place."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..runtime.torch_modes import writing_to
from ..tensors.dtypes import cast, from_bytes, memory_of_plain
from .blocks import Block, split_shape
from .device.device import Device, device_of

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Dtypes that torch copies on every device, by bytes per element."""


class Destination:
    """A tensor that is written box by box. The values are cast if their dtype differs.

    Args:
        tensor: the destination, on any device.
        stored: the dtype of the values that are written.
    """

    def __init__(self, tensor: torch.Tensor, stored: torch.dtype) -> None:
        self.tensor = tensor = tensor.detach()
        self.stored = stored
        self.device: Device | None = device_of(tensor)
        """The device that decodes, or joins planes. None: the host does all of that."""
        self.array: npt.NDArray[Any] | None = None
        """The bits of the tensor as an array. None if numpy cannot write them."""
        plain = tensor.device.type == "cpu" and not tensor.is_conj() and not tensor.is_neg()
        if plain and not tensor.dtype.is_complex:
            # torch copies on its thread pool, which the threads that call this would compete for. numpy does not
            # (`benchmarks/overhead.py`).
            self.array = memory_of_plain(tensor)


class BlockWriter:
    """The part of a tensor that the chunks of a block are written to, with one axis for each direction of the block.

    Args:
        destination: the tensor.
        block: the block.
    """

    def __init__(self, destination: Destination, block: Block) -> None:
        self._block = block
        self._stored = destination.stored
        self._tensor = destination.tensor
        self.casts = self._tensor.dtype != self._stored
        """Whether the values are cast."""
        self._shape, self._axes = split_shape(block.sizes, block.counts, block.dims)
        self._array: npt.NDArray[Any] | None = None
        if destination.array is not None:
            index: tuple[Any, ...] = (..., *block.position)  # the ellipsis makes it a view, even of a scalar
            region = destination.array[index]
            self._array = region.reshape(self._shape).transpose(self._axes) if block.counts else region

    def write(self, index: tuple[int | slice, ...], values: npt.NDArray[Any]) -> None:
        """Write some chunks of the block, or the needed part of its only chunk.

        Args:
            index: which chunks: an index into the directions of the block.
            values: the values of the whole chunks, one after another, as bytes or as unsigned integers. Each chunk is
                row-major and has the stored dtype.
        """
        block, array = self._block, self._array
        if array is None:
            self.write_tensor(index, from_bytes(values.view(np.uint8), self._stored, (-1,)))
            return
        if self.casts:
            as_cast = np.empty(values.nbytes // self._stored.itemsize * array.itemsize, np.uint8)
            cast(values.view(np.uint8), self._stored, as_cast, self._tensor.dtype)
            values = as_cast
        words = values if values.dtype == array.dtype else values.view(array.dtype)
        region = array[index] if index else array
        region[...] = words.reshape(region.shape) if block.counts else words.reshape(block.sizes)[block.part]

    def write_tensor(self, index: tuple[int | slice, ...], values: torch.Tensor) -> None:
        """Write values with torch. They are a flat tensor of the stored dtype, on any device. See `write`."""
        block, tensor = self._block, self._tensor
        bits = BITS.get(tensor.itemsize)
        if not self.casts and bits is not None and not tensor.is_conj() and not tensor.is_neg():
            tensor, values = tensor.view(bits), values.view(bits)  # torch cannot copy all dtypes on every device
        with writing_to(tensor):
            region = tensor[block.position]
            if block.counts:
                region = region.view(self._shape).permute(self._axes)[index]
                region.copy_(values.view(region.shape))
            else:
                region.copy_(values.view(block.sizes)[block.part])
