"""The blocks of a manifest: each has the columns of a CheckpointIndex for consecutive regions, as bytes.

A reader reads the blocks with the regions that it needs. docs/FORMAT.md describes the blocks byte by byte.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

from ....planner.box import IntArray, concat_ranges
from ....planner.entries import Entry, Segments
from ....planner.index import CheckpointIndex
from ....planner.partition import choose_regions, partition
from ....planner.regions import Regions
from ...errors import CorruptCheckpointError
from ...runtime.checksums import checksum

MAX_BLOCK_BYTES = 64 * 1024
"""The largest size of a block with several regions. A tensor that takes more is divided into regions."""
MAX_MANIFEST_BYTES = 2**36
"""The largest size of a manifest."""
BLOCK_COLUMNS = (
    ("offsets", "<i8", "extents"),
    ("sizes", "<i8", "extents"),
    ("starts", "<i8", "segments"),
    ("checksums", "<u8", "checksums"),
    ("regions", "<u4", "segments"),
    ("objects", "<u4", "segments"),
    ("lengths", "<u4", "chunks"),
    ("streams", "|u1", "segments"),
    ("encodings", "|u1", "segments"),
)
"""The name and type of each column, and what it has one value for. Region numbers are relative to the block."""
BLOCK_COUNTS = ("regions", "segments", "extents", "chunks", "checksums")
"""What the header counts for each block. Extents are the dimensions of all segments together."""


def _column_bytes(counts: IntArray) -> IntArray:
    """Return the (n,) sizes of blocks from their (n, 5) counts. Blocks are padded to a multiple of 8 bytes."""
    each = [sum(np.dtype(dtype).itemsize for _, dtype, of in BLOCK_COLUMNS if of == name) for name in BLOCK_COUNTS]
    nbytes: IntArray = -(-(counts @ np.array(each)) // 8) * 8
    return nbytes


@dataclass(frozen=True, slots=True, eq=False)
class BlockTable:
    """Where the blocks of a manifest are, and what they contain, in columns. Row i is block i."""

    firsts: IntArray
    """(n + 1,) the first region of each block. The regions of all entries are numbered, one entry after another."""
    starts: IntArray
    """(n + 1,) the first byte of each block in the manifest."""
    counts: IntArray
    """(n, 5) the numbers of BLOCK_COUNTS."""
    checksums: tuple[str, ...]
    """The XXH3-64 checksum of the bytes of each block, in hexadecimal."""

    def __len__(self) -> int:
        return len(self.counts)

    def holding(self, regions: IntArray) -> list[int]:
        """Return the blocks that contain some regions."""
        blocks: list[int] = np.unique(np.searchsorted(self.firsts, regions, "right") - 1).tolist()
        return blocks

    def check(self, at: int, data: Buffer, where: str) -> None:
        """Raise CorruptCheckpointError if the bytes of a block are damaged.

        Args:
            at: the block.
            data: its bytes.
            where: the location of the manifest, for the error message.
        """
        start, stop = self.starts[at : at + 2].tolist()
        if memoryview(data).nbytes != stop - start or f"{checksum(data):016x}" != self.checksums[at]:
            raise CorruptCheckpointError(
                f"the manifest {where} does not match its checksum: bytes [{start}, {stop}) are damaged"
            )

    @classmethod
    def of(cls, counts: IntArray, checksums: Sequence[str], start: int) -> BlockTable:
        """Return a table of consecutive blocks with these counts. The first block begins at byte `start`."""
        nbytes, regions = _column_bytes(counts), counts[:, 0]
        return cls(
            np.concatenate(([0], np.cumsum(regions))),
            start + np.concatenate(([0], np.cumsum(nbytes))),
            counts,
            tuple(checksums),
        )

    @classmethod
    def from_json(cls, rows: Any, start: int, regions: int, empty: Sequence[int]) -> BlockTable:
        """Return the table from its JSON rows.

        A region with elements has at least one segment, so the counts cannot exceed the bytes that are read.

        Args:
            rows: the rows: the counts and the checksum of each block.
            start: the first byte of the first block.
            regions: the number of regions of all entries.
            empty: the regions of tensors without elements, sorted.

        Raises:
            ValueError: the counts are impossible.
        """
        numbers = [row[:-1] for row in rows]
        fit = all(
            len(row) == len(BLOCK_COUNTS) and all(type(n) is int and 0 <= n <= MAX_MANIFEST_BYTES for n in row)
            for row in numbers
        )
        if not fit or sum(map(sum, numbers)) > MAX_MANIFEST_BYTES:
            raise ValueError("a block has impossible counts")
        counts = np.array(numbers, np.int64).reshape(-1, len(BLOCK_COUNTS))
        blocks = cls.of(counts, [str(row[-1]) for row in rows], start)
        without = np.diff(np.searchsorted(np.array(empty, np.int64), blocks.firsts))
        if bool(((counts[:, 0] == 0) | (counts[:, 0] > counts[:, 1] + without)).any()):
            raise ValueError("a block has more regions than it can have")
        if int(blocks.firsts[-1]) != regions:
            raise ValueError(f"the blocks do not contain {regions} regions of tensors")
        return blocks

    def to_json(self) -> list[list[Any]]:
        """Return the JSON rows that `from_json` reads."""
        return [[*counts, text] for counts, text in zip(self.counts.tolist(), self.checksums, strict=True)]


def encode_blocks(index: CheckpointIndex) -> tuple[list[tuple[int, ...]], BlockTable, list[bytes]]:
    """Encode an index as blocks.

    Args:
        index: the index, with one region for each entry.

    Returns:
        Into how many parts regions divide each dimension of each entry; the table of the blocks, as if the first began
        at byte 0; the bytes of each block.
    """
    sizes = _region_bytes(index)
    parts = choose_regions(index, [-(-nbytes // MAX_BLOCK_BYTES) for nbytes in sizes])
    if max(map(math.prod, parts), default=1) > 1:
        index = partition(index, parts)
        sizes = _region_bytes(index)
    totals = _totals(index)
    counts: list[IntArray] = []
    encoded: list[bytes] = []
    for first, last in pairwise([*_firsts(sizes), len(sizes)]):
        counts.append(totals[last] - totals[first])
        encoded.append(_encode_block(index, totals[first], totals[last]))
    table = np.array(counts, np.int64).reshape(-1, len(BLOCK_COUNTS))
    return parts, BlockTable.of(table, [f"{checksum(data):016x}" for data in encoded], 0), encoded


def _totals(index: CheckpointIndex) -> IntArray:
    """Return (regions + 1, 5) cumulative BLOCK_COUNTS: before each region, and in total."""
    segments = np.concatenate(([0], np.cumsum(index.regions.segments)))
    columns = (
        np.arange(len(segments)),
        segments,
        index.first_extent[segments],
        index.first_chunk[segments],
        index.first_checksum[segments],
    )
    return np.stack(columns, axis=1)


def _region_bytes(index: CheckpointIndex) -> list[int]:
    sizes: list[int] = _column_bytes(np.diff(_totals(index), axis=0)).tolist()
    return sizes


def _firsts(sizes: Sequence[int]) -> list[int]:
    """Return the first region of each block."""
    firsts: list[int] = []
    room = 0
    for at, nbytes in enumerate(sizes):
        if not firsts or nbytes > room:
            firsts.append(at)
            room = MAX_BLOCK_BYTES
        room -= nbytes
    return firsts


def _encode_block(index: CheckpointIndex, begin: IntArray, end: IntArray) -> bytes:
    """Return the bytes of the block with the regions between two rows of `_totals`."""
    slices = {of: slice(*bounds) for of, *bounds in zip(BLOCK_COUNTS, begin.tolist(), end.tolist(), strict=True)}
    regions = index.regions.segments[slices["regions"]]
    values = {
        "regions": np.repeat(np.arange(len(regions)), regions),
        "lengths": index.lengths[slices["chunks"]],
        "checksums": index.checksums[slices["checksums"]],
    }
    parts = [
        np.ascontiguousarray(values[name] if name in values else getattr(index.segments, name)[slices[of]], dtype)
        for name, dtype, of in BLOCK_COLUMNS
    ]
    data = b"".join(part.tobytes() for part in parts)
    return data + bytes(-len(data) % 8)


def decode_blocks(
    blocks: BlockTable,
    read: Sequence[tuple[int, memoryview]],
    entries: Sequence[Entry],
    parts: Sequence[tuple[int, ...]],
    first_regions: IntArray,
    objects: tuple[tuple[str, int], ...],
    where: str,
    *,
    whole_checksums: bool,
) -> CheckpointIndex:
    """Decode blocks to the index of the regions that they contain.

    Args:
        blocks: the table of all blocks.
        read: the rows of the blocks to decode, in order, each with its bytes.
        entries: the entries of the whole checkpoint.
        parts: into how many parts regions divide each dimension of each entry.
        first_regions: (entries + 1,) the number of each entry's first region.
        objects: name and size of the data objects of the whole checkpoint.
        where: the location of the manifest, for error messages.
        whole_checksums: see `CheckpointIndex`.

    Raises:
        CorruptCheckpointError: a block is damaged.
        InvalidIndexError: the index is impossible.
    """
    found: dict[str, list[npt.NDArray[Any]]] = {name: [] for name, _, _ in BLOCK_COLUMNS}
    known = 0
    for at, data in read:
        blocks.check(at, data, where)
        counts = dict(zip(BLOCK_COUNTS, blocks.counts[at].tolist(), strict=True))
        begin = 0
        for name, dtype, of in BLOCK_COLUMNS:
            values = np.frombuffer(data, dtype, counts[of], begin)
            found[name].append(values)
            begin += values.nbytes
        owners = found["regions"][-1]
        if len(owners) and (int(owners[-1]) >= counts["regions"] or bool((owners[1:] < owners[:-1]).any())):
            raise CorruptCheckpointError(f"the manifest {where} contradicts itself: a segment belongs to no tensor")
        found["regions"][-1] = owners.astype(np.int64) + known
        known += counts["regions"]

    def column(name: str, dtype: Any) -> npt.NDArray[Any]:
        pieces = found[name]
        whole = pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, dtype), *pieces])
        return whole.astype(dtype, copy=False)

    rows = [at for at, _ in read]
    regions = concat_ranges(blocks.firsts[rows], blocks.counts[rows, 0])
    owners = np.searchsorted(first_regions, regions, "right") - 1
    held, entry_of = np.unique(owners, return_inverse=True)
    region_of = column("regions", np.int64)
    segments = Segments(
        entries=entry_of[region_of],
        streams=column("streams", np.uint8),
        encodings=column("encodings", np.uint8),
        objects=column("objects", np.int64),
        starts=column("starts", np.int64),
        offsets=column("offsets", np.int64),
        sizes=column("sizes", np.int64),
    )
    return CheckpointIndex(
        tuple(entries[at] for at in held.tolist()),
        objects,
        segments,
        column("lengths", np.uint32),
        column("checksums", np.uint64),
        Regions(
            tuple(parts[at] for at in held.tolist()),
            entry_of,
            regions - first_regions[owners],
            np.bincount(region_of, minlength=known),
        ),
        whole_checksums,
    )
