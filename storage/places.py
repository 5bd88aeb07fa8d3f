"""Checkpoints below a place: which there are, removing one, and what saves that failed have left."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from ..planner.errors import CheckpointError
from ..planner.masking import masked
from .ambient import undisturbed
from .errors import (
    ArgumentError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    NotCommittedError,
    ObjectNotFoundError,
    StoreError,
)
from .local_store import LocalStore
from .manifest import DATA_FOLDER, DATA_NAME, NAME, Manifest
from .open_source import CONVERSION, FILE_SUFFIXES, TORCH_INDEX_SUFFIX, open_source
from .source import Source
from .sources.dcp import METADATA, RANK_METADATA
from .sources.weight_map import part_groups
from .store import Store, open_store
from .threads import Pool
from .writer import OBJECT_MAGIC

REMOVABLE = ("reshard", "dcp")
"""Formats whose metadata tells what a checkpoint is made of."""
WHOLE, UNFINISHED = "whole", "never committed"
_WRITTEN = re.compile(r"data/[0-9a-f]{32}-[0-9A-Za-z_-]+\.shard")
"""What data objects are called that reshard writes."""
_LAST_NUMBER = re.compile(r"(?<![0-9])([0-9]{1,18})[^0-9]*$")


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
    entries: int | None
    """Tensors and other values."""
    created: datetime.datetime | None
    """When it was saved, as reshard's own tell; of others, when the first of its objects was last written."""

    def __repr__(self) -> str:
        """It in words, for logs and notebooks: `uri` has the secrets that were given, and this has not."""
        return masked(f"Found({self.uri!r}, {self.format!r}, {self.state!r}, step={self.step})")

    @property
    def is_whole(self) -> bool:
        """Whether it is committed, and all its objects are there; `Checkpoint.verify` tells what they hold."""
        return self.state == WHOLE


@undisturbed()
def find_checkpoints(uri: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> list[Found]:
    """The checkpoints at a place and below it, by their names; files of torch.save where there is nothing else.

    Raises StoreError, UnsupportedURIError.
    """
    uri = os.fspath(uri) or "."
    folders: dict[str, set[str]] = {}
    for name in open_store(uri, storage_options).list():
        folder, base = _in_its_place(name)
        folders.setdefault(folder, set()).add(base)
    places: list[tuple[str, set[str] | None]] = []
    for folder, names in sorted(folders.items()):
        if any(map(_tells, names)):
            places.append((folder, names))
        else:
            files = (name for name in names if FILE_SUFFIXES.get(os.path.splitext(name)[1]) == "torch")
            places += [(f"{folder}/{name}".lstrip("/"), None) for name in sorted(files)]
    with Pool(16, "reshard-ls") as pool:

        def look(place: tuple[str, set[str] | None]) -> Found | None:
            return _found(f"{uri.rstrip('/')}/{place[0]}".rstrip("/"), place[1], storage_options)

        return [
            checkpoint for checkpoint in pool.map(look, sorted(places, key=itemgetter(0))) if checkpoint is not None
        ]


def _in_its_place(name: str) -> tuple[str, str]:
    """The folder of a checkpoint that an object would belong to, and its name in there."""
    folder, _, base = name.rpartition("/")
    if DATA_NAME.fullmatch(f"{DATA_FOLDER}/{base}") and folder.split("/")[-1] == DATA_FOLDER:
        return folder[: -len(DATA_FOLDER)].rstrip("/"), f"{DATA_FOLDER}/{base}"
    return folder, base


def _tells(name: str) -> bool:
    """Whether a name is one of a checkpoint's."""
    known = name in (NAME, METADATA) or RANK_METADATA.fullmatch(name) or DATA_NAME.fullmatch(name)
    of_many = name.endswith(TORCH_INDEX_SUFFIX) or part_groups([name])
    return bool(known or of_many) or os.path.splitext(name)[1] in (".safetensors", ".distcp")


def _found(uri: str, names: set[str] | None, storage_options: Mapping[str, Any] | None) -> Found | None:
    """None for a file that only has a name like those of torch.save. `names` are those of a folder, None of a file."""
    number = _LAST_NUMBER.search(uri.rpartition("/")[2])
    step = int(number[1]) if number else None
    try:
        source = open_source(uri, storage_options)
    except NotCommittedError:
        return Found(uri, "", UNFINISHED, step, None, None, None)
    except CheckpointError as error:
        if names is None and isinstance(error, (CorruptCheckpointError, CheckpointNotFoundError)):
            return None
        return Found(uri, "", str(error), step, None, None, None)
    nbytes = sum(nbytes for _, nbytes in source.objects)
    missing = 0 if names is None else sum(name not in names for name, _ in source.objects)
    damaged = sum(found.is_damage for found in source.unreadable.values())
    state = f"{damaged} tensors are missing" if damaged else WHOLE
    if missing:
        state = f"{missing} of {len(source.objects)} objects are missing"
    return Found(uri, source.format, state, step, nbytes, len(source.entries), _created(source))


def _created(source: Source) -> datetime.datetime | None:
    with contextlib.suppress(KeyError, ValueError, TypeError, OverflowError):
        return datetime.datetime.fromisoformat(source.info["created"]).astimezone(datetime.UTC)
    with contextlib.suppress(StoreError, ValueError, OverflowError):
        for name, _ in source.objects[:1]:
            return datetime.datetime.fromtimestamp(source.store.modified(name), datetime.UTC)
    return None


@undisturbed()
def remove(uri: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> list[str]:
    """Remove a checkpoint of reshard or of DCP: first what makes it one, so that it is never in part, then its data.

    Other objects at the place stay. Returns the names of what was removed. Raises ArgumentError for one of another
    format, and as `open_source`.
    """
    source = open_source(uri, storage_options)
    if source.format not in REMOVABLE:
        raise ArgumentError(
            f"{source.location} is of format {source.format!r}: only checkpoints of reshard and of DCP are removed, "
            "whose metadata tells what they are made of"
        )
    first = [NAME]
    if source.format == "dcp":
        first = [name for name in source.store.list() if name == METADATA or RANK_METADATA.fullmatch(name)]
    names = [name for name, _ in source.objects]
    source.store.delete(first)
    source.store.delete(names)
    if isinstance(source.store, LocalStore):
        source.store.delete_if_empty(DATA_FOLDER)
        source.store.delete_if_empty()
    return first + names


@dataclass(frozen=True, slots=True)
class Remains:
    """What saves that never ended have left in one place."""

    uri: str
    names: tuple[str, ...]
    nbytes: int


def find_remains(
    uri: str, storage_options: Mapping[str, Any] | None = None, *, older_than_s: float = 24 * 3600
) -> list[Remains]:
    """Data objects of reshard's own format that no manifest names, at a place and below it.

    Where any of a place is younger than that, a save may be in progress there, and none of its is told. Nor is any
    where a conversion was begun: the same call ends it. Raises StoreError, and CorruptCheckpointError where a manifest
    does not tell what it names.
    """
    folders: dict[str, list[str]] = {}
    converted: set[str] = set()
    for name in open_store(uri, storage_options).list():
        folder, base = _in_its_place(name)
        if base == CONVERSION:
            converted.add(folder)
        elif _WRITTEN.fullmatch(base):
            folders.setdefault(folder, []).append(base)
    found = []
    for folder in sorted(folders.keys() - converted):
        place = f"{uri.rstrip('/')}/{folder}".rstrip("/")
        remains = _remains(open_store(place, storage_options), folders[folder], older_than_s)
        if remains:
            found.append(Remains(place, tuple(remains), sum(remains.values())))
    return found


def remove_remains(
    remains: Iterable[Remains],
    storage_options: Mapping[str, Any] | None = None,
    *,
    older_than_s: float = 24 * 3600,
) -> None:
    """Remove what `find_remains` found; nothing of what a manifest names by now, or where something is younger."""
    for place in remains:
        store = open_store(place.uri, storage_options)
        store.delete(_remains(store, place.names, older_than_s))


def _remains(store: Store, names: Iterable[str], older_than_s: float) -> dict[str, int]:
    """Which data objects of a place are nobody's, and their bytes; none where one is young."""
    manifest = Manifest.find(store)
    kept = {name for name, _ in manifest.objects} if manifest else set()
    left = [name for name in names if name not in kept]
    if not left or _is_younger(store, left, older_than_s):
        return {}
    sizes = dict(zip(left, _sizes(store, left), strict=True))
    return {name: nbytes for name, nbytes in sizes.items() if _is_ours(store, name)}


def _is_ours(store: Store, name: str) -> bool:
    """Whether an object begins as those do that reshard writes; one that was cut short at once may have less."""
    begin = bytes(store.read(name, 0, len(OBJECT_MAGIC)))
    return OBJECT_MAGIC.startswith(begin)


def _is_younger(store: Store, names: Iterable[str], seconds: float) -> bool:
    def modified(name: str) -> float:
        try:
            return store.modified(name)
        except ObjectNotFoundError:
            return time.time()  # it was removed just now: something is going on

    with Pool(16, "reshard-gc") as pool:
        return max(pool.map(modified, names)) > time.time() - seconds


def _sizes(store: Store, names: Iterable[str]) -> list[int]:
    with Pool(16, "reshard-gc") as pool:
        return list(pool.map(store.size, names))
