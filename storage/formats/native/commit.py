"""The commit: writing the manifest, which is the only step that creates or replaces a checkpoint."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable

from ....planner.errors import CheckpointError
from ....planner.text import first_few
from ...errors import CheckpointExistsError, CommitError, ObjectNotFoundError, StoreError, as_refusal, nearest
from ...runtime.logs import logger_of
from ...stores.base import Store, check_delete, top_names
from ..detect import CONVERSION, is_of_other_format
from .manifest import DATA_FOLDER, MANIFEST_NAME
from .native_source import NativeSource

logger = logger_of(__name__)

_RANK = re.compile(r"-(\d+)\.shard$")
"""The end of the name of a data object: the number of the rank that wrote it."""


def check_may_save(store: Store, *, overwrite: bool) -> None:
    """Check that a save does not replace or hide a checkpoint unless it should.

    A checkpoint of another tool is not replaced even with `overwrite`: its files would stay, but could no longer be
    found.

    Raises:
        CheckpointExistsError: there is a checkpoint. For reshard's own format, the commit checks this again.
    """
    with contextlib.suppress(ObjectNotFoundError):
        store.read(MANIFEST_NAME, 0, 1)
        if overwrite:
            return
        raise CheckpointExistsError(
            f"there is a checkpoint at {store.location} already; pass overwrite=True to replace it"
        )
    there = min(filter(is_of_other_format, top_names(store)), default=None)
    if there == CONVERSION:
        raise CheckpointExistsError(
            f"a conversion to {store.location} has not finished: it has {there!r}. Make the same call of "
            "reshard.convert again to finish it, remove the objects there, or save to another location"
        )
    if there is not None:
        raise CheckpointExistsError(
            f"there is a checkpoint of another tool at {store.location}, or a part of one: it has {there!r}. A save "
            "would hide it, even with overwrite=True: remove it, or save to another location"
        )


def commit(
    store: Store,
    manifest: bytes,
    objects: set[str],
    *,
    overwrite: bool,
    rank: int = 0,
    in_writer_process: bool = False,
    before: Callable[[], object] | None = None,
) -> None:
    """Write the manifest, and then remove the data objects of the checkpoint that it replaced.

    If the store's answer to the write is lost, reading the manifest back shows whether the write succeeded, because no
    two manifests are equal.

    Args:
        store: the store of the checkpoint.
        manifest: the bytes of the manifest.
        objects: the names of all data objects. They must exist; in a store that is not shared, those of this rank.
        overwrite: whether to replace a checkpoint.
        rank: the rank that commits, for error messages.
        in_writer_process: whether a pickled copy of the store wrote the objects, in another process. For error
            messages.
        before: called just before the manifest is written. If it raises an error, nothing is committed.

    Raises:
        CheckpointExistsError: another save has committed, and this one certainly has not.
        StoreError: data objects are missing or cannot be listed, objects that are replaced cannot be removed, or the
            store refused to write the manifest. Nothing was committed.
        CommitError: the write failed, and the store does not have the manifest. The manifest may still appear.
    """
    replaced: set[str] = set()
    if overwrite:
        try:
            replaced = NativeSource.objects_in(store)
        except CheckpointError as error:
            logger.warning(
                "data objects of the checkpoint that is replaced will remain in %s: %s", store.location, error
            )
    expected = objects if store.capabilities.is_shared else {name for name in objects if rank_of_object(name) == rank}
    gone = expected - set(store.list(DATA_FOLDER)) if expected else set()
    if gone:
        hint = ""
        if in_writer_process and any(rank_of_object(name) == rank for name in gone):
            hint = (
                ", or the store keeps its objects in memory, where the copy of the store in the writer process wrote "
                "them: then pass background='thread'"
            )
        raise StoreError(f"{_gone(store, gone, rank)}{hint}; the checkpoint was not committed")
    try:
        check_delete(store, replaced - objects)
    except StoreError as error:
        raise nearest(error)(
            f"the checkpoint at {store.location} cannot be replaced, and is unchanged: {error}; then save again, or "
            "save to another location"
        ) from error
    if before is not None:
        before()
    put_commit(store, MANIFEST_NAME, manifest, "the manifest", overwrite=overwrite)
    try:
        store.delete(replaced - objects)
    except Exception as error:
        logger.warning("data objects of the checkpoint that was replaced remain in %s: %s", store.location, error)


def rank_of_object(name: str) -> int | None:
    """Return the rank that wrote a data object, or None if its name does not show it."""
    found = _RANK.search(name)
    return int(found[1]) if found else None


def _gone(store: Store, gone: set[str], rank: int) -> str:
    """Describe which ranks wrote the missing data objects, and why they may be missing."""
    others = sorted({of for of in map(rank_of_object, gone) if of is not None} - {rank})
    if not others:
        return (
            f"{len(gone)} data objects that were just written are gone from {store.location}, such as {min(gone)!r}: "
            "something else removes objects there"
        )
    return (
        f"rank {rank} cannot see {len(gone)} data objects at {store.location} that rank{'s' * (len(others) > 1)} "
        f"{first_few(others, 8)} wrote, such as {min(gone)!r}: all ranks must write to the same shared location, an "
        "object store or a disk that all of them see. If they do, something else removes objects there"
    )


def put_commit(store: Store, name: str, data: bytes, what: str, *, overwrite: bool) -> None:
    """Write the object that commits a checkpoint. Error messages call it `what`. Raises the errors of `commit`."""
    try:
        store.put(name, data, overwrite=overwrite)
    except Exception as error:
        found = _read_or_none(store, name, len(data))
        if found != data:
            if isinstance(error, CheckpointExistsError) and found is not None:
                raise
            if isinstance(error, StoreError) and not error.may_have_written:
                raise as_refusal(error, f"{what} was not written, so nothing was committed: {error}") from error
            raise CommitError(f"{what} may or may not have been written: {error}") from error


def _read_or_none(store: Store, name: str, nbytes: int) -> bytes | None:
    """Return the first `nbytes` + 1 bytes of an object, or None if it cannot be read."""
    try:
        return bytes(store.read(name, 0, nbytes + 1))
    except Exception:
        return None
