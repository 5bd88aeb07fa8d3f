"""The checkpoints of a run as rank 0 manages them: what to save, what to load, and what to remove."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...planner.errors import CheckpointError
from ..errors import ArgumentError, CheckpointNotFoundError
from ..formats.native.manifest import MANIFEST_NAME
from ..maintenance.catalog import NOT_COMMITTED, remove
from ..maintenance.gc import gc
from ..runtime.logs import logger_of
from ..runtime.process_group import portable
from ..runtime.threads import Pool
from ..stores.open import open_store
from .lease import Lease
from .policies import Policy, SavedStep, kept_steps
from .run_catalog import RunEntry, branch, find_entries, next_sequence, step_folder

logger = logger_of(__name__)


@dataclass(frozen=True, slots=True)
class SaveDecision:
    """What a call of `CheckpointManager.save` does, as rank 0 decided it."""

    is_skipped: bool
    """Whether the checkpoint exists already."""
    overwrite: bool
    saved: SavedStep
    sequence: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """A checkpoint that `CheckpointManager.restore` may load."""

    step: int
    uri: str
    on_mirror: bool
    reason: str = ""
    """Why it is not loaded. Empty if it can be loaded."""
    is_committed: bool = True
    error: CheckpointError | None = None
    """The error that opening it raised."""

    def __str__(self) -> str:
        return f"step {self.step} at {self.uri}"


class Run:
    """The checkpoints below one location.

    Args:
        root: the location.
        policies: which checkpoints are kept; None keeps all.
        lease: the right to remove checkpoints; None removes nothing.

    Raises:
        StoreError, UnsupportedURIError: the location cannot be listed.
    """

    def __init__(
        self,
        root: str,
        storage_options: Mapping[str, Any] | None,
        policies: Sequence[Policy] | None,
        lease: Lease | None,
    ) -> None:
        self.root = root
        self._storage_options = storage_options
        self._policies = policies
        self._lease = lease
        self._changed = threading.Condition()
        self._entries: list[RunEntry] = []
        self._abandoned: set[tuple[str, int]] = set()
        """Folder and sequence number of the checkpoints that `rewind` abandoned."""
        self._protected: dict[str, int] = {}
        """How many reads and writes are using each folder."""
        self._is_stale = True
        """Whether a save failed, so that it is unknown whether its checkpoint exists."""
        self._removing: str | None = None
        self._removed: list[str] = []
        self._pool = Pool(1, "reshard-retention")
        self._followers = Pool(1, "reshard-manager")
        self._pending = 0
        """How many tasks of the pool have not finished."""
        self._followed = 0
        """How many saves run in the background."""
        self.refresh()

    def refresh(self) -> None:
        """List the checkpoints again."""
        found = find_entries(self.root, self._storage_options)
        with self._changed:
            self._is_stale = False
            self._entries = [entry for entry in found if entry.folder != self._removing]

    def branch(self) -> list[RunEntry]:
        """Return the complete checkpoints of the current branch, in the order of steps."""
        with self._changed:
            return self._branch()

    def _branch(self) -> list[RunEntry]:
        return branch(entry for entry in self._entries if (entry.folder, entry.sequence) not in self._abandoned)

    def saved(self) -> tuple[SavedStep, ...]:
        """Return the checkpoints of the current branch, in the order of steps."""
        return tuple(entry.saved for entry in self.branch())

    def location(self, folder: str) -> str:
        """Return the location of a checkpoint."""
        return f"{self.root.rstrip('/')}/{folder}"

    def rewind(self, step: int) -> None:
        """Continue from a step: abandon the checkpoints of later steps."""
        with self._changed:
            self._abandoned |= {(entry.folder, entry.sequence) for entry in self._entries if entry.step > step}

    def decide(self, step: int, metrics: Mapping[str, float], *, force: bool) -> SaveDecision:
        """Decide whether a step is saved, and under which number.

        Raises:
            ArgumentError: the run has a checkpoint of a later step, and none of this step.
            RunInUseError: another manager saves to this run.
        """
        if self._lease is not None:
            self._lease.check()
        if self._is_stale:
            self.refresh()
        with self._changed:
            current = self._branch()
            is_saved = any(entry.step == step for entry in current)
            if current and step < current[-1].step and (force or not is_saved):
                raise ArgumentError(
                    f"step {step} cannot be saved, because the run at {self.root} has a checkpoint of step "
                    f"{current[-1].step}: call restore() before training and continue from the step that it returns, "
                    "or use another location"
                )
            overwrite = any(entry.step == step for entry in self._entries)
            sequence = next_sequence(self._entries)
        now = datetime.datetime.now(datetime.UTC)
        return SaveDecision(is_saved and not force, overwrite, SavedStep(step, now, metrics), sequence)

    def candidates(self, step: int | None, *, on_mirror: bool = False) -> list[Candidate]:
        """List the checkpoints again, and return those that can be loaded, the latest first.

        Incomplete checkpoints that are later than the last complete one are included, with the reason.

        Args:
            step: the only step to return, or None for all steps of the current branch.
        """
        self.refresh()
        with self._changed:
            self._abandoned.clear()
            complete = self._branch()
            if step is not None:
                complete = [entry for entry in self._entries if entry.step == step and not entry.state][-1:]
            last = complete[-1].step if complete else -1
            others = [entry for entry in self._entries if entry.state and step in (None, entry.step)]
            entries = [*complete, *(entry for entry in others if entry.step > last)]
        entries.sort(key=lambda entry: entry.step, reverse=True)
        return [
            Candidate(
                entry.step,
                self.location(entry.folder),
                on_mirror,
                entry.state,
                entry.state != NOT_COMMITTED,
                entry.error and portable(entry.error),
            )
            for entry in entries
        ]

    @contextmanager
    def protecting(self, folders: Iterable[str]) -> Iterator[None]:
        """Keep checkpoints from being removed while the block runs. Waits for one that is being removed."""
        folders = list(folders)
        self.protect(folders)
        try:
            yield
        finally:
            self.unprotect(folders)

    def protect(self, folders: Iterable[str]) -> None:
        with self._changed:
            for folder in folders:
                self._changed.wait_for(lambda folder=folder: self._removing != folder)  # type: ignore[misc]
                self._protected[folder] = self._protected.get(folder, 0) + 1

    def unprotect(self, folders: Iterable[str]) -> None:
        with self._changed:
            for folder in folders:
                self._protected[folder] -= 1
                if not self._protected[folder]:
                    del self._protected[folder]

    def all_folders(self) -> list[str]:
        """Return the folders of all known checkpoints."""
        with self._changed:
            return [entry.folder for entry in self._entries]

    def begin_save(self, decision: SaveDecision) -> None:
        """Keep the folder of a step from being removed until `end_save`."""
        self.protect([step_folder(decision.saved.step)])

    def end_save(self, decision: SaveDecision, *, is_committed: bool) -> None:
        """Note that a save has ended. If it succeeded, remove the checkpoints that are no longer kept."""
        folder = step_folder(decision.saved.step)
        self.unprotect([folder])
        if not is_committed:
            self._is_stale = True
            return
        with self._changed:
            self._entries = [entry for entry in self._entries if entry.folder != folder]
            self._entries.append(RunEntry(decision.saved, decision.sequence, folder))
        self.remove_others()

    def follow_save(self, decision: SaveDecision, wait: Callable[[], BaseException | None]) -> None:
        """Call `end_save` when a save in the background has ended.

        Args:
            wait: waits for the save, and returns its error.
        """
        with self._changed:
            self._followed += 1

        def follow() -> None:
            try:
                self.end_save(decision, is_committed=wait() is None)
            finally:
                with self._changed:
                    self._followed -= 1
                    self._changed.notify_all()

        self._followers.submit(follow)

    def wait_for_saves(self) -> None:
        """Wait until `end_save` was called for all saves."""
        with self._changed:
            self._changed.wait_for(lambda: not self._followed)

    def remove_others(self) -> None:
        """Remove the checkpoints that no policy keeps, in the background."""
        if self._policies is not None and self._lease is not None:
            self._submit(self._remove_others)

    def remove_remains(self) -> None:
        """Remove the data that killed saves left, when it is a day old, in the background."""
        if self._lease is not None:
            self._submit(self._remove_remains)

    def take_removed(self) -> list[str]:
        """Return the folders that were removed since the last call."""
        with self._changed:
            removed, self._removed = self._removed, []
        return removed

    def wait(self) -> None:
        """Wait until all removals have finished."""
        with self._changed:
            self._changed.wait_for(lambda: not self._pending)

    def close(self) -> None:
        self._pool.shutdown(wait=False)
        self._followers.shutdown(wait=False)

    def _submit(self, task: Any) -> None:
        def run() -> None:
            try:
                task()
            except Exception as error:
                logger.error("checkpoints of %s could not be removed: %s: %s", self.root, type(error).__name__, error)
            finally:
                with self._changed:
                    self._pending -= 1
                    self._changed.notify_all()

        with self._changed:
            self._pending += 1
        self._pool.submit(run)

    def _not_kept(self) -> list[RunEntry]:
        """Return the checkpoints to remove. Only complete ones in reshard's format are removed."""
        assert self._policies is not None
        current = self.branch()
        kept = kept_steps(self._policies, [entry.saved for entry in current])
        keeping = [entry for entry in current if entry.step in kept]
        if not keeping:
            return []
        # Other processes may remove checkpoints, too.
        open_store(self.location(keeping[-1].folder), self._storage_options).size(MANIFEST_NAME)
        with self._changed:
            return [entry for entry in self._entries if entry.is_native and not entry.state and entry not in keeping]

    def _remove_others(self) -> None:
        for entry in self._not_kept():
            with self._changed:
                if entry.folder in self._protected or entry not in self._entries:
                    continue
                self._removing = entry.folder
            try:
                self._remove(entry)
            finally:
                with self._changed:
                    self._removing = None
                    self._changed.notify_all()

    def _remove(self, entry: RunEntry) -> None:
        assert self._lease is not None
        self._lease.check()
        location = self.location(entry.folder)
        try:
            remove(location, self._storage_options)
        except CheckpointNotFoundError:
            pass  # another process removed it
        except CheckpointError as error:
            logger.warning("the checkpoint at %s could not be removed: %s", location, error)
            return
        logger.info("removed the checkpoint at %s", location)
        with self._changed:
            self._entries.remove(entry)
            self._abandoned.discard((entry.folder, entry.sequence))
            self._removed.append(entry.folder)

    def _remove_remains(self) -> None:
        assert self._lease is not None
        self._lease.check()
        for folder in self.all_folders():
            location = self.location(folder)
            with self.protecting([folder]):
                try:
                    for remains in gc(location, self._storage_options):
                        logger.info("removed %d objects of a killed save at %s", len(remains.names), location)
                except CheckpointError as error:
                    logger.warning("the data of a killed save at %s remains: %s", location, error)


def with_step(saved: Sequence[SavedStep], new: SavedStep) -> tuple[SavedStep, ...]:
    """Return the checkpoints of a branch with a new one, which replaces those of the same and of later steps."""
    return (*(found for found in saved if found.step < new.step), new)
