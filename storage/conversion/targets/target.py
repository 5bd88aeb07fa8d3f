"""A target: a format that a conversion writes, as units of work that stand by themselves, and a commit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ....planner.box import Box
from ....planner.entries import ITEMSIZES
from ....planner.grid import Grid
from ...stores.base import Store
from ...tensors.splitting import PIECE_BYTES
from ..source_stream import SourceStream
from ..work_items import Item, Piece

UNIT_BYTES = 256 * 1024 * 1024
"""Values of a unit, or a little more: what is done again at most after a kill."""


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """What one rank writes at once."""

    number: int
    pieces: tuple[Piece, ...]


UnitRecord = dict[str, Any]
"""What a target notes of a unit that it wrote, as a value of JSON: "files" are the names of its objects, "bytes" their
size, and the rest is the target's own."""


class ConversionTarget(Protocol):
    """A format to write. `units` is a function of the items alone, so that all ranks, and a rerun, agree on them."""

    format: str
    """What `open_source` calls it."""
    commits: str
    """The object whose presence makes the checkpoint whole."""

    def units(self, items: Sequence[Item]) -> list[WorkUnit]:
        """All work."""

    def write(
        self, store: Store, label: str, unit: WorkUnit, values: SourceStream, interrupt: Callable[[], None]
    ) -> UnitRecord:
        """Write a unit's objects; what a killed try left of them is replaced.

        Args:
            label: the conversion's, and the rank's: what is in the name of an object that no other may have.
        """

    def commit(
        self, location: str, items: Sequence[Item], done: Sequence[UnitRecord], paths: Mapping[str, Any]
    ) -> bytes:
        """The object that makes the checkpoint whole, once all units are written.

        Args:
            location: the store's.
            done: of all units, in order.
            paths: where items stand in the state dict that was saved, if that is known.
        """

    def orphans(self, store: Store, conversion: str, names: Iterable[str]) -> list[str]:
        """Which of the names are of tries that were killed, and no part of the checkpoint that was committed.

        Args:
            conversion: what the labels of all units begin with.
        """


def in_pieces(items: Sequence[Item]) -> list[WorkUnit]:
    """Units of pieces that are cut along the grid, in the order of the items; nothing of empty tensors."""
    units: list[WorkUnit] = []
    pieces: list[Piece] = []
    held = 0
    for item in items:
        whole, itemsize = Box.whole(item.shape), ITEMSIZES[item.dtype]
        boxes = [whole]
        if item.is_tensor:
            boxes = Grid.choose(item.shape, itemsize).split(whole, PIECE_BYTES // itemsize) if whole.numel else []
        for box in boxes:
            pieces.append(Piece(item, box))
            held += pieces[-1].nbytes
            if held >= UNIT_BYTES:
                units.append(WorkUnit(len(units), tuple(pieces)))
                pieces, held = [], 0
    return [*units, WorkUnit(len(units), tuple(pieces))] if pieces else units
