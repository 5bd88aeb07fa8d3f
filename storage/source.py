"""A source: what a checkpoint holds and where its bytes are, whatever its format.

The manifest is one; `sources/` has others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from ..planner.byte_ranges import Gaps
from ..planner.costs import UNBOUNDED, Costs
from ..planner.index import CheckpointIndex, Entry
from ..planner.read_plan import Want
from .errors import ArgumentError
from .state_dict import Path
from .store import Store


def bounded(most_over_read: float) -> float:
    """A user's bound on what is read over. Raises ArgumentError where it is none."""
    if not most_over_read >= 0:
        raise ArgumentError(f"max_over_read must be 0 or more, got {most_over_read}")
    return min(most_over_read, UNBOUNDED)


class Source(Protocol):
    """A checkpoint that is open. Its metadata is checked; more of it may be read as it is asked for."""

    @property
    def store(self) -> Store:
        """Where the objects are."""

    @property
    def location(self) -> str:
        """The checkpoint's place, as errors should name it."""

    @property
    def format(self) -> str:
        """One of FORMATS."""

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All tensors and objects."""

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """How many chunks each entry has, and their bytes as stored."""

    @property
    def objects(self) -> tuple[tuple[str, int], ...]:
        """Name and size in bytes of each data object."""

    @property
    def inline(self) -> Mapping[str, bytes]:
        """The bytes of those objects that are here already, and in no index."""

    @property
    def info(self) -> Mapping[str, Any]:
        """By what it was written, and whatever else it says of itself."""

    @property
    def paths(self) -> Mapping[str, Path]:
        """Where entries are in the state dict that was saved, if that is known."""

    @property
    def bytes_read(self) -> int:
        """Of metadata, so far."""

    @property
    def requests(self) -> int:
        """Reads that it took, so far."""

    def __contains__(self, name: str) -> bool: ...

    def entry(self, name: str) -> Entry:
        """The entry of this name. Raises MissingTensorError."""

    def index(self, wants: Iterable[Want] | None = None) -> CheckpointIndex:
        """An index that is good for planning these reads; it may hold more. Without `wants`, it has all entries.

        Raises MissingTensorError, CorruptCheckpointError, StoreError.
        """

    def fingerprint(self) -> str:
        """What tells this checkpoint from another one at the same location, or with the same names.

        Of reshard's own checkpoints, the checksum of the manifest. Of others, a checksum of their metadata and of a few
        of their values.
        """

    def observe(self, nbytes: int, seconds: float) -> None:
        """Learn from a reading how fast the store is, for those that follow."""

    def gaps(self, most_over_read: float | None, costs: Costs | None = None) -> Gaps:
        """Which gaps are worth reading over, under the user's bound or the default one.

        Args:
            costs: those of another store, to plan for; by default those of this one.
        """
