"""Planning for the largest models, from metadata alone: no tensors, one process.

    python -m benchmarks.planner [--cases NAME ...] [--json FILE] [--plot FILE]

The benchmark constructs the index of a checkpoint of dense models, as FSDP would save it in bf16 to a disk, with chunks
of about 1 and 8 MiB, and writes its manifest. Then one rank of the layout that loads it opens the manifest, reads the
part that it needs, and plans. For comparison, DCP reads the whole pickle of its Metadata for the same shards, and plans
with the function of its DefaultLoadPlanner. The peak is the resident memory minus the resident memory before.
"""

from __future__ import annotations

import math
import os
import pickle
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.common import Peak, Row, arguments_of, header, in_a_fresh_process, line, write
from benchmarks.shapes import TP_PLAN, fsdp_rows, transformer
from reshard.planner.box import Box, IntArray
from reshard.planner.entries import Encoding, Entry, Kind, Segments, Stream
from reshard.planner.grid import Grid
from reshard.planner.index import CheckpointIndex
from reshard.planner.layout import Layout
from reshard.planner.rank_plans import rank_tensors
from reshard.planner.read_plan import plan_reads
from reshard.storage.formats.detect import open_source
from reshard.storage.formats.native.manifest import MANIFEST_NAME, encode_manifest
from reshard.storage.stores.local import LocalStore

RATIO = 0.66
"""Stored bytes divided by bytes of bf16 weights: see `benchmarks/codec.py`."""


@dataclass(frozen=True)
class Case:
    """The shapes of a model, the number of ranks that save it, and the layout of the ranks that load it."""

    shapes: dict[str, tuple[int, ...]]
    saved_by: int
    tp: int
    pp: int

    def wanted(self) -> list[str]:
        """Return the tensors of the middle stage of the pipeline."""
        if self.pp == 1:
            return list(self.shapes)
        stage = self.pp // 2
        layers = sorted({name.rpartition(".")[0] for name in self.shapes if name.startswith("layers.")})
        held = layers[stage * len(layers) // self.pp : (stage + 1) * len(layers) // self.pp]
        return [name for name in self.shapes if name.rpartition(".")[0] in held]


B405 = transformer(16384, 53248, 1024, 126, 128256)
T1 = transformer(20480, 81920, 1280, 160, 128256)
CASES = {
    "405B, FSDP 1024 → TP 8, PP 16": Case(B405, 1024, 8, 16),
    "405B, FSDP 2048 → TP 64": Case(B405, 2048, 64, 1),
    "1T, FSDP 1024 → TP 8, PP 16": Case(T1, 1024, 8, 16),
    "1T, FSDP 2048 → TP 64": Case(T1, 2048, 64, 1),
}


def grid_of(shape: tuple[int, ...], ranks: int, chunk_bytes: int) -> Grid:
    """Return the grid that reshard chooses for a save by so many ranks, or one with larger chunks."""
    parts = list(Grid.choose(shape, 2, shard=(-(-shape[0] // ranks), *shape[1:])).parts)
    for d in range(len(shape)):
        while parts[d] > 16 and math.prod(shape) * 2 / math.prod(parts) * 2 <= chunk_bytes:
            parts[d] //= 2
    return Grid(shape, tuple(parts))


def index_of(case: Case, chunk_bytes: int) -> CheckpointIndex:
    """Return the index that a save would write."""
    entries: list[Entry] = []
    columns: dict[str, list[IntArray]] = {name: [] for name in ("entries", "objects", "starts", "offsets", "sizes")}
    lengths = []
    ends = np.full(case.saved_by, 8, np.int64)
    for name, shape in sorted(case.shapes.items()):
        entry = Entry(name, Kind.TENSOR, "bfloat16", grid_of(shape, case.saved_by, chunk_bytes))
        begins, rows = fsdp_rows(shape[0], case.saved_by)
        offsets = np.zeros((len(begins), len(shape)), np.int64)
        offsets[:, 0] = begins
        sizes = np.tile(np.array(shape, np.int64), (len(begins), 1))
        sizes[:, 0] = rows
        shards, _, _, chunk_sizes = entry.grid.chunks_of_many(offsets, sizes, *Box.whole(shape).columns)
        stored = (chunk_sizes.prod(axis=1) * 2 * RATIO).astype(np.int64) + 8
        columns["entries"].append(np.full(len(begins), len(entries)))
        columns["objects"].append(np.arange(len(begins)))
        columns["starts"].append(ends[: len(begins)].copy())
        columns["offsets"].append(offsets.reshape(-1))
        columns["sizes"].append(sizes.reshape(-1))
        lengths.append(stored)
        ends[: len(begins)] += np.bincount(shards, stored, len(begins)).astype(np.int64)
        entries.append(entry)
    merged = {name: np.concatenate(parts).astype(np.int64) for name, parts in columns.items()}
    n = len(merged["entries"])
    segments = Segments(
        streams=np.full(n, Stream.WHOLE, np.uint8), encodings=np.full(n, Encoding.PLANES, np.uint8), **merged
    )
    chunks = np.concatenate(lengths).astype(np.uint32)
    objects = tuple((f"data/{i:032x}-{i:05}.shard", int(size)) for i, size in enumerate(ends))
    checksums = np.random.default_rng(0).integers(0, 2**63, len(chunks)).astype(np.uint64)
    return CheckpointIndex(tuple(entries), objects, segments, chunks, checksums)


def make(case: Case, chunk_bytes: int, folder: str) -> int:
    """Write the manifest, and return its size in bytes."""
    data = encode_manifest(index_of(case, chunk_bytes), {}, {})
    LocalStore(folder).put(MANIFEST_NAME, data, overwrite=True)
    return len(data)


def plan_rank(case: Case, folder: str) -> Row:
    """Do what one rank does before it reads its first tensor, and measure it."""
    with Peak() as peak:
        begin = time.perf_counter()
        manifest = open_source(LocalStore(folder))
        layout = Layout({"tp": case.tp}, TP_PLAN)
        held = rank_tensors({name: manifest.entry(name) for name in case.wanted()}, layout, case.tp // 2)
        wants = [want for tensor in held for want in tensor.wants]
        index = manifest.index(wants)
        opened = time.perf_counter()
        plan = plan_reads(index, wants)
        planned = time.perf_counter()
    report = plan.report
    return {
        "open_s": opened - begin,
        "plan_s": planned - opened,
        "manifest_read": manifest.bytes_read,
        "manifest_requests": manifest.requests,
        "chunks": report.chunks,
        "requests": report.requests,
        "needed": report.bytes_needed,
        "amplification": report.amplification,
        "peak": peak.nbytes,
    }


def make_dcp(case: Case, path: str) -> int:
    """Write the `.metadata` that DCP would write, and return its size in bytes."""
    import torch
    from torch.distributed.checkpoint import metadata as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    tensors: dict[str, Any] = {}
    storage_data = {}
    for name, shape in case.shapes.items():
        chunks = []
        for at, (begin, rows) in enumerate(
            zip(*map(np.ndarray.tolist, fsdp_rows(shape[0], case.saved_by)), strict=True)
        ):
            offsets = torch.Size([begin, *(0 for _ in shape[1:])])
            chunks.append(dcp.ChunkStorageMetadata(offsets, torch.Size([rows, *shape[1:]])))
            storage_data[dcp.MetadataIndex(name, offsets, at)] = _StorageInfo(f"__{at}_0.distcp", begin, rows)
        tensors[name] = dcp.TensorStorageMetadata(dcp.TensorProperties(dtype=torch.bfloat16), torch.Size(shape), chunks)
    with open(path, "wb") as file:
        pickle.dump(dcp.Metadata(tensors, storage_data=storage_data), file)
    return os.path.getsize(path)


def plan_rank_dcp(case: Case, path: str) -> Row:
    """Do the same with DCP: read all metadata, then let its planner create the read items of each local tensor."""
    import torch
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
    from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

    layout = Layout({"tp": case.tp}, TP_PLAN)
    with Peak() as peak:
        begin = time.perf_counter()
        with open(path, "rb") as file:
            metadata = pickle.load(file)  # noqa: S301
        opened = time.perf_counter()
        items = 0
        for name in case.wanted():
            stored = metadata.state_dict_metadata[name]
            local = layout.local(name, tuple(stored.size), case.tp // 2)
            boxes = [ChunkStorageMetadata(torch.Size(b.offsets), torch.Size(b.sizes)) for b in local.boxes]
            items += len(create_read_items_for_chunk_list(name, stored, boxes))
        planned = time.perf_counter()
    return {"open_s": opened - begin, "plan_s": planned - opened, "requests": items, "peak": peak.nbytes}


def run(cases: list[str], with_dcp: list[str]) -> list[Row]:
    """Return one row per case, chunk size and planner."""
    header("case", "chunks of", "by", "manifest MB", "read MB", "reads", "open s", "plan s", "chunks", "peak MB")
    rows: list[Row] = []
    for name in cases:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as folder:
            for mib in (1, 8):
                total = in_a_fresh_process(make, case, mib << 20, folder)
                row: Row = {"case": name, "by": "reshard", "chunk_mib": mib, "manifest": total}
                rows.append(row | in_a_fresh_process(plan_rank, case, folder))
                show(rows[-1])
            if name in with_dcp:
                path = os.path.join(folder, "metadata")
                row = {
                    "case": name,
                    "by": "dcp",
                    "chunk_mib": None,
                    "manifest": in_a_fresh_process(make_dcp, case, path),
                }
                row |= {"manifest_read": row["manifest"], "manifest_requests": 1}
                rows.append(row | in_a_fresh_process(plan_rank_dcp, case, path))
                show(rows[-1])
    return rows


def show(row: Row) -> None:
    line(
        row["case"],
        f"{row['chunk_mib']} MiB" if row["chunk_mib"] else "a shard",
        row["by"],
        f"{row['manifest'] / 1e6:.1f}",
        f"{row['manifest_read'] / 1e6:.1f}",
        row["manifest_requests"],
        f"{row['open_s']:.2f}",
        f"{row['plan_s']:.2f}",
        row.get("chunks", row["requests"]),
        f"{row['peak'] / 1e6:.0f}",
    )


def draw(rows: list[Row], figure: Any) -> None:
    """Draw bars of the seconds to open and plan, on a logarithmic scale."""
    axes = figure.subplots()
    names = [f"{row['case']}, {row['by']}" + (f" {row['chunk_mib']} MiB" if row["chunk_mib"] else "") for row in rows]
    seconds = [row["open_s"] + row["plan_s"] for row in rows]
    colors = ["tab:green" if row["by"] == "reshard" else "tab:gray" for row in rows]
    axes.bar_label(axes.barh(names, seconds, color=colors), fmt="%.2f", fontsize=8)
    axes.margins(x=0.2)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("seconds that one rank needs to open the checkpoint and to plan", fontsize=8)
    axes.tick_params(labelsize=7)


def main(argv: list[str] | None = None) -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="NAME")
    parser.add_argument(
        "--dcp",
        nargs="*",
        choices=list(CASES),
        default=list(CASES)[:1],
        metavar="NAME",
        help="the cases to plan with DCP, too",
    )
    arguments = parser.parse_args(argv)
    write(arguments, run(arguments.cases, arguments.dcp), draw)


if __name__ == "__main__":
    main()
