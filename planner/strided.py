"""Find the boxes that a strided view of a tensor covers.

torch describes a view by sizes, strides and an offset, whatever operations created it. A checkpoint is read by boxes.
The functions here translate: `split` finds the boxes of a row-major tensor that a view consists of, and
`Part.boxes_in` finds how to read them straight into a strided destination.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .box import Box

MAX_PARTS = 256
"""A view that consists of more boxes is read as the rows that contain it."""
MAX_FAR_PARTS = 16 * MAX_PARTS
"""The same for boxes that are far from each other."""


@dataclass(frozen=True, slots=True)
class StridedView:
    """A view of memory, as torch describes it: element (i, j, ...) is at offset + i * strides[0] + j * strides[1] ...

    All numbers are in elements. Strides are not negative.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @classmethod
    def whole(cls, shape: Sequence[int]) -> StridedView:
        """Return the view of a whole row-major tensor."""
        return cls(tuple(shape), row_major_strides(shape), 0)

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    @property
    def end(self) -> int:
        """The position after the last element."""
        reach = sum((size - 1) * stride for size, stride in zip(self.sizes, self.strides, strict=True))
        return self.offset + reach + 1 if self.numel else self.offset

    def narrow(self, box: Box) -> StridedView:
        """Return a part of the view.

        Args:
            box: the part, in the dimensions of the view.
        """
        skipped = sum(at * stride for at, stride in zip(box.offsets, self.strides, strict=True))
        return StridedView(box.sizes, self.strides, self.offset + skipped)


def row_major_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a row-major tensor, in elements."""
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))


@dataclass(frozen=True, slots=True)
class Dim:
    """A dimension of a part of a view. A dimension of the view may be split into several."""

    size: int
    stride: int
    """The step in memory, in elements."""
    view_dim: int
    """The dimension of the view that it is a part of."""
    view_step: int = 1
    """Its step along that dimension."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a view that is inside one box of the tensor.

    The part is the elements `as_strided(sizes, strides)` of the values of the box: all of them, or only some.
    """

    start: tuple[int, ...]
    """Its first element, in the dimensions of the view."""
    dims: tuple[Dim, ...]
    """Its dimensions. The strides are those in a row-major tensor of the sizes of the box."""
    box: Box
    """The smallest box of the tensor that contains the part."""
    groups: tuple[tuple[int, ...], ...] | None
    """For each dimension of the box, the positions in `dims` that move along it, the largest step first. None if one of
    `dims` does not move along a dimension of the box: if it is expanded or moves along a diagonal."""
    offset: int = 0
    """The position of the first element in the box."""

    @property
    def view(self) -> StridedView:
        """The part as a view of the values of the box."""
        return StridedView(self._sizes, tuple(dim.stride for dim in self.dims), self.offset)

    @property
    def _sizes(self) -> tuple[int, ...]:
        return tuple(dim.size for dim in self.dims)

    def of(self, other: StridedView) -> StridedView:
        """Return the same part of another view of the same sizes, in the dimensions of the part."""
        offset = other.offset + sum(at * stride for at, stride in zip(self.start, other.strides, strict=True))
        strides = tuple(other.strides[dim.view_dim] * dim.view_step for dim in self.dims)
        return StridedView(self._sizes, strides, offset)

    def boxes_in(
        self, destination: StridedView, min_numel: int, min_run: int = 0
    ) -> list[tuple[Box, StridedView]] | None:
        """Return boxes that together are the part, and for each the part of a destination that it is read into.

        Args:
            destination: a view of other memory, with the sizes of the whole view.
            min_numel: the least number of elements of each box if there are several near each other. Smaller boxes
                cost more than reading the elements between them. Boxes are near if there are fewer than
                `min_numel` elements between them.
            min_run: the least number of consecutive elements in each box, if there are fewer than this between two.

        Returns:
            Boxes of the tensor, and views of their sizes. None if there are no such boxes, or too many: then read the
            box of the part into a temporary tensor.
        """
        if self.groups is None:
            return None
        into = self.of(destination)
        strides = row_major_strides(self.box.sizes)
        sizes, to_strides = list[int](), list[int]()
        stepped: list[tuple[int, int]] = []  # the dimensions to go through one by one, and those of the box
        for d, group in enumerate(self.groups):
            size, to_stride, left = 1, 1, len(group)
            for at in reversed(group):
                joins = size == 1 or into.strides[at] == to_stride * size
                if self.dims[at].stride != size * strides[d] or not joins:
                    break
                to_stride = into.strides[at] if size == 1 else to_stride
                size *= self.dims[at].size
                left -= 1
            stepped += ((at, d) for at in group[:left])
            sizes.append(size)
            to_strides.append(to_stride)
        count = math.prod(self.dims[at].size for at, _ in stepped)
        gaps = self.box.numel - count * math.prod(sizes)
        are_near = gaps < count * min_numel
        if count > 1 and are_near and (count > MAX_PARTS or math.prod(sizes) < min_numel):
            return None
        if count > 1 and _run_in(self.box.sizes, sizes) < min_run and gaps < count * min_run:
            return None
        if count > MAX_FAR_PARTS:
            return None
        found = []
        for index in itertools.product(*(range(self.dims[at].size) for at, _ in stepped)):
            offsets, first = list(self.box.offsets), into.offset
            for (at, d), i in zip(stepped, index, strict=True):
                offsets[d] += i * (self.dims[at].stride // strides[d])
                first += i * into.strides[at]
            found.append((Box(tuple(offsets), tuple(sizes)), StridedView(tuple(sizes), tuple(to_strides), first)))
        return found


def _run_in(outer: Sequence[int], sizes: Sequence[int]) -> int:
    """Return how many elements of a box of some sizes are consecutive in a box around it."""
    run = 1
    for size, whole in zip(reversed(sizes), reversed(outer), strict=True):
        run *= size
        if size < whole:
            break
    return run


@dataclass(frozen=True, slots=True)
class _Piece:
    """A piece of a view that has not been matched with a box yet."""

    start: tuple[int, ...]
    dims: tuple[Dim, ...]
    offset: int


def split(shape: Sequence[int], view: StridedView) -> list[Part]:
    """Split a view of a row-major tensor into parts that are each inside a box.

    Together the parts have each element of the view once. The boxes are small: a slice of a flattened matrix becomes
    the end of a row, whole rows, and the beginning of a row.

    Args:
        shape: the shape of the tensor.
        view: a view of its elements. The first element of the tensor is at position 0.
    """
    if not view.numel:
        return []
    dims = tuple(
        Dim(size, stride, at)
        for at, (size, stride) in enumerate(zip(view.sizes, view.strides, strict=True))
        if size > 1
    )
    whole = _Piece((0,) * len(view.sizes), dims, view.offset)
    parts: list[Part] = []
    left = [whole]
    while left:
        if len(parts) + len(left) > MAX_PARTS:
            return [_rows(shape, whole)]
        found = _match(shape, left.pop())
        if isinstance(found, Part):
            parts.append(found)
        else:
            left += found
    return parts


def _match(shape: Sequence[int], piece: _Piece) -> Part | list[_Piece]:
    """Return the piece as a part of a box, or smaller pieces if it continues from the end of a row in the next one."""
    strides = row_major_strides(shape)
    groups: list[list[int]] = [[] for _ in shape]
    for at, dim in enumerate(piece.dims):
        if dim.stride:
            along = next(d for d, size in enumerate(shape) if size > 1 and strides[d] <= dim.stride)
            if dim.stride % strides[along]:
                return _rows(shape, piece)
            groups[along].append(at)
    starts = [piece.offset // stride % size for stride, size in zip(strides, shape, strict=True)]
    sizes = []
    for d, group in enumerate(groups):
        group.sort(key=lambda at: -piece.dims[at].stride)
        reach = sum((piece.dims[at].size - 1) * piece.dims[at].stride // strides[d] for at in group)
        if starts[d] + reach >= shape[d]:
            return _wrapped(piece, group, starts[d], shape[d], strides[d])
        sizes.append(reach + 1)
    in_box = row_major_strides(sizes)
    moved = {at: piece.dims[at].stride // strides[d] * in_box[d] for d, group in enumerate(groups) for at in group}
    dims = tuple(replace(dim, stride=moved.get(at, 0)) for at, dim in enumerate(piece.dims))
    known = tuple(map(tuple, groups)) if len(moved) == len(dims) else None
    return Part(piece.start, dims, Box(tuple(starts), tuple(sizes)), known)


def _wrapped(piece: _Piece, group: Sequence[int], start: int, size: int, stride: int) -> list[_Piece]:
    """Split a piece that continues beyond the end of a dimension of the tensor.

    Args:
        group: the positions of its dimensions that move along this dimension.
        start: where it starts along the dimension.
        size, stride: the size and the stride of the dimension.
    """
    reaches = {at: piece.dims[at].stride // stride * (piece.dims[at].size - 1) for at in group}
    for at in group:
        step, count = piece.dims[at].stride // stride, piece.dims[at].size
        room = size - 1 - start - sum(reaches.values()) + reaches[at]
        inside = room // step + 1  # how many of its elements come before the end
        if not 0 < inside < count:
            continue
        if inside * step != size:
            return _cut(piece, at, inside)
        return _cut(piece, at, count - count % inside) if count % inside else [_with_split_dim(piece, at, inside)]
    widest = max(group, key=lambda at: reaches[at])
    return _cut(piece, widest, piece.dims[widest].size // 2)


def _with_split_dim(piece: _Piece, at: int, per_row: int) -> _Piece:
    """Replace a dimension by two: one over rows, and one inside a row."""
    dim = piece.dims[at]
    outer = Dim(dim.size // per_row, dim.stride * per_row, dim.view_dim, dim.view_step * per_row)
    inner = replace(dim, size=per_row)
    dims = tuple(new for new in (outer, inner) if new.size > 1)
    return replace(piece, dims=(*piece.dims[:at], *dims, *piece.dims[at + 1 :]))


def _cut(piece: _Piece, at: int, count: int) -> list[_Piece]:
    """Cut a piece in two, after `count` elements of a dimension."""
    dim = piece.dims[at]
    pieces = []
    for begin, size in ((0, count), (count, dim.size - count)):
        start = list(piece.start)
        start[dim.view_dim] += begin * dim.view_step
        kept = (replace(dim, size=size),) if size > 1 else ()
        dims = (*piece.dims[:at], *kept, *piece.dims[at + 1 :])
        pieces.append(_Piece(tuple(start), dims, piece.offset + begin * dim.stride))
    return pieces


def _rows(shape: Sequence[int], piece: _Piece) -> Part:
    """Return a piece as a part of the rows that contain it."""
    along = next(d for d, size in enumerate(shape) if size > 1)
    row = math.prod(shape[along + 1 :])
    end = piece.offset + sum((dim.size - 1) * dim.stride for dim in piece.dims) + 1
    first, last = piece.offset // row, (end - 1) // row
    rows = Box.whole(tuple(shape)).with_extent(along, first, last + 1)
    return Part(piece.start, piece.dims, rows, None, piece.offset - first * row)
