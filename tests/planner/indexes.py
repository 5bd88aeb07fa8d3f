"""Build indexes for the tests of the planner, as a save would write them, but without any objects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from reshard.planner.box import Box
from reshard.planner.chunk_reads import WantedBox
from reshard.planner.entries import Encoding, Entry, Kind, Segments, Stream
from reshard.planner.grid import Grid
from reshard.planner.index import CheckpointIndex
from reshard.planner.read_plan import plan_reads


@dataclass(frozen=True)
class Saved:
    """A saved tensor and its shards: shard i is in object i."""

    name: str
    grid: Grid
    shards: list[Box]
    dtype: str = "bfloat16"
    raw: bool = True
    plain: bool = False
    """Whether it is stored as in another format: each shard is one chunk without checksums."""


def index_of(*tensors: Saved, whole_checksums: bool = True) -> CheckpointIndex:
    """Return the index of tensors. Raw chunks are as long as their values, encoded chunks about a third of it."""
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
                        pages = -(-nbytes // entry.page_bytes) if saved.raw else 1
                        checksums += pages + (whole_checksums and pages > 1)
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
        whole_checksums=whole_checksums,
    )


def chunks_read(index: CheckpointIndex, want: WantedBox) -> list[Any]:
    """Return all columns of each chunk that a wanted box reads, with the values of the checksums."""
    (read,) = plan_reads(index, [want]).reads
    columns = (
        read.chunk_offsets, read.chunk_sizes, read.wanted_offsets, read.wanted_sizes, read.objects, read.starts,
        read.stops, index.checksums[read.checksums], read.skipped, read.encodings,
    )  # fmt: skip
    return sorted(zip(*(column.tolist() for column in columns), strict=True))
