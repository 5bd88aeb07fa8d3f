"""Saves and loads of many ranks with small tensors: seconds, and the traffic between the ranks, next to DCP's.

    python -m benchmarks.many_ranks [--ranks N ...] [--tensors N] [--repeat N] [--folder PATH]

Each of the ranks is a process of its own; they are forked from one that has imported torch. The state has 300 tensors
of 512 x 256 float32 (157 MB) and a step. The checkpoints are on a disk: pass a folder in memory to leave it out. A rank
saves rows of each tensor (as FSDP), and loads the same rows ("same") or columns ("columns", as tensor parallelism).

Seconds are medians, from one barrier to the next. The traffic is what passes the loopback interface between the same
barriers: collectives over gloo, and keys of the process group's store. It is shown per rank. The values that a load
finds are compared with the saved ones.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from benchmarks.common import Row, alternate, arguments_of, header, line, median, positive, write
from benchmarks.contenders import CONTENDERS, State
from benchmarks.timing import elapsed, on_rank_0
from tests.ranks import RankPool

COLUMNS = ("ranks", "call", "contender", "seconds", "of DCP's", "kB per rank", "packets per rank")
CALLS = ("save", "same", "columns")
NAMES = ("dcp", "reshard-none")
SHAPE = (512, 256)


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


def measure_rank(tensors: int, repeat: int, folder: str) -> list[Row]:
    """Return one row for each call and contender."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        saved = state_of(mesh, tensors, 0, is_empty=False)
        rows: dict[tuple[str, str], Row] = {}
        for at, name in alternate(NAMES, repeat + 1):
            contender, uri = CONTENDERS[name](), f"{folder}/{name}-{at}"
            for call in CALLS:
                state = saved if call == "save" else state_of(mesh, tensors, int(call == "columns"), is_empty=True)
                before = on_rank_0(traffic)
                run = contender.save if call == "save" else contender.load
                seconds = elapsed(partial(run, state, uri, {}))
                after = on_rank_0(traffic)
                _check(state, mesh, tensors, int(call == "columns"))
                if at:  # the first round warms up
                    row = rows.setdefault((call, name), {"call": call, "contender": name, "all": [], "traffic": []})
                    row["all"].append(seconds)
                    row["traffic"].append((after[0] - before[0], after[1] - before[1]))
            on_rank_0(partial(shutil.rmtree, uri))
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
            seconds, ratio = f"{row['seconds']:.2f}", f"{row['of_dcp']:.2f}"
            line(
                world,
                row["call"],
                row["contender"],
                seconds,
                ratio,
                f"{row['bytes'] / 1e3:.0f}",
                f"{row['packets']:.0f}",
            )
        rows += found
    return rows


def draw(rows: list[Row], figure: Any) -> None:
    """Draw the seconds of each call over the number of ranks."""
    for axes, call in zip(figure.subplots(1, len(CALLS)), CALLS, strict=True):
        for name in NAMES:
            points = [(row["ranks"], row["seconds"]) for row in rows if (row["call"], row["contender"]) == (call, name)]
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set(title=call, xlabel="ranks", ylabel="seconds", xscale="log", yscale="log")
        axes.legend()


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
