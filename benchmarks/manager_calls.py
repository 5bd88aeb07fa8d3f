"""What a call of `CheckpointManager.save` costs in a step that is not saved, and how soon a requested save begins.

    python -m benchmarks.manager_calls [--ranks 1 2 4] [--calls N] [--requests N]

Each rank calls `save` in every step of a loop. For comparison, the ranks agree on a save by an all_reduce of one number
over gloo in every step, and rank 0 looks for a key in torch's key-value store. The last columns are the time and the
number of steps from `save_now` on the last rank to the save on all ranks, in a loop whose steps take 10 ms.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

import reshard
from benchmarks.common import Row, arguments_of, header, line, median, positive, write
from benchmarks.timing import elapsed
from tests.ranks import RankPool

STEP_S = 0.01


def seconds_per_call(call: Callable[[], object], calls: int) -> float:
    """Return the seconds that one of many calls takes. Collective."""

    def many() -> None:
        for _ in range(calls):
            call()

    return elapsed(many) / calls


def run_rank(calls: int, requests: int) -> dict[str, Any]:
    """Measure on one rank."""
    folder: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    number, store = torch.ones(1), distributed_c10d._get_default_store()
    found: dict[str, Any] = {}
    with reshard.CheckpointManager(folder[0], save_every=10**9, asynchronous=False, signals=()) as manager:
        found["save"] = seconds_per_call(lambda: manager.save(1, {}), calls)
        found["all_reduce"] = seconds_per_call(lambda: dist.all_reduce(number), calls // 10)
        found["key"] = seconds_per_call(lambda: store.check(["benchmark"]), calls // 10)
        waits, steps, step = [], [], 0
        for _ in range(requests):
            begin, first = time.perf_counter(), step
            if dist.get_rank() == dist.get_world_size() - 1:
                manager.save_now()
            while True:
                step += 1
                time.sleep(STEP_S)
                dist.all_reduce(number)
                if manager.save(step, {"step": step}):
                    break
            waits.append(time.perf_counter() - begin)
            steps.append(step - first)
        found |= {"wait": median(waits), "steps": median(steps)}
    return found


def run(counts: list[int], calls: int, requests: int) -> list[Row]:
    """Return one row per number of ranks."""
    header("ranks", "save, µs", "all_reduce, µs", "look for a key, µs", "request to save, s", "steps")
    rows: list[Row] = []
    with RankPool() as pool:
        for ranks in counts:
            found = pool.run(ranks, run_rank, calls, requests, timeout_s=3600)[0]
            rows.append({"ranks": ranks, **found})
            micros = [f"{found[name] * 1e6:.1f}" for name in ("save", "all_reduce", "key")]
            line(ranks, *micros, f"{found['wait']:.2f}", found["steps"])
    return rows


def draw(rows: list[Row], figure: Any) -> None:
    """Draw bars of the seconds per step."""
    axes = figure.subplots()
    for at, name in enumerate(("save", "all_reduce", "key")):
        bars = axes.bar([i + at / 4 for i in range(len(rows))], [row[name] * 1e6 for row in rows], 0.25, label=name)
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.set_xticks(range(len(rows)), [f"{row['ranks']} ranks" for row in rows])
    axes.set_ylabel("µs per step")
    axes.set_yscale("log")
    axes.legend()


def main(argv: list[str] | None = None) -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--ranks", type=positive, nargs="+", default=[1, 2, 4], help="(default: 1 2 4)")
    parser.add_argument("--calls", type=positive, default=20_000, help="calls of save (default: %(default)s)")
    parser.add_argument("--requests", type=positive, default=9, help="requested saves (default: %(default)s)")
    arguments = parser.parse_args(argv)
    write(arguments, run(arguments.ranks, arguments.calls, arguments.requests), draw)


if __name__ == "__main__":
    main()
