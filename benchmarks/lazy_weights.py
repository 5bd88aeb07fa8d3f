"""Load a checkpoint into the fused parameters of an inference engine, with the code of the engine on lazy tensors.

    python -m benchmarks.lazy_weights [--layers N] [--tables bytes recording] [--json FILE] [--plot FILE]

The engine is written in plain torch, as inference engines write it: it fuses q, k and v, and gate and up, and it stacks
the experts. Nothing in it knows reshard. **bytes**: for each rank, the bytes that are read from a local disk, with the
metadata, divided by the bytes of its parameters (weights ~ N(0, 0.02²) in bf16), and divided by the stored bytes of the
whole checkpoint. The values are compared with the saved ones. **recording**: the seconds until the reads of one rank
are planned, for a model of 1,002 tensors, from metadata alone.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from safetensors.torch import save_file

import reshard
from benchmarks.common import Row, arguments_of, header, line, positive, write
from benchmarks.planner import Case, make
from benchmarks.shapes import transformer

Tensors = Mapping[str, torch.Tensor]
DTYPE = torch.bfloat16
TABLES = ("bytes", "recording")
DIM, HIDDEN, KV, VOCABULARY = 2048, 8192, 512, 16_384
EXPERTS, EXPERT_HIDDEN = 8, 3584
SAVED_AS = ("reshard zstd", "reshard none", "safetensors")


def load_dense(layers: int, weights: Tensors, rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """Return the parameters of one rank of a Llama-like model with tensor parallelism."""

    def rows(name: str) -> torch.Tensor:
        return weights[name].chunk(ranks)[rank]

    def columns(name: str) -> torch.Tensor:
        return weights[name].chunk(ranks, dim=1)[rank]

    made = {"embed": filled(rows("embed")), "head": filled(rows("head")), "norm": filled(weights["norm"])}
    for at in range(layers):
        prefix = f"layers.{at:03}"
        made[f"{prefix}.qkv"] = filled(*(rows(f"{prefix}.{name}") for name in "qkv"))
        made[f"{prefix}.gate_up"] = filled(*(rows(f"{prefix}.{name}") for name in ("gate", "up")))
        for name in ("o", "down"):
            made[f"{prefix}.{name}"] = filled(columns(f"{prefix}.{name}"))
        for name in ("norm1", "norm2"):
            made[f"{prefix}.{name}"] = filled(weights[f"{prefix}.{name}"])
    return made


def load_experts(layers: int, weights: Tensors, rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """Return the experts of one rank of a Mixtral-like model with expert parallelism."""
    mine = range(EXPERTS)[rank * EXPERTS // ranks : (rank + 1) * EXPERTS // ranks]
    made = {}
    for at in range(layers):
        for name in ("w1", "w2", "w3"):
            stacked = torch.stack([weights[f"layers.{at}.experts.{expert}.{name}"] for expert in mine])
            made[f"layers.{at}.{name}"] = filled(stacked)
    return made


def filled(*parts: torch.Tensor) -> torch.Tensor:
    """Return a new parameter that consists of some parts, one below the other."""
    parameter = torch.empty(sum(part.shape[0] for part in parts), *parts[0].shape[1:], dtype=DTYPE)
    begin = 0
    for part in parts:
        parameter[begin : begin + part.shape[0]].copy_(part)
        begin += part.shape[0]
    return parameter


def dense(layers: int) -> dict[str, tuple[int, ...]]:
    return transformer(DIM, HIDDEN, KV, layers, VOCABULARY)


def experts(layers: int) -> dict[str, tuple[int, ...]]:
    shapes = {"w1": (EXPERT_HIDDEN, DIM // 2), "w2": (DIM // 2, EXPERT_HIDDEN), "w3": (EXPERT_HIDDEN, DIM // 2)}
    return {
        f"layers.{at}.experts.{expert}.{name}": shape
        for at in range(layers)
        for expert in range(EXPERTS)
        for name, shape in shapes.items()
    }


class PlannedError(Exception):
    """Ends a block of lazy tensors without reading. Its arguments are what was measured."""


Load = Callable[[int, Tensors, int, int], dict[str, torch.Tensor]]
MODELS: dict[str, tuple[Callable[[int], dict[str, tuple[int, ...]]], Load]] = {
    "dense, TP 4": (dense, load_dense),
    "8 experts, EP 4": (experts, load_experts),
}
RANKS = 4


def random_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: (torch.randn(shape, generator=generator) * 0.02).to(DTYPE) for name, shape in shapes.items()}


def save_as(saved_as: str, weights: dict[str, torch.Tensor], folder: str) -> None:
    tool, _, codec = saved_as.partition(" ")
    if tool == "reshard":
        reshard.save(weights, folder, codec=codec)
    else:
        os.mkdir(folder)
        save_file(weights, os.path.join(folder, "model.safetensors"))


def measure(load: Callable[[Tensors, int, int], dict[str, torch.Tensor]], folder: str, saved: Tensors) -> Row:
    """Load as each rank, compare the values, and return what the rank that read most has read."""
    stored = sum(info.stored_bytes for info in reshard.open(folder).tensors.values())
    found: Row = {"needed": 0, "fetched": 0, "requests": 0, "seconds": 0.0}
    for rank in range(RANKS):
        begin = time.perf_counter()
        with reshard.open(folder) as checkpoint:
            with checkpoint.lazy() as weights:
                loaded = load(weights, rank, RANKS)
            report = weights.report
        took = time.perf_counter() - begin
        expected = load(saved, rank, RANKS)
        assert all(loaded[name].equal(tensor) for name, tensor in expected.items())
        assert report.bytes_needed == sum(tensor.nbytes for tensor in expected.values())
        counts = {"needed": report.bytes_needed, "fetched": report.bytes_fetched, "requests": report.requests}
        found = {name: max(found[name], count) for name, count in {**counts, "seconds": took}.items()}
    return {**found, "stored": stored}


def run_bytes(layers: int) -> list[Row]:
    """Return one row per model and format."""
    header("model", "checkpoint", "MB needed", "MB read", "read ÷ needed", "read ÷ all stored", "requests", "s")
    rows: list[Row] = []
    for model, (shapes, load) in MODELS.items():
        saved = random_weights(shapes(layers))
        for saved_as in SAVED_AS:
            with tempfile.TemporaryDirectory() as folder:
                save_as(saved_as, saved, os.path.join(folder, "checkpoint"))
                row = measure(partial(load, layers), os.path.join(folder, "checkpoint"), saved)
            row |= {"table": "bytes", "model": model, "saved_as": saved_as}
            row |= {"ratio": row["fetched"] / row["needed"], "share": row["fetched"] / row["stored"]}
            rows.append(row)
            megabytes = f"{row['needed'] / 1e6:.1f}", f"{row['fetched'] / 1e6:.1f}"
            ratios = f"{row['ratio']:.3f}", f"{row['share']:.3f}"
            line(model, saved_as, *megabytes, *ratios, row["requests"], f"{row['seconds']:.2f}")
    return rows


def run_recording(layers: int) -> list[Row]:
    """Return one row: the seconds to open a checkpoint, to record the copies of one rank, and to plan the reads."""
    shapes = transformer(4096, 14_336, 1024, layers, 128_256)
    header("tensors", "requests planned", "GB needed", "open s", "record s", "plan s")
    with tempfile.TemporaryDirectory() as folder:
        make(Case(shapes, saved_by=8, tp=8, pp=1), 1 << 20, folder)
        begin = time.perf_counter()
        checkpoint = reshard.open(folder)
        opened = time.perf_counter()
        try:
            with checkpoint.lazy() as weights:
                load_dense(layers, weights, 3, 8)  # the parameters are not written, so they take no memory
                recorded = time.perf_counter()
                report = weights.plan().report
                raise PlannedError(report, recorded, time.perf_counter())
        except PlannedError as error:
            report, recorded, planned = error.args
    seconds = {"open_s": opened - begin, "record_s": recorded - opened, "plan_s": planned - recorded}
    line(len(shapes), report.requests, f"{report.bytes_needed / 1e9:.1f}", *(f"{s:.2f}" for s in seconds.values()))
    return [{"table": "recording", "tensors": len(shapes), "requests": report.requests, **seconds}]


def draw(rows: list[Row], figure: Any) -> None:
    """Draw bars of bytes read divided by bytes needed."""
    axes = figure.subplots()
    shown = [row for row in rows if row["table"] == "bytes"]
    bars = axes.bar(range(len(shown)), [row["ratio"] for row in shown], 0.6)
    axes.bar_label(bars, fmt="%.3f", fontsize=8)
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(shown)), [f"{row['model']}\n{row['saved_as']}" for row in shown], fontsize=8)
    axes.set_ylabel("bytes read / bytes needed, of a rank")


def main(argv: list[str] | None = None) -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--layers", type=positive, default=4, help="the layers of the models of table bytes")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    arguments = parser.parse_args(argv)
    rows: list[Row] = []
    if "bytes" in arguments.tables:
        rows += run_bytes(arguments.layers)
    if "recording" in arguments.tables:
        rows += run_recording(111)
    write(arguments, rows, draw)


if __name__ == "__main__":
    main()
