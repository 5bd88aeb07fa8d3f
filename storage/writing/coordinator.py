"""What rank 0 does for a save: it plans what each rank writes, and commits the checkpoint."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ArgumentError
from ..runtime.gc_pauses import gc_disabled
from .agreement import check_same_metadata
from .checkpoint_writer import CheckpointWriter, Written
from .save_plan import GlobalPlan, HeldShards, plan_save


@dataclass(frozen=True, slots=True)
class UnchangedSinceLastPlan:
    """The names, shapes and shards of this rank have not changed since the ranks last agreed on a plan."""

    number: int
    """The number of that plan."""
    digests: bytes
    """As in `HeldShards`, now."""


@dataclass(frozen=True, slots=True)
class RankContents:
    """What one rank passes to a save. Rank 0 compares the ranks, and assigns the replicas."""

    location: str | None
    """None for a Store."""
    codec: str
    metadata: str
    """In JSON with sorted keys."""
    held: HeldShards | UnchangedSinceLastPlan


@dataclass(frozen=True, slots=True)
class Assignment:
    """What rank 0 sends to each rank: what the rank writes."""

    number: int
    """The number of the plan."""
    mask: bytes | None
    """One bit for each shard that the rank holds: whether it writes the shard. None if the plan is the one that all
    ranks have under this number."""
    largest_sizes: bytes = b""
    """As in `GlobalPlan`, for this rank. Empty if `mask` is None."""


@dataclass(frozen=True, slots=True, eq=False)
class ReusablePlan:
    """The plan of a save, as one rank keeps it for the next one. It refers to no tensors."""

    number: int
    """Identifies the plan. Rank 0 chooses it."""
    held: HeldShards
    """What this rank held."""
    assigned: Assignment
    """What this rank wrote."""
    plan: GlobalPlan | None
    """Only on rank 0."""


class SaveCoordinator:
    """Plans and commits a save, on rank 0.

    Args:
        writer: the writer of rank 0.
        last_plan: the plan of the last save of the same ranks, if there is one.
    """

    _numbers = itertools.count()

    def __init__(self, writer: CheckpointWriter, last_plan: ReusablePlan | None) -> None:
        self._writer = writer
        self._last_plan = last_plan
        self._differing: tuple[str, ...] = ()
        self.plan: GlobalPlan | None = None
        """What all ranks write. Known after `assign`; None on other ranks."""

    def assign(self, contents: Sequence[RankContents]) -> list[Assignment | None]:
        """Compare what the ranks hold, and assign each replica to one of them.

        Returns:
            What each rank writes. None for all if the last plan cannot be used again, so that all ranks must describe
            what they hold.

        Raises:
            ArgumentError: the ranks disagree.
            CheckpointExistsError: there is a checkpoint that must not be replaced.
        """
        for what, passed in (
            ("locations", {one.location for one in contents} - {None}),
            ("codecs", {one.codec for one in contents}),
        ):
            if len(passed) > 1:
                raise ArgumentError(
                    f"the ranks of one save passed different {what}: {', '.join(sorted(map(str, passed)))}"
                )
        check_same_metadata([one.metadata for one in contents])
        unchanged = [one.held for one in contents if isinstance(one.held, UnchangedSinceLastPlan)]
        if unchanged and not (len(unchanged) == len(contents) and len({one.number for one in unchanged}) == 1):
            return [None] * len(contents)
        self._writer.check_may_save()
        if unchanged:
            assert self._last_plan is not None
            self.plan = self._last_plan.plan
            number = self._last_plan.number
        else:
            held = [one.held for one in contents if isinstance(one.held, HeldShards)]
            with gc_disabled():
                self.plan = plan_save(held)
            number = next(self._numbers)
        assert self.plan is not None
        self._differing = tuple(self.plan.differing([one.held.digests for one in contents]))
        if unchanged:
            return [Assignment(number, None)] * len(contents)
        assigned = zip(self.plan.masks, self.plan.largest_sizes, strict=True)
        return [Assignment(number, mask, largest) for mask, largest in assigned]

    def commit(self, by_rank: Sequence[Written]) -> list[dict[str, Any]]:
        """Write the manifest, and return the reports of all ranks as plain data.

        Args:
            by_rank: what each rank wrote.

        Raises what `CheckpointWriter.commit` raises.
        """
        assert self.plan is not None
        entries = self.plan.entries
        paths = {name: entry.path for name, entry in entries.items()}
        tensors = {name: (entry.dtype, entry.shape) for name, entry in entries.items() if entry.dtype}
        return self._writer.commit(paths, tensors, by_rank, differing=self._differing)
