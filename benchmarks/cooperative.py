"""Loads in which ranks read each byte once and send it to each other, compared with separate reads in the same run.

    python -m benchmarks.cooperative [--cases NAME ...] [--layers N] [--repeat N] [--folder PATH]

| case | saved by | loaded by | where |
|---|---|---|---|
| replicas | FSDP, 4 ranks, native | 8 ranks that need everything | S3 behind 20 ms and 200 MB/s |
| replicas-none | the same with codec "none" | | |
| hsdp | FSDP, 4 ranks, native | HSDP 2 x 4 | S3 |
| columns | FSDP, 4 ranks, DCP | TP, 8 ranks | S3 |
| slow-dcp | FSDP, 4 ranks, DCP | TP, 4 ranks | S3 behind 20 ms and 200 MB/s; DCP's reader takes part, too |
| local | FSDP, 4 ranks, native | TP, 4 ranks, "auto" | a warm local disk |

The model is an MLP in bf16 of 537 MB (32 layers). Bytes are counted on the wire, and compared with the size of the
objects. Seconds are medians, from one barrier to the next. The values are compared with the saved ones.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import fsspec
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor

import reshard
from benchmarks.common import Row, alternate, arguments_of, header, line, median, positive, write
from benchmarks.contenders import CONTENDERS
from benchmarks.models import mlp, under
from benchmarks.stores import BenchmarkStore, opened
from benchmarks.timing import elapsed, on_rank_0
from tests.proxy import traffic
from tests.ranks import RankPool

SAVERS = 4
COLUMNS = ("case", "read", "seconds", "of separate", "MB on the wire", "of the stored bytes")


@dataclass(frozen=True)
class Case:
    """A load to measure."""

    store: str
    layout: str
    ranks: int
    saver: str = "reshard-zstd"
    """The contender that saves."""
    modes: tuple[object, ...] = (False, True)


CASES = {
    "replicas": Case("slow-s3", "replicas", 8),
    "replicas-none": Case("slow-s3", "replicas", 8, "reshard-none"),
    "hsdp": Case("s3", "hsdp", 8),
    "columns": Case("s3", "tp", 8, "dcp"),
    "slow-dcp": Case("slow-s3", "tp", 4, "dcp", modes=(False, True, "dcp")),
    "local": Case("local", "tp", 4, modes=(False, "auto")),
}


def save_rank(store: BenchmarkStore, uri: str, layers: int, saver: str) -> None:
    state = under("fsdp", mlp(seed=0, layers=layers)).state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        CONTENDERS[saver]().save(state, uri, store.options())


def state_of(layout: str, layers: int) -> dict[str, Any]:
    model = mlp(seed=0, layers=layers)
    if layout == "tp":
        return under("tp", model).state_dict()
    if layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh)
        return model.state_dict()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = model.state_dict()
    return {name: distribute_tensor(tensor, mesh, [Replicate()], src_data_rank=None) for name, tensor in state.items()}


def load_rank(case: Case, store: BenchmarkStore, uri: str, layers: int, repeat: int) -> list[Row]:
    """Return one row for each mode."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        state = state_of(case.layout, layers)
        expected = {name: tensor.to_local().clone() for name, tensor in state.items()}

        def load(mode: Any, *, metered: bool = False) -> None:
            options = store.options(metered=metered)
            if mode == "dcp":
                CONTENDERS["dcp"]().load(state, uri, options)
            else:
                reshard.load(state, uri, storage_options=options, cooperative=mode)

        rows: dict[object, Row] = {}
        for mode in case.modes:
            for tensor in state.values():
                tensor.to_local().zero_()
            load(mode)
            before = on_rank_0(lambda: traffic(store.counts).received) if store.is_s3 else 0
            load(mode, metered=True)
            after = on_rank_0(lambda: traffic(store.counts).received) if store.is_s3 else 0
            if not all(state[name].to_local().equal(tensor) for name, tensor in expected.items()):
                raise AssertionError(f"cooperative={mode} loaded values that differ from the saved ones")
            rows[mode] = {"mode": str(mode), "bytes": after - before, "all": []}
        for _, mode in alternate(list(case.modes), repeat):
            rows[mode]["all"].append(elapsed(lambda mode=mode: load(mode)))  # type: ignore[misc]
    return [{**row, "seconds": median(row["all"])} for row in rows.values()]


def stored_bytes(store: BenchmarkStore, uri: str) -> int:
    filesystem, path = fsspec.core.url_to_fs(uri, **store.options())
    return int(filesystem.du(path))


def run(names: list[str], stores: dict[str, BenchmarkStore], layers: int, repeat: int) -> list[Row]:
    header(*COLUMNS)
    rows: list[Row] = []
    for name in names:
        case = CASES[name]
        store = stores[case.store]
        uri = store.make()
        with RankPool() as pool:
            pool.run(SAVERS, save_rank, store, uri, layers, case.saver, timeout_s=3600)
            stored = stored_bytes(store, uri)
            found = pool.run(case.ranks, load_rank, case, store, uri, layers, repeat, timeout_s=3600)[0]
        store.remove(uri)
        for row in found:
            ratio = row["seconds"] / found[0]["seconds"]
            read = f"{row['bytes'] / 1e6:.0f}" if row["bytes"] else "-"
            of_stored = f"{row['bytes'] / stored:.2f}" if row["bytes"] else "-"
            line(name, row["mode"], f"{row['seconds']:.2f}", f"{ratio:.2f}", read, of_stored)
            rows.append({"case": name, **row, "of_separate": ratio, "stored": stored})
    return rows


def draw(rows: list[Row], figure: Any) -> None:
    """Draw one bar of seconds for each load."""
    axes = figure.subplots()
    labels = [f"{row['case']}, {row['mode']}" for row in rows]
    bars = axes.barh(labels, [row["seconds"] for row in rows])
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("seconds")


def main(argv: list[str] | None = None) -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--layers", type=positive, default=32, help="the number of layers, of 16.8 MB each")
    parser.add_argument("--repeat", type=positive, default=3, help="timed runs of each load (default: %(default)s)")
    parser.add_argument("--folder", help="the folder for the data of all stores")
    arguments = parser.parse_args(argv)
    names = list(dict.fromkeys(CASES[name].store for name in arguments.cases))
    with opened(names, arguments.folder) as stores:
        rows = run(arguments.cases, {store.name: store for store in stores}, arguments.layers, arguments.repeat)
    write(arguments, rows, draw)


if __name__ == "__main__":
    main()
