"""Convert between torch and the planner or numpy: names of dtypes, and tensors as arrays of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...planner.box import Box
from ...planner.entries import ITEMSIZES
from ..errors import DtypeError

LocalShard = tuple[Box, torch.Tensor]
"""A box of the global tensor, and the local tensor with its values."""
SINGLE_THREAD_NUMEL = 32768
"""How many elements torch processes in the calling thread, without using others: ATen's GRAIN_SIZE."""
_ARRAY_DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("u2"),
    4: np.dtype("u4"),
    8: np.dtype("u8"),
    16: np.dtype("c16"),
}
"""The dtypes with which numpy sees the bits of elements, by bytes per element."""


def dtype_name(name: str, dtype: torch.dtype) -> str:
    """Return the planner's name of a dtype. Raise DtypeError, with the name of the tensor, if it cannot be stored."""
    short = str(dtype).removeprefix("torch.")
    if short not in ITEMSIZES:
        raise DtypeError(f"{name!r} has dtype {dtype}, which reshard cannot store")
    return short


def is_packed(dtype: str | torch.dtype) -> bool:
    """Return whether a dtype, or the dtype of this name, has two values in each byte (`float4_e2m1fn_x2`)."""
    return str(dtype).endswith("_x2")


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch.dtype of a planner's name. Raise DtypeError if this version of torch does not have it."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise DtypeError(f"this torch {torch.__version__} has no dtype {name}")
    return dtype


def as_array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """Return the bits of a tensor as an array of the same shape on the host. A view if the tensor is on the host."""
    return memory_of_plain(tensor.detach().resolve_conj().resolve_neg().cpu())


def memory_of_plain(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """Return the memory of a tensor on the host as an array of unsigned integers, or of complex128.

    After `Tensor.numpy`, the storage of the tensor could never be resized again, but FSDP1 and others free memory so.
    """
    if not tensor.numel():
        return np.empty(tuple(tensor.shape), _ARRAY_DTYPES[tensor.itemsize])
    array: npt.NDArray[Any] = np.asarray(_Lent(tensor))
    return array


class _Lent:
    """Lends the memory of a tensor to numpy. The array keeps it alive."""

    __slots__ = ("__array_interface__", "_tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self.__array_interface__ = {
            "version": 3,
            "data": (tensor.data_ptr(), False),
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * tensor.itemsize for stride in tensor.stride()),
            "typestr": _ARRAY_DTYPES[tensor.itemsize].str,
        }


def as_bytes(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Return the bytes of an array in row-major order. A view if the array is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def cast(values: npt.NDArray[np.uint8], dtype: torch.dtype, out: npt.NDArray[np.uint8], to: torch.dtype) -> None:
    """Cast values as torch does, from bytes to bytes, in the calling thread only.

    torch would distribute larger casts over its own threads and wait for them. If other threads use the cores, that
    takes a hundred times as long.

    Args:
        values: (nbytes,) the values to cast.
        dtype: their dtype.
        out: (nbytes,) the destination.
        to: the dtype of the destination.
    """
    target, source = torch.from_numpy(out).view(to), from_bytes(values, dtype, (-1,))
    most = SINGLE_THREAD_NUMEL if torch.get_num_threads() > 1 else max(1, len(target))
    if len(target) <= most:
        target.copy_(source)
        return
    for part, values_of_part in zip(target.split(most), source.split(most), strict=True):
        part.copy_(values_of_part)


def from_bytes(data: npt.NDArray[np.uint8], dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """Return a tensor over bytes that hold its values in row-major order.

    The bytes are copied if torch must not use them: if they are read-only, or not aligned to the size of an element,
    because torch has loops with instructions that require alignment.
    """
    if not data.flags.writeable or data.ctypes.data % dtype.itemsize:
        data = data.copy()
    return torch.from_numpy(data).view(dtype).reshape(tuple(shape))
