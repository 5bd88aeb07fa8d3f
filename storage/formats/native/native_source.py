"""The source of reshard's own format: reads the manifest, and checks that it does not contradict itself.

Opening a manifest takes memory in proportion to the bytes that are read, whatever the manifest claims.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, chain, compress
from types import MappingProxyType
from typing import Any

import numpy as np
from typing_extensions import Buffer

from ....planner.box import concat
from ....planner.chunk_reads import WantedBox
from ....planner.coalesce import MAX_GAP_BYTES, GapLimits
from ....planner.entries import ITEMSIZES, Entry, Kind, are_native
from ....planner.errors import InvalidIndexError
from ....planner.grid import Grid
from ....planner.index import CheckpointIndex, missing_tensor
from ....planner.read_plan import NATIVE_GAP_LIMITS
from ....planner.regions import check_region_parts, regions_met
from ....planner.request_costs import REMOTE_COSTS, RequestCosts
from ...errors import DtypeError, ObjectNotFoundError
from ...runtime.brief import brief
from ...runtime.forks import fork_safe_lock
from ...runtime.threads import Pool
from ...stores.base import Store
from ...tensors.dtypes import torch_dtype
from ...tensors.state_dict import Path, path_from_json
from ..metadata_reader import MALFORMED_ERRORS, Speed
from ..source import RecordWithCrc, Unreadable, bounded
from ..user_metadata import read_metadata
from .manifest import DATA_NAME, WHOLE_CHECKSUMS_SINCE, ManifestBytes, contradiction, read_header
from .manifest_blocks import BlockTable, decode_blocks

READ_BYTES = 8 * 1024 * 1024
"""How many bytes of blocks a request reads, or slightly more."""
MAX_GAP = 0.125
"""Unneeded blocks are read to save a request, up to this fraction of the request's bytes (`benchmarks/planner.py`)."""
MAX_KEPT_BYTES = 64 * 1024 * 1024
"""How many bytes of blocks are kept for later calls."""
MAX_CHUNK_BYTES = 16 * 1024 * 1024
"""The largest size of a chunk's values. It bounds the memory for decoding a chunk, whatever the manifest claims."""


class NativeSource:
    """A checkpoint in reshard's own format. The blocks of a large manifest are read when they are needed."""

    format = "reshard"
    inline: Mapping[str, bytes] = MappingProxyType({})
    records: Sequence[RecordWithCrc] = ()
    unindexed: tuple[str, ...] = ()

    def __init__(self, manifest: ManifestBytes) -> None:
        """Read the header. Raise CorruptCheckpointError, UnsupportedVersionError or StoreError."""
        self._manifest = manifest
        read = read_header(manifest)
        self._version, header = read.version, read.content
        try:
            self._sizes = [_checked_sizes(*row[6:8]) for row in header["entries"]]
            """The claimed number of chunks and stored bytes of each entry. Reading the blocks checks them."""
            self._entries = tuple(
                _entry(size[1], *row[:5]) for row, size in zip(header["entries"], self._sizes, strict=True)
            )
            self.unreadable = _unreadable(self._entries, manifest.where)
            readable = [entry.name not in self.unreadable for entry in self._entries]
            self.entries = tuple(compress(self._entries, readable))
            self.sizes = tuple(compress(self._sizes, readable))
            self.paths: dict[str, Path] = {
                str(row[0]): path_from_json(row[5]) for row in header["entries"] if row[5] is not None
            }
            """Where entries were in the saved state dict."""
            self.objects = tuple((_object_name(name), _as_integers([nbytes])[0]) for name, nbytes in header["objects"])
            """The name and size in bytes of each data object."""
            self.info: dict[str, Any] = dict(header["info"])
            """What wrote the checkpoint, and when."""
            self._metadata: Any = header.get("metadata", {})
            self._positions = {entry.name: position for position, entry in enumerate(self._entries)}
            if len(self._entries) != len(self._positions):
                raise ValueError("two tensors have the same name")
            self._parts = [_parts(e, *row[8:]) for e, row in zip(self._entries, header["entries"], strict=True)]
            self._first_regions = np.array(list(accumulate(map(math.prod, self._parts), initial=0)), np.int64)
            firsts = self._first_regions.tolist()
            empty = [first for first, e in zip(firsts, self._entries, strict=False) if not e.numel]
            self._blocks = BlockTable.from_json(
                header["blocks"], read.blocks_start, int(self._first_regions[-1]), empty
            )
            if int(self._blocks.starts[-1]) != read.stop:
                raise ValueError(f"the blocks do not end at byte {read.stop}")
        except (*MALFORMED_ERRORS, InvalidIndexError) as error:
            raise contradiction(manifest.where, error) from error
        self._is_small = read.stop <= len(manifest.first)
        self._lock = fork_safe_lock()
        self._loaded: tuple[frozenset[int], CheckpointIndex] | None = None
        self._kept: dict[int, memoryview] = {}
        """The blocks that were read and are kept, by their row."""

    @classmethod
    def objects_in(cls, store: Store) -> set[str]:
        """Return the data objects of the checkpoint in a store. Raises what `find` raises."""
        found = cls.find(store)
        return set() if found is None else {name for name, _ in found.objects}

    @classmethod
    def find(cls, store: Store) -> NativeSource | None:
        """Return the checkpoint in a store, or None if it has no manifest. A small manifest takes one request.

        Raises:
            CorruptCheckpointError, UnsupportedVersionError, StoreError: the manifest cannot be read.
        """
        try:
            manifest = ManifestBytes(store)
        except ObjectNotFoundError:
            return None
        return cls(manifest)

    @property
    def store(self) -> Store:
        return self._manifest.store

    @property
    def location(self) -> str:
        return self.store.location

    def fingerprint(self) -> str:
        return f"{self._manifest.header_checksum:016x}"

    def observe(self, nbytes: int, seconds: float) -> None:
        """Ignore the speed of the store."""

    def gap_limits(self, max_over_read: float | None, costs: RequestCosts | None = None) -> GapLimits:
        if costs is None and not self.store.capabilities.is_local:
            costs = REMOTE_COSTS
        bound = bounded(max_over_read)
        if costs is not None:
            return costs.native_gap_limits() if bound is None else costs.gap_limits(bound)
        return NATIVE_GAP_LIMITS if bound is None else GapLimits(MAX_GAP_BYTES, bound)

    @property
    def metadata(self) -> dict[str, Any]:
        """What the user stored with the checkpoint. Raises CorruptCheckpointError if it cannot be decoded."""
        return read_metadata(self._metadata, self._manifest.where)

    @property
    def speed(self) -> Speed:
        return Speed()

    def use_store(self, store: Store, speed: Speed | None = None) -> None:
        self._manifest.store = store
        if speed is not None:
            self._manifest.bytes_read = self._manifest.requests = 0

    @property
    def bytes_read(self) -> int:
        """How many bytes of the manifest have been read."""
        return self._manifest.bytes_read

    @property
    def requests(self) -> int:
        """How many reads of the manifest there were."""
        return self._manifest.requests

    def __contains__(self, name: str) -> bool:
        return name in self._positions

    def entry(self, name: str) -> Entry:
        """Return the entry of this name. Raise MissingTensorError, or the error that `unreadable` has for the name."""
        if name in self.unreadable:
            raise self.unreadable[name].error()
        return self._entries[self._position(name)]

    def _position(self, name: str) -> int:
        if name not in self._positions:
            raise missing_tensor(name, self._positions)
        return self._positions[name]

    def index(self, wants: Iterable[WantedBox] | None = None) -> CheckpointIndex:
        """Return an index with the regions that some reads need, or with all regions. It may contain more.

        Raises:
            CorruptCheckpointError, StoreError: the blocks cannot be read.
            MissingTensorError: a name is missing. Only a large manifest checks this here.
        """
        if wants is None or self._is_small:
            wanted = frozenset(range(len(self._blocks)))
        else:
            wanted = frozenset(self._blocks_of(wants))
        with self._lock:
            if self._loaded is None or not wanted <= self._loaded[0]:
                self._loaded = wanted, self._load(sorted(wanted))
            return self._loaded[1]

    def blocks_to_read(self, wants: Iterable[WantedBox]) -> list[int]:
        """Return the blocks that `index` would read for some reads. Raises what `index` raises for missing names."""
        if self._is_small:
            return []
        return sorted(set(self._blocks_of(wants)).difference(self._kept))

    def block_bytes(self, blocks: Sequence[int]) -> int:
        """Return the size of some blocks."""
        at = np.asarray(blocks, np.int64)
        return int((self._blocks.starts[at + 1] - self._blocks.starts[at]).sum())

    def contents(self) -> bytes:
        """Return the bytes of the manifest. Raise CorruptCheckpointError if they are damaged, or StoreError."""
        starts = self._blocks.starts.tolist()
        data = self._manifest.read(0, starts[-1])
        for at in range(len(self._blocks)):
            self._blocks.check(at, data[starts[at] : starts[at + 1]], self._manifest.where)
        return bytes(data)

    def read_blocks(self, blocks: list[int]) -> dict[int, bytes]:
        """Read blocks for other ranks. Raise CorruptCheckpointError or StoreError."""
        return {at: bytes(data) for at, data in self._read(blocks)}

    def keep_blocks(self, blocks: Mapping[int, Buffer]) -> None:
        """Keep blocks that another rank has read."""
        self._kept |= {at: memoryview(data) for at, data in blocks.items()}

    def _blocks_of(self, wants: Iterable[WantedBox]) -> list[int]:
        """Return the blocks with the regions that some reads need."""
        regions = []
        for want in wants:
            position = self._position(want.name)
            met = regions_met(self._entries[position].shape, self._parts[position], want.box)
            regions.append(met + self._first_regions[position])
        return self._blocks.holding(concat(regions))

    def _read(self, blocks: list[int]) -> list[tuple[int, memoryview]]:
        """Return the bytes of blocks. Blocks that are not kept are read, many with one request."""
        missing = [at for at in blocks if at not in self._kept]
        runs: list[list[int]] = []
        starts = self._blocks.starts.tolist()
        for at in missing:
            if runs:
                begin, end = starts[runs[-1][0]], starts[runs[-1][-1] + 1]
                if starts[at] - end <= MAX_GAP * (end - begin) and starts[at + 1] - begin <= READ_BYTES:
                    runs[-1].append(at)
                    continue
            runs.append([at])

        def read(some: list[list[int]]) -> dict[int, memoryview]:
            found: dict[int, memoryview] = {}
            for run in some:
                first = starts[run[0]]
                data = self._manifest.read(first, starts[run[-1] + 1])
                found |= {at: data[starts[at] - first : starts[at + 1] - first] for at in run}
            return found

        readers = min(len(runs), self.store.capabilities.concurrent_reads)
        if readers <= 1:
            found = read(runs)
        else:
            with Pool(readers, "reshard-manifest") as pool:
                parts = pool.map(read, [runs[at::readers] for at in range(readers)])
                found = dict(chain.from_iterable(part.items() for part in parts))
        result = [(at, found[at] if at in found else self._kept[at]) for at in blocks]
        if sum(map(len, self._kept.values())) + sum(map(len, found.values())) <= MAX_KEPT_BYTES:
            self._kept |= found
        return result

    def _load(self, blocks: list[int]) -> CheckpointIndex:
        read = self._read(blocks)
        try:
            index = decode_blocks(
                self._blocks,
                read,
                self._entries,
                self._parts,
                self._first_regions,
                self.objects,
                self._manifest.where,
                whole_checksums=self._version >= WHOLE_CHECKSUMS_SINCE,
            )
            index.check_disjoint()
            if not are_native(index.segments.encodings).all():
                raise ValueError("a segment has the encoding of another format")
            held = np.bincount(index.regions.entries).tolist()
            for entry, found, known, parts in zip(index.entries, index.sizes, held, index.regions.parts, strict=True):
                if known == math.prod(parts) and found != self._sizes[self._positions[entry.name]]:
                    raise ValueError(f"{entry.name!r} has {found} chunks and bytes, the header says something else")
            return index
        except (*MALFORMED_ERRORS, InvalidIndexError) as error:
            raise contradiction(self._manifest.where, error) from error


def _checked_sizes(chunks: int, stored_bytes: int) -> tuple[int, int]:
    sizes = _as_integers([chunks, stored_bytes])
    if min(sizes) < 0:
        raise ValueError(f"{sizes} chunks and bytes")
    return sizes[0], sizes[1]


def _entry(stored_bytes: int, name: Any, kind: int, dtype: str, shape: list[Any], parts: list[Any]) -> Entry:
    grid = Grid(_as_integers(shape), _as_integers(parts))
    if type(name) is not str or type(dtype) is not str:
        raise ValueError(f"{brief(name)} has the dtype {brief(dtype)}")
    # The itemsize follows from the stored bytes if all chunks are raw. Otherwise this is only a bound.
    itemsize = 0 if dtype in ITEMSIZES else max(1, -(-stored_bytes // max(1, math.prod(grid.shape))))
    entry = Entry(name, Kind(kind), dtype, grid, None, itemsize)
    if entry.grid.cell_numel * entry.itemsize > MAX_CHUNK_BYTES:
        raise ValueError(f"the chunks of {name!r} are larger than {MAX_CHUNK_BYTES} bytes")
    return entry


def _unreadable(entries: Iterable[Entry], where: str) -> dict[str, Unreadable]:
    """Return the tensors whose dtype this version of reshard or torch does not have."""
    lacking: dict[str, str] = {}
    for dtype in {entry.dtype for entry in entries}:
        try:
            torch_dtype(dtype)
            if dtype not in ITEMSIZES:
                lacking[dtype] = "this version of reshard does not know it. Upgrade reshard"
        except DtypeError as error:
            lacking[dtype] = f"{error}. Upgrade torch or reshard, whichever is older"
    return {
        entry.name: Unreadable(
            DtypeError, f"{entry.name!r} in {where} has the dtype {entry.dtype!r}: {lacking[entry.dtype]}"
        )
        for entry in entries
        if entry.dtype in lacking
    }


def _parts(entry: Entry, parts: list[Any] | None) -> tuple[int, ...]:
    """Return into how many parts regions divide each dimension of an entry. Raise ValueError if that is impossible."""
    if parts is None:
        return (1,) * len(entry.shape)
    check_region_parts(entry, _as_integers(parts))
    return tuple(parts)


def _as_integers(values: list[Any]) -> tuple[int, ...]:
    if not {int}.issuperset(map(type, values)):
        raise ValueError(f"{brief(values)} should be integers")
    return tuple(values)


def _object_name(name: str) -> str:
    """Return the name of a data object. Raise ValueError if it could be outside the folder of the checkpoint."""
    if not DATA_NAME.fullmatch(name):
        raise ValueError(f"{brief(name)} is not the name of a data object")
    return name
