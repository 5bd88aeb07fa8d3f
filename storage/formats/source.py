"""A source: what a checkpoint holds and where its bytes are, whatever its format.

The manifest is one; `sources/` has others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ...planner.chunk_reads import Want
from ...planner.coalesce import GapLimits
from ...planner.entries import Entry
from ...planner.errors import CheckpointError
from ...planner.index import CheckpointIndex
from ...planner.request_costs import UNBOUNDED_OVER_READ, RequestCosts
from ..errors import ArgumentError, CorruptCheckpointError
from ..stores.base import Store
from ..tensors.state_dict import Path


def bounded(max_over_read: float) -> float:
    """A user's bound on what is read over. Raises ArgumentError where it is none."""
    if not max_over_read >= 0:
        raise ArgumentError(f"max_over_read must be 0 or more, got {max_over_read}")
    return min(max_over_read, UNBOUNDED_OVER_READ)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Why one name of a checkpoint cannot be read. The other names can."""

    kind: type[CheckpointError]
    """The class of the error that a request for the name raises."""
    reason: str
    """The message of that error: the name, what is wrong with it, where, and what to do."""
    object: str = ""
    """The object that should hold the values, if it is known."""

    @property
    def is_damage(self) -> bool:
        """Whether values are missing or wrong, and not only of a kind that cannot be read here."""
        return issubclass(self.kind, CorruptCheckpointError)

    def error(self) -> CheckpointError:
        """Return the error to raise."""
        return self.kind(self.reason)


def check_readable(source: Source, is_wanted: Callable[[str], bool]) -> None:
    """Check that every wanted name can be read.

    Raises:
        CheckpointError: the error of the first name that cannot be read. It counts the others.
    """
    found = [unreadable for name, unreadable in source.unreadable.items() if is_wanted(name)]
    if found:
        more = f"; {len(found) - 1} more names cannot be read" if len(found) > 1 else ""
        raise found[0].kind(f"{found[0].reason}{more}")


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
        """All tensors and objects that can be read."""

    @property
    def unreadable(self) -> Mapping[str, Unreadable]:
        """The names that the checkpoint has and that cannot be read. They are not in `entries`."""

    @property
    def unindexed(self) -> tuple[str, ...]:
        """Names that the files hold and the checkpoint's own index does not list. They are not read."""

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

    def __contains__(self, name: str) -> bool:
        """Whether the checkpoint has this name, readable or not."""

    def entry(self, name: str) -> Entry:
        """The entry of this name. Raises MissingTensorError, or what `unreadable` has for the name."""

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

    def gap_limits(self, max_over_read: float | None, costs: RequestCosts | None = None) -> GapLimits:
        """Which gaps are worth reading over, under the user's bound or the default one.

        Args:
            costs: those of another store, to plan for; by default those of this one.
        """
