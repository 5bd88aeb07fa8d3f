"""Check casts between dtypes: whether they are allowed, whether they lose bits, and whether integers fit."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..errors import ArgumentError, DtypeError
from .dtypes import is_packed

_OF_SCALES = ("scale", "absmax", "amax", "quant_state")
"""Found in the names of scales of quantised values, in any case. Those of bitsandbytes may also end with `SCB`."""
_OF_ACTIVATIONS = re.compile(r"(?:input|output|act|activation|[qkv])_")
"""The start of the names of scales that belong to activations, not to weights."""
_OF_MODULE = re.compile(r"(?:q?weight|q?scales?|scb|absmax|amax|quant|zeros)", re.IGNORECASE)
"""The start of the names of scales that belong to the only quantised tensor of their module."""
_VALUES = re.compile(r"[._]*(?:q?weight|(?:int_|q)?data|(?<![^_])q|blocks|packed|quantized)$", re.IGNORECASE)
"""The end of the name of quantised values, after the part that the name of their scale has too."""


_CHECKED_TOGETHER = 1 << 18
"""How many integers are checked at once. The check uses up to six arrays of this length."""


def check_dtype(dtype: object) -> None:
    """Check that an argument is a torch.dtype or None. Raise ArgumentError otherwise."""
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ArgumentError(f"dtype must be a torch.dtype such as torch.bfloat16, got {dtype!r}")


def check_cast(name: str, stored: torch.dtype, to: torch.dtype) -> None:
    """Check that a stored dtype can be cast to another, as `torch.can_cast` defines it.

    Args:
        name: the name of the tensor, for the error message.
        stored: the stored dtype.
        to: the dtype of the destination.

    Raises:
        DtypeError: the cast is not allowed. Packed dtypes are never cast.
    """
    if stored != to and (is_packed(stored) or is_packed(to) or not torch.can_cast(stored, to)):
        raise DtypeError(f"{name!r} is stored as {stored}, which cannot be cast to the destination's {to}")


def weight_dtype(stored: torch.dtype, shape: Sequence[int], dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype to load a tensor as, if weights are cast to `dtype`. Scalars, such as counters, keep theirs."""
    is_weight = stored.is_floating_point and len(shape) > 0 and not is_packed(stored)
    return dtype if dtype is not None and is_weight else stored


def loses_bits(stored: torch.dtype, to: torch.dtype) -> bool:
    """Return whether a cast between two floating-point dtypes may round values or exceed the range."""
    if stored == to or not _is_floating(stored) or not _is_floating(to):
        return False
    a, b = torch.finfo(stored), torch.finfo(to)
    return _eps(to) > _eps(stored) or b.max < a.max or b.smallest_normal > a.smallest_normal


def _eps(dtype: torch.dtype) -> float:
    """Return the distance from 1 to the next value. `torch.finfo` has half of it for float8_e5m2fnuz (torch 2.13)."""
    return 0.25 if dtype is torch.float8_e5m2fnuz else torch.finfo(dtype).eps


def needs_check(stored: torch.dtype, to: torch.dtype) -> bool:
    """Return whether some integers of a dtype do not fit into another dtype, so that `check_integers` is needed."""
    if stored == to or stored is torch.bool or _is_floating(stored):
        return False
    least, most = _range(stored)
    if _is_floating(to):
        return bool(max(-least, most) > 2 ** _precision(to))
    return to is not torch.bool and (least < _range(to)[0] or most > _range(to)[1])


def check_integers(name: str, values: torch.Tensor, to: torch.dtype, offsets: Sequence[int] = ()) -> None:
    """Check that integers keep their values in another dtype.

    Args:
        name: the name of the tensor, for the error message.
        values: a tensor of an integer dtype, on any device.
        to: the other dtype.
        offsets: the position of the first value in the tensor of that name. Default: `values` is the whole tensor.

    Raises:
        DtypeError: a value does not fit. The message contains the first such value.
    """
    array = values.detach().cpu().numpy().reshape(-1)
    for begin in range(0, array.size, _CHECKED_TOGETHER):
        some = array[begin : begin + _CHECKED_TOGETHER]
        wrong = _that_do_not_fit(some, to)
        if wrong.any():
            at = begin + int(np.argmax(wrong))
            position = [int(i) for i in np.unravel_index(at, values.shape)]
            if offsets:
                position = [i + offset for i, offset in zip(position, offsets, strict=True)]
            where = f" at {position}" if values.dim() else ""
            raise DtypeError(
                f"{name!r} is stored as {values.dtype}, and the destination is {to}: {int(array[at])}{where} does not "
                f"fit. Use a destination of {values.dtype}"
            )


def _that_do_not_fit(array: npt.NDArray[Any], to: torch.dtype) -> npt.NDArray[np.bool_]:
    """Return which integers of an array lose their values in another dtype."""
    if _is_floating(to):
        odd = array // np.where(array == 0, 1, array & (~array + array.dtype.type(1)))  # without trailing zero bits
        most = 2 ** _precision(to)
        wrong = (odd >= most) | ((odd <= -most) if array.dtype.kind == "i" else False)
        limit = np.float64(torch.finfo(to).max)
        return np.asarray(wrong | (array > limit) | (array < -limit))
    least, most = _range(to)
    wrong = np.zeros(array.shape, bool)
    if int(array.max()) > most:
        wrong |= array > most
    if int(array.min()) < least:
        wrong |= array < least
    return wrong


class ScaleNames:
    """The names of a checkpoint that may be scales of quantised values.

    They are searched for when they are first needed: most reads need none, and a checkpoint may have many names.

    Args:
        names: all names of the checkpoint.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = names

    @functools.cached_property
    def found(self) -> list[str]:
        return list(filter(_may_be_scale, self._names))


def _may_be_scale(name: str) -> bool:
    lower = name.lower()
    return any(word in lower for word in _OF_SCALES) or lower == "scb" or lower.endswith((".scb", "_scb"))


def check_is_not_scaled(name: str, stored: torch.dtype, to: torch.dtype, scales: ScaleNames) -> None:
    """Check that a cast does not use quantised values as if they were weights.

    Args:
        name: the name of the tensor.
        stored: the stored dtype.
        to: the dtype of the destination.
        scales: those of the checkpoint.

    Raises:
        DtypeError: the stored dtype has at most 8 bits, and the checkpoint has a scale for the tensor.
    """
    if stored == to or stored.itemsize > 1 or stored is torch.bool:
        return
    for other in scales.found:
        if other != name and is_scale_of(name, other):
            raise DtypeError(
                f"{name!r} is quantised: it is stored as {stored}, and {other!r} has its scale. reshard does not apply "
                f"scales: load both as they are stored (a destination of {stored}, no dtype=) and scale the values "
                "yourself, or leave the tensor out"
            )


def is_scale_of(name: str, other: str) -> bool:
    """Return whether, judging by their names, a tensor `other` has the scales of the quantised tensor `name`."""
    module, _, last = name.rpartition(".")
    if module and not other.startswith(f"{module}."):
        return False
    rest = other[len(module) + 1 if module else 0 :].lstrip("._")
    if not _may_be_scale(rest) or _OF_ACTIVATIONS.match(rest):
        return False
    stem = _VALUES.sub("", last).strip("._")
    return rest.startswith((last, stem)) if stem else _OF_MODULE.match(rest) is not None or rest.startswith(last)


def _is_floating(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


@functools.cache
def _range(dtype: torch.dtype) -> tuple[int, int]:
    info = torch.iinfo(dtype)
    return info.min, info.max


@functools.cache
def _precision(dtype: torch.dtype) -> int:
    """Return n such that all integers up to 2**n are exact."""
    return 1 - round(math.log2(_eps(dtype)))
