"""Checkpoints below a place: which there are, removing one, and what saves that failed have left."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ..planner.errors import CheckpointError
from .errors import ObjectNotFoundError
from .manifest import DATA_FOLDER, DATA_NAME, NAME, Manifest
from .open_source import open_source
from .source import Source
from .sources.dcp import METADATA, RANK_METADATA
from .sources.safetensors import INDEX_SUFFIX
from .store import Store, open_store
from .targets.progress import HEAD, NOTE

WHOLE, UNFINISHED = "whole", "never committed"
_LAST_NUMBER = re.compile(r"(\d+)\D*$")


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint, or what is left of one."""

    uri: str
    format: str
    state: str
    """WHOLE, UNFINISHED, or what is wrong with it."""
    step: int | None
    """The last number in the name of its folder."""
    nbytes: int | None
    """Of its data objects, as stored."""
    tensors: int | None
    created: str | None
    """When it was saved, in ISO 8601; reshard's own tell."""


def find_checkpoints(uri: str, storage_options: Mapping[str, Any] | None = None) -> list[Found]:
    """The checkpoints at a place and below it, by their names. Raises StoreError, UnsupportedURIError."""
    folders: dict[str, set[str]] = {}
    for name in open_store(uri, storage_options).list():
        folder, _, base = name.rpartition("/")
        if DATA_NAME.fullmatch(f"{DATA_FOLDER}/{base}") and folder.split("/")[-1] == DATA_FOLDER:
            folder, base = folder[: -len(DATA_FOLDER)].rstrip("/"), f"{DATA_FOLDER}/{base}"
        folders.setdefault(folder, set()).add(base)
    places = sorted(folder for folder, names in folders.items() if any(map(_tells, names)))
    with ThreadPoolExecutor(16, "reshard-ls") as pool:
        return list(pool.map(lambda folder: _found(f"{uri.rstrip('/')}/{folder}".rstrip("/"), storage_options), places))


def _tells(name: str) -> bool:
    """Whether a name is one of a checkpoint's."""
    known = name in (NAME, METADATA) or RANK_METADATA.fullmatch(name) or DATA_NAME.fullmatch(name)
    return bool(known) or os.path.splitext(name)[1] in (".safetensors", ".distcp")


def _found(uri: str, storage_options: Mapping[str, Any] | None) -> Found:
    number = _LAST_NUMBER.search(uri.rpartition("/")[2])
    step = int(number[1]) if number else None
    try:
        source = open_source(uri, storage_options)
    except CheckpointError as error:
        state = UNFINISHED if "never" in str(error) else str(error)
        return Found(uri, "reshard" if state == UNFINISHED else "", state, step, None, None, None)
    nbytes = sum(nbytes for _, nbytes in source.objects)
    created = source.info.get("created")
    return Found(uri, source.format, WHOLE, step, nbytes, len(source.entries), created if created else None)


def remove(uri: str, storage_options: Mapping[str, Any] | None = None) -> list[str]:
    """Remove a checkpoint: first what makes it one, so that it is never there in part, then its data.

    Other objects at the place stay. Returns the names of what was removed. Raises as `open_source`.
    """
    source = open_source(uri, storage_options)
    first = _what_makes_it_one(source)
    names = [name for name, _ in source.objects]
    source.store.delete(first)
    source.store.delete(names)
    return first + names


def _what_makes_it_one(source: Source) -> list[str]:
    names = [name for name in source.store.list() if "/" not in name]
    if source.format == "reshard":
        return [NAME]
    if source.format == "dcp":
        return [name for name in names if name == METADATA or RANK_METADATA.fullmatch(name)]
    return [name for name in names if name.endswith(INDEX_SUFFIX)] if source.format == "safetensors" else []


@dataclass(frozen=True, slots=True)
class Remains:
    """What saves and conversions that never ended have left in one place."""

    uri: str
    names: tuple[str, ...]
    nbytes: int


def find_remains(
    uri: str, storage_options: Mapping[str, Any] | None = None, *, older_than_s: float = 24 * 3600
) -> list[Remains]:
    """Data objects of reshard's own format that no manifest names, and notes of conversions, at a place and below it.

    Where any of a place is younger than that, a save may be in progress there, and none of its is told.
    Raises StoreError, and CorruptCheckpointError where a manifest does not tell what it names.
    """
    store = open_store(uri, storage_options)
    folders: dict[str, list[str]] = {}
    for name in store.list():
        folder, _, base = name.rpartition("/")
        if base == HEAD or NOTE.fullmatch(base):
            folders.setdefault(folder, []).append(base)
        elif folder.split("/")[-1] == DATA_FOLDER and DATA_NAME.fullmatch(f"{DATA_FOLDER}/{base}"):
            folders.setdefault(folder[: -len(DATA_FOLDER)].rstrip("/"), []).append(f"{DATA_FOLDER}/{base}")
    found = []
    for folder, names in sorted(folders.items()):
        place = f"{uri.rstrip('/')}/{folder}".rstrip("/")
        here = open_store(place, storage_options)
        manifest = Manifest.find(here)
        kept = {name for name, _ in manifest.objects} if manifest else set()
        remains = sorted((name for name in names if name not in kept), key=lambda name: name == HEAD)
        if remains and not _is_younger(here, remains, older_than_s):
            found.append(Remains(place, tuple(remains), sum(_sizes(here, remains))))
    return found


def remove_remains(remains: Iterable[Remains], storage_options: Mapping[str, Any] | None = None) -> None:
    """Remove what `find_remains` found; of what a manifest names by now, nothing."""
    for place in remains:
        store = open_store(place.uri, storage_options)
        manifest = Manifest.find(store)
        kept = {name for name, _ in manifest.objects} if manifest else set()
        store.delete(name for name in place.names if name not in kept)


def _is_younger(store: Store, names: Iterable[str], seconds: float) -> bool:
    def modified(name: str) -> float:
        try:
            return store.modified(name)
        except ObjectNotFoundError:
            return time.time()  # it was removed just now: something is going on

    with ThreadPoolExecutor(16, "reshard-gc") as pool:
        return max(pool.map(modified, names)) > time.time() - seconds


def _sizes(store: Store, names: Iterable[str]) -> list[int]:
    with ThreadPoolExecutor(16, "reshard-gc") as pool:
        return list(pool.map(store.size, names))
