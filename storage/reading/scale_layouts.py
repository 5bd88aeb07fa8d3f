"""Checks that a layout cuts quantised weights and their scales at the same places."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ...planner.entries import Entry
from ...planner.errors import LayoutError
from ...planner.layout import Layout, Replicate, Shard, StridedShard
from ..tensors.casts import ScaleNames, is_scale_of
from ..tensors.dtypes import torch_dtype


def check_scale_layouts(layout: Layout, entries: Mapping[str, Entry]) -> None:
    """Check that each rank holds the scales of its part of a quantised weight.

    A scale belongs to a weight, a row, a column or a block of a weight. Cut by itself into equal parts, as the rules of
    a weight do, it may end up on a rank that holds another part of the weight.

    Args:
        entries: the tensors that are read, by their names in the layout.

    Raises:
        LayoutError: a rank would hold a part of a weight and not its scales.
    """
    for weight, scale in _pairs(entries):
        shapes = entries[weight].shape, entries[scale].shape
        placements = zip(*(layout.placements(name, len(entries[name].shape)) for name in (weight, scale)), strict=True)
        for size, (of_weight, of_scale) in zip(layout.mesh.sizes, placements, strict=True):
            if size == 1 or isinstance(of_scale, Replicate):
                continue
            if isinstance(of_weight, Replicate) or not _are_cut_alike(of_weight, of_scale, *shapes, size):
                rule = f'Put the rule "{scale}": "replicate" before the others'
                if shapes[1][of_scale.dim] == 1:
                    raise LayoutError(
                        f"{scale!r} has the scales of {weight!r}. The layout cuts a dimension of size 1 of the scales, "
                        f"{shapes[1]}, into {size} parts, so only one rank would hold them. {rule}"
                    )
                raise LayoutError(
                    f"{scale!r} has the scales of {weight!r}. The layout cuts the shape {shapes[1]} of the scales and "
                    f"the shape {shapes[0]} of the weight into {size} parts, perhaps at different places, so ranks "
                    f"could hold scales of other parts of the weight. {rule}, and select the scales of each rank's "
                    "part yourself, or use a number of ranks for which the parts of the weight consist of whole blocks"
                )


def _pairs(entries: Mapping[str, Entry]) -> Iterator[tuple[str, str]]:
    """Yield the names of quantised weights with those of their scales."""
    weights: dict[str, list[str]] = {}
    for name, entry in entries.items():
        if torch_dtype(entry.dtype).itemsize == 1 and entry.dtype != "bool" and entry.shape:
            weights.setdefault(name.rpartition(".")[0], []).append(name)
    if not weights:
        return
    for scale in ScaleNames(entries).found:
        parts = scale.split(".")
        for module in (".".join(parts[:n]) for n in range(len(parts))):
            for name in weights.get(module, ()):
                rest = scale[len(module) + 1 if module else 0 :]
                is_beside = "." not in rest or scale.startswith(f"{name}.")  # not in a module of that name
                if name != scale and is_beside and is_scale_of(name, scale):
                    yield name, scale


def _are_cut_alike(
    of_weight: Shard | StridedShard,
    of_scale: Shard | StridedShard,
    weight: tuple[int, ...],
    scale: tuple[int, ...],
    size: int,
) -> bool:
    """Return whether `size` ranks hold the scales of their parts of a weight, given the placements and the shapes."""
    factors = {getattr(placement, "split_factor", 1) for placement in (of_weight, of_scale)}
    n, scales = weight[of_weight.dim], scale[of_scale.dim]
    from_end = of_weight.dim % len(weight) - len(weight), of_scale.dim % len(scale) - len(scale)
    if len(scale) == 1 < len(weight):
        from_end = from_end[0], -2  # one scale for each row
    if len(factors) > 1 or scales == 0 or from_end[0] != from_end[1]:
        return False
    if n == scales:
        return True
    pieces = size * factors.pop()
    of_block = -(-n // scales)
    is_known = of_block.bit_count() == 1  # otherwise the last block may be smaller than the others
    return is_known and n % pieces == scales % pieces == 0 and n // pieces == scales // pieces * of_block
