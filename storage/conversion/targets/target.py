"""The interface of a conversion target: a format that is written as independent work units, followed by a commit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ....planner.box import Box
from ....planner.entries import ITEMSIZES
from ....planner.grid import Grid
from ...stores.base import Store
from ...tensors.splitting import MAX_PIECE_BYTES
from ..source_stream import SourceStream
from ..work_items import Item, Piece

MIN_WORK_UNIT_BYTES = 256 * 1024 * 1024
"""Bytes of values in a work unit, at least. If a rank is killed, it loses about this many bytes of work."""


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """The pieces that one rank writes together, and adds to the journal together."""

    number: int
    pieces: tuple[Piece, ...]


UnitRecord = dict[str, Any]
"""What a target writes about a finished unit, as JSON. "files" are the names of its objects, and "bytes" is their total
size. The other keys depend on the target."""


class ConversionTarget(Protocol):
    """A format to write.

    `units` depends on the items only, so all ranks, and a later run, cut the same units.
    """

    format: str
    """The name of the format, as in `open_source`."""
    commit_name: str
    """The name of the object that commits the checkpoint."""

    def units(self, items: Sequence[Item]) -> list[WorkUnit]:
        """Return the units that write all items."""

    def write(
        self, store: Store, label: str, unit: WorkUnit, stream: SourceStream, interrupt: Callable[[], None]
    ) -> UnitRecord:
        """Write the objects of a unit. Objects that a killed run left are replaced.

        Args:
            label: identifies the conversion and the rank. It is part of object names that must be unique.
            stream: reads the pieces of the unit.
            interrupt: called regularly. If it raises an error, the writing stops with this error.
        """

    def commit_bytes(
        self, location: str, items: Sequence[Item], records: Sequence[UnitRecord], paths: Mapping[str, Any]
    ) -> bytes:
        """Return the bytes of the object that commits the checkpoint, after all units have been written.

        Args:
            location: the location of the store.
            records: the records of all units, in order.
            paths: the paths of items in the state dict that was saved, if they are known.
        """

    def orphans(self, store: Store, conversion: str, names: Iterable[str]) -> list[str]:
        """Return the names of objects that killed runs of a conversion left, and that the checkpoint does not need.

        Args:
            conversion: the start of all labels of the conversion.
            names: the names of all objects.
        """


def in_pieces(items: Sequence[Item]) -> list[WorkUnit]:
    """Cut items along the grid into pieces, and group these into units. Empty tensors have no pieces."""
    units: list[WorkUnit] = []
    pieces: list[Piece] = []
    held = 0
    for item in items:
        whole, itemsize = Box.whole(item.shape), ITEMSIZES[item.dtype]
        boxes = [whole]
        if item.is_tensor:
            boxes = Grid.choose(item.shape, itemsize).split(whole, MAX_PIECE_BYTES // itemsize) if whole.numel else []
        for box in boxes:
            pieces.append(Piece(item, box))
            held += pieces[-1].nbytes
            if held >= MIN_WORK_UNIT_BYTES:
                units.append(WorkUnit(len(units), tuple(pieces)))
                pieces, held = [], 0
    return [*units, WorkUnit(len(units), tuple(pieces))] if pieces else units
