"""What the ranks exchange in the calls of a `CheckpointManager`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ArgumentError
from .policies import SavedStep
from .run_controller import Candidate, RunController, SaveDecision


@dataclass(frozen=True, slots=True)
class News:
    """What rank 0 sends to all ranks from time to time."""

    saved: tuple[SavedStep, ...]
    """The checkpoints of the run."""
    removed: tuple[str, ...]
    """The folders that were removed since the last news."""

    @classmethod
    def of(cls, controller: RunController) -> News:
        return cls(controller.saved(), controller.root.removed())


@dataclass(frozen=True, slots=True)
class SaveOrder:
    """What rank 0 sends to all ranks before a save."""

    decision: SaveDecision
    metadata: dict[str, Any]
    news: News


@dataclass(frozen=True, slots=True)
class SaveCall:
    """What one rank passed to `save`."""

    step: int
    force: bool
    has_entries: bool
    """Whether its state dict has entries."""
    order: SaveOrder | None = None
    """Only from rank 0."""


@dataclass(frozen=True, slots=True)
class RestoreCall:
    """What one rank passed to `restore`."""

    step: int | None
    has_entries: bool
    """Whether its state dict has entries."""
    candidates: list[Candidate]
    """Only from rank 0."""


def _check_same(what: str, passed: Sequence[object]) -> None:
    """Raise ArgumentError if the ranks passed different arguments."""
    if len(set(passed)) > 1:
        arguments = ", ".join(f"rank {rank}: {of_rank}" for rank, of_rank in enumerate(passed[:8]))
        raise ArgumentError(f"the ranks passed different {what}: {arguments}")


def checked_order(calls: Sequence[SaveCall]) -> SaveOrder:
    """Return the order of rank 0 for the calls of all ranks.

    Raises:
        ArgumentError: the ranks passed different arguments, or nothing to save.
    """
    _check_same("steps or force to save()", [(call.step, call.force) for call in calls])
    if not any(call.has_entries for call in calls):
        raise ArgumentError(
            "the state dict is empty on every rank: saving nothing could replace the last useful checkpoint of the run"
        )
    order = calls[0].order
    assert order is not None
    return order


def checked_candidates(calls: Sequence[RestoreCall]) -> list[Candidate]:
    """Return the checkpoints that rank 0 has found for the calls of all ranks.

    Raises:
        ArgumentError: the ranks passed different steps, or nothing to restore.
    """
    _check_same("steps to restore()", [call.step for call in calls])
    if not any(call.has_entries for call in calls):
        raise ArgumentError(
            "the state dict is empty on every rank, so restore() would load nothing: pass the state dict that save() "
            "gets. latest_step() returns the latest step without loading it"
        )
    return calls[0].candidates
