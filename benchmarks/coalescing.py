"""Requests and over-read: what joining byte ranges saves and costs. It only plans, and measures no time.

    python -m benchmarks.coalescing [--cases NAME ...] [--json FILE] [--plot FILE]

The benchmark constructs only the index of a checkpoint. It plans rank 0 of another layout with several limits on the
gaps that a request may read over. The seconds are an estimate for a single rank, with a latency of 20 ms, 16 concurrent
requests and 200 MB/s: one latency, plus the larger of the time for the requests and the time for the bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.common import Row, arguments_of, header, line, write
from benchmarks.shapes import TP_PLAN, fsdp_rows, transformer
from reshard.planner.box import Box
from reshard.planner.coalesce import MAX_GAP_BYTES, MAX_OVER_READ, GapLimits
from reshard.planner.grid import Grid
from reshard.planner.index import CheckpointIndex
from reshard.planner.layout import Layout
from reshard.planner.rank_plans import rank_tensors
from reshard.planner.read_plan import plan_reads
from tests.planner.indexes import Saved, index_of

LATENCY_S = 0.020
CONCURRENT_REQUESTS = 16
BYTES_PER_S = 200e6
LIMITS = [(0, 0.0)] + [(gap, over) for over in (MAX_OVER_READ, 0.02, 0.1) for gap in (4 << 10, MAX_GAP_BYTES, 1 << 20)]
"""Pairs of max_gap_bytes and max_over_read."""
LARGE = {"dim": 8192, "hidden": 28672, "kv": 1024, "layers": 80, "vocabulary": 128256}
SMALL = {"dim": 768, "hidden": 2048, "kv": 256, "layers": 32, "vocabulary": 32000}
CASES: dict[str, tuple[dict[str, int], int, int, bool]] = {
    "70B, fsdp 64 → tp 8": (LARGE, 64, 8, False),
    "70B, fsdp 24 → tp 8": (LARGE, 24, 8, False),
    "70B, fsdp 8 → tp 16, codec none": (LARGE, 8, 16, True),
    "0.3B, fsdp 8 → tp 4": (SMALL, 8, 4, False),
    "0.3B, fsdp 8 → tp 3, codec none": (SMALL, 8, 3, True),
}
"""The model, the number of FSDP ranks that saved it in bf16, the TP ranks that load it, and whether its chunks are
raw."""


def saved(shapes: dict[str, tuple[int, ...]], ranks: int, *, raw: bool) -> CheckpointIndex:
    """Return the index of tensors that FSDP cut by rows."""
    return index_of(
        *(
            Saved(name, Grid.choose(shape, 2, raw=raw), list(_rows(shape, ranks)), raw=raw)
            for name, shape in shapes.items()
        )
    )


def _rows(shape: tuple[int, ...], ranks: int) -> Iterator[Box]:
    for begin, rows in zip(*map(np.ndarray.tolist, fsdp_rows(shape[0], ranks)), strict=True):
        yield Box((begin, *(0 for _ in shape[1:])), (rows, *shape[1:]))


def estimate(requests: int, nbytes: int) -> float:
    """Return the estimated seconds."""
    return LATENCY_S + max(nbytes / BYTES_PER_S, requests * LATENCY_S / CONCURRENT_REQUESTS)


def run(cases: list[str]) -> list[Row]:
    """Return one row per case and limit."""
    header("case", "max gap", "max over-read", "requests", "MB read", "over-read", "estimated s")
    rows: list[Row] = []
    for case in cases:
        model, ranks, tp, raw = CASES[case]
        index = saved(transformer(**model), ranks, raw=raw)
        tensors = rank_tensors({entry.name: entry for entry in index.entries}, Layout({"tp": tp}, TP_PLAN), 0)
        wants = [want for tensor in tensors for want in tensor.wants]
        for gap, over in LIMITS:
            report = plan_reads(index, wants, gap_limits=GapLimits(gap, over)).report
            row: Row = {"case": case, "max_gap_bytes": gap, "max_over_read": over, "requests": report.requests}
            row["bytes_fetched"] = report.bytes_fetched
            row["over_read"] = report.bytes_fetched - report.bytes_wanted
            row["estimated_s"] = estimate(report.requests, report.bytes_fetched)
            row["default"] = (gap, over) == (MAX_GAP_BYTES, MAX_OVER_READ)
            rows.append(row)
            part = row["over_read"] / report.bytes_wanted
            line(
                *(case, f"{gap >> 10} KiB{' (default)' if row['default'] else ''}", f"{over:.1%}", report.requests),
                *(f"{report.bytes_fetched / 1e6:.1f}", f"{part:.2%}", f"{row['estimated_s']:.2f}"),
            )
    return rows


def draw(rows: list[Row], figure: Any) -> None:
    """Draw requests against over-read, both relative to a plan without gaps. Circles mark the default."""
    axes = figure.subplots()
    for case in dict.fromkeys(row["case"] for row in rows):
        here = [row for row in rows if row["case"] == case]
        bare = here[0]

        def at(row: Row, bare: Row = bare) -> tuple[float, float]:
            return 100 * row["over_read"] / bare["bytes_fetched"], row["requests"] / bare["requests"]

        points = sorted(map(at, here))
        axes.plot([x for x, _ in points], [y for _, y in points], "o-", label=f"{case}: {bare['requests']} requests")
        for row in here:
            if row["default"]:
                axes.plot(*at(row), "o", markersize=12, fillstyle="none", color="black")
    axes.set_xlabel("over-read, % of bytes wanted")
    axes.set_ylabel("requests / requests without over-read")
    axes.set_ylim(0, 1.05)
    axes.legend(fontsize=8)


def main(argv: list[str] | None = None) -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    arguments = parser.parse_args(argv)
    write(arguments, run(arguments.cases), draw)


if __name__ == "__main__":
    main()
