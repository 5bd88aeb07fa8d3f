"""Where the values of lazy tensors come from, and which reads copy them to a destination.

An origin describes memory that does not exist: a tensor of the checkpoint, or what `torch.cat`, `clone` or a cast would
create. It never changes. A lazy tensor is a strided view of an origin. `resolve` turns a copy of such a view into reads
of boxes of the checkpoint, straight into the destination. Where that is impossible, a box is first read into a
temporary tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import torch

from ...planner.box import Box
from ...planner.strided import StridedView, split
from ..runtime.torch_modes import writing_to
from ..tensors.casts import check_integers, needs_check
from ..tensors.dtypes import is_packed

MIN_BOX_BYTES = 64 * 1024
"""If a view consists of several boxes that are smaller, the elements between them are read, too."""
MIN_RUN_BYTES = 4 * 1024
"""The same for consecutive bytes, if the user limits the over-read. The planner then decides about all other gaps."""


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A tensor of the checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    depth: ClassVar = 0
    views: ClassVar = 1

    @property
    def names(self) -> Iterator[str]:
        """The names of the checkpoint's tensors that the values come from."""
        yield self.name


@dataclass(frozen=True, eq=False)
class Assembled:
    """A row-major tensor that consists of views of other origins."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[PlacedView, ...]
    """Views that together cover the tensor. Their values are cast to its dtype as `Tensor.to` does."""
    same_bits: bool = False
    """Whether the bits of the values are kept if their dtype differs, as `Tensor.view(dtype)` does."""

    @cached_property
    def depth(self) -> int:
        """How many functions were called one after another to create the tensor."""
        return 1 + max((part.origin.depth for part in self.parts), default=0)

    @cached_property
    def views(self) -> int:
        """The number of views of stored tensors that it consists of."""
        return sum(part.origin.views for part in self.parts)

    @property
    def names(self) -> Iterator[str]:
        """The names of the checkpoint's tensors that the values come from."""
        for part in self.parts:
            yield from part.origin.names


Origin = Stored | Assembled


@dataclass(frozen=True, slots=True, eq=False)
class PlacedView:
    """A view of an origin, and the box of an assembled tensor that has its values."""

    box: Box
    origin: Origin
    view: StridedView


class Scratch:
    """A temporary row-major tensor in host memory. It is allocated when it is first used."""

    def __init__(self, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
        self.sizes = sizes
        self.dtype = dtype
        self._tensor: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return Box.whole(self.sizes).numel * self.dtype.itemsize

    def tensor(self) -> torch.Tensor:
        if self._tensor is None:
            self._tensor = torch.empty(self.sizes, dtype=self.dtype, device="cpu")
        return self._tensor


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """A strided view of memory that values are written to."""

    memory: torch.Tensor | Scratch
    dtype: torch.dtype
    """The dtype of the view. Its elements have the size of those of the memory."""
    view: StridedView
    """The view. Its offset counts from the beginning of the storage."""

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Target:
        """Return a whole plain tensor as a target."""
        view = StridedView(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
        return cls(tensor, tensor.dtype, view)

    def tensor(self) -> torch.Tensor:
        """Return the view as a tensor."""
        memory = self.memory.tensor() if isinstance(self.memory, Scratch) else self.memory
        memory = memory if memory.dtype == self.dtype else memory.view(self.dtype)
        return memory.as_strided(self.view.sizes, self.view.strides, self.view.offset)

    def narrow(self, box: Box) -> Target:
        return replace(self, view=self.view.narrow(box))


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """A box of the checkpoint and the target that it is read into."""

    name: str
    box: Box
    target: Target


@dataclass(frozen=True, slots=True, eq=False)
class Copy:
    """A copy out of a temporary tensor, after it has been read."""

    source: Target
    target: Target
    through: torch.dtype
    """The dtype that the values are cast to first."""
    name: str
    """A tensor that the values come from."""

    def run(self) -> None:
        """Copy. Raise DtypeError, and copy nothing, if integers do not fit the dtype of the target."""
        values, target = self.source.tensor().to(self.through), self.target.tensor()
        if needs_check(self.through, target.dtype):
            check_integers(self.name, values, target.dtype)
        with writing_to(target):
            target.copy_(values)


@dataclass(slots=True, eq=False)
class Resolution:
    """The reads that copy a view of an origin to a target, and what is done after them, in this order."""

    reads: list[Read] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    scratch: list[Scratch] = field(default_factory=list)
    min_box_bytes: int = MIN_BOX_BYTES
    """Smaller boxes are read together with the elements between them, if these are few."""
    min_run_bytes: int = 0
    """Boxes with fewer consecutive bytes are read together with the elements between them."""

    @property
    def nbytes(self) -> int:
        """The bytes of the temporary tensors."""
        return sum(scratch.nbytes for scratch in self.scratch)

    def _new_scratch(self, sizes: tuple[int, ...], dtype: torch.dtype) -> Target:
        self.scratch.append(Scratch(sizes, dtype))
        return Target(self.scratch[-1], dtype, StridedView.whole(sizes))

    def add(self, origin: Origin, view: StridedView, target: Target) -> None:
        """Add what copies a view of an origin to a target of the same sizes."""
        for part in split(origin.shape, view):
            itemsize = origin.dtype.itemsize
            boxes = part.boxes_in(target.view, self.min_box_bytes // itemsize, self.min_run_bytes // itemsize)
            if boxes is not None:
                for box, into in boxes:
                    self._add_box(origin, box, replace(target, view=into))
                continue
            scratch = self._new_scratch(part.box.sizes, origin.dtype)
            self._add_box(origin, part.box, scratch)
            self._copy(replace(scratch, view=part.view), replace(target, view=part.of(target.view)), origin)

    def _add_box(self, origin: Origin, box: Box, target: Target) -> None:
        if isinstance(origin, Stored):
            self.reads.append(Read(origin.name, box, target))
            return
        for part in origin.parts:
            common = part.box.intersect(box)
            if common is None:
                continue
            view, into = part.view.narrow(common.relative_to(part.box)), target.narrow(common.relative_to(box))
            self._add_part(origin, part.origin, view, into)

    def _add_part(self, owner: Assembled, origin: Origin, view: StridedView, target: Target) -> None:
        """Add what copies a view of a part of an assembled tensor.

        A read casts once, from the stored dtype to that of its target. If the values are cast twice, or in a way that
        only `Tensor.to` allows, they are read into a temporary tensor.
        """
        if origin.dtype == owner.dtype:
            self.add(origin, view, target)
        elif owner.same_bits and target.dtype == owner.dtype:
            self.add(origin, view, replace(target, dtype=origin.dtype))
        elif owner.same_bits:
            scratch = self._new_scratch(view.sizes, owner.dtype)
            self.add(origin, view, replace(scratch, dtype=origin.dtype))
            self._copy(scratch, target, owner)
        elif target.dtype == owner.dtype and _is_read_as(origin.dtype, owner.dtype):
            self.add(origin, view, target)
        else:
            scratch = self._new_scratch(view.sizes, origin.dtype)
            self.add(origin, view, scratch)
            self._copy(scratch, target, owner)

    def _copy(self, source: Target, target: Target, through: Origin) -> None:
        self.copies.append(Copy(source, target, through.dtype, next(through.names)))


def _is_read_as(stored: torch.dtype, dtype: torch.dtype) -> bool:
    """Return whether a read may cast one dtype to another without any check."""
    floating = stored.is_floating_point and dtype.is_floating_point
    return floating and stored.itemsize > 1 and not is_packed(stored) and not is_packed(dtype)


def resolve(
    origin: Origin, view: StridedView, target: Target, *, min_box_bytes: int = MIN_BOX_BYTES, min_run_bytes: int = 0
) -> Resolution:
    """Return the reads that copy a view of an origin to a target of the same sizes. See `Resolution`."""
    resolution = Resolution(min_box_bytes=min_box_bytes, min_run_bytes=min_run_bytes)
    resolution.add(origin, view, target)
    return resolution
