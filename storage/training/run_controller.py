"""What rank 0 does for a run and its mirror: it decides what to save and to load, and starts copies and removals."""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

from ..errors import ArgumentError, StoreError
from ..runtime.logs import logger_of
from ..runtime.threads import Pool
from .mirror import CopyResult, MirrorCopier
from .policies import SavedStep
from .run_catalog import Ancestors, RunEntry, branch, next_sequence, step_folder
from .run_location import Rewind, RunLocation

logger = logger_of(__name__)


@dataclass(frozen=True, slots=True)
class SaveDecision:
    """What a call of `CheckpointManager.save` does, as rank 0 decided it."""

    entry: RunEntry
    """The checkpoint, once it is complete."""
    is_skipped: bool
    """Whether the checkpoint exists already."""
    overwrite: bool
    """Whether there is something in its folder."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A checkpoint that `CheckpointManager.restore` may load."""

    entry: RunEntry
    """If it has a problem, it is not loaded."""
    uri: str
    on_mirror: bool

    def __str__(self) -> str:
        return f"step {self.entry.step} at {self.uri}"


class RunController:
    """Manages a run and its mirror on rank 0.

    Args:
        root: the checkpoints at the root.
        mirror: the checkpoints at the mirror, if there is one.
        copier: copies checkpoints to the mirror.
    """

    def __init__(self, root: RunLocation, mirror: RunLocation | None, copier: MirrorCopier | None) -> None:
        self.root = root
        self._mirror = mirror
        self._copier = copier
        self._locations = [root] if mirror is None else [root, mirror]
        if mirror is not None:
            root.twin, mirror.twin = mirror, root
        self._is_stale = False
        """Whether a save failed, so that it is unknown whether its checkpoint exists."""
        self._own_steps: set[int] = set()
        """The steps that this manager has saved or restored."""
        self._changed = threading.Condition()
        self._following = 0
        """How many saves run in the background."""
        self._copying: set[tuple[str, int]] = set()
        """Folder and sequence number of the checkpoints that are being copied."""
        self._not_copied: dict[str, str] = {}
        """Folders that could not be copied to the mirror, and why."""
        self._reading: list[Candidate] = []
        self._first_sequence = max(location.first_sequence for location in self._locations)
        """The next save gets at least this number."""
        if self._first_sequence > time.time() * 1000:
            for location in self._locations:
                location.note_sequence(self._first_sequence, at_once=True)
        self._pool = Pool(1, "reshard-manager")

    def begin(self) -> None:
        """Remove what killed saves left, and copy what is not on the mirror yet."""
        for location in self._locations:
            location.remove_unfinished_saves()
        self._copy_missing()

    def branch(self) -> list[RunEntry]:
        """Return the complete checkpoints of the current branch, at the root or the mirror, in the order of steps."""
        return branch(entry for location in self._locations for entry in location.current())

    def saved(self) -> tuple[SavedStep, ...]:
        """Return the checkpoints of the current branch, in the order of steps."""
        return tuple(entry.saved for entry in self.branch())

    def folders(self) -> set[str]:
        """Return the folders of all known checkpoints, complete or not."""
        return {entry.folder for location in self._locations for entry in location.entries()}

    def begin_save(self, step: int, metrics: Mapping[str, float], *, force: bool) -> SaveDecision:
        """Decide whether a step is saved, and under which number.

        If it is saved, its folder is not removed until `end_save`. This waits if it is being removed.

        Raises:
            ArgumentError: the run has a checkpoint of a later step.
        """
        if self._is_stale:
            self.root.refresh()
            self._is_stale = False
        current = self.branch()
        is_saved = any(entry.step == step for entry in current)
        if current and step < current[-1].step and (force or not is_saved):
            raise ArgumentError(
                f"step {step} cannot be saved, because the run at {self.root.uri} has a checkpoint of step "
                f"{current[-1].step}: call restore() before training and continue from the step that it returns, or "
                "use another location"
            )
        if is_saved and not force and step not in self._own_steps:
            logger.warning(
                "step %d was not saved, because the run at %s already has a checkpoint of it, which this manager did "
                "not save: call restore() before training, or use another location",
                step,
                self.root.uri,
            )
        overwrite = any(entry.step == step for entry in self.root.entries())
        now = datetime.datetime.now(datetime.UTC)
        entry = RunEntry(
            SavedStep(step, now, metrics),
            self._next_sequence(),
            step_folder(step),
            parent=max((entry.sequence for entry in current if entry.step < step), default=-1),
            ancestors=Ancestors.after([entry for entry in current if entry.step < step]),
            is_partial=not self.root.is_shared,
        )
        is_skipped = is_saved and not force
        if not is_skipped:
            for location in self._locations:
                location.note_sequence(entry.sequence)
            with ExitStack() as on_failure:  # `protect` may be interrupted while it waits
                for location in self._locations:
                    location.protect([entry.folder])
                    on_failure.callback(location.unprotect, [entry.folder])
                on_failure.pop_all()
        return SaveDecision(entry, is_skipped, overwrite)

    def end_save(self, entry: RunEntry, *, is_committed: bool) -> None:
        """Note that a save has ended. If it succeeded, copy it, and remove the checkpoints that are not kept."""
        if is_committed:
            self._own_steps.add(entry.step)
            self.root.add(entry)
        # Before `add`, a removal could delete the new data in this folder as if it were the old checkpoint.
        for location in self._locations:
            location.unprotect([entry.folder])
        if is_committed:
            self._copy_missing()
            self.root.remove_not_kept()
        else:
            self._is_stale = True

    def follow_save(self, entry: RunEntry, wait: Callable[[], BaseException | None]) -> None:
        """Call `end_save` when a save in the background has ended.

        Args:
            wait: waits for the save, and returns its error.
        """
        with self._changed:
            self._following += 1

        def follow() -> None:
            try:
                self.end_save(entry, is_committed=wait() is None)
            except Exception as error:
                logger.error("after the save of step %d: %s: %s", entry.step, type(error).__name__, error)
            finally:
                with self._changed:
                    self._following -= 1
                    self._changed.notify_all()

        self._pool.submit(follow)

    def wait_for_saves(self) -> None:
        """Wait until `end_save` was called for all saves."""
        with self._changed:
            self._changed.wait_for(lambda: not self._following)

    def wait_for_removals(self) -> None:
        """Wait for saves and removals on this rank, but not for copies, in which other ranks take part."""
        self.wait_for_saves()
        for location in self._locations:
            location.wait()

    def wait(self) -> None:
        """Wait for copies and removals. Raises StoreError if the last checkpoint could not be copied."""
        self.wait_for_saves()
        if self._copier is not None:
            self._copier.wait()
        for location in self._locations:
            location.wait()
        last = branch(self.root.current())[-1:]
        if last and last[0].folder in self._not_copied:
            raise StoreError(
                f"the checkpoint at {self.root.uri_of(last[0].folder)} is complete, but could not be copied to the "
                f"mirror: {self._not_copied[last[0].folder]}"
            )

    def close(self) -> None:
        for location in self._locations:
            location.close()
        self._pool.shutdown(wait=False)

    def begin_restore(self, step: int | None) -> list[Candidate]:
        """List the checkpoints again, and return those that can be loaded, the best first. They are not removed.

        Checkpoints that cannot be loaded are included, with the reason, if they are later than the last one that can be
        loaded. Of one step, the copy at the root comes before the one on the mirror.

        Args:
            step: the only step to return, or None for all steps of the current branch.
        """
        self.wait_for_saves()
        if self._copier is not None and not self.root.is_shared:
            self._copier.wait()  # only the mirror has a complete copy
        for location in self._locations:
            location.check_lease()  # a location that was unmounted looks like a new run
            location.refresh()
        entries = [entry for location in self._locations for entry in location.entries()]
        wanted = {(entry.step, entry.sequence) for entry in branch(entries)}
        if step is not None:
            found_of_step = {found for found in wanted if found[0] == step}
            others = ((step, entry.sequence) for entry in entries if entry.step == step and entry.is_complete)
            wanted = found_of_step or set(sorted(others)[-1:])
        known = [
            Candidate(self._with_problem(entry), location.uri_of(entry.folder), on_mirror=location is self._mirror)
            for location in self._locations
            for entry in location.entries()
            if not entry.is_complete or (entry.step, entry.sequence) in wanted
        ]
        last = max((found.entry.step for found in known if found.entry.is_complete), default=-1)
        candidates = [
            found
            for found in known
            if found.entry.is_complete or (found.entry.step > last and step in (None, found.entry.step))
        ]
        self._reading = sorted(candidates, key=lambda found: (-found.entry.step, found.on_mirror))
        for location in self._locations:
            location.protect(self._folders_read_from(location))
        return self._reading

    def _with_problem(self, entry: RunEntry) -> RunEntry:
        """Return a checkpoint with a problem if no rank sees all of it."""
        if not entry.is_partial or entry.problem:
            return entry
        if self._copier is None:  # the manager that saves may still copy it
            return replace(entry, problem="it has not been copied to the mirror yet", is_committed=False)
        error = StoreError(
            "each rank sees only what it wrote itself, and the mirror has no complete copy. Continue on the machines "
            "that saved it, or remove its folder on all of them"
        )
        return replace(entry, problem=str(error), error=error)

    def end_restore(self) -> None:
        """Allow the removal of the candidates again."""
        for location in self._locations:
            location.unprotect(self._folders_read_from(location))
        self._reading = []

    def rewind(self, to: RunEntry) -> None:
        """Continue from a checkpoint: abandon those that were saved after it."""
        self._own_steps.add(to.step)
        self._first_sequence = self._next_sequence()  # the clock may go back before the next save
        for location in self._locations:
            location.rewind(Rewind(to.step, to.sequence, self._first_sequence))

    def _next_sequence(self) -> int:
        known = next_sequence(entry for location in self._locations for entry in location.entries())
        return max(known, self._first_sequence)

    def _folders_read_from(self, location: RunLocation) -> list[str]:
        return [found.entry.folder for found in self._reading if found.on_mirror == (location is self._mirror)]

    def _copy_missing(self) -> None:
        """Copy the checkpoints that are kept and that the mirror does not have, in the background."""
        if self._mirror is None or self._copier is None:
            return
        try:
            kept = self.root.kept_of_run()
        except Exception as error:
            logger.error("a policy failed, so nothing is copied: %s: %s", type(error).__name__, error)
            return
        copied = {entry.key for entry in self._mirror.entries() if entry.is_complete}
        for entry in kept:
            with self._changed:
                if not entry.is_native or entry.key in copied or entry.key in self._copying:
                    continue
                self._copying.add(entry.key)
            for location in self._locations:
                location.protect([entry.folder])
            overwrite = any(known.folder == entry.folder for known in self._mirror.entries())
            self._copier.submit(
                entry.folder,
                overwrite=overwrite,
                is_needed=partial(self._may_copy, entry),
                ended=partial(self._end_copy, entry),
            )

    def _may_copy(self, entry: RunEntry) -> bool:
        """Return whether a checkpoint is still kept. Raises RunInUseError if another manager has the mirror."""
        assert self._mirror is not None
        self._mirror.check_lease()
        return any(kept.key == entry.key for kept in self.root.kept_of_run())

    def _end_copy(self, entry: RunEntry, result: CopyResult) -> None:
        assert self._mirror is not None
        if result.is_complete:
            self._mirror.add(replace(entry, is_partial=False))
        for location in self._locations:
            location.unprotect([entry.folder])
        with self._changed:
            self._copying.discard(entry.key)
        self._not_copied.pop(entry.folder, None)
        if result.problem:
            self._not_copied[entry.folder] = result.problem
            logger.warning(
                "the checkpoint at %s could not be copied to %s, and is copied again after the next save: %s",
                self.root.uri_of(entry.folder),
                self._mirror.uri,
                result.problem,
            )
        if result.is_complete:
            self._mirror.remove_not_kept()
        self.root.remove_not_kept()


def with_step(saved: Sequence[SavedStep], new: SavedStep) -> tuple[SavedStep, ...]:
    """Return the checkpoints of a branch with a new one, which replaces those of the same and of later steps."""
    return (*(found for found in saved if found.step < new.step), new)
