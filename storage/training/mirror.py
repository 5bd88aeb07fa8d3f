"""Copying the checkpoints of a run to another location in the background.

Each rank copies the objects that it wrote, because a machine may see only those that are on its own disks. Rank 0
publishes what to copy, waits until all ranks have copied their objects, and then writes the manifest, which commits the
copy. The ranks communicate through torch's key-value store, so training is not interrupted.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Condition
from typing import Any

import torch.distributed as dist

from ...planner.errors import CheckpointError
from ...planner.masking import masked
from ...planner.text import quoted
from ..errors import AccessDeniedError, CorruptCheckpointError, ObjectNotFoundError, StoreError, UnavailableError
from ..formats.native.commit import commit, rank_of_object
from ..formats.native.manifest import DATA_FOLDER, MANIFEST_NAME
from ..formats.native.native_source import NativeSource
from ..maintenance.verify import verify
from ..runtime.logs import logger_of
from ..runtime.lost_ranks import Lookout, Watch, client_of, new_key
from ..runtime.threads import Pool, current_stop
from ..stores.base import Store, exists
from ..stores.local import LocalStore
from ..stores.open import open_store
from ..stores.retry import read_whole, retried
from ..stores.uris import join_location
from .run_catalog import STEP_FOLDER

logger = logger_of(__name__)
POLL_EVERY_S = 0.5
READ_BYTES = 8 * 1024 * 1024
MAX_MANIFEST_BYTES = 64 * 1024 * 1024
"""If a manifest is larger, the ranks do not verify what they copy: each of them would read all of it."""
LEFTOVERS_KEPT_S = 24 * 3600
CONCURRENT_COPIES = 2
"""How many objects a rank copies at once. A writer holds up to 80 MB of each in memory."""


ANY = -1
"""All ranks look for an object, and none copies it."""


@dataclass(frozen=True, slots=True)
class CheckpointCopy:
    """A checkpoint to copy."""

    folder: str
    objects: Sequence[tuple[str, int, int]]
    """The name, the size and the rank that copies each object. If the rank is ANY, nobody copies it, and all ranks say
    whether they see it."""

    def to_json(self) -> str:
        return json.dumps([self.folder, list(self.objects)])

    @classmethod
    def from_json(cls, text: str | bytes) -> CheckpointCopy:
        folder, objects = json.loads(text)
        return cls(folder, [(name, nbytes, rank) for name, nbytes, rank in objects])


@dataclass(frozen=True, slots=True)
class _OwnCopy:
    """How a rank has copied its objects."""

    problem: str = ""
    """Why it failed."""
    lacking: Sequence[str] = ()
    """Objects that it should copy, or look for, and does not see."""
    is_out_of_reach: bool = False
    """See `CopyResult`."""

    def to_json(self) -> str:
        return json.dumps([self.problem, list(self.lacking)])

    @classmethod
    def from_json(cls, text: str | bytes) -> _OwnCopy:
        return cls(*json.loads(text))


@dataclass(frozen=True, slots=True)
class CopyResult:
    """How a copy ended. If it is neither complete nor failed, nothing was copied, because it was no longer needed."""

    is_complete: bool = False
    problem: str = ""
    """Why it failed."""
    is_out_of_reach: bool = False
    """Whether it failed because the mirror does not answer, or refuses access."""


@dataclass(frozen=True, slots=True)
class _Submitted:
    """A copy that was submitted; see `MirrorCopier.submit`."""

    folder: str
    overwrite: bool
    is_needed: Callable[[], bool]
    ended: Callable[[CopyResult], None]


class MirrorCopier:
    """Copies checkpoints to the mirror, with the other ranks.

    Args:
        root: the location to copy from.
        storage_options: its options for fsspec.
        mirror: the location to copy to.
        mirror_options: its options for fsspec.
        process_group: the ranks, or None without a process group. All ranks must create their instances in the same
            order.
    """

    def __init__(
        self,
        root: str,
        storage_options: Mapping[str, Any] | None,
        mirror: str,
        mirror_options: Mapping[str, Any] | None,
        process_group: dist.ProcessGroup | None,
    ) -> None:
        self._source = partial(_open, root, storage_options)
        self._target = partial(_open, mirror, mirror_options)
        self._mirror_path = masked(mirror.partition("://")[2] or mirror)
        """The location of the mirror without its protocol, as error messages show it."""
        self._rank, self._world = 0, 1
        self._key_value_store: Any = None
        if process_group is not None and dist.get_world_size(process_group) > 1:
            self._rank, self._world = dist.get_rank(process_group), dist.get_world_size(process_group)
            self._key = new_key("mirror", process_group)
            watch = Watch.of(process_group)
            self._lookout, self._key_value_store = Lookout(watch), client_of(watch.store)
        self._changed = Condition()
        self._waiting: deque[_Submitted] = deque()
        self._is_busy = False
        self._count = 0
        """How many copies have begun."""
        self._pool = Pool(1, "reshard-mirror")
        self._pool.submit(self._serve if self._rank == 0 else self._follow)

    def submit(
        self, folder: str, *, overwrite: bool, is_needed: Callable[[], bool], ended: Callable[[CopyResult], None]
    ) -> None:
        """Copy a checkpoint in the background. Only rank 0 calls it.

        Args:
            folder: its folder below the root.
            overwrite: whether to replace a checkpoint in this folder of the mirror.
            is_needed: called before the copy begins. If it returns False, nothing is copied.
            ended: called at the end.
        """
        with self._changed:
            self._waiting.append(_Submitted(folder, overwrite, is_needed, ended))
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait until all copies have ended. Only rank 0 calls it."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._is_busy)

    def close(self) -> None:
        """End the thread."""
        self._pool.stop.set()
        with self._changed:
            self._changed.notify_all()
        self._pool.shutdown(wait=False)

    def _serve(self) -> None:
        """Copy what was submitted, on rank 0."""
        stop = current_stop()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or stop.wait(0), POLL_EVERY_S)
                if stop.wait(0):
                    return
                if not self._waiting:
                    continue
                task = self._waiting.popleft()
                self._is_busy = True
            try:
                result = self._copy(task) if task.is_needed() else CopyResult()
            except Exception as error:
                result = CopyResult(
                    problem=f"{type(error).__name__}: {error}", is_out_of_reach=self._is_out_of_reach(error)
                )
            ended = [task]
            if result.is_out_of_reach:  # each of the other copies would wait as long
                with self._changed:
                    ended += self._waiting
                    self._waiting.clear()
            for one in ended:
                try:
                    one.ended(result)
                except Exception as error:
                    logger.error("after the copy of %s: %s: %s", one.folder, type(error).__name__, error)
            with self._changed:
                self._is_busy = False
                self._changed.notify_all()

    def _copy(self, task: _Submitted) -> CopyResult:
        """Copy a checkpoint with all ranks, and commit it."""
        folder = task.folder
        source, target = self._source(folder), self._target(folder)
        manifest = NativeSource.find(source)
        if manifest is None:
            return CopyResult(problem="it was removed")
        data, objects = manifest.contents(), list(manifest.objects)
        by_number = [(name, nbytes, (rank_of_object(name) or 0) % self._world) for name, nbytes in objects]
        copied = self._copy_on_all_ranks(CheckpointCopy(folder, by_number))
        lacking = {name for one in copied for name in one.lacking}
        if lacking and not any(one.problem for one in copied):
            copied = self._copy_from_other_ranks(folder, [found for found in objects if found[0] in lacking])
        if problems := [one.problem for one in copied if one.problem]:
            return CopyResult(problem="; ".join(problems), is_out_of_reach=any(one.is_out_of_reach for one in copied))
        commit(target, data, {name for name, _ in objects}, overwrite=task.overwrite, before=task.is_needed)
        return CopyResult(is_complete=True)

    def _copy_from_other_ranks(self, folder: str, objects: Sequence[tuple[str, int]]) -> list[_OwnCopy]:
        """Copy objects that the ranks of their numbers do not see.

        Other ranks may be on the machines that have them, if the ranks have moved since the save.
        """
        looked = self._copy_on_all_ranks(CheckpointCopy(folder, [(name, nbytes, ANY) for name, nbytes in objects]))
        if any(one.problem for one in looked):
            return looked
        ranks: dict[str, int] = {}
        for name, _ in objects:
            ranks[name] = next((rank for rank, one in enumerate(looked) if name not in one.lacking), ANY)
        if lost := [name for name, rank in ranks.items() if rank == ANY]:
            return [_OwnCopy(f"no rank has {quoted(lost)}")]
        return self._copy_on_all_ranks(
            CheckpointCopy(folder, [(name, nbytes, ranks[name]) for name, nbytes in objects])
        )

    def _copy_on_all_ranks(self, copy: CheckpointCopy) -> list[_OwnCopy]:
        """Copy objects on all ranks, and wait for them. Return what `_copy_own` returned on each of them."""
        self._count += 1
        if self._key_value_store is not None:
            self._key_value_store.set(f"{self._key}/{self._count}", copy.to_json())
        return [self._copy_own(copy), *self._copied_by_others()]

    def _copied_by_others(self) -> list[_OwnCopy]:
        """Wait for the other ranks, and return for each of them what `_copy_own` returned."""
        if self._key_value_store is None:
            return []
        keys = {rank: f"{self._key}/{self._count}/{rank}" for rank in range(1, self._world)}
        stop = current_stop()
        while not self._key_value_store.check(list(keys.values())):
            if stop.wait(POLL_EVERY_S / 5):
                raise StoreError("the copy was stopped")
            self._lookout.check(
                self._key_value_store,
                lambda: [at for at, key in keys.items() if not self._key_value_store.check([key])],
            )
        copied = [_OwnCopy.from_json(self._key_value_store.get(key)) for key in keys.values()]
        for key in (*keys.values(), f"{self._key}/{self._count}"):
            self._key_value_store.delete_key(key)
        return copied

    def _follow(self) -> None:
        """Copy what rank 0 publishes, on another rank."""
        stop = current_stop()
        try:
            while not stop.wait(POLL_EVERY_S):
                key = f"{self._key}/{self._count + 1}"
                if self._key_value_store.check([key]):
                    copy = CheckpointCopy.from_json(self._key_value_store.get(key))
                    self._count += 1
                    self._key_value_store.set(f"{key}/{self._rank}", self._copy_own(copy).to_json())
        except RuntimeError as error:
            logger.info("the process group has ended, and this rank copies no more checkpoints: %s", error)

    def _copy_own(self, copy: CheckpointCopy) -> _OwnCopy:
        """Copy the objects of this rank."""
        try:
            source, target = self._source(copy.folder), self._target(copy.folder)
            lacking = [name for name, _, rank in copy.objects if rank in (self._rank, ANY) and not exists(source, name)]
            own = [(name, nbytes) for name, nbytes, rank in copy.objects if rank == self._rank and name not in lacking]
            _check_undamaged(source, [name for name, _ in own])
            with Pool(CONCURRENT_COPIES, "reshard-copy") as pool:
                for _ in pool.map(lambda item: copy_object(source, target, *item), own):
                    pass
        except CheckpointError as error:
            return _OwnCopy(f"rank {self._rank}: {error}", is_out_of_reach=self._is_out_of_reach(error))
        except Exception as error:
            return _OwnCopy(f"rank {self._rank}: {type(error).__name__}: {error}")
        return _OwnCopy(lacking=lacking)

    def _is_out_of_reach(self, error: Exception) -> bool:
        """Return whether an error says that the mirror, and not the root, does not answer or refuses access."""
        return isinstance(error, (UnavailableError, AccessDeniedError)) and self._mirror_path in str(error)


def _check_undamaged(source: Store, names: Sequence[str]) -> None:
    """Check objects before they are copied, with the checksums in the manifest.

    If this rank does not see the manifest, or if it is so large that reading it takes long, nothing is checked.

    Raises:
        CorruptCheckpointError: a chunk is damaged or missing.
    """
    if not names:
        return
    manifest = NativeSource.find(source)
    if manifest is None or source.size(MANIFEST_NAME) > MAX_MANIFEST_BYTES:
        why = "this rank does not see its manifest" if manifest is None else "its manifest is too large"
        logger.info("%s is copied without being verified, because %s", source.location, why)
        return
    if damaged := verify(source, manifest.index(), only=set(names)):
        raise CorruptCheckpointError(f"{len(damaged)} chunks in {source.location} are damaged: {damaged[0]}")


def copy_object(source: Store, target: Store, name: str, nbytes: int) -> None:
    """Copy an object, unless the target has it already. The names of data objects are unique.

    Raises:
        CorruptCheckpointError: the object is missing or shorter than `nbytes`.
        StoreError: a store failed.
    """
    try:
        if target.size(name) == nbytes:
            return
        target.delete([name])  # a copy that was killed
    except ObjectNotFoundError:
        pass

    def write() -> None:
        with target.create(name) as out:
            for start in range(0, nbytes, READ_BYTES):
                stop = min(start + READ_BYTES, nbytes)
                data = read_whole(source, name, start, stop)
                if memoryview(data).nbytes != stop - start:
                    raise CorruptCheckpointError(
                        f"{name!r} in {source.location} ends before byte {stop}: it is truncated"
                    )
                out.write(data)

    retried(write)  # an object that is being written cannot be continued after a failure


def remove_local_objects(root: str, folders: Iterable[str]) -> None:
    """Remove the data objects of folders on a disk of this machine, after rank 0 has removed the checkpoints."""
    for folder in folders:
        store = _open(root, None, folder)
        try:
            store.delete([name for name in store.list() if rank_of_object(name) is not None])
        except CheckpointError as error:
            logger.warning("objects of a checkpoint that was removed remain in %s: %s", store.location, error)
        if isinstance(store, LocalStore):
            store.delete_if_empty(DATA_FOLDER)
            store.delete_if_empty()


def remove_local_leftovers(root: str, known: Iterable[str]) -> None:
    """Remove data objects that are a day old from a disk of this machine, in folders that rank 0 does not know.

    Rank 0 may have ended before it could tell this rank what it had removed.

    Args:
        root: the root of the run.
        known: the folders of all checkpoints that rank 0 sees.
    """
    store = open_store(root)
    found: dict[str, list[str]] = {}
    names = set(store.list())
    for name in names:
        folder = name.partition("/")[0]
        has_manifest = f"{folder}/{MANIFEST_NAME}" in names  # of a checkpoint that another rank 0 has saved here
        if rank_of_object(name) is not None and STEP_FOLDER.fullmatch(folder) and not has_manifest:
            found.setdefault(folder, []).append(name)
    for folder in known:
        found.pop(folder, None)
    begin = time.time() - LEFTOVERS_KEPT_S
    old = [folder for folder, names in found.items() if all(store.modified(name) < begin for name in names)]
    remove_local_objects(root, sorted(old))


def _open(root: str, storage_options: Mapping[str, Any] | None, folder: str) -> Store:
    return open_store(join_location(root, folder), storage_options)
