"""torch tensors as the planner and numpy see them: dtype names, what is held of them here, bytes in place."""

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
"""A box of the global tensor, and the local tensor that holds it."""


def dtype_name(name: str, dtype: torch.dtype) -> str:
    """The planner's name of a dtype. Raises DtypeError for one that cannot be stored."""
    short = str(dtype).removeprefix("torch.")
    if short not in ITEMSIZES:
        raise DtypeError(f"{name!r} has dtype {dtype}, which reshard cannot store")
    return short


def is_packed(dtype: str | torch.dtype) -> bool:
    """Return whether a dtype, or the dtype of this name, has two values in each byte (`float4_e2m1fn_x2`)."""
    return str(dtype).endswith("_x2")


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a planner's name. Raises DtypeError where this torch has none."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise DtypeError(f"this torch {torch.__version__} has no dtype {name}")
    return dtype


ALONE_NUMEL = 32768
"""Elements that torch works on in the thread that asks: ATen's GRAIN_SIZE."""
UNSIGNED = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}
"""The dtypes that numpy has too, by bytes an element."""


def as_array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """The bits of a tensor's values, on the host, of the same shape; a view where they are there already."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu()
    bits: npt.NDArray[Any] = plain.view(UNSIGNED.get(plain.itemsize, plain.dtype)).numpy()
    return bits


def as_bytes(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """The bytes of an array in row-major order; a view where they lie so already."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def cast(values: npt.NDArray[np.uint8], dtype: torch.dtype, out: npt.NDArray[np.uint8], to: torch.dtype) -> None:
    """Cast values as torch does, from their bytes to bytes, by this thread alone.

    A cast of more at once torch would spread over threads of its own, and wait for them: where others use the cores, a
    hundred times as long.
    """
    target, source = torch.from_numpy(out).view(to), from_bytes(values, dtype, (-1,))
    most = ALONE_NUMEL if torch.get_num_threads() > 1 else max(1, len(target))
    for piece, values_of_it in zip(target.split(most), source.split(most), strict=True):
        piece.copy_(values_of_it)


def from_bytes(data: npt.NDArray[np.uint8], dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """A tensor over bytes that hold its values in row-major order.

    Over a copy of them where torch must not have them: where they are read-only, or do not begin at a multiple of an
    element's size, for which its loops have instructions that trap.
    """
    if not data.flags.writeable or data.ctypes.data % dtype.itemsize:
        data = data.copy()
    return torch.from_numpy(data).view(dtype).reshape(tuple(shape))
