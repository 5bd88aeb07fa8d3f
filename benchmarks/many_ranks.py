"""Saves and loads of many ranks with small tensors: seconds, and the traffic between the ranks, next to DCP's.

    python -m benchmarks.many_ranks [--ranks N ...] [--tensors N] [--repeat N] [--folder PATH]

Each of the ranks is a process of its own; they are forked from one that has imported torch. The state has 300 tensors
of 512 x 256 float32 (157 MB) and a step. The checkpoints are on a disk: pass a folder in memory to leave it out.

- save: a rank saves rows of each tensor, as FSDP does.
- same, columns: it loads the same rows, or columns, as tensor parallelism does.
- manager: 300 steps of a CheckpointManager that saves every hundredth step and keeps the last checkpoint; with DCP, the
  same saves, and rank 0 removes the previous checkpoint.
- no save: 1,000 calls of a CheckpointManager when no save is due.
- failure: a load of a checkpoint that is not there, so all ranks fail. The lines of its traceback are counted.

Seconds are medians, from one barrier to the next. The traffic is what passes the loopback interface between the same
barriers: collectives over gloo, and keys of the process group's store. It is shown per rank. The values that a load
finds are compared with the saved ones.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import reshard
from benchmarks.common import Row, alternate, arguments_of, header, line, median, positive, write
from benchmarks.contenders import CONTENDERS, State
from benchmarks.timing import elapsed, on_rank_0
from tests.ranks import RankPool

COLUMNS = ("ranks", "call", "contender", "seconds", "of DCP's", "kB per rank", "packets per rank", "error lines")
CALLS = ("save", "same", "columns", "manager", "no save", "failure")
DRAWN = ("save", "same", "columns", "manager", "failure")
NAMES = ("dcp", "reshard-none")
SHAPE = (512, 256)
STEPS, EVERY = 300, 100


def values_of(at: int) -> torch.Tensor:
    return torch.arange(SHAPE[0] * SHAPE[1], dtype=torch.float32).reshape(SHAPE) + at


def state_of(mesh: DeviceMesh, tensors: int, dim: int, *, is_empty: bool) -> State:
    """Return a state dict of DTensors that are sharded along a dimension."""
    state: State = {"step": 0 if is_empty else 7}
    for at in range(tensors):
        local = values_of(at).chunk(mesh.size(), dim)[mesh.get_local_rank()]
        local = torch.empty_like(local) if is_empty else local.contiguous()
        state[f"layers.{at}.weight"] = DTensor.from_local(local, mesh, [Shard(dim)])
    return state


def traffic() -> tuple[int, int]:
    """Return the bytes and packets that the loopback interface has received so far."""
    with open("/proc/net/dev") as file:
        words = next(line for line in file if line.strip().startswith("lo:")).split()
    return int(words[1]), int(words[2])


def call_of(call: str, name: str, state: State, uri: str, stack: contextlib.ExitStack) -> Callable[[], object]:
    """Return what is measured. Collective. `stack` ends what it needs."""
    contender = CONTENDERS[name]()
    if call == "save":
        return partial(contender.save, state, uri, {})
    if call in ("same", "columns"):
        return partial(contender.load, state, uri, {})
    if call == "manager":
        return partial(_save_with_dcp if name == "dcp" else _save_with_manager, state, f"{uri}-run")
    if call == "no save":
        if name == "dcp":
            return lambda: None
        manager = reshard.CheckpointManager(f"{uri}-none", save_every=10**9, signals=())
        return partial(_save_nothing, state, stack.enter_context(manager))
    return partial(_fail, partial(contender.load, state, f"{uri}-missing", {}))


def _save_with_manager(state: State, uri: str) -> None:
    options: dict[str, Any] = {"asynchronous": False, "codec": "none", "signals": ()}
    with reshard.CheckpointManager(uri, save_every=EVERY, keep=[reshard.latest(1)], **options) as manager:
        for step in range(1, STEPS + 1):
            manager.save(step, state)


def _save_with_dcp(state: State, uri: str) -> None:
    for step in range(EVERY, STEPS + 1, EVERY):
        dcp.save(state, checkpoint_id=f"{uri}/{step}")
        if step > EVERY and dist.get_rank() == 0:
            shutil.rmtree(f"{uri}/{step - EVERY}")


def _save_nothing(state: State, manager: reshard.CheckpointManager) -> None:
    for step in range(1, 1001):
        manager.save(step, state)


def _keep(call: Callable[[], object], returned: list[object]) -> None:
    returned.append(call())


def _fail(load: Callable[[], object]) -> int:
    """Return the number of lines of the error."""
    try:
        load()
    except (reshard.errors.CheckpointError, CheckpointException):
        return len(traceback.format_exc().splitlines())
    raise AssertionError("there is a checkpoint")


def measure_rank(tensors: int, repeat: int, folder: str) -> list[Row]:
    """Return one row for each call and contender."""
    logging.disable(logging.WARNING)  # DCP logs the traceback of each rank
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        saved = state_of(mesh, tensors, 0, is_empty=False)
        rows: dict[tuple[str, str], Row] = {}
        for at, name in alternate(NAMES, repeat + 1):
            uri = f"{folder}/{name}-{at}"
            for call in CALLS:
                is_load = call in ("same", "columns")
                state = state_of(mesh, tensors, int(call == "columns"), is_empty=True) if is_load else saved
                returned: list[object] = []
                with contextlib.ExitStack() as stack:
                    run = call_of(call, name, state, uri, stack)
                    before = on_rank_0(traffic)
                    seconds = elapsed(partial(_keep, run, returned))
                    after = on_rank_0(traffic)
                _check(state, mesh, tensors, int(call == "columns"))
                if at:  # the first round warms up
                    row = rows.setdefault((call, name), {"call": call, "contender": name, "all": [], "traffic": []})
                    row["all"].append(seconds)
                    row["traffic"].append((after[0] - before[0], after[1] - before[1]))
                    row["error_lines"] = returned[0]
            for made in (uri, f"{uri}-run", f"{uri}-none"):
                on_rank_0(partial(shutil.rmtree, made, ignore_errors=True))
        for row in rows.values():
            row["seconds"] = median(row.pop("all"))
            nbytes, packets = zip(*row.pop("traffic"), strict=True)
            row |= {"bytes": median(nbytes) / mesh.size(), "packets": median(packets) / mesh.size()}
        return sorted(rows.values(), key=lambda row: CALLS.index(row["call"]))


def _check(state: State, mesh: DeviceMesh, tensors: int, dim: int) -> None:
    for at in range(0, tensors, 50):
        expected = values_of(at).chunk(mesh.size(), dim)[mesh.get_local_rank()]
        if not state[f"layers.{at}.weight"].to_local().equal(expected):
            raise AssertionError("a call left values that differ from the saved ones")


def run(ranks: list[int], tensors: int, repeat: int, parent: str | None) -> list[Row]:
    header(*COLUMNS)
    rows: list[Row] = []
    for world in ranks:
        with tempfile.TemporaryDirectory(dir=parent) as folder, RankPool() as pool:
            found: list[Row] = pool.run(world, measure_rank, tensors, repeat, folder, timeout_s=3600)[0]
        for row in found:
            dcp = next(one for one in found if one["call"] == row["call"] and one["contender"] == "dcp")
            row |= {"ranks": world, "of_dcp": row["seconds"] / dcp["seconds"]}
            has_ratio = row["call"] != "no save"
            line(
                world,
                row["call"],
                row["contender"],
                f"{row['seconds']:.2f}",
                f"{row['of_dcp']:.2f}" if has_ratio else "",
                f"{row['bytes'] / 1e3:.0f}",
                f"{row['packets']:.0f}",
                row["error_lines"] or "",
            )
        rows += found
    return rows


def draw(rows: list[Row], figure: Any) -> None:
    """Draw the seconds of each call, and the traffic of each rank, over the number of ranks."""
    plots = figure.subplots(2, len(DRAWN), sharex=True)
    for at, axes in enumerate(plots.flat):
        call, value = DRAWN[at % len(DRAWN)], ("seconds", "bytes")[at // len(DRAWN)]
        for name in NAMES:
            points = [(row["ranks"], row[value]) for row in rows if (row["call"], row["contender"]) == (call, name)]
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set(xscale="log", yscale="log", **({"title": call} if value == "seconds" else {"xlabel": "ranks"}))
        ticks = sorted({row["ranks"] for row in rows})
        axes.set_xticks(ticks, ticks, minor=False)
        axes.minorticks_off()
        if at % len(DRAWN) == 0:
            axes.set_ylabel("seconds" if value == "seconds" else "bytes per rank")
    figure.legend(*plots[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(NAMES), frameon=False)


def main(argv: list[str] | None = None) -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--ranks", type=positive, nargs="+", default=[2, 4, 8, 16, 32, 64], help="the numbers of ranks")
    parser.add_argument("--tensors", type=positive, default=300, help="the number of tensors (default: %(default)s)")
    parser.add_argument("--repeat", type=positive, default=3, help="timed runs of each call (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="the folder for the checkpoints")
    arguments = parser.parse_args(argv)
    rows = run(arguments.ranks, arguments.tensors, arguments.repeat, arguments.folder and str(arguments.folder))
    write(arguments, rows, draw)


if __name__ == "__main__":
    main()
