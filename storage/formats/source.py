"""The protocol of sources: what a checkpoint of any format contains, and where its bytes are.

`native/native_source.py` implements it for reshard's own format, `foreign.py` for other formats.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ...planner.chunk_reads import WantedBox
from ...planner.coalesce import GapLimits
from ...planner.entries import Entry
from ...planner.errors import CheckpointError
from ...planner.index import CheckpointIndex
from ...planner.request_costs import UNBOUNDED_OVER_READ, RequestCosts
from ..errors import ArgumentError, CorruptCheckpointError
from ..stores.base import Store
from ..tensors.state_dict import Path
from .metadata_reader import Speed


def bounded(max_over_read: float | None) -> float | None:
    """Return a user's bound on over-reads, if there is one. Raise ArgumentError if it is negative or not a number."""
    if max_over_read is None:
        return None
    if not isinstance(max_over_read, numbers.Real) or isinstance(max_over_read, bool) or not max_over_read >= 0:
        raise ArgumentError(f"max_over_read must be a number of 0 or more, or None, got {max_over_read!r}")
    return min(float(max_over_read), UNBOUNDED_OVER_READ)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Why one name of a checkpoint cannot be read. The other names can."""

    kind: type[CheckpointError]
    """The class of the error that a request for the name raises."""
    reason: str
    """The message of that error: the name, what is wrong with it, where, and what to do."""
    object: str = ""
    """The object that should hold the values, if known."""

    @property
    def is_damage(self) -> bool:
        """Whether values are missing or wrong, rather than of a kind that this installation cannot read."""
        return issubclass(self.kind, CorruptCheckpointError)

    def error(self) -> CheckpointError:
        """Return the error to raise."""
        return self.kind(self.reason)


@dataclass(frozen=True, slots=True)
class RecordWithCrc:
    """A byte range of an object that has a CRC-32."""

    name: str
    object: str
    start: int
    stop: int
    """The byte range [start, stop) of the object."""
    crc: int
    entries: tuple[str, ...]
    """The tensors and values that are stored in it."""


def check_readable(source: Source, is_wanted: Callable[[str], bool]) -> None:
    """Check that every wanted name can be read.

    Raises:
        CheckpointError: the error of the first name that cannot be read. The message says how many other names cannot
            be read.
    """
    found = [unreadable for name, unreadable in source.unreadable.items() if is_wanted(name)]
    if found:
        more = f"; {len(found) - 1} more names cannot be read" if len(found) > 1 else ""
        raise found[0].kind(f"{found[0].reason}{more}")


class Source(Protocol):
    """An open checkpoint. Its metadata has been checked. A source may read more metadata when a method needs it."""

    @property
    def store(self) -> Store:
        """The store with the objects."""

    @property
    def speed(self) -> Speed:
        """What opening the checkpoint measured."""

    def use_store(self, store: Store, speed: Speed | None = None) -> None:
        """Read from this store from now on. It has the same objects.

        Args:
            store: the store.
            speed: what another rank measured, which read the metadata for this one. The reads are then not counted.
        """

    @property
    def location(self) -> str:
        """The location of the checkpoint, for error messages."""

    @property
    def format(self) -> str:
        """The format: "reshard", "dcp", "safetensors" or "torch"."""

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All tensors and values that can be read."""

    @property
    def unreadable(self) -> Mapping[str, Unreadable]:
        """The names in the checkpoint that cannot be read. They are not in `entries`."""

    @property
    def unindexed(self) -> tuple[str, ...]:
        """Names that the files contain but the index of the checkpoint does not list. They are not read."""

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """The number of chunks of each entry, and their stored bytes."""

    @property
    def objects(self) -> tuple[tuple[str, int], ...]:
        """The name and size in bytes of each data object."""

    @property
    def inline(self) -> Mapping[str, bytes]:
        """The bytes of the values that have already been read. An index does not contain them."""

    @property
    def records(self) -> Sequence[RecordWithCrc]:
        """The byte ranges with a CRC-32, if the format has them for parts of its objects."""

    @property
    def info(self) -> Mapping[str, Any]:
        """What wrote the checkpoint, and other information in its metadata."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the user stored with the checkpoint, or {} if the format has no such data."""

    @property
    def paths(self) -> Mapping[str, Path]:
        """Where entries were in the saved state dict, if known."""

    @property
    def bytes_read(self) -> int:
        """How many bytes of metadata have been read."""

    @property
    def requests(self) -> int:
        """How many reads of metadata there were."""

    def __contains__(self, name: str) -> bool:
        """Return whether the checkpoint has this name, readable or not."""

    def entry(self, name: str) -> Entry:
        """Return the entry of this name. Raise MissingTensorError, or the error that `unreadable` has for the name."""

    def index(self, wants: Iterable[WantedBox] | None = None) -> CheckpointIndex:
        """Return an index to plan reads with.

        Args:
            wants: the reads. The index contains at least the chunks that they need. By default, it contains all
                entries.

        Raises:
            MissingTensorError, CorruptCheckpointError, StoreError: the index cannot be read.
        """

    def fingerprint(self) -> str:
        """Return a string that differs between checkpoints, even at the same location or with the same names.

        For reshard's own format this is the checksum of the manifest. For other formats it is a checksum of the
        metadata and of some of the values.
        """

    def observe(self, nbytes: int, seconds: float) -> None:
        """Record that a read of `nbytes` bytes took `seconds`, to estimate the speed of the store."""

    def gap_limits(self, max_over_read: float | None, costs: RequestCosts | None = None) -> GapLimits:
        """Return which gaps between byte ranges are worth reading over.

        Args:
            max_over_read: the user's bound on over-reads, or None for the default.
            costs: the costs of another store to plan for. By default, the costs of this store.
        """
