"""The checkpoints at and below a location: finding them, and removing one."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from ...planner.errors import CheckpointError
from ...planner.masking import masked
from ..errors import (
    AccessDeniedError,
    ArgumentError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    NotCommittedError,
    ObjectNotFoundError,
    StoreError,
)
from ..formats.dcp_metadata import METADATA, RANK_METADATA
from ..formats.detect import (
    CONVERSION,
    CONVERSION_NOTE,
    FILE_SUFFIXES,
    TORCH_INDEX_SUFFIX,
    is_torch_file,
    open_source,
)
from ..formats.hf_index import group_numbered_files
from ..formats.native.manifest import DATA_FOLDER, DATA_NAME, MANIFEST_NAME
from ..formats.source import Source
from ..runtime.threads import Pool
from ..runtime.torch_modes import without_torch_modes
from ..stores.base import Store, check_delete
from ..stores.local import LocalStore, SpecialFileError
from ..stores.open import open_store
from ..stores.uris import join_location, last_name

UNFINISHED_CONVERSION = "unfinished conversion"
CONVERTED = re.compile(
    rf"{DATA_NAME.pattern}|{re.escape(MANIFEST_NAME)}"
    r"|__\d+_\d+\.distcp|\.metadata|model-\d{5,}-of-\d{5,}\.safetensors|model\.safetensors\.index\.json"
)
"""The names of the objects that conversions write."""
REMOVABLE = ("reshard", "dcp")
"""Formats whose metadata lists every object of a checkpoint."""
COMPLETE, NOT_COMMITTED = "complete", "not committed"
_OF_DCP = re.compile(r"__[0-9]+_[0-9]+\.distcp")
"""The names of DCP's data objects. A StorageWriter may add a prefix, which may contain folders."""
_PREFIXED = re.compile(rf".*{_OF_DCP.pattern}", re.DOTALL)
_LAST_NUMBER = re.compile(r"(?<![0-9])([0-9]{1,18})[^0-9]*$")


@dataclass(frozen=True, slots=True)
class FoundCheckpoint:
    """A checkpoint that `find_checkpoints` found, or the data of an unfinished save."""

    uri: str
    format: str
    """The format. Empty if the checkpoint cannot be opened."""
    state: str
    """"complete", "not committed", or what is wrong with the checkpoint."""
    step: int | None
    """The last number in the name of the folder."""
    nbytes: int | None
    """The size of the data objects as stored, in bytes."""
    entries: int | None
    """The number of tensors and other values."""
    created: datetime.datetime | None
    """The time of the save. Other formats do not record it; for them, the time at which the first data object was last
    written."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The `metadata` that was passed to `reshard.save`. The metrics of a CheckpointManager are under "metrics"."""
    error: CheckpointError | None = field(default=None, compare=False)
    """The error that opening the checkpoint raised, if it is committed and cannot be opened."""

    def __repr__(self) -> str:
        """Return a description without the secrets that `uri` may contain."""
        return masked(f"FoundCheckpoint({self.uri!r}, {self.format!r}, {self.state!r}, step={self.step})")

    @property
    def is_complete(self) -> bool:
        """Whether the checkpoint is committed and has all its objects. `Checkpoint.verify` also checks their bytes."""
        return self.state == COMPLETE


@without_torch_modes()
def find_checkpoints(
    uri: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None
) -> list[FoundCheckpoint]:
    """Find the checkpoints at and below a location, sorted by name.

    Files of torch.save are only listed for folders without other checkpoints. The location may be a single file.

    Args:
        uri: a path or a URI that fsspec can open.
        storage_options: options for fsspec.

    Raises:
        StoreError, UnsupportedURIError: the location cannot be listed.
    """
    uri = location_of(uri)
    folders: dict[str, set[str]] = {}
    for name in open_store(uri, storage_options).list():
        folder, base = split_name(name)
        folders.setdefault(folder, set()).add(base)
    candidates: list[tuple[str, set[str] | None]] = []
    for folder, names in sorted(folders.items()):
        if any(map(_marks_a_checkpoint, names)):
            candidates.append((folder, names))
        else:
            files = (name for name in names if is_torch_file(name))
            candidates += [(f"{folder}/{name}".lstrip("/"), None) for name in sorted(files)]
    if not folders and os.path.splitext(uri)[1] in FILE_SUFFIXES:
        candidates.append(("", None))
    with Pool(16, "reshard-ls") as pool:

        def open_candidate(candidate: tuple[str, set[str] | None]) -> FoundCheckpoint | None:
            name, names = candidate
            return _found(join_location(uri, name), names, storage_options, is_guess=names is None and bool(name))

        found = pool.map(open_candidate, sorted(candidates, key=itemgetter(0)))
        return [checkpoint for checkpoint in found if checkpoint is not None]


def location_of(uri: str | os.PathLike[str]) -> str:
    """Return a path or URI as a string. Raises ArgumentError."""
    try:
        return os.fspath(uri) or "."
    except TypeError:
        raise ArgumentError(
            f"expected a path or a URI, got {uri!r}: folders in a Store instance cannot be searched"
        ) from None


def split_name(name: str) -> tuple[str, str]:
    """Split the name of an object into the folder of its checkpoint and its name in that folder."""
    folder, _, base = name.rpartition("/")
    if DATA_NAME.fullmatch(f"{DATA_FOLDER}/{base}") and folder.split("/")[-1] == DATA_FOLDER:
        return folder[: -len(DATA_FOLDER)].rstrip("/"), f"{DATA_FOLDER}/{base}"
    return folder, base


def _marks_a_checkpoint(name: str) -> bool:
    """Return whether a folder that contains an object of this name may be a checkpoint."""
    known = name in (MANIFEST_NAME, METADATA) or RANK_METADATA.fullmatch(name) or DATA_NAME.fullmatch(name)
    of_many = name.endswith(TORCH_INDEX_SUFFIX) or group_numbered_files([name])
    return bool(known or of_many) or os.path.splitext(name)[1] in (".safetensors", ".distcp")


def _found(
    uri: str, names: set[str] | None, storage_options: Mapping[str, Any] | None, *, is_guess: bool
) -> FoundCheckpoint | None:
    """Open a candidate. Return None for a file that does not exist, or has a suffix of torch.save files but is not one.

    Args:
        names: the names of the objects in the folder; None if the candidate is a file.
        is_guess: whether only the suffix of a file in a folder makes it a candidate.
    """
    number = _LAST_NUMBER.search(last_name(uri))
    step = int(number[1]) if number else None
    try:
        source = open_source(uri, storage_options, is_found=True)
        metadata = dict(source.metadata)
    except NotCommittedError:
        return FoundCheckpoint(uri, "", NOT_COMMITTED, step, None, None, None)
    except CheckpointError as error:
        is_no_checkpoint = isinstance(error, CheckpointNotFoundError) or (
            is_guess and isinstance(error, CorruptCheckpointError)
        )
        if names is None and is_no_checkpoint:
            return None
        return FoundCheckpoint(uri, "", str(error), step, None, None, None, error=error)
    nbytes = sum(nbytes for _, nbytes in source.objects)
    missing = [] if names is None else [name for name, _ in source.objects if name not in names]
    damaged = sum(found.is_damage for found in source.unreadable.values())
    state = f"{damaged} tensors are missing" if damaged else COMPLETE
    if missing:
        state = f"{len(missing)} of {len(source.objects)} objects are missing"
        try:
            source.store.size(missing[0])
        except AccessDeniedError as error:  # their folder could not be listed
            return FoundCheckpoint(uri, "", str(error), step, None, None, None, error=error)
        except StoreError:
            pass
    return FoundCheckpoint(uri, source.format, state, step, nbytes, len(source.entries), _created(source), metadata)


def _created(source: Source) -> datetime.datetime | None:
    with contextlib.suppress(KeyError, ValueError, TypeError, OverflowError):
        return datetime.datetime.fromisoformat(source.info["created"]).astimezone(datetime.UTC)
    with contextlib.suppress(StoreError, ValueError, OverflowError):
        for name, _ in source.objects[:1]:
            return datetime.datetime.fromtimestamp(source.store.modified(name), datetime.UTC)
    return None


@dataclass(frozen=True, slots=True)
class Removal:
    """The objects that the removal of a checkpoint deletes."""

    format: str
    """The format, or "unfinished conversion"."""
    metadata: tuple[str, ...]
    """The objects without which it is not a checkpoint. They are deleted first. Those of an unfinished conversion are
    deleted last, because they show that its files are no checkpoint."""
    data: tuple[tuple[str, int], ...]
    """The names and sizes of the other objects."""

    @property
    def names(self) -> list[str]:
        return [*self.metadata, *(name for name, _ in self.data)]

    @property
    def nbytes(self) -> int:
        return sum(nbytes for _, nbytes in self.data)

    @property
    def unusual(self) -> list[str]:
        """The names that DCP only writes if it is configured with a prefix."""
        return [name for name, _ in self.data if self.format == "dcp" and not _OF_DCP.fullmatch(name)]


@without_torch_modes()
def find_removal(uri: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> Removal:
    """Return what `remove` would delete, and change nothing. It raises the same errors as `remove`."""
    return _find_removal(uri, storage_options)[1]


def _find_removal(uri: str | os.PathLike[str], storage_options: Mapping[str, Any] | None) -> tuple[Store, Removal]:
    """Return the store of a checkpoint, and what to remove there."""
    try:
        source = open_source(uri, storage_options)
        return source.store, _removal(source)
    except (CorruptCheckpointError, NotCommittedError):
        store = open_store(uri, storage_options)
        names = list(store.list())
        removal = _removal_of_remains(store, names)
        if removal is None:
            raise
        check_delete(store, removal.names)
        return store, removal


def _removal_of_remains(store: Store, names: Sequence[str]) -> Removal | None:
    """Return what belongs to a native checkpoint with a damaged manifest, or to an unfinished conversion."""
    if MANIFEST_NAME in names and CONVERSION not in names:
        return Removal("reshard", (MANIFEST_NAME,), _with_sizes(store, filter(DATA_NAME.fullmatch, names)))
    if CONVERSION in names:
        notes = [name for name in names if CONVERSION_NOTE.fullmatch(name)]
        written = filter(CONVERTED.fullmatch, names)
        return Removal(UNFINISHED_CONVERSION, (*notes, CONVERSION), _with_sizes(store, written))
    return None


def _with_sizes(store: Store, names: Iterable[str]) -> tuple[tuple[str, int], ...]:
    """Return names with the sizes of the objects, or 0 for what is no file."""

    def size(name: str) -> int:
        try:
            return store.size(name)
        except (ObjectNotFoundError, SpecialFileError):  # such as a link without a target
            return 0

    names = list(names)
    with Pool(16, "reshard-rm") as pool:
        return tuple(zip(names, pool.map(size, names), strict=True))


def _removal(source: Source) -> Removal:
    if source.format not in REMOVABLE:
        raise ArgumentError(
            f"{source.location} has the format {source.format!r}: only checkpoints of reshard and DCP can be removed, "
            "because their metadata lists all their objects"
        )
    metadata = [MANIFEST_NAME]
    if source.format == "dcp":
        names = list(source.store.list())
        metadata = [name for name in names if name == METADATA or RANK_METADATA.fullmatch(name)]
        _check_names_of_dcp(source, names)
    removal = Removal(source.format, tuple(metadata), tuple(source.objects))
    check_delete(source.store, removal.names)
    return removal


def _check_names_of_dcp(source: Source, names: Iterable[str]) -> None:
    """Check that the metadata of a DCP checkpoint lists only objects that DCP wrote for this checkpoint.

    Raises:
        ArgumentError: it lists an object that DCP does not write, or that another checkpoint may need.
    """
    parts = [name.rpartition("/") for name in names]
    folders = {
        folder for folder, _, base in parts if base in (MANIFEST_NAME, METADATA) or RANK_METADATA.fullmatch(base)
    }
    others = [
        name
        for name, _ in source.objects
        if not _PREFIXED.fullmatch(name) or any(name.startswith(f"{folder}/") for folder in folders if folder)
    ]
    if others:
        raise ArgumentError(
            f"the metadata of the checkpoint at {source.location} lists {len(others)} objects that DCP does not write, "
            f"or that belong to another checkpoint, such as {others[0]!r}: nothing was removed. Check the folder, and "
            "remove it with other tools"
        )


@without_torch_modes()
def remove(
    uri: str | os.PathLike[str],
    storage_options: Mapping[str, Any] | None = None,
    *,
    expected: Removal | None = None,
) -> list[str]:
    """Remove a checkpoint of reshard or DCP, or an unfinished conversion. Other objects there are not touched.

    The metadata is deleted first, so that a partly removed checkpoint is never mistaken for a complete one. If the
    manifest of a native checkpoint is damaged, all data objects at the location are removed.

    Args:
        uri: a path or a URI that fsspec can open.
        storage_options: options for fsspec.
        expected: the result of `find_removal`. If the checkpoint has changed since then, nothing is removed.

    Returns:
        The names of the removed objects.

    Raises:
        ArgumentError: the checkpoint has another format, its metadata lists objects that DCP does not write, or it is
            not the expected one. Nothing was removed.
        StoreError: an object cannot be deleted because it is a folder or is in a folder that is a symbolic link; then
            nothing was removed. Or the store failed during the removal.
        CheckpointError: a checkpoint cannot be opened; see `reshard.open`.
    """
    store, removal = _find_removal(uri, storage_options)
    if expected is not None and removal != expected:
        raise ArgumentError(f"the checkpoint at {store.location} has changed in the meantime: nothing was removed")
    data = [name for name, _ in removal.data]
    for names in (data, removal.metadata) if removal.format == UNFINISHED_CONVERSION else (removal.metadata, data):
        store.delete(names)
    if isinstance(store, LocalStore):
        store.delete_if_empty(DATA_FOLDER)
        store.delete_if_empty()
    return removal.names
