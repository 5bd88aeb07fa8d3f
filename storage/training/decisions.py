"""What rank 0 decides for a run and its mirror: what to save, what to load, and what to copy."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from ...planner.errors import CheckpointError
from ..errors import ArgumentError, StoreError
from ..maintenance.catalog import NOT_COMMITTED
from ..runtime.logs import logger_of
from ..runtime.process_group import portable
from ..runtime.threads import Pool
from .mirror import Mirror
from .policies import SavedStep
from .run import Rewind, Run
from .run_catalog import RunEntry, branch, next_sequence, step_folder

logger = logger_of(__name__)


@dataclass(frozen=True, slots=True)
class SaveDecision:
    """What a call of `CheckpointManager.save` does, as rank 0 decided it."""

    is_skipped: bool
    """Whether the checkpoint exists already."""
    overwrite: bool
    saved: SavedStep
    sequence: int
    parent: int
    """The sequence number of the checkpoint before it; -1 if it is the first."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A checkpoint that `CheckpointManager.restore` may load."""

    step: int
    uri: str
    on_mirror: bool = False
    sequence: int = -1
    reason: str = ""
    """Why it is not loaded. Empty if it can be loaded."""
    is_committed: bool = True
    error: CheckpointError | None = field(default=None, compare=False)
    """The error that opening it raised."""

    def __str__(self) -> str:
        return f"step {self.step} at {self.uri}"

    @property
    def folder(self) -> str:
        return self.uri.rpartition("/")[2]


class Decisions:
    """The decisions of rank 0.

    Args:
        run: the checkpoints at the root.
        mirror: the checkpoints at the mirror, if there is one.
        copies: copies checkpoints to the mirror.
    """

    def __init__(self, run: Run, mirror: Run | None, copies: Mirror | None) -> None:
        self.run = run
        self._mirror = mirror
        self._copies = copies
        self._runs = [run] if mirror is None else [run, mirror]
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
        self._pool = Pool(1, "reshard-manager")

    def begin(self) -> None:
        """Remove what killed saves left, and copy what is not on the mirror yet."""
        for run in self._runs:
            run.remove_remains()
        self._copy_missing()

    def branch(self) -> list[RunEntry]:
        """Return the complete checkpoints of the current branch, at the root or the mirror, in the order of steps."""
        return branch(entry for run in self._runs for entry in run.current())

    def saved(self) -> tuple[SavedStep, ...]:
        """Return the checkpoints of the current branch, in the order of steps."""
        return tuple(entry.saved for entry in self.branch())

    def decide(self, step: int, metrics: Mapping[str, float], *, force: bool) -> SaveDecision:
        """Decide whether a step is saved, and under which number.

        Raises:
            ArgumentError: the run has a checkpoint of a later step.
        """
        if self._is_stale:
            self.run.refresh()
            self._is_stale = False
        current = self.branch()
        is_saved = any(entry.step == step for entry in current)
        if current and step < current[-1].step and (force or not is_saved):
            raise ArgumentError(
                f"step {step} cannot be saved, because the run at {self.run.root} has a checkpoint of step "
                f"{current[-1].step}: call restore() before training and continue from the step that it returns, or "
                "use another location"
            )
        if is_saved and not force and step not in self._own_steps:
            logger.warning(
                "step %d was not saved, because the run at %s already has a checkpoint of it, which this manager did "
                "not save: call restore() before training, or use another location",
                step,
                self.run.root,
            )
        overwrite = any(entry.step == step for entry in self.run.entries())
        now = datetime.datetime.now(datetime.UTC)
        parent = max((entry.sequence for entry in current if entry.step < step), default=-1)
        return SaveDecision(
            is_saved and not force, overwrite, SavedStep(step, now, metrics), self._next_sequence(), parent
        )

    def begin_save(self, decision: SaveDecision) -> None:
        """Keep the folder of a step from being removed until `end_save`."""
        for run in self._runs:
            run.protect([step_folder(decision.saved.step)])

    def end_save(self, decision: SaveDecision, *, is_committed: bool) -> None:
        """Note that a save has ended. If it succeeded, copy it, and remove the checkpoints that are not kept."""
        folder = step_folder(decision.saved.step)
        if is_committed:
            self._own_steps.add(decision.saved.step)
            is_partial = not self.run.is_shared
            self.run.add(
                RunEntry(decision.saved, decision.sequence, folder, parent=decision.parent, is_partial=is_partial)
            )
        for run in self._runs:  # after `add`: until then, a removal takes the folder for the checkpoint before
            run.unprotect([folder])
        if is_committed:
            self._copy_missing()
            self.run.remove_others()
        else:
            self._is_stale = True

    def follow_save(self, decision: SaveDecision, wait: Callable[[], BaseException | None]) -> None:
        """Call `end_save` when a save in the background has ended.

        Args:
            wait: waits for the save, and returns its error.
        """
        with self._changed:
            self._following += 1

        def follow() -> None:
            try:
                self.end_save(decision, is_committed=wait() is None)
            except Exception as error:
                logger.error("after the save of step %d: %s: %s", decision.saved.step, type(error).__name__, error)
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
        for run in self._runs:
            run.wait()

    def wait(self) -> None:
        """Wait for copies and removals. Raises StoreError if the last checkpoint could not be copied."""
        self.wait_for_saves()
        if self._copies is not None:
            self._copies.wait()
        for run in self._runs:
            run.wait()
        last = branch(self.run.current())[-1:]
        if last and last[0].folder in self._not_copied:
            raise StoreError(
                f"the checkpoint at {self.run.location(last[0].folder)} is complete, but could not be copied to the "
                f"mirror: {self._not_copied[last[0].folder]}"
            )

    def close(self) -> None:
        for run in self._runs:
            run.close()
        self._pool.shutdown(wait=False)

    def begin_restore(self, step: int | None) -> list[Candidate]:
        """List the checkpoints again, and return those that can be loaded, the best first. They are not removed.

        Incomplete checkpoints that are later than the last complete one are included, with the reason. Of one step, the
        copy at the root comes before the one on the mirror.

        Args:
            step: the only step to return, or None for all steps of the current branch.
        """
        self.wait_for_saves()
        if self._copies is not None and not self.run.is_shared:
            self._copies.wait()  # only the mirror has a complete copy
        for run in self._runs:
            run.refresh()
        entries = [entry for run in self._runs for entry in run.entries()]
        wanted = {(entry.step, entry.sequence) for entry in branch(entries)}
        if step is not None:
            found_of_step = {found for found in wanted if found[0] == step}
            others = ((step, entry.sequence) for entry in entries if entry.step == step and not entry.state)
            wanted = found_of_step or set(sorted(others)[-1:])
        last = max((found for found, _ in wanted), default=-1)
        candidates = []
        for run in self._runs:
            for entry in run.entries():
                is_complete = not entry.state and (entry.step, entry.sequence) in wanted and not entry.is_partial
                is_broken = entry.state and entry.step > last and step in (None, entry.step)
                if is_complete or is_broken:
                    candidates.append(_candidate(run, entry, on_mirror=run is self._mirror))
        self._reading = sorted(candidates, key=lambda found: (-found.step, found.on_mirror))
        for run in self._runs:
            run.protect(self._folders_read_from(run))
        return self._reading

    def end_restore(self) -> None:
        """Allow the removal of the candidates again."""
        for run in self._runs:
            run.unprotect(self._folders_read_from(run))
        self._reading = []

    def rewind(self, to: Candidate) -> None:
        """Continue from a checkpoint: abandon those from which training did not come to it."""
        self._own_steps.add(to.step)
        for run in self._runs:
            run.rewind(Rewind(to.step, to.sequence, self._next_sequence()))

    def _next_sequence(self) -> int:
        return next_sequence(entry for run in self._runs for entry in run.entries())

    def _folders_read_from(self, run: Run) -> list[str]:
        return [found.folder for found in self._reading if found.on_mirror == (run is self._mirror)]

    def _copy_missing(self) -> None:
        """Copy the checkpoints that are kept and that the mirror does not have, in the background."""
        if self._mirror is None or self._copies is None:
            return
        try:
            kept = self.run.kept()
        except Exception as error:
            logger.error("a policy failed, so nothing is copied: %s: %s", type(error).__name__, error)
            return
        copied = {entry.key for entry in self._mirror.entries() if not entry.state}
        for entry in kept:
            with self._changed:
                if not entry.is_native or entry.key in copied or entry.key in self._copying:
                    continue
                self._copying.add(entry.key)
            for run in self._runs:
                run.protect([entry.folder])
            overwrite = any(known.folder == entry.folder for known in self._mirror.entries())
            self._copies.submit(
                entry.folder,
                overwrite=overwrite,
                is_needed=partial(self._is_kept, entry),
                ended=partial(self._end_copy, entry),
            )

    def _is_kept(self, entry: RunEntry) -> bool:
        return any(kept.key == entry.key for kept in self.run.kept())

    def _end_copy(self, entry: RunEntry, error: str | None) -> None:
        assert self._mirror is not None
        if error == "":
            self._mirror.add(replace(entry, is_partial=False))
        for run in self._runs:
            run.unprotect([entry.folder])
        with self._changed:
            self._copying.discard(entry.key)
        self._not_copied.pop(entry.folder, None)
        if error:
            self._not_copied[entry.folder] = error
            logger.warning(
                "the checkpoint at %s could not be copied to %s, and is copied again after the next save: %s",
                self.run.location(entry.folder),
                self._mirror.root,
                error,
            )
        elif error is not None:
            self._mirror.remove_others()
        self.run.remove_others()


def _candidate(run: Run, entry: RunEntry, *, on_mirror: bool) -> Candidate:
    return Candidate(
        entry.step,
        run.location(entry.folder),
        on_mirror,
        entry.sequence,
        entry.state,
        entry.state != NOT_COMMITTED,
        None if entry.error is None else portable(entry.error),
    )


def with_step(saved: Sequence[SavedStep], new: SavedStep) -> tuple[SavedStep, ...]:
    """Return the checkpoints of a branch with a new one, which replaces those of the same and of later steps."""
    return (*(found for found in saved if found.step < new.step), new)
