"""The checkpoints at the root of a run or at its mirror, as rank 0 manages them.

Checkpoints that no policy keeps are removed in the background (retention), and so is the data of killed saves.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...planner.errors import CheckpointError
from ..errors import CheckpointNotFoundError
from ..formats.native.manifest import MANIFEST_NAME
from ..maintenance.catalog import remove
from ..maintenance.gc import gc
from ..runtime.logs import logger_of
from ..runtime.threads import Pool
from ..stores.open import open_store
from ..stores.uris import join_location
from .lease import Lease
from .policies import CheckedPolicy, kept_steps
from .run_catalog import RunEntry, branch, find_entries

logger = logger_of(__name__)


@dataclass(frozen=True, slots=True)
class Rewind:
    """Training continues from an earlier checkpoint. Later ones are abandoned, until they are restored themselves."""

    step: int
    """The step from which it continues."""
    sequence: int
    """The sequence number of its checkpoint; -1 if it has none."""
    next_sequence: int
    """The sequence number of the next save."""

    def abandons(self, entry: RunEntry) -> bool:
        """Return whether this checkpoint is later than the one from which training continues."""
        is_later = entry.step > self.step or 0 <= self.sequence < entry.sequence
        return is_later and entry.sequence < self.next_sequence


class RunLocation:
    """The checkpoints of a run at one location.

    Args:
        uri: the location.
        storage_options: its options for fsspec.
        policies: which checkpoints are kept; None keeps all.
        lease: the right to remove checkpoints; None removes nothing.
        is_shared: whether this rank sees the objects of all ranks.

    Raises:
        StoreError, UnsupportedURIError: the location cannot be listed.
    """

    def __init__(
        self,
        uri: str,
        storage_options: Mapping[str, Any] | None,
        policies: Sequence[CheckedPolicy] | None,
        lease: Lease | None,
        *,
        is_shared: bool = True,
    ) -> None:
        self.uri = uri
        self.twin: RunLocation | None = None
        """The other location of the run."""
        self.is_shared = is_shared
        self.storage_options = storage_options
        self._policies = policies
        self._lease = lease
        self._changed = threading.Condition()
        self._entries: list[RunEntry] = []
        self._rewind: Rewind | None = None
        self._protected: dict[str, int] = {}
        """How many reads and writes are using each folder."""
        self._removing: str | None = None
        self._changes = 0
        """How many checkpoints were added, and how many removals have ended."""
        self._removed: list[str] = []
        self._pool = Pool(1, "reshard-retention")
        self._pending = 0
        """How many tasks of the pool have not finished."""
        self.refresh()

    def refresh(self) -> None:
        """List the checkpoints again."""
        while True:
            changes = self._changes
            found = find_entries(self.uri, self.storage_options, is_shared=self.is_shared)
            with self._changed:
                if self._changes == changes:  # otherwise the list may be older than the change
                    removing = [entry for entry in self._entries if entry.folder == self._removing]
                    self._entries = [*removing, *(entry for entry in found if entry.folder != self._removing)]
                    return

    def entries(self) -> list[RunEntry]:
        """Return all known checkpoints, complete or not."""
        with self._changed:
            return list(self._entries)

    def current(self) -> list[RunEntry]:
        """Return the known checkpoints that were not abandoned by `rewind`."""
        with self._changed:
            return [entry for entry in self._entries if not self._is_abandoned(entry)]

    def uri_of(self, folder: str) -> str:
        """Return the location of a checkpoint."""
        return join_location(self.uri, folder)

    def rewind(self, to: Rewind) -> None:
        """Abandon checkpoints. They are kept until a later save is complete."""
        with self._changed:
            self._rewind = to

    def _is_abandoned(self, entry: RunEntry) -> bool:
        return self._rewind is not None and self._rewind.abandons(entry)

    def add(self, entry: RunEntry) -> None:
        """Note that a checkpoint was committed. It replaces another one in its folder."""
        with self._changed:
            self._entries = [known for known in self._entries if known.folder != entry.folder]
            self._entries.append(entry)
            self._changes += 1

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
        """Keep checkpoints from being removed until `unprotect`. Waits for one that is being removed."""
        with self._changed:
            for folder in folders:
                self._changed.wait_for(lambda folder=folder: self._removing != folder)  # type: ignore[misc]
                self._protected[folder] = self._protected.get(folder, 0) + 1

    def unprotect(self, folders: Iterable[str]) -> None:
        """Undo `protect`."""
        with self._changed:
            for folder in folders:
                self._protected[folder] -= 1
                if not self._protected[folder]:
                    del self._protected[folder]

    def kept(self) -> list[RunEntry]:
        """Return the checkpoints that are complete, not abandoned, and kept by a policy, in the order of steps."""
        return self._kept_of(self.current())

    def kept_of_run(self) -> list[RunEntry]:
        """Return the checkpoints at this location that a policy keeps among those of the whole run."""
        current = self.current()
        of_run = self._branch_with(current)
        kept = {entry.key for entry in self._kept_by_policies(of_run)}
        return [entry for entry in current if entry.is_complete and entry.key in kept]

    def _kept_of(self, current: Sequence[RunEntry]) -> list[RunEntry]:
        on_branch = {entry.key for entry in self._branch_with(current)}
        return self._kept_by_policies(branch(entry for entry in current if entry.key in on_branch))

    def _branch_with(self, current: Sequence[RunEntry]) -> list[RunEntry]:
        """Return the branch of the whole run. Some of its checkpoints may be at the twin only.

        The twin shows which of them are abandoned: training may have continued on another machine.
        """
        return branch([*current, *(self.twin.current() if self.twin else ())])

    def _kept_by_policies(self, entries: list[RunEntry]) -> list[RunEntry]:
        if self._policies is None:
            return entries
        steps = kept_steps(self._policies, [entry.saved for entry in entries])
        return [entry for entry in entries if entry.step in steps]

    @property
    def first_sequence(self) -> int:
        """The smallest number for a save that no earlier manager of this location has used."""
        return 0 if self._lease is None else self._lease.first_sequence

    def note_sequence(self, number: int, *, at_once: bool = False) -> None:
        """Let later managers of this location use larger numbers, also if they do not see the save.

        Args:
            number: the number of a save.
            at_once: whether to store it now, and not within a few seconds. This may raise a StoreError.
        """
        if self._lease is not None:
            self._lease.note_sequence(number)
            if at_once:
                self._lease.renew()

    def check_lease(self) -> None:
        """Raise RunInUseError if another manager has taken over this location, or StoreError if it is gone."""
        if self._lease is not None:
            self._lease.check()

    def remove_not_kept(self) -> None:
        """Remove the checkpoints that no policy keeps, in the background."""
        if self._policies is not None and self._lease is not None:
            self._submit(self._remove_not_kept)

    def remove_unfinished_saves(self) -> None:
        """Remove the data that killed saves left, when it is a day old, in the background."""
        if self._lease is not None:
            self._submit(self._remove_unfinished_saves)

    def removed(self) -> tuple[str, ...]:
        """Return the folders that were removed, in this order, except those that were forgotten."""
        with self._changed:
            return tuple(self._removed)

    def forget_removed(self, folders: Sequence[str]) -> None:
        """Forget the first of the folders that `removed` returned, when all ranks know of them."""
        with self._changed:
            del self._removed[: len(folders)]

    def wait(self) -> None:
        """Wait until all removals have finished."""
        with self._changed:
            self._changed.wait_for(lambda: not self._pending)

    def close(self) -> None:
        self._pool.shutdown(wait=False)

    def _submit(self, task: Callable[[], None]) -> None:
        def run() -> None:
            try:
                task()
            except Exception as error:
                logger.error("checkpoints of %s could not be removed: %s: %s", self.uri, type(error).__name__, error)
            finally:
                with self._changed:
                    self._pending -= 1
                    self._changed.notify_all()

        with self._changed:
            self._pending += 1
        try:
            self._pool.submit(run)
        except RuntimeError:  # the manager was closed: the next one removes them
            with self._changed:
                self._pending -= 1

    def _to_remove(self) -> tuple[list[RunEntry], Rewind | None]:
        """Return the checkpoints to remove, and the rewind under which this holds.

        Only complete checkpoints in reshard's format are removed. Those that the rewind has abandoned are removed when
        a later save is complete.
        """
        with self._changed:
            rewind, entries = self._rewind, list(self._entries)
        abandoned = [entry for entry in entries if rewind is not None and rewind.abandons(entry)]
        current = [entry for entry in entries if rewind is None or not rewind.abandons(entry)]
        keeping = self._kept_of(current)
        if not keeping:
            return [], rewind
        # Other processes may remove checkpoints, too. The last one must exist before another one is removed.
        open_store(self.uri_of(keeping[-1].folder), self.storage_options).size(MANIFEST_NAME)
        last_saved = max(entry.sequence for entry in current if entry.is_complete)
        keys = {entry.key for entry in (*keeping, *(e for e in abandoned if e.sequence > last_saved))}
        return [entry for entry in entries if entry.is_native and entry.is_complete and entry.key not in keys], rewind

    def _remove_not_kept(self) -> None:
        entries, rewind = self._to_remove()
        for entry in entries:
            with self._changed:
                if self._rewind is not rewind:
                    return  # a restore has decided otherwise, and the next save removes what it does not keep
                if entry.folder in self._protected or all(known.key != entry.key for known in self._entries):
                    continue
                self._removing = entry.folder
            try:
                self._remove(entry)
            finally:
                with self._changed:
                    self._removing = None
                    self._changes += 1
                    self._changed.notify_all()

    def _remove(self, entry: RunEntry) -> None:
        self.check_lease()
        uri = self.uri_of(entry.folder)
        try:
            remove(uri, self.storage_options)
        except CheckpointNotFoundError:
            pass  # another process removed it
        except CheckpointError as error:
            logger.warning("the checkpoint at %s could not be removed: %s", uri, error)
            return
        logger.info("removed the checkpoint at %s", uri)
        with self._changed:
            self._entries = [known for known in self._entries if known.key != entry.key]
            self._removed.append(entry.folder)

    def _remove_unfinished_saves(self) -> None:
        self.check_lease()
        for folder in [entry.folder for entry in self.entries()]:
            uri = self.uri_of(folder)
            with self.protecting([folder]):
                try:
                    for remains in gc(uri, self.storage_options):
                        logger.info("removed %d objects of a killed save at %s", len(remains.names), uri)
                except CheckpointError as error:
                    logger.warning("data that a killed save may have left at %s is not removed: %s", uri, error)
