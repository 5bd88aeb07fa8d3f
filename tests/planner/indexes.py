"""Indexes for the planner's tests, as they would be after saving: every byte of an object is counted, none exists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from reshard.planner.box import Box
from reshard.planner.chunk_reads import Want
from reshard.planner.entries import Encoding, Entry, Kind, Segments, Stream
from reshard.planner.grid import Grid
from reshard.planner.index import CheckpointIndex
from reshard.planner.read_plan import plan_reads


@dataclass(frozen=True)
class Saved:
    """One tensor as it was saved: its shards, one object for each."""

    name: str
    grid: Grid
    shards: list[Box]
    dtype: str = "bfloat16"
    raw: bool = True
    plain: bool = False
    """As another format has it: a shard is one chunk, without checksums."""


def index_of(*tensors: Saved) -> CheckpointIndex:
    """The index of tensors whose encoded chunks are as long as their values (raw), or two thirds of it."""
    rows: list[tuple[int, int, int, int, int, Box]] = []
    lengths: list[int] = []
    checksums = 0
    objects: list[int] = []
    entries = tuple(Entry(saved.name, Kind.TENSOR, saved.dtype, saved.grid) for saved in tensors)
    for at, (entry, saved) in enumerate(zip(entries, tensors, strict=True)):
        split = saved.dtype == "float32" and not saved.raw
        for number, shard in enumerate(saved.shards):
            while len(objects) <= number:
                objects.append(8)
            for stream in (Stream.HEAD, Stream.TAIL) if split else (Stream.WHOLE,):
                encoding = Encoding.PLAIN if saved.plain else Encoding.RAW if saved.raw else Encoding.PLANES
                rows.append((at, stream, encoding, number, objects[number], shard))
                for size in entry.grid.chunks(shard)[2].prod(axis=1).tolist():
                    nbytes = size * entry.itemsize if saved.raw else 2 + size * entry.itemsize // 3
                    lengths.append(nbytes)
                    if not saved.plain:
                        checksums += -(-nbytes // entry.page_bytes) if saved.raw else 1
                    objects[number] += nbytes
    columns = list(zip(*rows, strict=True)) or [()] * 6
    return CheckpointIndex(
        entries,
        tuple((f"data/{i}.shard", nbytes) for i, nbytes in enumerate(objects)),
        Segments(
            np.array(columns[0], np.int64),
            np.array(columns[1], np.uint8),
            np.array(columns[2], np.uint8),
            np.array(columns[3], np.int64),
            np.array(columns[4], np.int64),
            np.array([n for box in columns[5] for n in box.offsets], np.int64),
            np.array([n for box in columns[5] for n in box.sizes], np.int64),
        ),
        np.array(lengths, np.uint32),
        np.arange(checksums, dtype=np.uint64),
    )


def chunks_read(index: CheckpointIndex, want: Want) -> list[Any]:
    """Each chunk that a want reads, and all that is known of it; checksums by their values."""
    (read,) = plan_reads(index, [want]).reads
    columns = (
        read.chunk_offsets, read.chunk_sizes, read.piece_offsets, read.piece_sizes, read.objects, read.starts,
        read.stops, index.checksums[read.checksums], read.skipped, read.encodings,
    )  # fmt: skip
    return sorted(zip(*(column.tolist() for column in columns), strict=True))
