"""Decoded values into a destination tensor, in place."""

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
    """A tensor that is written box by box, cast where its dtype is not that of the values.

    One on a device is written in host memory first, pinned where that can be, and copied to the device as a whole.

    Args:
        staged: whether to do so; by default, where the tensor is not in host memory.
    """

    def __init__(self, tensor: torch.Tensor, stored: torch.dtype, *, staged: bool | None = None) -> None:
        self._tensor = tensor.detach()
        self._stored = stored
        self._staged = tensor.device.type != "cpu" if staged is None else staged
        self._lock = threading.Lock()
        self._target: torch.Tensor | None = None
        """What the boxes are written to."""
        self._array: npt.NDArray[Any] | None = None
        """The bits of the target, where numpy can write them."""
        if not self._staged:
            self._write_to(self._tensor)

    def begin(self, *, whole: bool, max_bytes: int) -> None:
        """Make ready to be written. Any further call does nothing.

        Args:
            whole: whether `finish` will follow soon.
            max_bytes: of host memory to stage the tensor in; a larger one is written on the device, box by box.
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
            # numpy copies without torch's thread pool, which the threads that call here would contend for.
            self._array = target.view(UNSIGNED[target.itemsize]).numpy()
        self._target = target

    def write(
        self, at: Slices, values: Bytes, chunk_shape: tuple[int, ...], part: Slices, count: int = 1, dim: int = 0
    ) -> None:
        """Write a part of a chunk, or the whole of several that adjoin.

        Args:
            at: where it goes, in the tensor.
            values: the bytes of the whole chunks, one after another, each row-major, of shape `chunk_shape` and the
                stored dtype.
            part: the part of the chunk, of the sizes of `at`.
            count: how many chunks there are. Of several, each is wanted whole.
            dim: in which they adjoin.
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
        # The chunks' own dimension comes first in their bytes; it belongs before the one in which they adjoin.
        shape, before, after = (count, *chunk_shape), chunk_shape[:dim], chunk_shape[dim:]
        axes = (*range(1, dim + 1), 0, *range(dim + 1, len(shape)))
        if array is not None:
            array[at].reshape(*before, count, *after)[...] = values.view(array.dtype).reshape(shape).transpose(axes)
        else:
            with writing_to(target):
                split = target[at].unflatten(dim, (count, chunk_shape[dim]))
                split.copy_(from_bytes(values, self._stored, shape).permute(axes))

    def finish(self) -> None:
        """All boxes are written: what was staged goes to the tensor."""
        with self._lock:
            if self._target is not None and self._target is not self._tensor:
                _copy(self._target, self._tensor)
                self._target = self._array = None


def _copy(staged: torch.Tensor, tensor: torch.Tensor) -> None:
    """Copy to a device: on a stream of our own, so that what else runs there is not waited for."""
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
    """One for all copies to a device: what a stream has used of its memory is kept for it."""
    return torch.cuda.Stream(device)
