"""Bytes that each rank reads to load a checkpoint under another layout, compared with DCP's reader in the same run.

    python -m benchmarks.bytes_read [--json FILE] [--plot FILE]

FSDP or TP ranks (gloo) save an MLP of 8 layers, 1024 x 4096, bf16, with DCP's FsspecWriter and with reshard (codecs
"zstd" and "none"), and other ranks load it. The table shows the bytes that all ranks read from the store, with metadata
and manifest, divided by the bytes of the destination tensors. Bytes do not depend on the machine.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

import reshard
from benchmarks.common import Row, arguments_of, header, line, write
from benchmarks.models import mlp, under
from reshard.demo.dcp_peer import CountingReader
from tests.ranks import RankPool

CASES = [("fsdp", 8, "tp", 4), ("fsdp", 4, "tp", 8), ("fsdp", 4, "tp", 4), ("fsdp", 3, "tp", 5), ("tp", 4, "fsdp", 8)]


def save_rank(layout: str, folder: str) -> None:
    state = under(layout, mlp(seed=0)).state_dict()
    dcp.save(state, storage_writer=FsspecWriter(os.path.join(folder, "dcp"), sync_files=False))
    for codec in ("zstd", "none"):
        reshard.save(state, os.path.join(folder, codec), codec=codec)


def load_rank(layout: str, folder: str) -> dict[str, tuple[int, int, int]]:
    """Return (bytes needed, bytes read, requests) of this rank for each reader."""
    state = under(layout, mlp(seed=1)).state_dict()
    needed = sum(tensor.to_local().nbytes for tensor in state.values())
    reader = CountingReader(os.path.join(folder, "dcp"))
    dcp.load(state, storage_reader=reader)
    expected = {name: tensor.to_local().clone() for name, tensor in state.items()}
    counts = {"dcp": (needed, reader.bytes, reader.requests)}
    for codec in ("zstd", "none"):
        state = under(layout, mlp(seed=1)).state_dict()
        report = reshard.load(state, os.path.join(folder, codec)).local
        assert report.bytes_needed == needed
        assert all(tensor.to_local().equal(expected[name]) for name, tensor in state.items())
        counts[codec] = report.bytes_needed, report.bytes_fetched, report.requests
    return counts


def run(cases: list[tuple[str, int, str, int]]) -> list[Row]:
    """Return one row per case: bytes read divided by bytes needed, and the most requests of any rank."""
    header("saved → loaded", "DCP FsspecReader", "reshard zstd", "reshard none", "requests of a rank: DCP, zstd, none")
    rows: list[Row] = []
    with RankPool() as pool:
        for saved, save_ranks, loaded, load_ranks in cases:
            with tempfile.TemporaryDirectory() as folder:
                pool.run(save_ranks, save_rank, saved, folder)
                counts = pool.run(load_ranks, load_rank, loaded, folder)
            row: Row = {"case": f"{saved} {save_ranks} → {loaded} {load_ranks}"}
            row["needed_mb"] = sum(rank["dcp"][0] for rank in counts) / 1e6
            for reader in counts[0]:
                row[reader] = sum(rank[reader][1] for rank in counts) / sum(rank[reader][0] for rank in counts)
                row[f"{reader}_requests"] = max(rank[reader][2] for rank in counts)
            rows.append(row)
            ratios = f"{row['dcp']:.2f}", f"{row['zstd']:.3f}", f"{row['none']:.3f}"
            line(row["case"], *ratios, ", ".join(str(row[f"{reader}_requests"]) for reader in counts[0]))
    return rows


def draw(rows: list[Row], figure: Any) -> None:
    """Draw bars of bytes read divided by bytes needed."""
    axes = figure.subplots()
    readers = {"dcp": "DCP FsspecReader", "none": "reshard, none", "zstd": "reshard, zstd"}
    for at, (reader, label) in enumerate(readers.items()):
        bars = axes.bar(
            [i + (at - 1) * 0.27 for i in range(len(rows))], [row[reader] for row in rows], 0.25, label=label
        )
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(rows)), [row["case"] for row in rows])
    axes.set_ylabel("bytes read / bytes needed")
    axes.legend()


def main(argv: list[str] | None = None) -> None:
    arguments = arguments_of(__doc__).parse_args(argv)
    write(arguments, run(CASES), draw)


if __name__ == "__main__":
    main()
