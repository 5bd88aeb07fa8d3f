"""Reads of the values of a checkpoint that are not tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from ...planner.chunk_reads import WantedBox
from ...planner.entries import Kind
from ..errors import ArgumentError, CorruptCheckpointError
from ..formats.source import Source
from ..formats.value_codec import MAX_VALUE_BYTES, decode_value
from ..tensors.dtypes import from_bytes

MAX_REPEATED_BYTES = 4096
"""Larger values are decoded even if an equal one was decoded before. A number in a torch.save file takes 1 KiB."""


def whole_wants(source: Source, names: Iterable[str]) -> list[WantedBox]:
    """Return what must be read for whole tensors and values.

    The metadata may already contain the bytes of a value. Then there is nothing to read.

    Raises:
        MissingTensorError: the checkpoint has no entry of such a name.
    """
    return [WantedBox(name, source.entry(name).whole) for name in names if name not in source.inline]


def check_values(source: Source, names: Iterable[str], budget_bytes: int | None) -> None:
    """Check that values that are read together fit a budget.

    Args:
        budget_bytes: the budget that the caller passed. None means that there is no limit.

    Raises:
        ArgumentError: the values are larger than the budget.
    """
    if budget_bytes is None:
        return
    nbytes = {name: source.entry(name).numel for name in names}
    total = sum(nbytes.values())
    if total > budget_bytes:
        largest = max(nbytes, key=lambda name: nbytes[name])
        raise ArgumentError(
            f"the values to read from {source.location} take {total} bytes, but budget_bytes is {budget_bytes}. The "
            f"largest is {largest!r} with {nbytes[largest]} bytes: pass a budget_bytes of at least {total}"
        )


class ValueBuffer:
    """The read of one value: the buffer that its bytes are read into, and how to decode them.

    Raises:
        MissingTensorError: the checkpoint has no entry of this name.
        CorruptCheckpointError: the value is larger than any value that can be saved.
    """

    @classmethod
    def of(cls, source: Source, names: Iterable[str]) -> list[ValueBuffer]:
        """Return the reads of values. First read their metadata at once, and check their sizes in it."""
        names = list(names)
        source.index(whole_wants(source, names))
        return [cls(source, name) for name in names]

    def __init__(self, source: Source, name: str) -> None:
        """Allocate the buffer. The size of the value in the metadata must have been checked, as `of` does."""
        entry = source.entry(name)
        self.name = name
        self.kind = entry.kind
        self.wants = whole_wants(source, [name])
        """What to read: one box, or nothing if the metadata contains the bytes."""
        if entry.numel > MAX_VALUE_BYTES:
            raise CorruptCheckpointError(
                f"value {name!r} in {source.location} has {entry.numel} bytes, but a value has {MAX_VALUE_BYTES} bytes "
                "at most: the metadata is damaged"
            )
        inline = source.inline.get(name)
        self._tensor = (
            torch.empty(entry.shape, dtype=torch.uint8, device="cpu")
            if inline is None
            else from_bytes(np.frombuffer(inline, np.uint8), torch.uint8, entry.shape)
        )
        self.tensors = [self._tensor for _ in self.wants]
        """The buffer for each of `wants`."""

    @property
    def nbytes(self) -> int:
        """The size of the encoded bytes."""
        return self._tensor.nbytes

    @property
    def data(self) -> bytes:
        """The encoded bytes, after they have been read."""
        return bytes(self._tensor.numpy())

    def value(self, *, allow_pickle: bool = False) -> Any:
        """Decode the value.

        Raises:
            UnsafeValueError: the value needs a pickle that is not safe, and `allow_pickle` is False.
            CorruptCheckpointError: the bytes cannot be decoded.
        """
        return decode_value(self.name, self.kind, self.data, allow_pickle=allow_pickle)


def decode_all(reads: Iterable[ValueBuffer], *, allow_pickle: bool = False) -> list[Any]:
    """Decode values. Equal small numbers, strings and tuples are decoded once, such as the learning rates of parameter
    groups.

    Raises:
        UnsafeValueError, CorruptCheckpointError: see `ValueBuffer.value`.
    """
    values = []
    immutable: dict[tuple[Kind, bytes], Any] = {}
    for read in reads:
        key = (read.kind, read.data) if read.nbytes <= MAX_REPEATED_BYTES else None
        if key is not None and key in immutable:
            values.append(immutable[key])
            continue
        value = read.value(allow_pickle=allow_pickle)
        if key is not None and _is_immutable(value):
            immutable[key] = value
        values.append(value)
    return values


def _is_immutable(value: Any) -> bool:
    return type(value) in (bool, int, float, str, type(None)) or (
        type(value) is tuple and all(map(_is_immutable, value))
    )
