"""Removing data that failed or killed saves left behind."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...planner.errors import InvalidIndexError
from ...planner.masking import masked
from ...planner.text import counted
from ..errors import ArgumentError, CorruptCheckpointError, ObjectNotFoundError
from ..formats.detect import CONVERSION
from ..formats.native.native_source import NativeSource
from ..runtime.logs import logger_of
from ..runtime.threads import Pool
from ..runtime.torch_modes import without_torch_modes
from ..stores.base import Store
from ..stores.local import TEMPORARY, SpecialFileError
from ..stores.open import open_found_store, open_store
from ..stores.uris import join_location
from ..writing.object_writer import OBJECT_MAGIC
from .catalog import location_of, split_name

logger = logger_of(__name__)
MIN_AGE_S = 3600
"""No save takes longer from its last write to its commit. Younger data may belong to a save that is running."""
_DATA_OBJECT = re.compile(r"data/[0-9a-f]{32}-[0-9A-Za-z_-]+\.shard")
"""The names of the data objects that reshard writes."""
_PUT = re.compile(r"manifest\.reshard|\.metadata|\.reshard-convert(-\d{6,})?\.json|model\.safetensors\.index\.json")
"""The names of the objects that reshard writes through a temporary file, on a disk."""


@dataclass(frozen=True, slots=True)
class Remains:
    """The data that unfinished saves left at one location."""

    uri: str
    names: tuple[str, ...]
    """The names of the objects."""
    nbytes: int
    """Their total size in bytes."""
    root: str
    """The location that was searched."""
    folder: str
    """The folder of these objects below `root`; empty for `root` itself."""

    def __repr__(self) -> str:
        """Return a description without the secrets that `uri` and `root` may contain."""
        return masked(f"Remains({self.uri!r}, {counted(len(self.names), 'object')}, {self.nbytes} bytes)")


@without_torch_modes()
def gc(
    uri: str | os.PathLike[str],
    storage_options: Mapping[str, Any] | None = None,
    *,
    older_than_s: float = 24 * 3600,
    dry_run: bool = False,
    no_save_running: bool = False,
) -> list[Remains]:
    """Remove the data that failed or killed saves left at and below a location. Checkpoints are not touched.

    If any data at a location is younger than `older_than_s`, a save may be running there, and nothing is removed from
    it. Nothing is removed from a location with an unfinished conversion, which the same call of `convert` completes,
    nor from a checkpoint with a damaged manifest, which a warning names. `remove` removes both.

    Args:
        uri: a path or a URI that fsspec can open.
        storage_options: options for fsspec.
        older_than_s: the minimum age of the data in seconds.
        dry_run: return what would be removed, and remove nothing.
        no_save_running: allow an age of less than an hour. This damages the checkpoint of a save that is running there.

    Returns:
        What was removed, by location.

    Raises:
        ArgumentError: `older_than_s` is less than an hour, and neither `dry_run` nor `no_save_running` is True.
        StoreError: the store failed.
    """
    if not older_than_s >= MIN_AGE_S and not (dry_run or no_save_running):
        raise ArgumentError(
            f"older_than_s={older_than_s:g} could remove the data of a save that is about to commit, and damage its "
            f"checkpoint: pass {MIN_AGE_S} or more, or no_save_running=True if no save is running there"
        )
    uri = location_of(uri)
    found = find_remains(uri, storage_options, older_than_s=older_than_s)
    if not dry_run:
        remove_remains(found, storage_options, older_than_s=older_than_s)
    return found


def find_remains(
    uri: str, storage_options: Mapping[str, Any] | None = None, *, older_than_s: float = 24 * 3600
) -> list[Remains]:
    """Find data objects of the native format that no manifest lists, and temporary files, at and below a location.

    Args:
        older_than_s: the minimum age in seconds. It must exceed the time that a save takes from its last write to its
            commit. Otherwise the data of a running save is found, and removing it damages that checkpoint.

    Raises:
        ArgumentError, StoreError: see `gc`.
    """
    _check_age(older_than_s)
    folders: dict[str, list[str]] = {}
    converted: set[str] = set()
    for name in open_store(uri, storage_options).list():
        folder, base = split_name(name)
        if base == CONVERSION:
            converted.add(folder)
        elif _DATA_OBJECT.fullmatch(base) or _is_temporary(base):
            folders.setdefault(folder, []).append(base)
    found = []
    for folder in sorted(folders.keys() - converted):
        location = join_location(uri, folder)
        try:
            remains = _remains(open_found_store(location, storage_options), folders[folder], older_than_s)
        except (CorruptCheckpointError, InvalidIndexError) as error:
            logger.warning("the checkpoint at %s is damaged, so nothing is removed there: %s", location, error)
            continue
        if remains:
            found.append(Remains(location, tuple(remains), sum(remains.values()), uri, folder))
    return found


def remove_remains(
    remains: Iterable[Remains],
    storage_options: Mapping[str, Any] | None = None,
    *,
    older_than_s: float = 24 * 3600,
) -> None:
    """Remove what `find_remains` found, except objects that a manifest lists by now.

    Raises:
        ArgumentError, CorruptCheckpointError, StoreError: see `gc`.
    """
    _check_age(older_than_s)
    for found in remains:
        names = _remains(open_found_store(found.uri, storage_options), found.names, older_than_s)
        # Deletes through the location that the caller passed, because a store follows no symbolic link below it.
        open_store(found.root, storage_options).delete([f"{found.folder}/{name}".lstrip("/") for name in names])


def _check_age(seconds: float) -> None:
    if not seconds >= 0:
        raise ArgumentError(f"older_than_s must be 0 or more, got {seconds}")


def _is_temporary(name: str) -> bool:
    found = TEMPORARY.fullmatch(name)
    return found is not None and _PUT.fullmatch(found[1]) is not None


def _remains(store: Store, names: Iterable[str], older_than_s: float) -> dict[str, int]:
    """Return the objects that no manifest lists, and their sizes. Return none if one of them is too young."""
    kept = NativeSource.objects_in(store)
    left = [name for name in names if name not in kept]
    if not left or _is_younger(store, left, older_than_s):
        return {}
    sizes = dict(zip(left, _sizes(store, left), strict=True))
    found = {name: nbytes for name, nbytes in sizes.items() if nbytes is not None}
    kept = NativeSource.objects_in(store) if found else set()  # a save may have committed in the meantime
    return {name: nbytes for name, nbytes in found.items() if name not in kept}


def _is_ours(store: Store, name: str) -> bool:
    """Return whether an object starts like those that reshard writes. A truncated one may have fewer bytes."""
    if _is_temporary(name):
        return True
    try:
        begin = bytes(store.read(name, 0, len(OBJECT_MAGIC)))
    except ObjectNotFoundError:
        return False
    return OBJECT_MAGIC.startswith(begin)


def _is_younger(store: Store, names: Iterable[str], seconds: float) -> bool:
    def modified(name: str) -> float:
        try:
            return store.modified(name)
        except ObjectNotFoundError:
            return time.time()  # it was removed just now, so a save may be running
        except SpecialFileError:
            return 0.0

    with Pool(16, "reshard-gc") as pool:
        return max(pool.map(modified, names)) > time.time() - seconds


def _sizes(store: Store, names: Iterable[str]) -> list[int | None]:
    """Return the sizes of objects; None for an object that reshard did not write, or that no longer exists."""

    def size(name: str) -> int | None:
        try:
            nbytes = store.size(name)
            return nbytes if _is_ours(store, name) else None
        except (ObjectNotFoundError, SpecialFileError):
            return None

    with Pool(16, "reshard-gc") as pool:
        return list(pool.map(size, names))
