"""Join precision planes with torch, on the device that has them. See `formats.native.codec` for the planes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...tensors.dtypes import torch_dtype


def join_planes(planes: Sequence[torch.Tensor], dtype: str) -> torch.Tensor:
    """Join the planes of values that are stored as one whole stream.

    Args:
        planes: (n,) uint8 each, with one byte of each element, or of each component of complex values.
        dtype: the dtype of the values.

    Returns:
        The values, flat.
    """
    if dtype == "bfloat16":
        return join_bfloat16(*planes)
    joined = planes[0] if len(planes) == 1 else torch.stack(list(planes), dim=-1).view(-1)
    return joined.view(torch_dtype(dtype))


def join_bfloat16(exponents: torch.Tensor, rests: torch.Tensor) -> torch.Tensor:
    """Join the planes of bfloat16 values: the exponents, and the mantissas with the signs in the lowest bit."""
    return _words(exponents, rests).view(torch.bfloat16)


def _words(exponents: torch.Tensor, rests: torch.Tensor) -> torch.Tensor:
    words = exponents.to(torch.int16)
    words <<= 7
    words |= rests >> 1
    signs = rests.to(torch.int16)
    signs <<= 15
    words |= signs
    return words


def join_float32(
    heads: Sequence[torch.Tensor],
    tails: Sequence[torch.Tensor],
    exceptions: Sequence[tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]],
) -> torch.Tensor:
    """Join the planes of float32 values that are stored as heads and tails.

    Args:
        heads, tails: the two planes of each.
        exceptions: positions of elements, and their bits.
    """
    bits = _words(*heads).to(torch.int32)
    bits <<= 16
    bits += torch.stack(list(tails), dim=-1).view(torch.int16).view(-1)  # as signed numbers
    if exceptions:
        positions, values = map(np.concatenate, zip(*exceptions, strict=True))
        bits[_moved(positions, bits)] = _moved(values.view(np.int32), bits)
    return bits.view(torch.float32)


def _moved(array: npt.NDArray[Any], to: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(array).to(to.device)
