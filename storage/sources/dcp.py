"""A checkpoint of torch.distributed.checkpoint as a source: `.metadata`, and slices of `*.distcp`.

Each slice is a torch.save file of one shard. Where the values lie in it is read from its first bytes, many slices at
once, and only of the slices that a read meets; what is not row-major there, or compressed, is read as a whole. Slices
of `serialization_format=SAFETENSORS` lie where the header of their file says. A save without collectives left the
metadata of each rank; together they are the checkpoint's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...planner.box import Box, intersect_many
from ...planner.index import ITEMSIZES, Encoding, Entry, Kind
from ...planner.read_plan import Want
from ..errors import CheckpointNotFoundError, CorruptCheckpointError, ObjectNotFoundError
from .foreign import ForeignSource, Shards
from .inert import Record, load_inert, record
from .reads import Reads
from .safetensors import Tensor, read_header
from .zip_head import HEAD_BYTES, locate_values

METADATA = ".metadata"
RANK_METADATA = re.compile(r"__(\d+)\.metadata")
ZSTD = "stream.zstd"

_Metadata, _TensorMetadata, _BytesMetadata = (
    record("Metadata"),
    record("TensorStorageMetadata"),
    record("BytesStorageMetadata"),
)
_HOME = "torch.distributed.checkpoint.metadata"
_OLD_HOME = "torch.distributed._shard.sharded_tensor.metadata"
_ALLOWED: dict[tuple[str, str], Any] = {
    (_HOME, "Metadata"): _Metadata,
    (_HOME, "TensorStorageMetadata"): _TensorMetadata,
    (_HOME, "BytesStorageMetadata"): _BytesMetadata,
    **{(_HOME, name): Record for name in ("ChunkStorageMetadata", "MetadataIndex", "StorageMeta")},
    **{(home, "TensorProperties"): Record for home in (_HOME, _OLD_HOME)},
    **{(home, name): Record for home in (_HOME, _OLD_HOME) for name in ("_MEM_FORMAT_ENCODING", "MEM_FORMAT_ENCODING")},
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): Record,
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"): Record,
    ("torch.serialization", "_get_layout"): str,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): dict,
    **{
        (module, name): Record
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath", "PurePosixPath")
    },
}
_CONTRADICTIONS = (ValueError, LookupError, TypeError, AttributeError)
_Chunk = tuple[Box, str, int, int, tuple[str, ...]]
"""A box, and where it is: object, first byte, length, and what was done to the stream."""


class DcpSource(ForeignSource):
    """The shards of a checkpoint of DCP."""

    format = "dcp"

    def __init__(self, reads: Reads, names: Iterable[str] = (METADATA,)) -> None:
        """
        Args:
            names: the metadata: one, or that of each rank.

        Raises CheckpointNotFoundError, CorruptCheckpointError, UnsafeObjectError, StoreError.
        """
        tensors: dict[str, tuple[str, tuple[int, ...], dict[Box, _Chunk]]] = {}
        blobs: dict[str, _Chunk] = {}
        paths: dict[str, tuple[str | int, ...]] = {}
        for name in names:
            metadata = _read_metadata(reads, name)
            try:
                _merge(metadata, tensors, blobs)
                if isinstance(metadata.get("planner_data"), dict):
                    paths |= {str(key): tuple(path) for key, path in metadata.get("planner_data").items()}
            except _CONTRADICTIONS as error:
                raise CorruptCheckpointError(
                    f"{name!r} in {reads.store.location} contradicts itself: {error}"
                ) from error
        ends: dict[str, int] = {}
        for _, file, start, length, _ in [
            *blobs.values(),
            *(c for _, _, chunks in tensors.values() for c in chunks.values()),
        ]:
            ends[file] = max(ends.get(file, 0), start + length)
        super().__init__(reads, ends.items())
        self.paths = paths
        self.info |= {"files": len(ends)}
        positions = {file: at for at, (file, _) in enumerate(self.objects)}
        for name, (dtype, shape, chunks) in tensors.items():
            rows = [(box, positions[file], at, length, Encoding.OPAQUE) for box, file, at, length, _ in chunks.values()]
            self.add(name, Kind.TENSOR, dtype, shape, Shards.of(rows, len(shape)))
        for name, (_, file, at, length, _) in blobs.items():
            shards = Shards.of([(Box.whole((length,)), positions[file], at, length, Encoding.PLAIN)], 1)
            self.add(name, Kind.TORCH_SAVE, "uint8", (length,), shards)
        self._located = {
            name: np.array([bool(transforms) for *_, transforms in chunks.values()], bool)
            for name, (_, _, chunks) in tensors.items()
        }
        """Of each shard, whether its encoding is settled."""
        self._files: dict[tuple[str, int], tuple[dict[str, Tensor], int]] = {}
        """Tensors and ends of safetensors files, by object and first byte."""

    def locate(self, wants: list[Want]) -> None:
        met: dict[tuple[str, int], Entry] = {}
        for want in wants:
            if want.name in self._located:
                shards = self._shards[want.name]
                overlap = intersect_many(shards.offsets, shards.sizes, want.box)[1]
                rows = np.flatnonzero((overlap > 0).all(axis=1) & ~self._located[want.name])
                met |= {(want.name, row): self._entries[want.name] for row in rows.tolist()}
        slices = [_Slice(entry, row, *self._slice(name, row)) for (name, row), entry in met.items()]
        heads = self._reads.many(self._head, slices)
        files = {(s.object, s.start) for s, head in zip(slices, heads, strict=True) if head[8:9] == b"{"} - set(
            self._files
        )
        for key, found in zip(files, self._reads.many(self._header, list(files)), strict=True):
            self._files[key] = found
        for piece, head in zip(slices, heads, strict=True):
            self._settle(piece, head)

    def _slice(self, name: str, row: int) -> tuple[str, int, int]:
        shards = self._shards[name]
        return self.objects[int(shards.objects[row])][0], int(shards.starts[row]), int(shards.lengths[row])

    def _head(self, piece: _Slice) -> bytes:
        try:
            return self._reads.read(piece.object, piece.start, piece.start + min(HEAD_BYTES, piece.nbytes))
        except ObjectNotFoundError as error:
            raise CorruptCheckpointError(
                f"{piece.entry.name!r}: object {piece.object!r} is missing in {self.store.location}"
            ) from error

    def _header(self, place: tuple[str, int]) -> tuple[dict[str, Tensor], int]:
        """The tensors of the safetensors file that begins at a byte of an object and ends with it, and that end."""
        end = self._reads.size(place[0])
        return read_header(self._reads, *place, end)[0], end

    def _settle(self, piece: _Slice, head: bytes) -> None:
        """Note where the values of a slice are; where that is not told, it is read as a whole."""
        entry, row, shards = piece.entry, piece.row, self._shards[piece.entry.name]
        sizes = tuple(shards.sizes[row].tolist())
        if (piece.object, piece.start) in self._files:
            tensors, end = self._files[piece.object, piece.start]
            tensor = tensors.get(entry.name)
            if tensor is None or (tensor.dtype, tensor.shape) != (entry.dtype, sizes):
                raise self.contradiction(
                    f"{entry.name!r} should be {entry.dtype} {sizes} in {piece.object!r}, whose header has "
                    + ("nothing of this name" if tensor is None else f"{tensor.dtype} {tensor.shape}")
                )
            at = int(shards.objects[row])
            self.objects = (*self.objects[:at], (piece.object, end), *self.objects[at + 1 :])
            begin: int | None = tensor.start - piece.start
        else:
            begin = locate_values(head, piece.nbytes, entry.dtype, sizes)
        if begin is not None:
            shards.starts[row] = piece.start + begin
            shards.lengths[row] = int(shards.sizes[row].prod()) * entry.itemsize
            shards.encodings[row] = Encoding.PLAIN
        self._located[entry.name][row] = True


@dataclass(frozen=True, slots=True)
class _Slice:
    """The bytes of one shard, as the metadata tells them."""

    entry: Entry
    row: int
    object: str
    start: int
    nbytes: int


def _read_metadata(reads: Reads, name: str) -> Record:
    try:
        data = reads.exactly(name, 0, reads.size(name))
    except ObjectNotFoundError:
        raise CheckpointNotFoundError(
            f"there is no checkpoint of DCP at {reads.store.location}: it has no {name}"
        ) from None
    where = f"{name!r} in {reads.store.location}"
    metadata, _ = load_inert(data, _ALLOWED, where)
    if not isinstance(metadata, _Metadata):
        raise CorruptCheckpointError(f"{where} is no metadata of DCP, but {type(metadata).__name__}")
    return metadata


def _merge(
    metadata: Record,
    tensors: dict[str, tuple[str, tuple[int, ...], dict[Box, _Chunk]]],
    blobs: dict[str, _Chunk],
) -> None:
    """Add what one metadata tells; what is there already stays. Raises what Python does where it is malformed."""
    stored = {
        (index.get("fqn"), None if index.get("offset") is None else tuple(index.get("offset"))): _place(info)
        for index, info in metadata.get("storage_data").items()
    }
    for name, entry in metadata.get("state_dict_metadata").items():
        if isinstance(entry, _BytesMetadata):
            blobs.setdefault(str(name), (Box((), ()), *stored[name, None]))
            continue
        dtype, shape = str(entry.get("properties").state[0]), tuple(entry.get("size"))
        if dtype not in ITEMSIZES:
            raise ValueError(f"{name!r} has the dtype {dtype}")
        chunks = tensors.setdefault(str(name), (dtype, shape, {}))[2]
        for chunk in entry.get("chunks"):
            box = Box(tuple(chunk.get("offsets")), tuple(chunk.get("sizes")))
            if box.numel and box not in chunks:
                chunks[box] = (box, *stored[name, box.offsets])


def _place(info: Record) -> tuple[str, int, int, tuple[str, ...]]:
    """Where a slice is. Raises ValueError where that cannot be."""
    name, start, length = info.get("relative_path"), info.get("offset"), info.get("length")
    parts = str(name).split("/")
    if not all(parts) or {".", ".."}.intersection(parts) or "\\" in str(name):
        raise ValueError(f"{name!r} is no object of this folder")
    if type(start) is not int or type(length) is not int or start < 0 or not 0 <= length <= 2**60:
        raise ValueError(f"bytes {start}, {length} of {name!r}")
    transforms = tuple(info.get("transform_descriptors") or ())
    if any(str(transform).partition("/")[0] != ZSTD for transform in transforms):
        raise ValueError(f"the streams went through {transforms}, of which reshard knows {ZSTD!r}")
    return str(name), start, length, transforms
