"""The metadata of a checkpoint of torch.distributed.checkpoint (DCP), as plain data.

The metadata is a pickle. It is read without running any code that it names (`torch_save/inert_unpickler.py`), and
checked.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ...planner.box import Box
from ...planner.entries import ITEMSIZES
from ...planner.errors import CheckpointError
from ..errors import CheckpointNotFoundError, CorruptCheckpointError, DtypeError, ObjectNotFoundError, UnsafeValueError
from ..runtime.brief import brief, text_of
from ..tensors.state_dict import MAX_NESTING, Path, path_from_json
from .metadata_reader import MALFORMED_ERRORS, MetadataReader
from .torch_save.inert_unpickler import (
    INERT_LAYOUT,
    INERT_SIZE,
    InertDict,
    InertObject,
    checked_sizes,
    inert_class,
    load_inert,
    refused_global_error,
    unknown_name,
)
from .torch_save.pickle_scan import MAX_PICKLE_BYTES
from .tree_size import is_repetitive

METADATA = ".metadata"
RANK_METADATA = re.compile(r"__([0-9]{1,18})\.metadata")
"""The metadata of one rank, from a save without collectives."""
TYPED_PATHS = ".reshard.paths"
"""The key in `planner_data` of paths with keys that are not strings, encoded as in a manifest. Conversions write it."""
ZSTD_TRANSFORM = "stream.zstd"
FIRST_METADATA_READ_BYTES = 1024 * 1024
"""How many bytes of the metadata the first request reads. Most metadata is smaller."""

MAX_PATH_CHARS = 4096
"""The longest name of an object."""
MAX_DTYPE_CHARS = 1000
"""The longest name of a dtype."""
MAX_TRANSFORMS = 16
"""How many transforms the stream of a shard may have passed through."""

_Metadata = inert_class("Metadata")
_TensorMetadata = inert_class("TensorStorageMetadata")
_BytesMetadata = inert_class("BytesStorageMetadata")
_MODULE = "torch.distributed.checkpoint.metadata"
_OLD_MODULE = "torch.distributed._shard.sharded_tensor.metadata"
_METADATA_GLOBALS: dict[tuple[str, str], Any] = {
    (_MODULE, "Metadata"): _Metadata,
    (_MODULE, "TensorStorageMetadata"): _TensorMetadata,
    (_MODULE, "BytesStorageMetadata"): _BytesMetadata,
    **{(_MODULE, name): InertObject for name in ("ChunkStorageMetadata", "MetadataIndex", "StorageMeta")},
    **{
        (module, name): InertObject
        for module in (_MODULE, _OLD_MODULE)
        for name in ("TensorProperties", "_MEM_FORMAT_ENCODING", "MEM_FORMAT_ENCODING")
    },
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): InertObject,
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"): InertObject,
    ("torch.serialization", "_get_layout"): INERT_LAYOUT,
    ("torch", "Size"): INERT_SIZE,
    ("collections", "OrderedDict"): InertDict,
    ("collections", "defaultdict"): InertDict,
    **{
        (module, name): InertObject
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath", "PurePosixPath")
    },
}
"""The classes and functions that metadata may name, and what replaces them."""


class SerializedShard(NamedTuple):
    """Where a shard, or a value, is stored: a byte range of an object, serialised as a whole."""

    object: str
    start: int
    nbytes: int
    transforms: tuple[str, ...]
    """What the stream passed through after serialisation."""


@dataclass(slots=True)
class DcpTensor:
    """A tensor in the metadata."""

    dtype: str
    shape: tuple[int, ...]
    shards: dict[Box, SerializedShard] = field(default_factory=dict)


class DcpMetadata:
    """The metadata of a checkpoint, merged from that of all ranks if each rank wrote its own."""

    def __init__(self) -> None:
        self.tensors: dict[str, DcpTensor] = {}
        self.values: dict[str, SerializedShard] = {}
        self.paths: dict[str, Path] = {}
        """Where entries are in the state dict that was saved."""
        self.unreadable: dict[str, tuple[type[CheckpointError], str]] = {}
        """The names that cannot be read, each with its error class and message."""
        self.info: dict[str, str] = {}
        """What DCP calls its format and the save."""

    @classmethod
    def read(cls, reader: MetadataReader, names: Iterable[str]) -> DcpMetadata:
        """Read and merge the metadata of a checkpoint.

        Args:
            names: the objects with metadata: one, or one for each rank.

        Raises:
            CheckpointNotFoundError: there is no such object.
            CorruptCheckpointError: the metadata is damaged or contradicts itself.
            UnsafeValueError: the metadata needs a class or function that is not allowed.
        """
        merged = cls()
        for name in names:
            metadata = _load(reader, name)
            where = f"{name!r} in {reader.store.location}"
            try:
                merged._add(metadata, where)
            except _UnknownClassError as error:
                raise refused_global_error(where, str(error)) from error
            except MALFORMED_ERRORS as error:
                raise CorruptCheckpointError(f"{where} contradicts itself: {text_of(error)}") from error
        for name in merged.unreadable:
            merged.tensors.pop(name, None)
            merged.values.pop(name, None)
        return merged

    def _add(self, metadata: InertObject, where: str) -> None:
        """Add the metadata of one object. Of a shard that several ranks describe, the first description counts.

        Args:
            where: the name of the object in error messages.

        Raises:
            _UnknownClassError, *MALFORMED_ERRORS: the metadata cannot be used.
        """
        storage = _StorageTable(metadata)
        boxes = _ShardBoxes()
        for name, entry in _known(metadata.get("state_dict_metadata")).items():
            _checked_name(name)
            try:
                if isinstance(_known(entry), _BytesMetadata):
                    self.values.setdefault(name, storage.find(name, None))
                else:
                    self._add_tensor(name, entry, storage, boxes, where)
            except _UnknownClassError as error:
                reason = f"{where} describes {name!r} by {error}, a class that reshard does not know and does not run"
                self.unreadable.setdefault(name, (UnsafeValueError, f"{reason}. The other names can be read"))
        self.paths |= _planner_paths(metadata.get("planner_data"))
        self.info = _info(metadata)

    def _add_tensor(
        self, name: str, entry: InertObject, storage: _StorageTable, boxes: _ShardBoxes, where: str
    ) -> None:
        word = _known(entry.get("properties")).state[0]
        dtype = unknown_name(word) or _checked_name(word)
        if len(dtype) > MAX_DTYPE_CHARS:
            raise ValueError(f"{name!r} has the dtype {brief(dtype)}")
        if dtype not in ITEMSIZES:
            reason = f"{name!r} in {where} has the dtype {dtype}, which reshard cannot read: load it with dcp.load"
            self.unreadable.setdefault(name, (DtypeError, f"{reason}. The other tensors can be read"))
            return
        shape = checked_sizes(_known(entry.get("size")))
        tensor = self.tensors.setdefault(name, DcpTensor(dtype, shape))
        if (tensor.dtype, tensor.shape) != (dtype, shape):
            raise ValueError(
                f"one rank describes {name!r} as {tensor.dtype} {tensor.shape}, another as {dtype} {shape}"
            )
        for box in boxes.of(_known(entry.get("chunks"))):
            if box.ndim != len(shape):
                raise ValueError(f"{name!r} has the shape {shape}, but a shard is {box}")
            if box.numel and box not in tensor.shards:
                tensor.shards[box] = storage.find(name, box.offsets)


class _UnknownClassError(Exception):
    """The metadata needs an object of an unknown class. The message is the name of the class."""


def _known(value: Any) -> Any:
    """Return a value of the metadata. Raise _UnknownClassError if its class is unknown."""
    unknown = unknown_name(value)
    if unknown is not None:
        raise _UnknownClassError(unknown)
    return value


def _checked_name(value: Any) -> str:
    """Return a name. Raise TypeError if it is not a string."""
    if type(value) is not str:
        raise TypeError(f"a name is of {unknown_name(value) or type(value).__name__}")
    return value


class _StorageTable:
    """Where shards and values are stored, by name and offsets: `storage_data` of the metadata."""

    def __init__(self, metadata: InertObject) -> None:
        self._infos: dict[tuple[str, tuple[int, ...] | None], Any] = {}
        self._unknown: list[str] = []
        """The unknown classes among the keys of the table."""
        for index, info in _known(metadata.get("storage_data")).items():
            try:
                name, offset = _known(_known(index).get("fqn")), _known(index.get("offset"))
            except _UnknownClassError as error:
                self._unknown.append(str(error))
                continue
            self._infos[_checked_name(name), None if offset is None else checked_sizes(offset)] = info

    def find(self, name: str, offsets: tuple[int, ...] | None) -> SerializedShard:
        """Return where a value, or the shard at some offsets of a tensor, is stored. Raise ValueError if unknown."""
        if (name, offsets) in self._infos:
            return _serialized_shard(_known(self._infos[name, offsets]))
        if self._unknown:
            raise _UnknownClassError(self._unknown[0])
        raise ValueError(f"nothing says where {name!r} is stored" + ("" if offsets is None else f" at {offsets}"))


class _ShardBoxes:
    """The boxes of lists of shards. Tensors may share one list, which is then only read once."""

    def __init__(self) -> None:
        self._found: dict[int, list[Box] | _UnknownClassError] = {}
        """By the identity of a list, which the metadata keeps alive."""

    def of(self, chunks: Any) -> list[Box]:
        """Return the boxes of a list of shards, without duplicates.

        Of boxes without elements, one for each number of dimensions is returned.
        """
        found = self._found.get(id(chunks))
        if found is None:
            try:
                boxes = dict.fromkeys(
                    Box(checked_sizes(_known(chunk.get("offsets"))), checked_sizes(_known(chunk.get("sizes"))))
                    for chunk in dict.fromkeys(map(_known, chunks))
                )
                empty = {box.ndim: box for box in boxes if not box.numel}
                found = [*(box for box in boxes if box.numel), *empty.values()]
            except _UnknownClassError as error:
                found = error
            self._found[id(chunks)] = found
        if isinstance(found, _UnknownClassError):
            raise found
        return found


def _serialized_shard(info: InertObject) -> SerializedShard:
    """Return where something is stored, from DCP's description. Raise ValueError if that is impossible."""
    name = _known(info.get("relative_path"))
    is_path = type(name) is str and len(name) <= MAX_PATH_CHARS and "\\" not in name and "\0" not in name
    parts = name.split("/") if is_path else []
    if not parts or not all(parts) or {".", ".."}.intersection(parts):
        raise ValueError(f"{brief(name)} is not an object of this folder")
    start, nbytes = checked_sizes((_known(info.get("offset")), _known(info.get("length"))))
    descriptors = _known(info.get("transform_descriptors")) or ()
    transforms = tuple(map(_known, descriptors[:MAX_TRANSFORMS]))
    if any(type(word) is not str or word.partition("/")[0] != ZSTD_TRANSFORM for word in transforms):
        raise ValueError(
            f"the streams passed through {brief(descriptors)}, but reshard only knows {ZSTD_TRANSFORM!r}: load it "
            "with dcp.load"
        )
    if len(transforms) < len(descriptors):
        raise ValueError(f"the streams passed through {len(descriptors)} transforms, more than {MAX_TRANSFORMS}")
    return SerializedShard(name, start, nbytes, transforms)


def _planner_paths(planner_data: Any) -> dict[str, Path]:
    """Return where entries are in the state dict that was saved, if DCP's planner recorded it."""
    if not isinstance(planner_data, dict):
        return {}
    paths: dict[str, Path] = {
        name: path
        for name, path in planner_data.items()
        if type(name) is str
        and type(path) is tuple
        and 0 < len(path) <= MAX_NESTING
        and all(type(key) in (str, int) for key in path)
    }
    typed = planner_data.get(TYPED_PATHS)
    if isinstance(typed, dict):
        if is_repetitive(typed):
            raise ValueError("its paths hold the same lists again and again")
        paths |= {name: path_from_json(path) for name, path in typed.items() if type(name) is str}
    return paths


def _info(metadata: InertObject) -> dict[str, str]:
    """Return what DCP calls its format and the save, if the metadata has it."""
    meta = metadata.get("storage_meta")
    save_id = meta.get("save_id") if isinstance(meta, InertObject) else None
    found = {"version": metadata.get("version"), "save_id": save_id}
    return {key: value for key, value in found.items() if type(value) is str}


def _load(reader: MetadataReader, name: str) -> InertObject:
    """Read and unpickle one object with metadata."""
    try:
        data = reader.whole(name, 0, FIRST_METADATA_READ_BYTES, ending=pickle.STOP)
        if len(data) == FIRST_METADATA_READ_BYTES:
            nbytes = reader.size(name)
            if nbytes > MAX_PICKLE_BYTES:
                raise CorruptCheckpointError(
                    f"{name!r} in {reader.store.location} has {nbytes} bytes; metadata may have {MAX_PICKLE_BYTES}"
                )
            data += reader.exactly(name, len(data), max(nbytes, len(data) + 1))
    except ObjectNotFoundError:
        where = reader.store.location
        raise CheckpointNotFoundError(f"there is no DCP checkpoint at {where}: it has no {name}") from None
    where = f"{name!r} in {reader.store.location}"
    metadata, _ = load_inert(data, _METADATA_GLOBALS, where, allow_unknown=True)
    unknown = unknown_name(metadata)
    if unknown is not None:  # such as Megatron's subclass of Metadata
        state = getattr(metadata, "state", None)
        if not isinstance(state, dict) or not state.keys() >= {"state_dict_metadata", "storage_data"}:
            raise refused_global_error(where, unknown)
        metadata = _Metadata()
        metadata.state = state
    if not isinstance(metadata, _Metadata):
        raise CorruptCheckpointError(f"{where} is not metadata of DCP, but {type(metadata).__name__}")
    return metadata
