"""The checkpoints of one run: where each step is stored, and which of them belong to the current branch of training.

A run that continues from an earlier step leaves checkpoints of later steps behind. They belong to an abandoned branch.
Each checkpoint stores its own sequence number, that of the checkpoint before it, and those of its ancestors. So the
checkpoints alone show which of them are abandoned: those that are not ancestors of the last save.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ...planner.errors import CheckpointError
from ..errors import ArgumentError, StoreError
from ..maintenance.catalog import NOT_COMMITTED, FoundCheckpoint, find_checkpoints
from ..runtime.process_group import portable
from ..stores.local import LocalStore
from ..stores.open import open_store
from ..stores.uris import folder_below, join_location
from .policies import SavedStep

MANAGED = "manager"
"""The key of the metadata of a checkpoint under which the manager keeps its own."""
METRICS = "metrics"
"""The key of the metadata of a checkpoint under which the metrics are."""
STEP_FOLDER = re.compile(r"step-([0-9]{1,64})")


MAX_ANCESTORS = 2048
"""How many ancestors a checkpoint lists: about 30 KB. If there are more, those that have been removed are left out."""


@dataclass(frozen=True, slots=True)
class Ancestors:
    """The checkpoints that training came through before a save."""

    numbers: tuple[int, ...] = ()
    """The sequence numbers of the last ones, ascending. They may have been removed since."""
    since: int = 0
    """Of the numbers from this one on, only those in `numbers` are ancestors."""

    def may_include(self, sequence: int) -> bool:
        """Return whether the checkpoint with this number is an ancestor, or may be one because it is too old."""
        return sequence < self.since or sequence in self.numbers

    @classmethod
    def after(cls, current: Sequence[RunEntry]) -> Ancestors:
        """Return the ancestors of the next save.

        Args:
            current: the checkpoints of the branch, in the order of steps.
        """
        numbered = [entry for entry in current if entry.sequence >= 0]
        if not numbered:
            return cls()
        last = numbered[-1]
        if last.ancestors is None:  # an older version saved it
            return cls((last.sequence,), last.sequence)
        known = {entry.sequence for entry in numbered if entry.sequence >= last.ancestors.since}
        numbers = sorted({*last.ancestors.numbers, *known})
        if len(numbers) > MAX_ANCESTORS:
            numbers = sorted(known)
        if len(numbers) <= MAX_ANCESTORS:
            return cls(tuple(numbers), last.ancestors.since)
        return cls(tuple(numbers[-MAX_ANCESTORS:]), numbers[-MAX_ANCESTORS])


@dataclass(frozen=True, slots=True)
class RunEntry:
    """A checkpoint of a run."""

    saved: SavedStep
    sequence: int
    """Increases with each save of the run; -1 if another tool saved it. See `next_sequence`."""
    folder: str
    """The folder below the root of the run."""
    problem: str = ""
    """What is wrong with the checkpoint. Empty if it is complete."""
    is_committed: bool = True
    """Whether its save finished. If not, `problem` says so."""
    is_native: bool = True
    """Whether it has reshard's format. Others can be loaded, but are never removed."""
    error: CheckpointError | None = field(default=None, compare=False)
    """Why it cannot be opened. It can be sent to other ranks."""
    parent: int | None = None
    """The sequence number of the checkpoint before it; -1 if it is the first, or None if this is not known."""
    ancestors: Ancestors | None = None
    """None if this is not known."""
    is_partial: bool = False
    """Whether some of its objects are on the disks of other machines, which only their ranks see."""

    @property
    def step(self) -> int:
        return self.saved.step

    @property
    def is_complete(self) -> bool:
        return not self.problem

    @property
    def key(self) -> tuple[str, int]:
        """Identifies the save. Two listings of it may differ, for example in metrics that are NaN."""
        return self.folder, self.sequence


def step_folder(step: int) -> str:
    """Return the folder of a step, below the root of a run."""
    return f"step-{step:08}"


def find_entries(
    root: str, storage_options: Mapping[str, Any] | None = None, *, is_shared: bool = True
) -> list[RunEntry]:
    """Return the checkpoints at `root`/step-…, complete or not, in no particular order.

    Args:
        is_shared: whether this rank sees the objects of all ranks. If not, missing objects are normal.

    Raises:
        StoreError, UnsupportedURIError: the location cannot be listed.
    """
    entries = []
    for found in find_checkpoints(root, storage_options):
        folder = folder_below(root, found.uri)
        step = STEP_FOLDER.fullmatch(folder)
        if step:
            entry = _entry(found, folder, int(step[1]))
            has_manifest = entry.is_native and entry.error is None and entry.is_committed
            entries.append(entry if is_shared or not has_manifest else replace(entry, problem="", is_partial=True))
    return [*entries, *_unreadable_entries(root, storage_options)]


def _unreadable_entries(root: str, storage_options: Mapping[str, Any] | None) -> list[RunEntry]:
    """Return the checkpoints on a disk whose folders this process may not list. `find_checkpoints` leaves them out."""
    store = open_store(root, storage_options)
    entries = []
    if isinstance(store, LocalStore):
        with contextlib.suppress(OSError):  # then `find_checkpoints` has raised an error
            for folder in filter(STEP_FOLDER.fullmatch, os.listdir(store.location)):
                try:
                    next(iter(open_store(join_location(root, folder), storage_options).list()), None)
                except StoreError as error:
                    step = int(folder.partition("-")[2])
                    saved = SavedStep(step, datetime.datetime.fromtimestamp(0, datetime.UTC), {})
                    entries.append(RunEntry(saved, -1, folder, problem=str(error), error=portable(error)))
    return entries


def _entry(found: FoundCheckpoint, folder: str, step: int) -> RunEntry:
    managed = found.metadata.get(MANAGED)
    managed = managed if isinstance(managed, Mapping) else {}
    sequence, parent = (number if type(number := managed.get(key)) is int else None for key in ("sequence", "parent"))
    created = found.created or datetime.datetime.fromtimestamp(0, datetime.UTC)
    with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):
        created = datetime.datetime.fromisoformat(managed["time"]).astimezone(datetime.UTC)
    saved = SavedStep(step, created, stored_metrics(found.metadata.get(METRICS)))
    return RunEntry(
        saved,
        -1 if sequence is None else sequence,
        folder,
        problem="" if found.is_complete else found.state,
        is_committed=found.state != NOT_COMMITTED,
        is_native=found.format == "reshard",
        error=None if found.error is None else portable(found.error),
        parent=parent,
        ancestors=_ancestors(managed.get("ancestors")),
    )


def _ancestors(stored: object) -> Ancestors | None:
    """Return the ancestors that the metadata of a checkpoint has. None if they cannot be understood."""
    if not isinstance(stored, list) or not stored or any(type(number) is not int for number in stored):
        return None
    return Ancestors(tuple(stored[1:]), stored[0])


def metadata_of(entry: RunEntry, metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the metadata of a checkpoint: the user's, the metrics, and what `find_entries` needs.

    Raises:
        ArgumentError: the user's metadata has a key that the manager uses.
    """
    for key in (METRICS, MANAGED):
        if metadata and key in metadata:
            raise ArgumentError(f"metadata has the key {key!r}, which the CheckpointManager uses: use another key")
    managed: dict[str, Any] = {"sequence": entry.sequence, "parent": entry.parent}
    managed["time"] = entry.saved.time.isoformat()
    if entry.ancestors is not None:
        managed["ancestors"] = [entry.ancestors.since, *entry.ancestors.numbers]
    metrics = {METRICS: dict(entry.saved.metrics)} if entry.saved.metrics else {}
    return {**(metadata or {}), **metrics, MANAGED: managed}


def branch(entries: Iterable[RunEntry]) -> list[RunEntry]:
    """Return the complete checkpoints that are not abandoned, in the order of steps.

    The last save is on the branch, and so are its ancestors. An incomplete checkpoint, too, shows that training went
    back to an earlier step.
    """
    found: list[RunEntry] = []
    last = before = math.inf
    ancestors: Ancestors | None = None
    known = [entry for entry in entries if entry.is_complete or entry.sequence >= 0]
    for entry in sorted(known, key=lambda e: (e.sequence, e.step, e.is_complete, e.is_native), reverse=True):
        is_ancestor = ancestors is None or ancestors.may_include(entry.sequence)
        if entry.step < last and entry.sequence <= before and is_ancestor:
            last = entry.step
            before = before if entry.parent is None else entry.parent
            if ancestors is None or entry.sequence < ancestors.since:
                ancestors = entry.ancestors or ancestors
            if entry.is_complete:
                found.append(entry)
    return found[::-1]


def next_sequence(entries: Iterable[RunEntry]) -> int:
    """Return the sequence number of the next save: the time in milliseconds, or one more than the last number if that
    is larger.

    Two machines that continue from one checkpoint, without knowing each other, then use different numbers.
    """
    return max(int(time.time() * 1000), 1 + max((entry.sequence for entry in entries), default=-1))


def stored_metrics(stored: object) -> dict[str, float]:
    """Return the metrics in the metadata of a checkpoint. Other values in it are ignored."""
    if not isinstance(stored, Mapping):
        return {}
    metrics = {}
    for name, value in stored.items():
        if isinstance(name, str) and isinstance(value, (int, float)) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):  # an integer that no float holds
                metrics[name] = float(value)
    return metrics


def check_metrics(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    """Return metrics as numbers. Raises ArgumentError for a value that is not a number."""
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise ArgumentError(f'metrics must be a dict such as {{"loss": 0.5}}, got {metrics!r}')
    checked = {}
    for name, value in metrics.items():
        if not isinstance(name, str):
            raise ArgumentError(f"the names of metrics must be strings, got {name!r}")
        try:
            if isinstance(value, (str, bytes)):
                raise TypeError("a text")
            checked[name] = float(value.detach() if isinstance(value, torch.Tensor) else value)
        except Exception as error:
            raise ArgumentError(
                f"the metric {name!r} must be a number or a tensor with one element, got {value!r}: {error}"
            ) from error
    return checked
