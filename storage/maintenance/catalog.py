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

from ...planner.errors import CheckpointError
from ...planner.masking import masked
from ..errors import (
    ArgumentError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    NotCommittedError,
    ObjectNotFoundError,
    StoreError,
)
from ..formats.dcp_metadata import METADATA, RANK_METADATA
from ..formats.detect import CONVERSION, FILE_SUFFIXES, TORCH_INDEX_SUFFIX, open_source
from ..formats.hf_index import group_numbered_files
from ..formats.native.manifest import DATA_FOLDER, DATA_NAME, MANIFEST_NAME, Manifest
from ..formats.source import Source
from ..runtime.threads import Pool
from ..runtime.torch_modes import undisturbed
from ..stores.base import Store, check_delete
from ..stores.local import TEMPORARY, LocalStore, SpecialFileError
from ..stores.open import open_found_store, open_store
from ..writing.object_writer import OBJECT_MAGIC

REMOVABLE = ("reshard", "dcp")
"""Formats whose metadata tells what a checkpoint is made of."""
WHOLE, UNFINISHED = "whole", "never committed"
_WRITTEN = re.compile(r"data/[0-9a-f]{32}-[0-9A-Za-z_-]+\.shard")
"""What data objects are called that reshard writes."""
_OF_DCP = re.compile(r"__[0-9]+_[0-9]+\.distcp")
"""What DCP calls its data objects; a StorageWriter may put a prefix before that, which may have folders."""
_PREFIXED = re.compile(rf".*{_OF_DCP.pattern}", re.DOTALL)
_PUT = re.compile(r"manifest\.reshard|\.metadata|\.reshard-convert(-\d{6,})?\.json|model\.safetensors\.index\.json")
"""What reshard puts by way of a temporary file, on a disk."""
_LAST_NUMBER = re.compile(r"(?<![0-9])([0-9]{1,18})[^0-9]*$")


@dataclass(frozen=True, slots=True)
class FoundCheckpoint:
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
        return masked(f"FoundCheckpoint({self.uri!r}, {self.format!r}, {self.state!r}, step={self.step})")

    @property
    def is_whole(self) -> bool:
        """Whether it is committed, and all its objects are there; `Checkpoint.verify` tells what they hold."""
        return self.state == WHOLE


@undisturbed()
def find_checkpoints(
    uri: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None
) -> list[FoundCheckpoint]:
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

        def look(place: tuple[str, set[str] | None]) -> FoundCheckpoint | None:
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
    known = name in (MANIFEST_NAME, METADATA) or RANK_METADATA.fullmatch(name) or DATA_NAME.fullmatch(name)
    of_many = name.endswith(TORCH_INDEX_SUFFIX) or group_numbered_files([name])
    return bool(known or of_many) or os.path.splitext(name)[1] in (".safetensors", ".distcp")


def _found(uri: str, names: set[str] | None, storage_options: Mapping[str, Any] | None) -> FoundCheckpoint | None:
    """None for a file that only has a name like those of torch.save. `names` are those of a folder, None of a file."""
    number = _LAST_NUMBER.search(uri.rpartition("/")[2])
    step = int(number[1]) if number else None
    try:
        source = open_source(uri, storage_options, is_found=True)
    except NotCommittedError:
        return FoundCheckpoint(uri, "", UNFINISHED, step, None, None, None)
    except CheckpointError as error:
        if names is None and isinstance(error, (CorruptCheckpointError, CheckpointNotFoundError)):
            return None
        return FoundCheckpoint(uri, "", str(error), step, None, None, None)
    nbytes = sum(nbytes for _, nbytes in source.objects)
    missing = 0 if names is None else sum(name not in names for name, _ in source.objects)
    damaged = sum(found.is_damage for found in source.unreadable.values())
    state = f"{damaged} tensors are missing" if damaged else WHOLE
    if missing:
        state = f"{missing} of {len(source.objects)} objects are missing"
    return FoundCheckpoint(uri, source.format, state, step, nbytes, len(source.entries), _created(source))


def _created(source: Source) -> datetime.datetime | None:
    with contextlib.suppress(KeyError, ValueError, TypeError, OverflowError):
        return datetime.datetime.fromisoformat(source.info["created"]).astimezone(datetime.UTC)
    with contextlib.suppress(StoreError, ValueError, OverflowError):
        for name, _ in source.objects[:1]:
            return datetime.datetime.fromtimestamp(source.store.modified(name), datetime.UTC)
    return None


@dataclass(frozen=True, slots=True)
class Removal:
    """What the removal of a checkpoint deletes."""

    format: str
    metadata: tuple[str, ...]
    """What makes it a checkpoint, which goes first."""
    data: tuple[tuple[str, int], ...]
    """Names and bytes of its other objects."""

    @property
    def names(self) -> list[str]:
        return [*self.metadata, *(name for name, _ in self.data)]

    @property
    def nbytes(self) -> int:
        return sum(nbytes for _, nbytes in self.data)

    @property
    def unusual(self) -> list[str]:
        """The names that DCP writes only if it is given prefixes for them."""
        return [name for name, _ in self.data if self.format == "dcp" and not _OF_DCP.fullmatch(name)]


@undisturbed()
def find_removal(uri: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> Removal:
    """Find out what `remove` deletes, and change nothing. Raises as `remove`."""
    return _removal(open_source(uri, storage_options))


def _removal(source: Source) -> Removal:
    if source.format not in REMOVABLE:
        raise ArgumentError(
            f"{source.location} is of format {source.format!r}: only checkpoints of reshard and of DCP are removed, "
            "whose metadata tells what they are made of"
        )
    first = [MANIFEST_NAME]
    if source.format == "dcp":
        there = list(source.store.list())
        first = [name for name in there if name == METADATA or RANK_METADATA.fullmatch(name)]
        _refuse_others(source, there)
    removal = Removal(source.format, tuple(first), tuple(source.objects))
    check_delete(source.store, removal.names)
    return removal


def _refuse_others(source: Source, there: Iterable[str]) -> None:
    """Raises ArgumentError if metadata of DCP names what DCP does not write, or what another checkpoint may need."""
    parts = [name.rpartition("/") for name in there]
    places = {folder for folder, _, base in parts if base in (MANIFEST_NAME, METADATA) or RANK_METADATA.fullmatch(base)}
    others = [
        name
        for name, _ in source.objects
        if not _PREFIXED.fullmatch(name) or any(name.startswith(f"{place}/") for place in places if place)
    ]
    if others:
        raise ArgumentError(
            f"the metadata of the checkpoint at {source.location} names {len(others)} objects that DCP does not write, "
            f"or that are of another checkpoint, as {others[0]!r}: nothing was removed. Look at what is there, and "
            "remove it by other means"
        )


@undisturbed()
def remove(
    uri: str | os.PathLike[str],
    storage_options: Mapping[str, Any] | None = None,
    *,
    expected: Removal | None = None,
) -> list[str]:
    """Remove a checkpoint of reshard or of DCP: first what makes it one, so that it is never in part, then its data.

    Other objects at the place stay.

    Args:
        expected: what `find_removal` found. If that has changed, nothing is removed.

    Returns: the names of what was removed.

    Raises:
        ArgumentError: it is of another format, its metadata names objects that DCP does not write, or it is not what
            was expected.
        StoreError: an object cannot be deleted: it is a folder, or in a folder that is a symbolic link. Nothing was
            removed then, unless the store failed on the way.
    And as `open_source`.
    """
    source = open_source(uri, storage_options)
    removal = _removal(source)
    if expected is not None and removal != expected:
        raise ArgumentError(f"the checkpoint at {source.location} has changed meanwhile: nothing was removed")
    source.store.delete(removal.metadata)
    source.store.delete([name for name, _ in removal.data])
    if isinstance(source.store, LocalStore):
        source.store.delete_if_empty(DATA_FOLDER)
        source.store.delete_if_empty()
    return removal.names


@dataclass(frozen=True, slots=True)
class Remains:
    """What saves that never ended have left in one place."""

    uri: str
    names: tuple[str, ...]
    nbytes: int
    root: str
    """The place that was looked through."""
    folder: str
    """Below it, where these are; empty for the place itself."""


def find_remains(
    uri: str, storage_options: Mapping[str, Any] | None = None, *, older_than_s: float = 24 * 3600
) -> list[Remains]:
    """Data objects of reshard's own format that no manifest names, and temporary files, at a place and below it.

    Where any of a place is younger than that, a save may be in progress there, and none of its is told. Nor is any
    where a conversion was begun: the same call ends it.

    Args:
        older_than_s: of a save that is in progress, the data would be found if this is shorter than the time from its
            last write to its commit, and the save would commit a damaged checkpoint if it is removed.

    Raises StoreError, ArgumentError, and CorruptCheckpointError where a manifest does not tell what it names.
    """
    _check_age(older_than_s)
    folders: dict[str, list[str]] = {}
    converted: set[str] = set()
    for name in open_store(uri, storage_options).list():
        folder, base = _in_its_place(name)
        if base == CONVERSION:
            converted.add(folder)
        elif _WRITTEN.fullmatch(base) or _is_temporary(base):
            folders.setdefault(folder, []).append(base)
    found = []
    for folder in sorted(folders.keys() - converted):
        place = f"{uri.rstrip('/')}/{folder}".rstrip("/")
        remains = _remains(open_found_store(place, storage_options), folders[folder], older_than_s)
        if remains:
            found.append(Remains(place, tuple(remains), sum(remains.values()), uri, folder))
    return found


def remove_remains(
    remains: Iterable[Remains],
    storage_options: Mapping[str, Any] | None = None,
    *,
    older_than_s: float = 24 * 3600,
) -> None:
    """Remove what `find_remains` found; nothing of what a manifest names by now, or where something is younger.

    Raises as `find_remains`.
    """
    _check_age(older_than_s)
    for place in remains:
        names = _remains(open_found_store(place.uri, storage_options), place.names, older_than_s)
        # From the place that the caller named: the store follows no link below that.
        open_store(place.root, storage_options).delete([f"{place.folder}/{name}".lstrip("/") for name in names])


def _check_age(seconds: float) -> None:
    if not seconds >= 0:
        raise ArgumentError(f"older_than_s must be 0 or more, got {seconds}")


def _is_temporary(name: str) -> bool:
    found = TEMPORARY.fullmatch(name)
    return found is not None and _PUT.fullmatch(found[1]) is not None


def _remains(store: Store, names: Iterable[str], older_than_s: float) -> dict[str, int]:
    """Which objects of a place are nobody's, and their bytes; none where one is young."""
    kept = _kept(store)
    left = [name for name in names if name not in kept]
    if not left or _is_younger(store, left, older_than_s):
        return {}
    sizes = dict(zip(left, _sizes(store, left), strict=True))
    found = {name: nbytes for name, nbytes in sizes.items() if nbytes is not None and _is_ours(store, name)}
    kept = _kept(store) if found else set()  # by now, a save may have committed
    return {name: nbytes for name, nbytes in found.items() if name not in kept}


def _kept(store: Store) -> set[str]:
    """The data objects that the manifest names."""
    manifest = Manifest.find(store)
    return {name for name, _ in manifest.objects} if manifest else set()


def _is_ours(store: Store, name: str) -> bool:
    """Whether an object begins as those do that reshard writes; one that was cut short at once may have less."""
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
            return time.time()  # it was removed just now: something is going on
        except SpecialFileError:
            return 0.0

    with Pool(16, "reshard-gc") as pool:
        return max(pool.map(modified, names)) > time.time() - seconds


def _sizes(store: Store, names: Iterable[str]) -> list[int | None]:
    """The bytes of objects; None for one that is gone, or is no file."""

    def size(name: str) -> int | None:
        try:
            return store.size(name)
        except (ObjectNotFoundError, SpecialFileError):
            return None

    with Pool(16, "reshard-gc") as pool:
        return list(pool.map(size, names))
