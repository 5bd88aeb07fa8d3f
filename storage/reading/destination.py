"""Writes decoded values to a destination tensor, in place."""

from __future__ import annotations

import functools
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..formats.native.codec import Bytes
from ..runtime.torch_modes import writing_to
from ..tensors.dtypes import UNSIGNED, cast, from_bytes
from .blocks import Block, split_shape


class Destination:
    """A tensor that is written box by box. The values are cast if their dtype differs.

    A tensor on a device is written to host memory first (pinned for CUDA), and copied to the device as a whole.

    Args:
        tensor: the destination.
        stored: the dtype of the values that are written.
        staged: whether to write to host memory first. By default, if the tensor is not in host memory.
    """

    def __init__(self, tensor: torch.Tensor, stored: torch.dtype, *, staged: bool | None = None) -> None:
        self._tensor = tensor.detach()
        self._stored = stored
        self._staged = tensor.device.type != "cpu" if staged is None else staged
        self._lock = threading.Lock()
        self._target: torch.Tensor | None = None
        """The tensor that boxes are written to. None before `begin`, and after `finish` has copied it."""
        self._array: npt.NDArray[Any] | None = None
        """The bits of the target as an array. None if numpy cannot write them."""
        if not self._staged:
            self._write_to(self._tensor)

    def begin(self, *, whole: bool, max_bytes: int) -> None:
        """Prepare for writing. All calls except the first do nothing.

        Args:
            whole: whether all boxes are written now, and `finish` follows.
            max_bytes: the maximum size of the copy in host memory. A larger tensor is written on the device, box by
                box.
        """
        with self._lock:
            if self._target is not None:
                return
            target = self._tensor
            if self._staged and whole and target.nbytes <= max_bytes:
                pinned = self._tensor.device.type == "cuda"
                target = torch.empty(self._tensor.shape, dtype=self._tensor.dtype, device="cpu", pin_memory=pinned)
            self._write_to(target)

    def _write_to(self, target: torch.Tensor) -> None:
        plain = target.device.type == "cpu" and not target.is_conj() and not target.is_neg()
        if plain and not target.dtype.is_complex:
            # torch copies on its thread pool, which the threads that call this would compete for. numpy does not
            # (`benchmarks/overhead.py`).
            self._array = target.view(UNSIGNED[target.itemsize]).numpy()
        self._target = target

    def open(self, block: Block) -> Target:
        """Return the part of the tensor that a block is written to."""
        target = self._target
        assert target is not None
        return Target(block, target, self._array, self._stored)

    def finish(self) -> None:
        """Copy the tensor to the device, after all boxes have been written to host memory."""
        with self._lock:
            if self._target is not None and self._target is not self._tensor:
                _copy_to_device(self._target, self._tensor)
                self._target = self._array = None


class Target:
    """The part of a tensor that the chunks of a block are written to, with one axis for each direction of the block.

    Args:
        block: the block.
        tensor: the tensor.
        array: its bits as an array. None if numpy cannot write them.
        stored: the dtype of the values of the block.
    """

    def __init__(self, block: Block, tensor: torch.Tensor, array: npt.NDArray[Any] | None, stored: torch.dtype) -> None:
        self._block = block
        self._stored = stored
        self._tensor = tensor
        self.casts = tensor.dtype != stored
        """Whether the values are cast."""
        self._shape, self._axes = split_shape(block.sizes, block.counts, block.dims)
        self._array: npt.NDArray[Any] | None = None
        if array is not None:
            index: tuple[Any, ...] = (..., *block.target)  # the ellipsis makes it a view, even of a scalar
            region = array[index]
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
            self._copy(index, values.view(np.uint8))
            return
        if self.casts:
            as_cast = np.empty(values.nbytes // self._stored.itemsize * array.itemsize, np.uint8)
            cast(values.view(np.uint8), self._stored, as_cast, self._tensor.dtype)
            values = as_cast
        words = values if values.dtype == array.dtype else values.view(array.dtype)
        target = array[index] if index else array
        target[...] = words.reshape(target.shape) if block.counts else words.reshape(block.sizes)[block.part]

    def _copy(self, index: tuple[int | slice, ...], values: Bytes) -> None:
        """Write with torch."""
        block = self._block
        with writing_to(self._tensor):
            target = self._tensor[block.target]
            if block.counts:
                target = target.view(self._shape).permute(self._axes)[index]
                target.copy_(from_bytes(values, self._stored, target.shape))
            else:
                target.copy_(from_bytes(values, self._stored, block.sizes)[block.part])


def _copy_to_device(staged: torch.Tensor, tensor: torch.Tensor) -> None:
    """Copy to a device, on a separate stream, so that the copy does not wait for other work on the device."""
    if tensor.device.type != "cuda":
        with writing_to(tensor):
            tensor.copy_(staged)
        return
    stream = _stream_of(tensor.device)
    with torch.cuda.stream(stream), writing_to(tensor):
        tensor.copy_(staged, non_blocking=True)
    stream.synchronize()


@functools.cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """Return the stream for all copies to a device. torch caches memory for each stream, so a new one costs memory."""
    return torch.cuda.Stream(device)
