"""Plans a conversion: which entries it writes, how they are cut into work units, and which conversion it is.

The plan depends on the source and the arguments only, so it is the same on every rank and in every run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...planner.entries import Entry
from ..errors import ObjectNotFoundError
from ..formats.metadata_reader import MetadataReader
from ..formats.source import Source
from ..reading.value_buffers import check_values
from ..runtime.checksums import checksum
from ..runtime.reports import Cast
from ..tensors.casts import ScaleNames, check_is_not_scaled, loses_bits, weight_dtype
from ..tensors.dtypes import dtype_name, torch_dtype
from ..tensors.name_patterns import Selection, matches_any
from ..tensors.state_dict import Path, renamed_path
from .targets.safetensors import SafetensorsTarget
from .targets.target import ConversionTarget, WorkUnit
from .work_items import Item

SAMPLES = 4
"""The number of samples of each source object."""
SAMPLE_BYTES = 4096
"""The size of a sample."""


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """What a conversion reads and writes."""

    source: Source
    target: ConversionTarget
    items: tuple[Item, ...]
    """The entries to write, sorted by name."""
    units: tuple[WorkUnit, ...]
    """The work units that write them."""
    dropped: tuple[str, ...]
    """The names in the source that are not written."""
    cast: tuple[Cast, ...]
    """The tensors that are rounded to another dtype."""
    digest: str
    """A checksum of the arguments, the metadata of the source, and the work units."""

    def identify(self, reader: MetadataReader) -> str:
        """Return a checksum that identifies the conversion: `digest` and samples of the source's objects."""
        return _digest([self.digest, *_sample_objects(self.source, reader)])

    def paths(self) -> dict[str, Path]:
        """Return the paths of items in the state dict that was saved, if their names still match them.

        A new name may be that of a dict that contains other items. Then only items that keep their names have paths.
        """
        known = [item for item in self.items if item.source in self.source.paths]
        renamed = {item.name: renamed_path(self.source.paths[item.source], item.name) for item in known}
        paths = {name: path for name, path in renamed.items() if path is not None}
        containers = {path[:length] for path in paths.values() for length in range(1, len(path))}
        if containers.isdisjoint(paths.values()):
            return paths
        return {item.name: self.source.paths[item.source] for item in known if item.name == item.source}


def plan_conversion(
    source: Source,
    target: ConversionTarget,
    selection: Selection,
    may_miss: Sequence[str],
    dtype: torch.dtype | None,
    *,
    budget_bytes: int | None,
    arguments: Sequence[Any],
) -> ConversionPlan:
    """Plan a conversion.

    Args:
        may_miss: patterns of names that are dropped if they are missing or cannot be read.
        dtype: the dtype to cast floating-point tensors to.
        budget_bytes: the memory limit that the caller passed.
        arguments: all other arguments that determine what is written, as JSON.

    Raises:
        MissingTensorError: a pattern matches no name.
        ArgumentError: two names would become the same, or a value is larger than the budget.
        DtypeError: the target does not have the dtype of a tensor, or a tensor cannot be cast.
        UnsupportedFormatError, CorruptCheckpointError, UnsafeValueError: a selected name cannot be read.
    """
    items = _select_items(source, selection, may_miss, dtype)
    if isinstance(target, SafetensorsTarget):
        items = [item for item in items if item.is_tensor]
    converted = {item.source for item in items}
    names = (*(entry.name for entry in source.entries), *source.unreadable, *source.unindexed)
    for item in items:
        if not item.is_tensor:
            check_values(source, [item.source], budget_bytes)
    units = target.units(items)
    of_source = [source.format, source.location, dict(source.info), source.objects, source.sizes]
    pieces = [len(unit.pieces) for unit in units]
    return ConversionPlan(
        source,
        target,
        tuple(items),
        tuple(units),
        dropped=tuple(name for name in names if name not in converted),
        cast=tuple(_find_casts(source, items)),
        digest=_digest([list(arguments), of_source, [repr(item) for item in items], pieces]),
    )


def _select_items(
    source: Source, selection: Selection, may_miss: Sequence[str], dtype: torch.dtype | None
) -> list[Item]:
    """Return the entries to write, sorted by their new names."""
    names = [*(entry.name for entry in source.entries), *source.unreadable]
    selection.check(names, may_miss=may_miss)
    for name, unreadable in source.unreadable.items():
        if selection.includes(name) and not matches_any(may_miss, name):
            raise unreadable.kind(f"{unreadable.reason}. To convert the rest, pass exclude={name!r} (--exclude)")
    scales = ScaleNames(names)
    selected = selection.select(name for name in names if name not in source.unreadable)
    items = []
    for new, name in sorted(selected.items()):
        entry = source.entry(name)
        items.append(Item(new, name, entry.kind, _written_dtype(entry, dtype, scales), entry.shape))
    return items


def _written_dtype(entry: Entry, dtype: torch.dtype | None, scales: ScaleNames) -> str:
    """Return the dtype in which an entry is written, by the planner's name."""
    if not entry.is_tensor or dtype is None:
        return entry.dtype
    stored = torch_dtype(entry.dtype)
    to = weight_dtype(stored, entry.shape, dtype)
    check_is_not_scaled(entry.name, stored, to, scales)
    return dtype_name(entry.name, to)


def _find_casts(source: Source, items: Sequence[Item]) -> list[Cast]:
    """Return the tensors whose values lose bits."""
    stored = ((item, source.entry(item.source).dtype) for item in items if item.is_tensor)
    return [
        Cast(item.name, dtype, item.dtype)
        for item, dtype in stored
        if dtype != item.dtype and loses_bits(torch_dtype(dtype), item.torch_dtype)
    ]


def _digest(parts: list[Any]) -> str:
    return f"{checksum(json.dumps(parts).encode()):016x}"


def _sample_objects(source: Source, reader: MetadataReader) -> list[str]:
    """Return checksums of samples of all objects. They show most overwrites of the source, but not all."""
    if source.format == "reshard":
        return []  # every save writes objects with new names
    wanted = [
        (name, start, min(start + SAMPLE_BYTES, nbytes))
        for name, nbytes in source.objects
        for start in sorted({max(0, nbytes - SAMPLE_BYTES) * i // (SAMPLES - 1) for i in range(SAMPLES)})
        if nbytes
    ]
    if not wanted:
        return []

    def sample(name: str, start: int, stop: int) -> str:
        try:
            return f"{checksum(reader.read(name, start, stop)):016x}"
        except ObjectNotFoundError:
            return ""  # reading its values raises the error

    return reader.many(sample, *map(list, zip(*wanted, strict=True)))
