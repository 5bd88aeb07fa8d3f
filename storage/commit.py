"""The commit: the manifest put into the store, the only moment at which a checkpoint comes into being."""

from __future__ import annotations

import contextlib

from ..planner.errors import CheckpointError
from .errors import CheckpointExistsError, CommitError, ObjectNotFoundError, StoreError
from .logs import logger_of
from .manifest import DATA_FOLDER, NAME, Manifest
from .store import Store

logger = logger_of(__name__)


def refuse_if_there(store: Store) -> None:
    """Raises CheckpointExistsError where the store has a checkpoint; the commit itself makes sure again."""
    with contextlib.suppress(ObjectNotFoundError):
        store.read(NAME, 0, 1)
        raise CheckpointExistsError(
            f"there is a checkpoint at {store.location} already; pass overwrite=True to replace it"
        )


def commit(store: Store, manifest: bytes, objects: set[str], *, overwrite: bool) -> None:
    """Put the manifest, and only then remove what the checkpoint that it replaced was made of.

    A put whose answer was lost is recognised by what the store then has: no two manifests are alike.

    Raises:
        CheckpointExistsError: another save has committed. This one has not, for certain.
        StoreError: data objects are gone, or cannot be looked for.
        CommitError: the put failed, and the store does not have the manifest now; it may still come.
    """
    replaced: set[str] = set()
    if overwrite:
        with contextlib.suppress(CheckpointError):  # one that does not tell what it is made of
            there = Manifest.find(store)
            replaced = {name for name, _ in there.objects} if there else set()
    gone = objects - set(store.list(DATA_FOLDER)) if objects else set()
    if gone:
        raise StoreError(
            f"{len(gone)} data objects that were just written are gone from {store.location}, as {min(gone)!r}: "
            "something else removes objects there; the checkpoint was not committed"
        )
    put_commit(store, NAME, manifest, "the manifest", overwrite=overwrite)
    try:
        store.delete(replaced - objects)
    except Exception as error:
        logger.warning("data objects of the checkpoint that was replaced remain in %s: %s", store.location, error)


def put_commit(store: Store, name: str, data: bytes, what: str, *, overwrite: bool) -> None:
    """Put the object that makes a checkpoint whole; `what` errors call it. Raises as `commit`."""
    try:
        store.put(name, data, overwrite=overwrite)
    except Exception as error:
        found = _read_back(store, name, len(data))
        if found != data:
            if isinstance(error, CheckpointExistsError) and found is not None:
                raise
            raise CommitError(f"{what} may or may not have been written: {error}") from error


def _read_back(store: Store, name: str, nbytes: int) -> bytes | None:
    """The object that is there, as far as `nbytes` and one more; None where it cannot be read."""
    try:
        return bytes(store.read(name, 0, nbytes + 1))
    except Exception:
        return None
