"""Detect the format of a checkpoint by the objects at its location, and open the source that reads it."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ...planner.text import quoted
from ..errors import ArgumentError, CheckpointNotFoundError, NotCommittedError, ObjectNotFoundError, StoreError
from ..runtime.logs import logger_of
from ..runtime.torch_modes import without_torch_modes
from ..stores.base import Store
from ..stores.local import LocalStore
from ..stores.open import open_found_store, open_store
from ..stores.uris import last_name, split_file
from .dcp_metadata import METADATA, RANK_METADATA
from .dcp_source import DcpSource
from .foreign import ForeignSource
from .hf_index import WeightMap, check_numbered_files, group_numbered_files, read_weight_map
from .metadata_reader import MetadataReader
from .native.manifest import DATA_NAME, MANIFEST_NAME
from .native.native_source import NativeSource
from .safetensors_source import INDEX_SUFFIX, SUFFIX, SafetensorsSource
from .source import Source
from .torch_save.torch_save_source import LEGACY_MAGIC, TorchSaveSource

logger = logger_of(__name__)

FORMATS = ("reshard", "dcp", "safetensors", "torch")
FILE_SUFFIXES = {SUFFIX: "safetensors", ".pt": "torch", ".pth": "torch", ".bin": "torch", ".ckpt": "torch"}
"""The formats of single files, by the suffix of their names."""
HF_FILE = "pytorch_model.bin"
"""The name that transformers gives to a torch.save file of a model. Other such files in its folder are ignored."""
TORCH_INDEX_SUFFIX = ".bin.index.json"
MAIN_INDEXES = (f"model{INDEX_SUFFIX}", f"pytorch_model{TORCH_INDEX_SUFFIX}")
"""The names that transformers gives to the index of a model. Other indexes in the folder are ignored."""
_MODEL_SUFFIXES = (SUFFIX, INDEX_SUFFIX, TORCH_INDEX_SUFFIX)
"""The suffixes that show a model in a folder. Single torch.save files often accompany a checkpoint."""
SIGNATURE_BYTES = 32
"""How many first bytes of a file are read to detect its format."""
CONVERSION = ".reshard-convert.json"
"""The name of the object that a conversion keeps at its destination until it has finished."""
CONVERSION_NOTE = re.compile(r"\.reshard-convert-(\d{6,})\.json")
"""The names of the notes of a conversion: which work units have been written."""
MAX_OBJECTS_SEARCHED = 10_000
"""How many objects of a folder are listed to find a checkpoint."""


@without_torch_modes()
def open_source(
    uri: str | os.PathLike[str] | Store,
    storage_options: Mapping[str, Any] | None = None,
    format: str | None = None,
    *,
    is_found: bool = False,
    wrap: Callable[[Store], Store] = lambda store: store,
) -> Source:
    """Open the checkpoint at a path or URI, or in a store.

    Args:
        uri: the location of a folder or file, or the store of a folder.
        storage_options: options of the store.
        format: one of FORMATS. By default, the format is detected.
        is_found: whether the URI comes from a listing. Text in it that looks like a password is then not a secret.
        wrap: Returns the store to read from, for the store at the location.

    Raises:
        CheckpointNotFoundError: there is no checkpoint, or it is unclear which one is meant.
        NotCommittedError: the save or conversion has not finished, or was interrupted.
        CorruptCheckpointError, UnsupportedVersionError, UnsafeValueError: the metadata cannot be read.
        UnsupportedURIError, ArgumentError, StoreError: see the messages.
    """
    if format not in (None, *FORMATS):
        raise ArgumentError(f"format must be one of {FORMATS}, got {format!r}")
    opened_store = open_found_store if is_found and isinstance(uri, str) else open_store

    def opened(location: str | os.PathLike[str] | Store, options: Mapping[str, Any] | None) -> Store:
        return wrap(opened_store(location, options))  # type: ignore[arg-type]

    store = opened(uri, storage_options)
    if isinstance(uri, Store) or format == "reshard":
        return _in_folder(store, format)
    folder, name = split_file(os.fspath(uri))
    suffix = os.path.splitext(name)[1]
    if suffix in FILE_SUFFIXES and format in (None, FILE_SUFFIXES[suffix]):
        source = _file(opened(folder, storage_options), name, FILE_SUFFIXES[suffix])
        if source is not None:
            return source
    try:
        return _in_folder(store, format)
    except NotCommittedError:
        raise
    except CheckpointNotFoundError:
        source = _file(opened(folder, storage_options), name, format) if name else None
        if source is None:
            raise
        return source


def _file(store: Store, name: str, format: str | None) -> Source | None:
    """Open a single file. Return None if it does not exist, or is not a checkpoint."""
    reader = MetadataReader(store)
    try:
        reader.size(name)
        if name.endswith(INDEX_SUFFIX) and format in (None, "safetensors"):
            return _safetensors(reader, read_weight_map(reader, name, ()), ())
        if name.endswith(TORCH_INDEX_SUFFIX) and format in (None, "torch"):
            return _torch(reader, read_weight_map(reader, name, ()), ())
        begin = b"" if format else reader.whole(name, 0, SIGNATURE_BYTES)
    except ObjectNotFoundError:
        return None
    if format == "safetensors" or begin[8:9] == b"{":
        return SafetensorsSource(reader, [name])
    if format == "torch" or begin.startswith(b"PK") or LEGACY_MAGIC in begin:
        return TorchSaveSource(reader, [name])
    return None


def _safetensors(reader: MetadataReader, weight_map: WeightMap, beside: Sequence[str]) -> Source:
    return _noting_others(SafetensorsSource(reader, weight_map.names or beside, weight_map), beside)


def _torch(reader: MetadataReader, weight_map: WeightMap, beside: Sequence[str]) -> Source:
    return _noting_others(TorchSaveSource(reader, weight_map.names or beside, weight_map), beside)


def _noting_others(source: ForeignSource, beside: Sequence[str]) -> Source:
    """Note in the source's `info` the weight files in its folder that its index does not name."""
    others = sorted(set(beside).difference(name for name, _ in source.objects))
    if others:
        source.info["unindexed_files"] = others
    return source


def _in_folder(store: Store, format: str | None) -> Source:
    if format in (None, "reshard"):
        manifest = NativeSource.find(store)
        if manifest is not None:
            _warn_of_others(store, "reshard", format)
            return manifest
    listing = _Listing.of(store, format)
    listing.check()
    for known, open_if_there in (("dcp", _open_dcp), ("safetensors", _open_safetensors), ("torch", _open_torch_save)):
        source = open_if_there(listing) if format in (None, known) else None
        if source is not None:
            return source
    raise _not_found(store, listing.names, format)


@dataclass(frozen=True, slots=True)
class _Listing:
    """The objects of a folder, without a native manifest."""

    store: Store
    wanted: str | None
    """The format that the caller wants. None: any format."""
    reader: MetadataReader
    names: list[str]
    """All names, or the first MAX_OBJECTS_SEARCHED and the indexes."""
    top: list[str]
    """The names of the objects that are not in folders."""
    is_cut: bool

    @classmethod
    def of(cls, store: Store, wanted: str | None) -> _Listing:
        reader = MetadataReader(store)
        names = list(islice(store.list(), MAX_OBJECTS_SEARCHED))
        is_cut = len(names) == MAX_OBJECTS_SEARCHED
        if is_cut:
            names += [name for name in (METADATA, *MAIN_INDEXES) if name not in names and _is_there(reader, name)]
        top = sorted(name for name in names if "/" not in name)
        return cls(store, wanted, reader, names, top, is_cut)

    def check(self) -> None:
        """Raise NotCommittedError for an unfinished conversion, and CheckpointNotFoundError if there are too many."""
        top = self.top
        if CONVERSION in top and not any(name == METADATA or name.endswith(INDEX_SUFFIX) for name in top):
            raise NotCommittedError(
                f"the checkpoint at {self.store.location} is being converted, or its conversion was interrupted: it "
                f"has {CONVERSION}. Make the same call of reshard.convert again to resume it, or remove it with "
                "`reshard rm`"
            )
        if self.is_cut and not any(
            name == METADATA or name.endswith((INDEX_SUFFIX, TORCH_INDEX_SUFFIX)) for name in top
        ):
            raise CheckpointNotFoundError(
                f"{self.store.location} has more than {MAX_OBJECTS_SEARCHED} objects, too many to find a checkpoint "
                "among them: give the folder or file of the checkpoint"
            )


def _open_dcp(listing: _Listing) -> Source | None:
    ranks = [name for name in listing.top if RANK_METADATA.fullmatch(name)]
    files = [METADATA] if METADATA in listing.top else sorted(ranks, key=_rank_of_metadata)
    if not files:
        return None
    _warn_of_others(listing.store, "dcp", listing.wanted)
    return DcpSource(listing.reader, files)


def _open_safetensors(listing: _Listing) -> Source | None:
    files = [name for name in listing.top if name.endswith(SUFFIX)]
    indexes = [name for name in listing.top if name.endswith(INDEX_SUFFIX)]
    if indexes:
        weights = read_weight_map(listing.reader, _index_of(listing.store, indexes), files)
        return _safetensors(listing.reader, weights, files)
    if not files:
        return None
    check_numbered_files(listing.store.location, files)
    return SafetensorsSource(listing.reader, files)


def _open_torch_save(listing: _Listing) -> Source | None:
    files = [name for name in listing.top if is_torch_file(name)]
    indexes = [name for name in listing.top if name.endswith(TORCH_INDEX_SUFFIX)]
    if indexes:
        return _torch(listing.reader, read_weight_map(listing.reader, _index_of(listing.store, indexes), files), files)
    files = _files_of_one_model(listing.store, files)
    return TorchSaveSource(listing.reader, files) if files else None


def _warn_of_others(store: Store, found: str, wanted: str | None) -> None:
    """Log a warning if a local folder also has a checkpoint of another format, which may be the newer one.

    Elsewhere this would cost a request.

    Args:
        store: the store of the folder.
        found: the format of the checkpoint that is read.
        wanted: the format that the caller wants. None: any format.
    """
    if wanted is not None or not isinstance(store, LocalStore):
        return
    suffixes = _MODEL_SUFFIXES if found == "dcp" else (*_MODEL_SUFFIXES, METADATA)
    names: list[str] = []
    with contextlib.suppress(StoreError):  # a folder need not be readable to open a file in it
        names += store.list_top()
    if name := min((name for name in names if name.endswith(suffixes)), default=None):
        logger.warning(
            "%s has checkpoints of several formats: the one of format %r is read, but there is also %r. Pass format= "
            "to choose one, and save to another location than other tools",
            store.location,
            found,
            name,
        )


def _index_of(store: Store, indexes: Sequence[str]) -> str:
    """Return the index to use. Raise CheckpointNotFoundError if that is unclear."""
    found = [name for name in indexes if name in MAIN_INDEXES] or indexes
    if len(found) > 1:
        raise CheckpointNotFoundError(
            f"{store.location} has {len(found)} indexes, {quoted(found)}: open one of them, for example "
            f"'{store.location}/{found[0]}'"
        )
    return found[0]


def _files_of_one_model(store: Store, files: list[str]) -> list[str]:
    """Return the torch.save files that form one model: a single file, or numbered files. Empty if that is unclear.

    Raises:
        CorruptCheckpointError: numbered files are missing.
    """
    if HF_FILE in files or len(files) == 1:
        files = [HF_FILE] if HF_FILE in files else files
        check_numbered_files(store.location, files)
        return files
    groups = group_numbered_files(files)
    numbered = [name for group in groups.values() for name in group]
    check_numbered_files(store.location, numbered)
    return numbered if len(groups) == 1 else []


def is_torch_file(name: str) -> bool:
    """Return whether an object has a suffix of torch.save files."""
    return FILE_SUFFIXES.get(os.path.splitext(name)[1]) == "torch"


def is_of_any_checkpoint(name: str) -> bool:
    """Return whether an object belongs to a checkpoint of some format, or to an unfinished conversion."""
    return name == MANIFEST_NAME or DATA_NAME.fullmatch(name) is not None or is_of_other_format(name)


def is_of_other_format(name: str) -> bool:
    """Return whether an object at the top of a folder belongs to another format or to an unfinished conversion."""
    known = name in (METADATA, CONVERSION) or RANK_METADATA.fullmatch(name) is not None
    is_top = "/" not in name
    return is_top and (
        known
        or name.endswith((".distcp", INDEX_SUFFIX, TORCH_INDEX_SUFFIX))
        or os.path.splitext(name)[1] in FILE_SUFFIXES
    )


def _is_there(reader: MetadataReader, name: str) -> bool:
    try:
        reader.size(name)
    except ObjectNotFoundError:
        return False
    return True


def _rank_of_metadata(name: str) -> int:
    found = RANK_METADATA.fullmatch(name)
    return int(found[1]) if found else 0


def _not_found(store: Store, names: list[str], format: str | None) -> CheckpointNotFoundError:
    remains = sum(1 for name in names if DATA_NAME.fullmatch(name))
    if remains and format in (None, "reshard"):
        return NotCommittedError(
            f"the checkpoint at {store.location} was never committed: it has {remains} data objects but no "
            f"{MANIFEST_NAME}. The save was interrupted, or is still running. `reshard gc` removes what is left, once "
            "it is a day old"
        )
    if any(name.endswith(".distcp") for name in names if "/" not in name) and format in (None, "dcp"):
        return NotCommittedError(f"the checkpoint at {store.location} was never finished: it has no {METADATA}")
    files = [name for name in names if "/" not in name and is_torch_file(name)]
    if files and format in (None, "torch"):
        return CheckpointNotFoundError(
            f"{store.location} has {len(files)} torch.save files: open one of them, for example {files[0]!r}"
        )
    parts = [name.rpartition("/") for name in names]
    looked = "checkpoint" if format is None else f"checkpoint of format {format!r}"
    marks = {
        "reshard": MANIFEST_NAME,
        "dcp": METADATA,
        "safetensors": f"*{SUFFIX}",
        "torch": "single torch.save file",
    }
    lacks = ", no ".join(mark for of, mark in marks.items() if format == of or (format is None and of != "torch"))
    inner = min((folder for folder, _, base in parts if folder and base in (MANIFEST_NAME, METADATA)), default=None)
    hint = "" if inner is None else f". There are some below it, such as {inner!r}; `reshard ls` lists them"
    if last_name(store.location) in (MANIFEST_NAME, METADATA):
        hint += ". Pass the folder that contains this file"
    return CheckpointNotFoundError(f"there is no {looked} at {store.location}: it has no {lacks}{hint}")
