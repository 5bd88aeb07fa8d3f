"""The commit: the manifest put into the store, the only moment at which a checkpoint comes into being."""

from __future__ import annotations

import contextlib
import re

from ....planner.errors import CheckpointError
from ...errors import CheckpointExistsError, CommitError, ObjectNotFoundError, StoreError
from ...runtime.logs import logger_of
from ...stores.base import Store, check_delete, top_names
from ..detect import CONVERSION, is_of_a_checkpoint
from .manifest import DATA_FOLDER, MANIFEST_NAME, Manifest

logger = logger_of(__name__)


_RANK = re.compile(r"-(\d+)\.shard$")
"""What the name of a data object ends with: the number of the rank that wrote it."""


def refuse_if_there(store: Store, *, overwrite: bool) -> None:
    """Make sure that a save replaces or hides no checkpoint that it was not told to replace.

    A checkpoint of another tool is not replaced even with `overwrite`: its files would stay, and no longer be found.

    Raises CheckpointExistsError. For reshard's own format, the commit itself makes sure again.
    """
    with contextlib.suppress(ObjectNotFoundError):
        store.read(MANIFEST_NAME, 0, 1)
        if overwrite:
            return
        raise CheckpointExistsError(
            f"there is a checkpoint at {store.location} already; pass overwrite=True to replace it"
        )
    there = min(filter(is_of_a_checkpoint, top_names(store)), default=None)
    if there == CONVERSION:
        raise CheckpointExistsError(
            f"a conversion to {store.location} was begun, and has not ended: it has {there!r}. Make the same call of "
            "reshard.convert again to end it, remove what is there, or save to another place"
        )
    if there is not None:
        raise CheckpointExistsError(
            f"there is a checkpoint of another tool at {store.location}, or a part of one: it has {there!r}. A save "
            "would hide it, with overwrite=True too: remove it, or save to another place"
        )


def commit(store: Store, manifest: bytes, objects: set[str], *, overwrite: bool, rank: int = 0) -> None:
    """Put the manifest, and only then remove what the checkpoint that it replaced was made of.

    A put whose answer was lost is recognised by what the store then has: no two manifests are alike.

    Args:
        rank: the one that calls, whose objects must be there, as those of the others.

    Raises:
        CheckpointExistsError: another save has committed. This one has not, for certain.
        StoreError: data objects are gone, or cannot be looked for; or those that are replaced cannot be removed.
        CommitError: the put failed, and the store does not have the manifest now; it may still come.
    """
    replaced: set[str] = set()
    if overwrite:
        with contextlib.suppress(CheckpointError):  # one that does not tell what it is made of
            there = Manifest.find(store)
            replaced = {name for name, _ in there.objects} if there else set()
    gone = objects - set(store.list(DATA_FOLDER)) if objects else set()
    if gone:
        raise StoreError(f"{_gone(store, gone, rank)}; the checkpoint was not committed")
    check_delete(store, replaced - objects)
    put_commit(store, MANIFEST_NAME, manifest, "the manifest", overwrite=overwrite)
    try:
        store.delete(replaced - objects)
    except Exception as error:
        logger.warning("data objects of the checkpoint that was replaced remain in %s: %s", store.location, error)


def _gone(store: Store, gone: set[str], rank: int) -> str:
    """Say whose data objects are not there, and why that may be."""
    found = (_RANK.search(name) for name in gone)
    others = sorted({int(of[1]) for of in found if of} - {rank})
    if not others:
        return (
            f"{len(gone)} data objects that were just written are gone from {store.location}, as {min(gone)!r}: "
            "something else removes objects there"
        )
    shown = ", ".join(map(str, others[:8])) + (f" and {len(others) - 8} more" if len(others) > 8 else "")
    return (
        f"rank {rank} cannot see {len(gone)} data objects at {store.location} that rank{'s' * (len(others) > 1)} "
        f"{shown} wrote, as {min(gone)!r}: all ranks must write to the same shared place, an object store or a disk "
        "that all of them see. If they do, something else removes objects there"
    )


def put_commit(store: Store, name: str, data: bytes, what: str, *, overwrite: bool) -> None:
    """Put the object that makes a checkpoint whole; `what` errors call it. Raises as `commit`."""
    try:
        store.put(name, data, overwrite=overwrite)
    except Exception as error:
        found = _read_or_none(store, name, len(data))
        if found != data:
            if isinstance(error, CheckpointExistsError) and found is not None:
                raise
            raise CommitError(f"{what} may or may not have been written: {error}") from error


def _read_or_none(store: Store, name: str, nbytes: int) -> bytes | None:
    """The object that is there, as far as `nbytes` and one more; None where it cannot be read."""
    try:
        return bytes(store.read(name, 0, nbytes + 1))
    except Exception:
        return None
