"""Reads of the values of a checkpoint that are not tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from ...planner.chunk_reads import WantedBox
from ..errors import ArgumentError, CorruptCheckpointError
from ..formats.source import Source
from ..formats.value_codec import MAX_VALUE_BYTES, decode_value
from ..tensors.dtypes import from_bytes


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


class ValueRead:
    """The read of one value: the buffer that its bytes are read into, and how to decode them.

    Raises:
        MissingTensorError: the checkpoint has no entry of this name.
        CorruptCheckpointError: the value is larger than any value that can be saved.
    """

    def __init__(self, source: Source, name: str) -> None:
        entry = source.entry(name)
        self.name = name
        self.kind = entry.kind
        self.wants = whole_wants(source, [name])
        """What to read: one box, or nothing if the metadata contains the bytes."""
        source.index(self.wants)  # checks the size in the metadata before memory of that size is allocated
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
