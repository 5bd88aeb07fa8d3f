"""A checkpoint of torch.distributed.checkpoint as a source: `.metadata`, and slices of `*.distcp`.

Each slice is a torch.save file of one shard. Where the values lie in it is read from its first bytes, many slices at
once, and only of the slices that a read meets; what is not row-major there, or compressed, is read as a whole. Slices
of `serialization_format=SAFETENSORS` lie where the header of their file says. A save without collectives left the
metadata of each rank; together they are the checkpoint's.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...planner.box import Box, IntArray, intersect_many
from ...planner.chunk_reads import Want
from ...planner.coalesce import MAX_REQUEST_BYTES
from ...planner.entries import ITEMSIZES, Encoding, Entry, Kind
from ...planner.errors import CheckpointError
from ...planner.index import CheckpointIndex
from ...planner.slabs import slabs_of
from ..errors import CheckpointNotFoundError, CorruptCheckpointError, DtypeError, ObjectNotFoundError, UnsafeValueError
from ..runtime.brief import brief, text_of
from ..tensors.state_dict import MAX_NESTING, Path, path_from_json
from .foreign import ForeignSource, Shards
from .metadata_reads import MALFORMED_ERRORS, Reads
from .safetensors import TensorHeader, read_header
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
from .torch_save.zip_layout import MAX_PREAMBLE_BYTES, locate_values
from .tree_size import is_repetitive

METADATA = ".metadata"
RANK_METADATA = re.compile(r"__([0-9]{1,18})\.metadata")
TYPED_PATHS = ".reshard.paths"
"""In `planner_data`: the paths, as in a manifest, that have keys which are not strings. A conversion writes it."""
ZSTD = "stream.zstd"
FIRST_METADATA_READ_BYTES = 1024 * 1024
"""Of the metadata, which most are smaller than."""

MAX_PATH = 4096
"""Characters of the name of an object."""
MAX_DTYPE = 1000
"""Characters of the name of a dtype."""
MAX_TRANSFORMS = 16
"""What the stream of a slice may have gone through."""

_Metadata = inert_class("Metadata")
_TensorMetadata = inert_class("TensorStorageMetadata")
_BytesMetadata = inert_class("BytesStorageMetadata")
_HOME = "torch.distributed.checkpoint.metadata"
_OLD_HOME = "torch.distributed._shard.sharded_tensor.metadata"
_METADATA_GLOBALS: dict[tuple[str, str], Any] = {
    (_HOME, "Metadata"): _Metadata,
    (_HOME, "TensorStorageMetadata"): _TensorMetadata,
    (_HOME, "BytesStorageMetadata"): _BytesMetadata,
    **{(_HOME, name): InertObject for name in ("ChunkStorageMetadata", "MetadataIndex", "StorageMeta")},
    **{(home, "TensorProperties"): InertObject for home in (_HOME, _OLD_HOME)},
    **{
        (home, name): InertObject
        for home in (_HOME, _OLD_HOME)
        for name in ("_MEM_FORMAT_ENCODING", "MEM_FORMAT_ENCODING")
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
_Chunk = tuple[Box, str, int, int, tuple[str, ...]]
"""A box, and where it is: object, first byte, length, and what was done to the stream."""
_Refused = tuple[type[CheckpointError], str]
"""The error of a name that cannot be read, and its message."""


class DcpSource(ForeignSource):
    """The shards of a checkpoint of DCP."""

    format = "dcp"

    def __init__(self, reads: Reads, names: Iterable[str] = (METADATA,)) -> None:
        """
        Args:
            names: the metadata: one, or that of each rank.

        Raises CheckpointNotFoundError, CorruptCheckpointError, UnsafeValueError, StoreError.
        """
        tensors: dict[str, tuple[str, tuple[int, ...], dict[Box, _Chunk]]] = {}
        blobs: dict[str, _Chunk] = {}
        paths: dict[str, Path] = {}
        unreadable: dict[str, _Refused] = {}
        for name in names:
            metadata = _read_metadata(reads, name)
            try:
                _merge(metadata, f"{name!r} in {reads.store.location}", tensors, blobs, unreadable)
                paths |= _planner_paths(metadata.get("planner_data"))
            except _UnknownClassError as error:
                raise refused_global_error(f"{name!r} in {reads.store.location}", str(error)) from error
            except MALFORMED_ERRORS as error:
                where = f"{name!r} in {reads.store.location}"
                raise CorruptCheckpointError(f"{where} contradicts itself: {text_of(error)}") from error
        for name in unreadable:
            tensors.pop(name, None)
            blobs.pop(name, None)
        slices = [chunk for _, _, chunks in tensors.values() for chunk in chunks.values()]
        ends: dict[str, int] = {}
        for _, file, start, length, _ in [*blobs.values(), *slices]:
            ends[file] = max(ends.get(file, 0), start + length)
        super().__init__(reads, ends.items())
        self.paths = paths
        self.info |= {"files": len(ends)} | _identity(metadata)
        positions = {file: at for at, (file, _) in enumerate(self.objects)}
        for name, (dtype, shape, chunks) in tensors.items():
            rows = [(box, positions[file], at, length, Encoding.OPAQUE) for box, file, at, length, _ in chunks.values()]
            self.add(name, Kind.TENSOR, dtype, shape, Shards.of(rows, len(shape)))
        for name, (_, file, at, length, _) in blobs.items():
            shards = Shards.of([(Box.whole((length,)), positions[file], at, length, Encoding.PLAIN)], 1)
            self.add(name, Kind.TORCH_SAVE, "uint8", (length,), shards)
        for name, (kind, reason) in unreadable.items():
            self.refuse(name, kind, reason)
        self._whole = {
            name: np.array([bool(transforms) for *_, transforms in chunks.values()], bool)
            for name, (_, _, chunks) in tensors.items()
            if name in self._entries
        }
        """Of each shard of a tensor, whether it is known to be read as a whole."""
        self._settled = {name: np.zeros(len(shards.starts), bool) for name, shards in self._shards.items()}
        """Of each shard, whether where it is has been found out, and is known to be there."""
        self._told = {
            name: (shards.starts.copy(), shards.lengths.copy(), shards.encodings.copy())
            for name, shards in self._shards.items()
        }
        """Where the shards are by the metadata."""
        self._sized: set[int] = set()
        """Objects whose sizes are from the store; those of the others are what the metadata tells."""
        self._files: dict[tuple[int, int], dict[str, TensorHeader]] = {}
        """The tensors of safetensors files, by object and first byte."""

    def index(self, wants: Iterable[Want] | None = None) -> CheckpointIndex:
        if wants is None:
            with self._lock:  # of safetensors files, the metadata does not tell even the slices
                self.locate([Want(name, Box.whole(self._entries[name].shape)) for name in self._in_safetensors()])
        return super().index(wants)

    def _in_safetensors(self) -> list[str]:
        """Tensors whose slices have no more bytes than their values: those of safetensors files."""
        found = []
        for name, whole in self._whole.items():
            shards = self._shards[name]
            values = shards.sizes.prod(axis=1) * self._entries[name].itemsize
            if bool((~whole & (shards.encodings == Encoding.OPAQUE) & (shards.lengths <= values)).any()):
                found.append(name)
        return found

    def locate(self, wants: list[Want]) -> None:
        met: dict[tuple[str, int], bool] = {}
        """The shards that are met and not settled, and whether a part of them is worth finding out where it is."""
        for want in wants:
            if want.name in self._settled:
                shards = self._shards[want.name]
                offsets, sizes = intersect_many(shards.offsets, shards.sizes, want.box)
                rows = np.flatnonzero((sizes > 0).all(axis=1) & ~self._settled[want.name])
                # A process that was forked while a thread settled a shard has it half settled.
                for column, told in zip(
                    (shards.starts, shards.lengths, shards.encodings), self._told[want.name], strict=True
                ):
                    column[rows] = told[rows]  # type: ignore[index]
                apart = self._is_worth_it(want.name, rows, offsets[rows], sizes[rows])
                for row, worth_it in zip(rows.tolist(), apart.tolist(), strict=True):
                    met[want.name, row] = worth_it or met.get((want.name, row), False)
        slices = [self._slice(name, row) for name, row in met]
        self._check_ends(slices)
        unclear = [piece for piece, worth_it in zip(slices, met.values(), strict=True) if worth_it]
        heads = self._reads.many(self._head, unclear)
        files = {(s.object, s.start) for s, head in zip(unclear, heads, strict=True) if head[8:9] == b"{"}
        new = sorted(files.difference(self._files))
        self._files |= dict(zip(new, self._reads.many(self._header, new), strict=True))
        for piece, head in zip(unclear, heads, strict=True):
            self._settle(piece, head)
        for piece in unclear:
            self._settled[piece.entry.name][piece.row] = True

    def _is_worth_it(self, name: str, rows: IntArray, offsets: IntArray, sizes: IntArray) -> npt.NDArray[np.bool_]:
        """Whether to ask where the values of some shards are, to read boxes of them; else they are read as a whole.

        To ask takes a request for each. Where that costs more than the rest of the slice, it is not worth it.
        """
        apart = np.zeros(len(rows), bool)
        if name not in self._whole:
            return apart
        apart[:] = ~self._whole[name][rows]
        if self.store.capabilities.read_into is not None:
            return apart  # on a disk, to ask costs nothing, and to decode does
        shards, itemsize, costs = self._shards[name], self._entries[name].itemsize, self._reads.costs
        lengths, values = shards.lengths[rows], shards.sizes[rows].prod(axis=1) * itemsize
        # A slice that has no more bytes than its values is one of a safetensors file, whose header has to be read.
        some = np.flatnonzero(apart & (lengths > values) & (lengths <= MAX_REQUEST_BYTES))
        boxes = shards.offsets[rows[some]], shards.sizes[rows[some]], offsets[some], sizes[some]
        slabs = slabs_of(*boxes, itemsize, costs.gap_limits())
        nbytes = np.where(slabs.runs.sparse, slabs.runs.packed_bytes, slabs.runs.spans)
        apart[some] = lengths[some] - np.bincount(slabs.chunks, nbytes, len(some)) > costs.gap_bytes
        return apart

    def _slice(self, name: str, row: int) -> _Slice:
        shards = self._shards[name]
        at, start, nbytes = (int(column[row]) for column in (shards.objects, shards.starts, shards.lengths))
        return _Slice(self._entries[name], row, at, start, nbytes)

    def _check_ends(self, slices: list[_Slice]) -> None:
        """Check that the objects have the bytes of which the metadata tells, before memory is taken for them."""
        sizes = dict(enumerate(self.objects))
        new = sorted({piece.object for piece in slices} - self._sized)
        sizes |= {at: (sizes[at][0], nbytes) for at, nbytes in zip(new, self._reads.many(self._size, new), strict=True)}
        for name, nbytes, piece in ((*sizes[piece.object], piece) for piece in slices):
            if piece.start + piece.nbytes > nbytes:
                raise CorruptCheckpointError(
                    f"{piece.entry.name!r}: object {name!r} in {self.store.location} has {nbytes} bytes, and should "
                    f"have [{piece.start}, {piece.start + piece.nbytes}): it was cut short, or the metadata is damaged"
                )
        self.objects = tuple(sizes.values())
        self._sized.update(new)

    def _size(self, at: int) -> int:
        name = self.objects[at][0]
        try:
            return self._reads.size(name)
        except ObjectNotFoundError as error:
            tensor = next(tensor for tensor, shards in self._shards.items() if at in shards.objects)
            raise CorruptCheckpointError(f"{tensor!r}: object {name!r} is missing in {self.store.location}") from error

    def _head(self, piece: _Slice) -> bytes:
        nbytes = min(
            MAX_PREAMBLE_BYTES, max(piece.nbytes, 9)
        )  # one of safetensors has the values' size, which may be less
        return self._reads.whole(self.objects[piece.object][0], piece.start, piece.start + nbytes)

    def _header(self, place: tuple[int, int]) -> dict[str, TensorHeader]:
        """The tensors of the safetensors file that begins at a byte of an object and ends with it."""
        name, end = self.objects[place[0]]
        return read_header(self._reads, name, place[1], end)[0]

    def _settle(self, piece: _Slice, head: bytes) -> None:
        """Note where the values of a slice are; where that is not told, it is read as a whole."""
        entry, row, shards = piece.entry, piece.row, self._shards[piece.entry.name]
        offsets, sizes = (tuple(column[row].tolist()) for column in (shards.offsets, shards.sizes))
        tensors = self._files.get((piece.object, piece.start))
        if tensors is not None:
            tensor = tensors.get(entry.name)
            fits = tensor is not None and (tensor.dtype, tensor.shape) == (entry.dtype, sizes)
            if tensor is None or not fits or tensor.offsets not in (None, offsets):
                raise self.contradiction(
                    f"{entry.name!r} should be {entry.dtype} {sizes} at {offsets} in "
                    f"{self.objects[piece.object][0]!r}, whose header has "
                    + ("nothing of this name" if tensor is None else f"{tensor.dtype} {tensor.shape} {tensor.offsets}")
                )
            begin: int | None = tensor.start - piece.start
        else:
            begin = locate_values(head, piece.nbytes, entry.dtype, sizes)
        if begin is not None:
            shards.starts[row] = piece.start + begin
            shards.lengths[row] = int(shards.sizes[row].prod()) * entry.itemsize
            shards.encodings[row] = Encoding.PLAIN


@dataclass(frozen=True, slots=True)
class _Slice:
    """The bytes of one shard, as the metadata tells them."""

    entry: Entry
    row: int
    object: int
    start: int
    nbytes: int


def _read_metadata(reads: Reads, name: str) -> InertObject:
    try:
        data = reads.whole(name, 0, FIRST_METADATA_READ_BYTES, ending=pickle.STOP)
        if len(data) == FIRST_METADATA_READ_BYTES:
            nbytes = reads.size(name)
            if nbytes > MAX_PICKLE_BYTES:
                raise CorruptCheckpointError(
                    f"{name!r} in {reads.store.location} has {nbytes} bytes; metadata may have {MAX_PICKLE_BYTES}"
                )
            data += reads.exactly(name, len(data), max(nbytes, len(data) + 1))
    except ObjectNotFoundError:
        where = reads.store.location
        raise CheckpointNotFoundError(f"there is no checkpoint of DCP at {where}: it has no {name}") from None
    where = f"{name!r} in {reads.store.location}"
    metadata, _ = load_inert(data, _METADATA_GLOBALS, where, allow_unknown=True)
    foreign = unknown_name(metadata)
    if foreign is not None:
        state = getattr(metadata, "state", None)
        if not isinstance(state, dict) or not state.keys() >= {"state_dict_metadata", "storage_data"}:
            raise refused_global_error(where, foreign)
        metadata = _Metadata()  # of a class of its own that derives from it, as Megatron's
        metadata.state = state
    if not isinstance(metadata, _Metadata):
        raise CorruptCheckpointError(f"{where} is no metadata of DCP, but {type(metadata).__name__}")
    return metadata


class _UnknownClassError(Exception):
    """What a tensor's own metadata says is an object of a class that is not known."""


def _name(value: Any) -> str:
    """Return a name. Raises TypeError for what is no string."""
    if type(value) is not str:
        raise TypeError(f"a name is of {unknown_name(value) or type(value).__name__}")
    return value


def _known(value: Any) -> Any:
    """Return a value of the metadata. Raises _UnknownClassError if it is of a class that is not known."""
    foreign = unknown_name(value)
    if foreign is not None:
        raise _UnknownClassError(foreign)
    return value


def _merge(
    metadata: InertObject,
    where: str,
    tensors: dict[str, tuple[str, tuple[int, ...], dict[Box, _Chunk]]],
    blobs: dict[str, _Chunk],
    unreadable: dict[str, _Refused],
) -> None:
    """Add what one metadata tells; what is there already stays. Raises what Python does where it is malformed.

    Args:
        where: what errors call the metadata.
        unreadable: names whose own metadata needs a class that is not known, or whose dtype is not known.
    """
    stored, foreign = _stored(metadata)

    def place(name: str, offsets: tuple[int, ...] | None) -> tuple[str, int, int, tuple[str, ...]]:
        if (name, offsets) in stored:
            return _place(_known(stored[name, offsets]))
        if foreign:
            raise _UnknownClassError(foreign[0])
        raise ValueError(f"nothing tells where {name!r} is stored" + ("" if offsets is None else f" at {offsets}"))

    boxes: dict[int, list[Box] | _UnknownClassError] = {}
    """Of each list of shards that was met, by its identity: several tensors may have one."""
    for name, entry in _known(metadata.get("state_dict_metadata")).items():
        _name(name)
        try:
            if isinstance(_known(entry), _BytesMetadata):
                blobs.setdefault(name, (Box((), ()), *place(name, None)))
                continue
            word = _known(entry.get("properties")).state[0]
            dtype = unknown_name(word) or _name(word)
            if len(dtype) > MAX_DTYPE:
                raise ValueError(f"{name!r} has the dtype {brief(dtype)}")
            if dtype not in ITEMSIZES:
                reason = f"{name!r} in {where} has the dtype {dtype}, which reshard cannot read: load it with dcp.load"
                unreadable.setdefault(name, (DtypeError, f"{reason}. The other tensors can be read"))
                continue
            shape = checked_sizes(_known(entry.get("size")))
            *known, chunks = tensors.setdefault(name, (dtype, shape, {}))
            if known != [dtype, shape]:
                raise ValueError(f"{name!r} is of {dtype} {shape} to one rank, and of {known} to another")
            for box in _boxes(_known(entry.get("chunks")), boxes):
                if box.ndim != len(shape):
                    raise ValueError(f"{name!r} has the shape {shape}, and a shard {box}")
                if box.numel and box not in chunks:
                    chunks[box] = (box, *place(name, box.offsets))
        except _UnknownClassError as error:
            reason = f"{where} describes {name!r} by {error}, a class that reshard does not know and does not run"
            unreadable.setdefault(name, (UnsafeValueError, f"{reason}. The other names can be read"))


def _boxes(chunks: Any, known: dict[int, list[Box] | _UnknownClassError]) -> list[Box]:
    """Return the boxes of a list of shards, each once; of those without elements, one of each number of dimensions.

    Args:
        known: those of the lists that were met before.
    """
    found = known.get(id(chunks))
    if found is None:
        try:
            every = dict.fromkeys(
                Box(checked_sizes(_known(chunk.get("offsets"))), checked_sizes(_known(chunk.get("sizes"))))
                for chunk in dict.fromkeys(map(_known, chunks))
            )
            empty = {box.ndim: box for box in every if not box.numel}
            found = [*(box for box in every if box.numel), *empty.values()]
        except _UnknownClassError as error:
            found = error
        known[id(chunks)] = found
    if isinstance(found, _UnknownClassError):
        raise found
    return found


def _stored(metadata: InertObject) -> tuple[dict[tuple[str, tuple[int, ...] | None], Any], list[str]]:
    """What tells where slices are, by name and offsets; and the classes that are not known of what else there is."""
    stored: dict[tuple[str, tuple[int, ...] | None], Any] = {}
    foreign: list[str] = []
    for index, info in _known(metadata.get("storage_data")).items():
        try:
            name, offset = _known(_known(index).get("fqn")), _known(index.get("offset"))
        except _UnknownClassError as error:
            foreign.append(str(error))
            continue
        stored[_name(name), None if offset is None else checked_sizes(offset)] = info
    return stored, foreign


def _identity(metadata: InertObject) -> dict[str, str]:
    """What DCP calls its format and the save, as far as the metadata has it."""
    meta = metadata.get("storage_meta")
    found = {
        "version": metadata.get("version"),
        "save_id": meta.get("save_id") if isinstance(meta, InertObject) else None,
    }
    return {key: value for key, value in found.items() if type(value) is str}


def _planner_paths(planner_data: Any) -> dict[str, Path]:
    """The paths of values in the state dict that was saved, as far as DCP's planner has recorded them."""
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


def _place(info: InertObject) -> tuple[str, int, int, tuple[str, ...]]:
    """Where a slice is. Raises ValueError where that cannot be."""
    name = _known(info.get("relative_path"))
    is_path = type(name) is str and len(name) <= MAX_PATH and "\\" not in name and "\0" not in name
    parts = name.split("/") if is_path else []
    if not parts or not all(parts) or {".", ".."}.intersection(parts):
        raise ValueError(f"{brief(name)} is no object of this folder")
    start, length = checked_sizes((_known(info.get("offset")), _known(info.get("length"))))
    descriptors = _known(info.get("transform_descriptors")) or ()
    transforms = tuple(map(_known, descriptors[:MAX_TRANSFORMS]))
    if any(type(word) is not str or word.partition("/")[0] != ZSTD for word in transforms):
        raise ValueError(f"the streams went through {brief(descriptors)}, of which reshard knows {ZSTD!r}")
    if len(transforms) < len(descriptors):
        raise ValueError(f"the streams went through {len(descriptors)} transforms")
    return name, start, length, transforms
