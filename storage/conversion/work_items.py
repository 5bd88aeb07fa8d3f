"""What a conversion copies: tensors and values, in pieces that are read at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...planner.box import Box
from ...planner.entries import ITEMSIZES, Kind
from ..tensors.dtypes import torch_dtype


@dataclass(frozen=True, slots=True)
class Item:
    """A tensor or value to write."""

    name: str
    source: str
    """The name in the source."""
    kind: Kind
    dtype: str
    """The dtype to write, by the planner's name."""
    shape: tuple[int, ...]

    @property
    def is_tensor(self) -> bool:
        return self.kind is Kind.TENSOR

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch_dtype(self.dtype)

    @property
    def nbytes(self) -> int:
        return Box.whole(self.shape).numel * ITEMSIZES[self.dtype]


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor, or a whole value."""

    item: Item
    box: Box

    @property
    def nbytes(self) -> int:
        return self.box.numel * ITEMSIZES[self.item.dtype]
