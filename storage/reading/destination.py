"""Writes decoded values to a destination tensor, in place."""

from __future__ import annotations

import functools
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..formats.native.chunk_runs import Slices
from ..formats.native.codec import Bytes
from ..runtime.torch_modes import writing_to
from ..tensors.dtypes import UNSIGNED, cast, from_bytes


class Destination:
    """A tensor that is written box by box. The values are cast if their dtype differs.

    A tensor on a device is written to host memory first (pinned for CUDA), and copied to the device as a whole.

    Args:
        tensor: The destination.
        stored: The dtype of the values that are written.
        staged: Whether to write to host memory first. By default, if the tensor is not in host memory.
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
            whole: Whether all boxes are written now, and `finish` follows.
            max_bytes: The maximum size of the copy in host memory. A larger tensor is written on the device, box by
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

    def write(
        self, at: Slices, values: Bytes, chunk_shape: tuple[int, ...], part: Slices, count: int = 1, dim: int = 0
    ) -> None:
        """Write a part of a chunk, or several adjacent chunks as a whole.

        Args:
            at: The position in the tensor.
            values: The bytes of the whole chunks, one after another. Each is row-major and has the stored dtype.
            chunk_shape: The shape of each chunk.
            part: The part of the chunk to write, with the sizes of `at`.
            count: The number of chunks. If there are several, each is written as a whole.
            dim: The dimension in which the chunks are adjacent.
        """
        array, target = self._array, self._target
        assert target is not None
        if array is not None and target.dtype != self._stored:
            as_cast = np.empty(len(values) // self._stored.itemsize * target.itemsize, np.uint8)
            cast(values, self._stored, as_cast, target.dtype)
            values = as_cast
        if count == 1:
            if array is not None:
                array[at] = values.view(array.dtype).reshape(chunk_shape)[part]
            else:
                with writing_to(target):
                    target[at].copy_(from_bytes(values, self._stored, chunk_shape)[part])
            return
        # The first dimension of `values` counts the chunks. Move it before the dimension in which they are adjacent.
        shape, before, after = (count, *chunk_shape), chunk_shape[:dim], chunk_shape[dim:]
        axes = (*range(1, dim + 1), 0, *range(dim + 1, len(shape)))
        if array is not None:
            array[at].reshape(*before, count, *after)[...] = values.view(array.dtype).reshape(shape).transpose(axes)
        else:
            with writing_to(target):
                split = target[at].unflatten(dim, (count, chunk_shape[dim]))
                split.copy_(from_bytes(values, self._stored, shape).permute(axes))

    def finish(self) -> None:
        """Copy the tensor to the device, after all boxes have been written to host memory."""
        with self._lock:
            if self._target is not None and self._target is not self._tensor:
                _copy_to_device(self._target, self._tensor)
                self._target = self._array = None


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
