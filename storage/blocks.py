"""Blocks of a manifest: the columns of a CheckpointIndex, for a run of its tensors, as bytes.

Block after block, whatever the layout that saved them; a reader takes those of the tensors that it needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from ..planner.index import CheckpointIndex, Entry, Segments
from .checksums import checksum
from .errors import CorruptCheckpointError

BLOCK_BYTES = 256 * 1024
"""A block ends where the blocks so far pass a multiple of this."""
COLUMNS = (
    ("offsets", "<i8", "extents"),
    ("sizes", "<i8", "extents"),
    ("starts", "<i8", "segments"),
    ("checksums", "<u8", "checksums"),
    ("entries", "<u4", "segments"),
    ("objects", "<u4", "segments"),
    ("lengths", "<u4", "chunks"),
    ("streams", "|u1", "segments"),
    ("encodings", "|u1", "segments"),
)
"""Name, type, and what the column has one value for. Entries are counted from the first of the block."""


@dataclass(frozen=True, slots=True)
class Block:
    """Where a block is, and what it holds."""

    start: int
    """Its first byte, in the manifest."""
    first: int
    """Its first entry."""
    entries: int
    """How many it has."""
    segments: int
    extents: int
    """Dimensions of all its segments together."""
    chunks: int
    checksums: int
    checksum: int
    """XXH3-64 of its bytes."""

    @property
    def nbytes(self) -> int:
        """Padded to a multiple of 8."""
        used = sum(np.dtype(dtype).itemsize * int(getattr(self, count)) for _, dtype, count in COLUMNS)
        return -(-used // 8) * 8

    @property
    def stop(self) -> int:
        return self.start + self.nbytes


def encode_blocks(index: CheckpointIndex) -> Iterator[tuple[Block, bytes]]:
    """All entries of an index as blocks, each with its bytes; the first begins at byte 0."""
    sizes = [_entry_bytes(index, position) for position in range(len(index.entries))]
    totals = list(accumulate(sizes, initial=0))
    cuts = [0] + [at for at in range(1, len(sizes)) if totals[at] // BLOCK_BYTES > totals[at - 1] // BLOCK_BYTES]
    start = 0
    for first, last in pairwise([*cuts, len(sizes)] if sizes else []):
        columns = _columns_of(index, first, last)
        data = b"".join(np.ascontiguousarray(columns[name], dtype).tobytes() for name, dtype, _ in COLUMNS)
        data += bytes(-len(data) % 8)
        counts = (len(columns["starts"]), len(columns["offsets"]), len(columns["lengths"]), len(columns["checksums"]))
        yield Block(start, first, last - first, *counts, checksum(data)), data
        start += len(data)


def _entry_bytes(index: CheckpointIndex, position: int) -> int:
    segments, chunks, checksums = (part.stop - part.start for part in _ranges(index, position, position + 1))
    a_segment = 18 + 16 * len(index.entries[position].shape)
    nbytes: int = a_segment * segments + 4 * chunks + 8 * checksums
    return nbytes


def _ranges(index: CheckpointIndex, first: int, last: int) -> tuple[slice, slice, slice]:
    """The segments, chunks and checksums of entries [first, last)."""
    segments = slice(index.segments_of(first).start, index.segments_of(last - 1).stop)
    chunks = slice(int(index.first_chunk[segments.start]), int(index.first_chunk[segments.stop]))
    first, last = index.first_checksum[[segments.start, segments.stop]].tolist()
    return segments, chunks, slice(first, last)


def _columns_of(index: CheckpointIndex, first: int, last: int) -> dict[str, npt.NDArray[Any]]:
    segments, chunks, checksums = _ranges(index, first, last)
    boxes = [index.shard_boxes(position) for position in range(first, last)]
    return {
        "offsets": np.concatenate([offsets.reshape(-1) for offsets, _ in boxes]),
        "sizes": np.concatenate([sizes.reshape(-1) for _, sizes in boxes]),
        "starts": index.segments.starts[segments],
        "checksums": index.checksums[checksums],
        "entries": index.segments.entries[segments] - first,
        "objects": index.segments.objects[segments],
        "lengths": index.lengths[chunks],
        "streams": index.segments.streams[segments],
        "encodings": index.segments.encodings[segments],
    }


def decode_blocks(
    blocks: Sequence[tuple[Block, memoryview]],
    entries: Sequence[Entry],
    objects: tuple[tuple[str, int], ...],
    where: str,
) -> CheckpointIndex:
    """The index of the entries that some blocks hold.

    Args:
        blocks: each with its bytes.
        entries, objects: of the whole checkpoint.
        where: what errors call the manifest.

    Raises CorruptCheckpointError, InvalidIndexError.
    """
    parts: dict[str, list[npt.NDArray[Any]]] = {name: [] for name, _, _ in COLUMNS}
    held: list[Entry] = []
    for block, data in blocks:
        if len(data) != block.nbytes or checksum(data) != block.checksum:
            raise CorruptCheckpointError(
                f"the manifest {where} does not match its checksum: bytes [{block.start}, {block.stop}) are damaged"
            )
        at = 0
        for name, dtype, count in COLUMNS:
            values = np.frombuffer(data, dtype, int(getattr(block, count)), at)
            parts[name].append(values.astype(np.int64) + len(held) if name == "entries" else values)
            at += values.nbytes
        if block.segments and int(parts["entries"][-1].max()) >= len(held) + block.entries:
            raise CorruptCheckpointError(f"the manifest {where} contradicts itself: a segment belongs to no tensor")
        held += entries[block.first : block.first + block.entries]

    def column(name: str, dtype: Any) -> npt.NDArray[Any]:
        found = parts[name]
        whole = found[0] if len(found) == 1 else np.concatenate([np.empty(0, dtype), *found])
        return whole.astype(dtype, copy=False)

    segments = Segments(
        entries=column("entries", np.int64),
        streams=column("streams", np.uint8),
        encodings=column("encodings", np.uint8),
        objects=column("objects", np.int64),
        starts=column("starts", np.int64),
        offsets=column("offsets", np.int64),
        sizes=column("sizes", np.int64),
    )
    return CheckpointIndex(tuple(held), objects, segments, column("lengths", np.uint32), column("checksums", np.uint64))
