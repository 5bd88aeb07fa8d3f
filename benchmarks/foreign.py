"""Read and convert checkpoints of other formats: bytes, seconds and memory, compared with DCP's readers.

    python -m benchmarks.foreign [--tables bytes seconds convert] [--stores local far-s3 slow-s3] [--repeat N]

The model is the MLP of the other benchmarks. **bytes**: ranks save it with DCP's FileSystemWriter, as safetensors, or
with reshard in float32, and other ranks load it under tensor parallelism from a local disk. The table shows the bytes
read, with metadata, divided by the bytes of the destinations. **seconds**: DCP's reader and reshard load a DCP
checkpoint in turns. **convert**: one process converts a model of 8 times its budget. The peak is the resident memory
that the kernel reports, minus the resident memory before the conversion.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

import reshard
from benchmarks.common import (
    Peak,
    Row,
    alternate,
    arguments_of,
    header,
    in_a_fresh_process,
    line,
    median,
    positive,
    write,
)
from benchmarks.memory import state_of
from benchmarks.models import mlp, under
from benchmarks.stores import NAMES, BenchmarkStore, opened
from benchmarks.timing import elapsed, on_rank_0
from reshard.demo.dcp_peer import CountingReader
from tests.ranks import RankPool

TABLES = ("bytes", "seconds", "convert")
CASES = [
    ("dcp", torch.bfloat16, 8, 4),
    ("dcp", torch.bfloat16, 4, 8),
    ("dcp", torch.float32, 4, 8),
    ("safetensors", torch.bfloat16, 1, 8),
    ("reshard", torch.float32, 4, 8),
]
"""The format and the dtype of the checkpoint, the FSDP ranks that save it, the TP ranks that load it as bfloat16."""
RANKS = 4
CONVERSIONS = [("dcp", "reshard"), ("reshard", "safetensors"), ("safetensors", "dcp"), ("safetensors", "reshard")]


def weights(dtype: torch.dtype, layers: int) -> nn.Module:
    return mlp(seed=0, layers=layers).to(dtype)


def save_rank(format: str, dtype: torch.dtype, folder: str) -> None:
    """Save under FSDP with DCP, to compare with, and in the given format if it is a different one."""
    state = under("fsdp", weights(dtype, 8)).state_dict()
    dcp.save(state, storage_writer=dcp.FileSystemWriter(os.path.join(folder, "dcp"), sync_files=False))
    if format == "reshard":
        reshard.save(state, os.path.join(folder, format))
    elif format == "safetensors":
        os.makedirs(os.path.join(folder, format))
        whole = list(weights(dtype, 8).state_dict().items())
        for part in range(2):
            save_file(dict(whole[part::2]), os.path.join(folder, format, f"model-{part + 1:05}-of-00002.safetensors"))


def count_rank(format: str, dtype: torch.dtype, folder: str) -> dict[str, tuple[int, int, int]]:
    """Return (bytes needed, bytes read, requests) of this rank for each reader, and check the values."""
    state = under("tp", mlp(seed=1)).state_dict()
    needed = sum(tensor.to_local().nbytes for tensor in state.values())
    reader = CountingReader(os.path.join(folder, "dcp"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, storage_reader=reader)
    expected = {name: tensor.to_local().clone() for name, tensor in state.items()}
    state = under("tp", mlp(seed=1)).state_dict()
    report = reshard.load(state, os.path.join(folder, format)).local
    if not all(tensor.to_local().equal(expected[name]) for name, tensor in state.items()):
        raise AssertionError("reshard loaded values that differ from those of DCP")
    return {"dcp": (needed, reader.bytes, reader.requests), "reshard": (needed, report.bytes_fetched, report.requests)}


def count_bytes() -> list[Row]:
    """Return one row per case."""
    header("saved → loaded as bf16", "MB needed", "DCP", "reshard", "requests of a rank: DCP, reshard")
    rows: list[Row] = []
    with RankPool() as pool:
        for format, dtype, save_ranks, load_ranks in CASES:
            with tempfile.TemporaryDirectory() as folder:
                pool.run(save_ranks, save_rank, format, dtype, folder)
                counts = pool.run(load_ranks, count_rank, format, dtype, folder)
            name = str(dtype).removeprefix("torch.")
            saved = f"{format} {name}" + (f", fsdp {save_ranks}" if save_ranks > 1 else "")
            row: Row = {"table": "bytes", "case": f"{saved} → tp {load_ranks}"}
            row["needed"] = sum(rank["dcp"][0] for rank in counts)
            for reader in counts[0]:
                row[reader] = sum(rank[reader][1] for rank in counts) / row["needed"]
                row[f"{reader}_requests"] = max(rank[reader][2] for rank in counts)
            rows.append(row)
            ratios = f"{row['needed'] / 1e6:.1f}", f"{row['dcp']:.2f}", f"{row['reshard']:.3f}"
            line(row["case"], *ratios, f"{row['dcp_requests']}, {row['reshard_requests']}")
    return rows


def time_rank(store: BenchmarkStore, layers: int, repeat: int) -> dict[str, list[float]]:
    """Return the seconds of loads of a DCP checkpoint for each reader."""
    uri, options = on_rank_0(store.make), store.options()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        saved = under("fsdp", weights(torch.bfloat16, layers)).state_dict()
        writer = FsspecWriter(uri, sync_files=False, **options) if options else dcp.FileSystemWriter(uri)
        dcp.save(saved, storage_writer=writer)
        state = under("tp", mlp(seed=1, layers=layers)).state_dict()
        loads = {
            "dcp": lambda: dcp.load(
                state, storage_reader=FsspecReader(uri, **options) if options else dcp.FileSystemReader(uri)
            ),
            "reshard": lambda: reshard.load(state, uri, storage_options=options),
        }
        seconds: dict[str, list[float]] = {name: [] for name in loads}
        expected: dict[str, torch.Tensor] = {}
        for at, name in alternate(list(loads), repeat + 1):
            for tensor in state.values():
                tensor.to_local().zero_()
            took = elapsed(loads[name])
            seconds[name] += [took] if at else []  # the first round warms up
            expected = expected or {key: tensor.to_local().clone() for key, tensor in state.items()}
            if not all(tensor.to_local().equal(expected[key]) for key, tensor in state.items()):
                raise AssertionError(f"{name} loaded values that differ from those of the first load")
    on_rank_0(lambda: store.remove(uri))
    return seconds


def count_seconds(names: list[str], folder: str | None, layers: int, repeat: int) -> list[Row]:
    """Return one row per store."""
    rows: list[Row] = []
    with opened(names, folder) as stores:
        header("store of a DCP checkpoint", "MB", "DCP's reader, s", "reshard, s", "speedup")
        for store in stores:
            with RankPool() as pool:
                seconds = pool.run(RANKS, time_rank, store, layers, repeat, timeout_s=3600)[0]
            row: Row = {"table": "seconds", "case": store.name, "layers": layers}
            row |= {f"{name}_all": values for name, values in seconds.items()}
            row |= {name: median(values) for name, values in seconds.items()}
            rows.append(row)
            total = sum(parameter.nbytes for parameter in mlp(seed=0, layers=layers).parameters()) / 1e6
            gain = row["dcp"] / row["reshard"]
            line(store.name, f"{total:.0f}", f"{row['dcp']:.2f}", f"{row['reshard']:.2f}", f"{gain:.1f}")
    return rows


def peak_of(src: str, dst: str, format: str, budget_bytes: int, warm: tuple[str, str]) -> tuple[int, float]:
    """Convert once, and return the peak memory and the seconds. Call it in a new process."""
    reshard.convert(*warm, format=format, budget_bytes=budget_bytes)
    with Peak() as peak:
        report = reshard.convert(src, dst, format=format, budget_bytes=budget_bytes)
    return peak.nbytes, report.total.seconds["total"]


def count_memory(folder: str | None, budget_mb: int) -> list[Row]:
    """Return one row per conversion."""
    header("convert", "MB", "budget MB", "peak MB", "s", "MB/s")
    rows: list[Row] = []
    budget = budget_mb * 1_000_000
    for src, dst in CONVERSIONS:
        with tempfile.TemporaryDirectory(dir=folder) as root:
            for name, nbytes in (("large", 8 * budget), ("small", 4_000_000)):
                target = os.path.join(root, name)
                first = os.path.join(root, f"{name}-first")
                in_a_fresh_process(_make, first, nbytes)
                in_a_fresh_process(_convert, first, target, src, budget)
            warm = (os.path.join(root, "small"), os.path.join(root, "small-dst"))
            target = os.path.join(root, "dst")
            peak, seconds = in_a_fresh_process(peak_of, os.path.join(root, "large"), target, dst, budget, warm)
        row: Row = {"table": "convert", "case": f"{src} → {dst}", "budget": budget, "peak": peak, "s": seconds}
        rows.append(row)
        rate = 8 * budget / 1e6 / seconds
        line(row["case"], 8 * budget_mb, budget_mb, f"{peak / 1e6:.0f}", f"{seconds:.2f}", f"{rate:.0f}")
    return rows


def _make(folder: str, nbytes: int) -> None:
    """Save a model with a few tensors, one of which is larger than all others together."""
    reshard.save({**state_of(1, nbytes * 5 // 8, seed=0), "m": state_of(12, nbytes * 3 // 8, seed=1)}, folder)


def _convert(src: str, dst: str, format: str, budget: int) -> None:
    reshard.convert(src, dst, format=format, budget_bytes=budget)


def draw(rows: list[Row], figure: Any) -> None:
    """Draw bars: bytes read divided by bytes needed, seconds, and peaks next to the budget."""
    tables = list(dict.fromkeys(row["table"] for row in rows))
    figure.set_size_inches(10, 1 + 2.7 * len(tables))
    labels = {"bytes": "bytes read / needed", "seconds": "seconds", "convert": "MB"}
    for axes, table in zip(figure.subplots(len(tables), 1, squeeze=False)[:, 0], tables, strict=True):
        here = [row for row in rows if row["table"] == table]
        keys = {"dcp": "DCP's reader", "reshard": "reshard"}
        if table == "convert":
            keys = {"budget": "budget", "peak": "peak minus memory before"}
        for shift, (key, label) in zip((-0.2, 0.2), keys.items(), strict=True):
            scale = 1e-6 if table == "convert" else 1
            bars = axes.bar(
                [at + shift for at in range(len(here))], [row[key] * scale for row in here], 0.38, label=label
            )
            axes.bar_label(bars, fmt="%.3g", fontsize=7)
        axes.set_xticks(range(len(here)), [row["case"] for row in here], fontsize=7)
        axes.set_ylabel(labels[table], fontsize=8)
        axes.margins(y=0.15)
        axes.legend(fontsize=8)


def main(argv: list[str] | None = None) -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--stores", nargs="+", choices=NAMES, default=["local", "far-s3", "slow-s3"])
    parser.add_argument(
        "--layers", type=positive, default=32, help="the layers of the timed model, 16.8 MB each (default: 32)"
    )
    parser.add_argument(
        "--budget-mb", type=positive, default=128, help="the budget of a conversion in MB (default: %(default)s)"
    )
    parser.add_argument("--repeat", type=positive, default=3, help="timed loads of each reader (default: %(default)s)")
    parser.add_argument("--folder", help="the folder for the data (default: the system's temporary folder)")
    arguments = parser.parse_args(argv)
    rows: list[Row] = []
    if "bytes" in arguments.tables:
        rows += count_bytes()
    if "seconds" in arguments.tables:
        rows += count_seconds(arguments.stores, arguments.folder, arguments.layers, arguments.repeat)
    if "convert" in arguments.tables:
        rows += count_memory(arguments.folder, arguments.budget_mb)
    write(arguments, rows, draw)


if __name__ == "__main__":
    main()
