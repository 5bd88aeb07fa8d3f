"""What rank 0 does in a save by many ranks, and what a rank does to open the result and to plan its reads. Simulated.

    python -m benchmarks.coordinator [--ranks N ...] [--tensors N] [--folder PATH]

One process creates the messages of all ranks, with the functions that real ranks use, for tensors in bf16 that are
sharded by rows. Then it does the work of rank 0 ("plan" and "commit", without the store), and writes the manifest to a
file. Last, it opens this file as a rank that loads the same rows ("same") or columns (tensor parallelism over 8 ranks).

| column | |
|---|---|
| received | the bytes that rank 0 receives from all ranks, to plan and to commit |
| plan | seconds from the messages of all ranks to the answers |
| commit | seconds from the messages of all ranks to the bytes of the manifest |
| peak | the largest memory of the process, with the messages of all ranks |
| open, read, requests, planned | for one rank: seconds to open the checkpoint and to plan; bytes and requests that it \
reads of the manifest; requests for tensors |
"""

from __future__ import annotations

import functools
import pickle
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Row, arguments_of, header, line, positive, write
from reshard.planner.box import Box
from reshard.planner.chunk_reads import WantedBox
from reshard.planner.entries import Encoding, Kind
from reshard.planner.grid import Grid
from reshard.planner.read_plan import plan_reads
from reshard.planner.request_costs import REMOTE_COSTS
from reshard.storage.formats.native.manifest import MANIFEST_NAME, encode_manifest
from reshard.storage.formats.native.native_source import NativeSource
from reshard.storage.formats.native.write_records import (
    ObjectRecord,
    PackedRecords,
    SegmentRecord,
    ShardRecord,
    assemble_index,
)
from reshard.storage.stores.local import LocalStore
from reshard.storage.writing.agreement import EntryDescription
from reshard.storage.writing.save_plan import HeldShards, plan_save

COLUMNS = ("ranks", "shards", "received MB", "plan s", "commit s", "manifest MB", "peak GB")
LOAD_COLUMNS = ("ranks", "load", "open s", "read MB", "requests", "planned requests")
ROWS, WIDTH, TP = 8, 8192, 8
CHUNK_BYTES = 5000
"""The stored bytes of a chunk. Only their number matters."""


def held_by(rank: int, described: dict[str, EntryDescription]) -> bytes:
    box = Box((rank * ROWS, 0), (ROWS, WIDTH))
    return pickle.dumps(HeldShards.of(described, [[box]] * len(described), []))


def written_by(rank: int, names: list[str], grid: Grid) -> bytes:
    box = Box((rank * ROWS, 0), (ROWS, WIDTH))
    chunks = len(grid.chunks(box)[0])
    lengths = np.full(chunks, CHUNK_BYTES, "<u4").tobytes()
    checksums = np.random.default_rng(rank).integers(0, 2**63, chunks * len(names), dtype=np.uint64).astype("<u8")
    record = ObjectRecord(f"data/{rank:032x}-{rank:05}.shard")
    nbytes = 8
    for at, name in enumerate(names):
        own = checksums[at * chunks : (at + 1) * chunks].tobytes()
        segment = SegmentRecord(0, int(Encoding.PLANES), nbytes, lengths, own)
        record.shards.append(ShardRecord(name, int(Kind.TENSOR), "bfloat16", grid, box, (segment,)))
        nbytes += chunks * CHUNK_BYTES
    record.nbytes = nbytes
    return pickle.dumps(PackedRecords.of([record]))


def coordinate(ranks: int, tensors: int, folder: Path) -> Row:
    """Do the work of rank 0, and write the manifest."""
    names = [f"model.layers.{at}.weight" for at in range(tensors)]
    shape = (ranks * ROWS, WIDTH)
    described = {name: EntryDescription(("model", name), "sharded tensor", "bfloat16", shape) for name in names}
    held = [held_by(rank, described) for rank in range(ranks)]
    begin = time.perf_counter()
    plan = plan_save([pickle.loads(one) for one in held])  # noqa: S301 (made above)
    plan_s = time.perf_counter() - begin
    written = [written_by(rank, names, Grid.choose(shape, 2, shard=(ROWS, WIDTH))) for rank in range(ranks)]
    begin = time.perf_counter()
    index = assemble_index([pickle.loads(one) for one in written])  # noqa: S301 (made above)
    manifest = encode_manifest(index, {name: entry.path for name, entry in plan.entries.items()}, {})
    commit_s = time.perf_counter() - begin
    (folder / MANIFEST_NAME).write_bytes(manifest)
    return {
        "ranks": ranks,
        "shards": ranks * tensors,
        "received": sum(map(len, held)) + sum(map(len, written)),
        "plan_s": plan_s,
        "commit_s": commit_s,
        "manifest": len(manifest),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def open_as(load: str, ranks: int, folder: Path) -> Row:
    """Open the checkpoint, and plan what one rank reads."""
    begin = time.perf_counter()
    manifest = NativeSource.find(LocalStore(str(folder)))
    assert manifest is not None
    middle = ranks // 2
    box = Box((middle * ROWS, 0), (ROWS, WIDTH))
    if load != "same":
        box = Box((0, WIDTH // TP), (ranks * ROWS, WIDTH // TP))
    wants = [WantedBox(entry.name, box) for entry in manifest.entries]
    plan = plan_reads(manifest.index(wants), wants, gap_limits=REMOTE_COSTS.native_gap_limits())
    return {
        "ranks": ranks,
        "load": load,
        "open_s": time.perf_counter() - begin,
        "read": manifest.bytes_read,
        "requests": manifest.requests,
        "planned": len(plan.requests),
    }


def run(ranks: list[int], tensors: int, parent: str | None) -> list[Row]:
    saves, loads = [], []
    header(*COLUMNS)
    with tempfile.TemporaryDirectory(dir=parent) as root:
        for world in ranks:
            folder = Path(root) / str(world)
            folder.mkdir()
            saves.append(coordinate(world, tensors, folder))
            show = functools.partial(_megabytes, saves[-1])
            seconds = (f"{saves[-1][name]:.2f}" for name in ("plan_s", "commit_s"))
            peak = f"{saves[-1]['peak'] / 1e9:.1f}"
            line(world, world * tensors, show("received"), *seconds, show("manifest"), peak)
        print()
        header(*LOAD_COLUMNS)
        for world in ranks:
            for load in ("same", "columns"):
                row = open_as(load, world, Path(root) / str(world))
                line(world, load, f"{row['open_s']:.2f}", _megabytes(row, "read"), row["requests"], row["planned"])
                loads.append(row)
    return saves + loads


def _megabytes(row: Row, name: str) -> str:
    return f"{row[name] / 1e6:.1f}"


def draw(rows: list[Row], figure: Any) -> None:
    """Draw the seconds of rank 0 over the number of ranks."""
    axes = figure.subplots()
    for name in ("plan_s", "commit_s"):
        points = [(row["ranks"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), marker="o", label=name.removesuffix("_s"))
    axes.set(xlabel="ranks", ylabel="seconds", xscale="log", yscale="log")
    axes.legend()


def main(argv: list[str] | None = None) -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--ranks", type=positive, nargs="+", default=[256, 1024], help="the numbers of ranks")
    parser.add_argument("--tensors", type=positive, default=300, help="the number of tensors (default: %(default)s)")
    parser.add_argument("--folder", help="the folder for the manifests")
    arguments = parser.parse_args(argv)
    write(arguments, run(arguments.ranks, arguments.tensors, arguments.folder), draw)


if __name__ == "__main__":
    main()
