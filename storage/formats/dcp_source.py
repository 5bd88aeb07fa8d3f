"""A checkpoint of torch.distributed.checkpoint (DCP) as a source: `.metadata`, and `*.distcp` objects with its shards.

Each shard is serialised as a torch.save file. Its first bytes show where its values are. They are read for many shards
at once, and only for the shards that a read needs. A shard that is compressed or not row-major is read as a whole. With
`serialization_format=SAFETENSORS`, the header of a safetensors file shows where the values are. A save without
collectives leaves the metadata of each rank; together they are the metadata of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...planner.box import Box, IntArray, intersect_many
from ...planner.chunk_reads import WantedBox
from ...planner.coalesce import FREE_GAP_BYTES, MAX_REQUEST_BYTES, GapLimits, coalesce
from ...planner.entries import Encoding, Entry
from ...planner.index import CheckpointIndex
from ...planner.slabs import slabs_of
from ..errors import CorruptCheckpointError, ObjectNotFoundError
from .dcp_metadata import METADATA, DcpMetadata, SerializedShard
from .foreign import ForeignSource, Shards
from .metadata_reader import MetadataReader
from .safetensors_source import TensorHeader, read_header
from .torch_save.zip_layout import MAX_PREAMBLE_BYTES, locate_values

MAX_PREAMBLES_BYTES = 1024 * 1024
"""The most bytes of one request for the first bytes of several shards."""


class DcpSource(ForeignSource):
    """The tensors and values of a DCP checkpoint."""

    format = "dcp"

    def __init__(self, reader: MetadataReader, names: Iterable[str] = (METADATA,)) -> None:
        """Read the metadata.

        Args:
            reader: reads the store.
            names: the objects with metadata: one, or one for each rank.

        Raises:
            CheckpointNotFoundError, CorruptCheckpointError, UnsafeValueError, StoreError: see `DcpMetadata.read`.
        """
        metadata = DcpMetadata.read(reader, names)
        shards = [shard for tensor in metadata.tensors.values() for shard in tensor.shards.values()]
        ends: dict[str, int] = {}
        for shard in [*metadata.values.values(), *shards]:
            ends[shard.object] = max(ends.get(shard.object, 0), shard.start + shard.nbytes)
        super().__init__(reader, ends.items())
        self.paths = metadata.paths
        self.info |= {"files": len(ends)} | metadata.info
        self._add_entries(metadata)
        self._must_read_whole = {
            name: np.array([bool(shard.transforms) for shard in tensor.shards.values()], bool)
            for name, tensor in metadata.tensors.items()
            if name in self._entries
        }
        """For each shard of a tensor, whether it can only be read as a whole."""
        self._is_located = {name: np.zeros(len(shards.starts), bool) for name, shards in self._shards.items()}
        """For each shard, whether `self._shards` has the position of its values. The position has been checked."""
        self._by_metadata = {
            name: (shards.starts.copy(), shards.lengths.copy(), shards.encodings.copy())
            for name, shards in self._shards.items()
        }
        """Where the shards are according to the metadata."""
        self._sized: set[int] = set()
        """The objects whose sizes come from the store. The metadata determines the sizes of the others."""
        self._headers: dict[tuple[int, int], dict[str, TensorHeader]] = {}
        """The tensors of safetensors files, by object and first byte."""

    def _add_entries(self, metadata: DcpMetadata) -> None:
        positions = {name: at for at, (name, _) in enumerate(self.objects)}

        def row(box: Box, shard: SerializedShard, encoding: Encoding) -> tuple[Box, int, int, int, Encoding]:
            return box, positions[shard.object], shard.start, shard.nbytes, encoding

        for name, tensor in metadata.tensors.items():
            rows = [row(box, shard, Encoding.OPAQUE) for box, shard in tensor.shards.items()]
            self.add_tensor(name, tensor.dtype, tensor.shape, Shards.of(rows, len(tensor.shape)))
        for name, value in metadata.values.items():
            shape = (value.nbytes,)
            shards = Shards.of([row(Box.whole(shape), value, Encoding.PLAIN)], 1)
            self.add_stored_value(name, value.nbytes, shards)
        for name, (kind, reason) in metadata.unreadable.items():
            self.refuse(name, kind, reason)

    def index(self, wants: Iterable[WantedBox] | None = None) -> CheckpointIndex:
        if wants is None:
            with self._lock:  # the metadata does not have the byte ranges of shards in safetensors files
                self.locate([WantedBox(name, self._entries[name].whole) for name in self._in_safetensors()])
        return super().index(wants)

    def _in_safetensors(self) -> list[str]:
        """Return the tensors with shards that have no more bytes than their values: those in safetensors files."""
        found = []
        for name, whole in self._must_read_whole.items():
            shards = self._shards[name]
            values = shards.sizes.prod(axis=1) * self._entries[name].itemsize
            if bool((~whole & (shards.encodings == Encoding.OPAQUE) & (shards.lengths <= values)).any()):
                found.append(name)
        return found

    def locate(self, wants: list[WantedBox]) -> None:
        met: dict[tuple[str, int], bool] = {}
        """The shards that the reads overlap and that are not located; and whether locating each is worthwhile."""
        for want in wants:
            is_located = self._is_located.get(want.name)
            if is_located is not None and not bool(is_located.all()):
                shards = self._shards[want.name]
                offsets, sizes = intersect_many(shards.offsets, shards.sizes, want.box)
                rows = np.flatnonzero((sizes > 0).all(axis=1) & ~is_located)
                # If the process was forked while a thread located a shard, its row may be half changed.
                for column, by_metadata in zip(
                    (shards.starts, shards.lengths, shards.encodings), self._by_metadata[want.name], strict=True
                ):
                    column[rows] = by_metadata[rows]  # type: ignore[index]
                worthwhile = self._is_worthwhile(want.name, rows, offsets[rows], sizes[rows])
                for row, is_worthwhile in zip(rows.tolist(), worthwhile.tolist(), strict=True):
                    met[want.name, row] = is_worthwhile or met.get((want.name, row), False)
        shards_met = [self._serialized(name, row) for name, row in met]
        self._check_ends(shards_met)
        to_locate = [shard for shard, is_worthwhile in zip(shards_met, met.values(), strict=True) if is_worthwhile]
        preambles = self._preambles(to_locate)
        files = {
            (shard.object, shard.start)
            for shard, preamble in zip(to_locate, preambles, strict=True)
            if preamble[8:9] == b"{"
        }
        new = sorted(files.difference(self._headers))
        self._headers |= dict(zip(new, self._reader.many(self._header, new), strict=True))
        for shard, preamble in zip(to_locate, preambles, strict=True):
            self._locate_values(shard, preamble)
        # The bytes of a value are read as they are, so only its end had to be checked.
        for shard in (*to_locate, *(shard for shard in shards_met if not shard.entry.is_tensor)):
            self._is_located[shard.entry.name][shard.row] = True

    def _is_worthwhile(self, name: str, rows: IntArray, offsets: IntArray, sizes: IntArray) -> npt.NDArray[np.bool_]:
        """Return which shards to locate, so that boxes of them can be read. The others are read as a whole.

        Locating a shard takes a request. It is not worthwhile if that costs more than reading the rest of the shard
        (`benchmarks/foreign.py`).

        Args:
            name: the tensor.
            rows: (n,) the shards that a read overlaps.
            offsets, sizes: (n, ndim) the boxes of the overlaps.
        """
        worthwhile = np.zeros(len(rows), bool)
        if name not in self._must_read_whole:
            return worthwhile
        worthwhile[:] = ~self._must_read_whole[name][rows]
        if self.store.capabilities.is_local:
            return worthwhile  # on a disk, a request costs less than decoding
        shards, itemsize, costs = self._shards[name], self._entries[name].itemsize, self._reader.costs
        lengths, values = shards.lengths[rows], shards.sizes[rows].prod(axis=1) * itemsize
        # A shard that has no more bytes than its values is in a safetensors file, and the header must be read.
        some = np.flatnonzero(worthwhile & (lengths > values) & (lengths <= MAX_REQUEST_BYTES))
        boxes = shards.offsets[rows[some]], shards.sizes[rows[some]], offsets[some], sizes[some]
        slabs = slabs_of(*boxes, itemsize, costs.gap_limits())
        nbytes = np.where(slabs.runs.sparse, slabs.runs.packed_bytes, slabs.runs.spans)
        worthwhile[some] = lengths[some] - np.bincount(slabs.chunks, nbytes, len(some)) > costs.gap_bytes
        return worthwhile

    def _serialized(self, name: str, row: int) -> _ShardRow:
        shards = self._shards[name]
        at, start, nbytes = (int(column[row]) for column in (shards.objects, shards.starts, shards.lengths))
        return _ShardRow(self._entries[name], row, at, start, nbytes)

    def _check_ends(self, shards: list[_ShardRow]) -> None:
        """Check that the objects have all bytes of some shards, before memory is allocated for them."""
        sizes = dict(enumerate(self.objects))
        new = sorted({shard.object for shard in shards} - self._sized)
        sizes |= {
            at: (sizes[at][0], nbytes) for at, nbytes in zip(new, self._reader.many(self._size, new), strict=True)
        }
        for name, nbytes, shard in ((*sizes[shard.object], shard) for shard in shards):
            if shard.start + shard.nbytes > nbytes:
                raise CorruptCheckpointError(
                    f"{shard.entry.name!r}: object {name!r} in {self.store.location} has {nbytes} bytes, and should "
                    f"have [{shard.start}, {shard.start + shard.nbytes}): it was cut short, or the metadata is damaged"
                )
        self.objects = tuple(sizes.values())
        self._sized.update(new)

    def _size(self, at: int) -> int:
        name = self.objects[at][0]
        try:
            return self._reader.size(name)
        except ObjectNotFoundError as error:
            tensor = next(tensor for tensor, shards in self._shards.items() if at in shards.objects)
            raise CorruptCheckpointError(f"{tensor!r}: object {name!r} is missing in {self.store.location}") from error

    def _preambles(self, shards: list[_ShardRow]) -> list[bytes]:
        """Read the first bytes of serialised shards. Many small shards take few requests."""
        if not shards:
            return []
        # The preamble of a safetensors file may be longer than the shard, which has the size of its values.
        lengths = [min(MAX_PREAMBLE_BYTES, max(shard.nbytes, 9)) for shard in shards]
        objects, starts = (np.array([getattr(s, name) for s in shards], np.int64) for name in ("object", "start"))
        limits = GapLimits(FREE_GAP_BYTES, 0.0, free_gap_bytes=FREE_GAP_BYTES)
        requests = coalesce(objects, starts, starts + lengths, limits, max_request_bytes=MAX_PREAMBLES_BYTES)

        def read(at: int, start: int, stop: int) -> bytes:
            return self._reader.whole(self.objects[at][0], start, stop)

        data = self._reader.many(read, *(c.tolist() for c in (requests.objects, requests.starts, requests.stops)))
        begins = starts - requests.starts[requests.request_of_range]
        return [
            data[request][begin : begin + length]
            for request, begin, length in zip(requests.request_of_range.tolist(), begins.tolist(), lengths, strict=True)
        ]

    def _header(self, file: tuple[int, int]) -> dict[str, TensorHeader]:
        """Read the tensors of a safetensors file that begins at a byte of an object and ends with the object."""
        name, end = self.objects[file[0]]
        return read_header(self._reader, name, file[1], end)[0]

    def _locate_values(self, shard: _ShardRow, preamble: bytes) -> None:
        """Note where the values of a shard are. If the preamble does not show it, the shard is read as a whole."""
        entry, row, shards = shard.entry, shard.row, self._shards[shard.entry.name]
        offsets, sizes = (tuple(column[row].tolist()) for column in (shards.offsets, shards.sizes))
        tensors = self._headers.get((shard.object, shard.start))
        if tensors is not None:
            tensor = tensors.get(entry.name)
            fits = tensor is not None and (tensor.dtype, tensor.shape) == (entry.dtype, sizes)
            if tensor is None or not fits or tensor.offsets not in (None, offsets):
                raise self.contradiction(
                    f"{entry.name!r} should be {entry.dtype} {sizes} at {offsets} in "
                    f"{self.objects[shard.object][0]!r}, whose header has "
                    + ("nothing of this name" if tensor is None else f"{tensor.dtype} {tensor.shape} {tensor.offsets}")
                )
            begin: int | None = tensor.start - shard.start
        else:
            begin = locate_values(preamble, shard.nbytes, entry.dtype, sizes)
        if begin is not None:
            shards.starts[row] = shard.start + begin
            shards.lengths[row] = int(shards.sizes[row].prod()) * entry.itemsize
            shards.encodings[row] = Encoding.PLAIN


@dataclass(frozen=True, slots=True)
class _ShardRow:
    """One shard of a tensor, and its serialised bytes according to the metadata."""

    entry: Entry
    row: int
    object: int
    start: int
    nbytes: int
