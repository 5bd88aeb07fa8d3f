"""Find tensors that share memory with each other, or whose elements share memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

EXACT_NUMEL = 10_000_000
"""A larger tensor is assumed to overlap itself unless its strides show that it does not."""
MAX_WORK: Any = 1_000_000
"""How many steps numpy may take to find out whether two arrays overlap. If it needs more, they are assumed to."""


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Return whether two elements of a strided tensor share memory."""
    dims = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    reaches = accumulate(((size - 1) * stride for stride, size in dims), initial=0)
    if all(stride > reach for (stride, _), reach in zip(dims, reaches, strict=False)):
        return False
    if tensor.numel() > EXACT_NUMEL or any(stride == 0 for stride, _ in dims):
        return tensor.numel() > 0
    positions = np.zeros(1, np.int64)
    for stride, size in dims:
        positions = (positions[:, None] + np.arange(size) * stride).reshape(-1)
    return len(np.unique(positions)) < tensor.numel()


def address_range(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the first address of a strided tensor that has elements, and the address after its last element."""
    begin = tensor.data_ptr()
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (reach + 1) * tensor.itemsize


@dataclass(frozen=True, slots=True)
class Overlap:
    """Two tensors that share memory, by their positions in a list."""

    first: int
    second: int
    is_same: bool
    """Whether both have the same elements in the same order, of the same dtype."""


def find_overlaps(tensors: Sequence[torch.Tensor]) -> list[Overlap]:
    """Return pairs of tensors that share memory. If several share the same memory, each is paired with one other.

    Args:
        tensors: strided tensors that have memory, on any devices.
    """
    spans = [
        (str(tensor.device), *address_range(tensor), position)
        for position, tensor in enumerate(tensors)
        if tensor.numel()
    ]
    found: list[Overlap] = []
    active: list[tuple[str, int, int, int]] = []
    for span in sorted(spans):
        device, begin, _, position = span
        active = [other for other in active if other[0] == device and other[2] > begin]
        for _, _, _, other in active:
            if _share_memory(tensors[other], tensors[position]):
                first, second = sorted((other, position))
                found.append(Overlap(first, second, _is_same(tensors[first], tensors[second])))
                break
        active.append(span)
    return found


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        (a.data_ptr(), a.dtype, a.shape) == (b.data_ptr(), b.dtype, b.shape)
        and all(x == y or n == 1 for x, y, n in zip(a.stride(), b.stride(), a.shape, strict=True))
        and (a.is_conj(), a.is_neg()) == (b.is_conj(), b.is_neg())
    )


class _ArrayInterface:
    """An array at an address, for numpy. Its elements are never read, because they may be on a device."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (tensor.data_ptr(), True),
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * tensor.itemsize for stride in tensor.stride()),
            "typestr": f"|V{tensor.itemsize}",
        }


def _share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.is_contiguous() and b.is_contiguous():
        return True  # the spans overlap, and have no gaps
    one: npt.NDArray[np.void] = np.asarray(_ArrayInterface(a))
    two: npt.NDArray[np.void] = np.asarray(_ArrayInterface(b))
    try:
        return np.shares_memory(one, two, max_work=MAX_WORK)
    except np.exceptions.TooHardError:
        return True
