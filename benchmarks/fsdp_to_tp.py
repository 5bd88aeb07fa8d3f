"""Save under FSDP, load under TP: seconds, bytes, requests and memory, compared with other libraries in the same run.

    python -m benchmarks.fsdp_to_tp [--stores local s3 slow-s3] [--contenders NAME ...] [--large] [--repeat N]

4 FSDP ranks (gloo) save an MLP in bf16, N(0, 0.02²), of 537 MB (or 2.1 GB), and 4 TP ranks load it. The contenders take
turns, in alternating order. After a warm-up, one run measures bytes, requests and memory and compares the values, and
`--repeat` runs measure time, from one barrier to the next, so that the slowest rank counts. Every save goes to a new
URI, which is removed afterwards. Writes to the local disk are synced; reads come from a warm page cache.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import Peak, Row, alternate, arguments_of, header, line, median, moved_by_calls, positive, write
from benchmarks.contenders import CONTENDERS, Contender, State, available
from benchmarks.models import mlp, under
from benchmarks.stores import NAMES, BenchmarkStore, opened
from benchmarks.timing import elapsed, on_rank_0
from tests.proxy import traffic
from tests.ranks import RankPool

RANKS = 4
LAYERS, LARGE_LAYERS = 32, 128
COLUMNS = ("store", "contender", "save s", "load s", "MB written", "MB read", "requests", "peak MB of a rank")


class Session:
    """The saves and loads of one rank with one store."""

    def __init__(self, store: BenchmarkStore, sizes: dict[str, int]) -> None:
        self._store = store
        self._saved: State = under("fsdp", mlp(seed=0, **sizes)).state_dict()
        self._loaded: State = under("tp", mlp(seed=0, **sizes)).state_dict()
        self._expected = {name: tensor.to_local().clone() for name, tensor in self._loaded.items()}

    def time(self, contender: Contender) -> Row:
        """Save and load once, and return the seconds of each."""
        uri = on_rank_0(self._store.make)
        options = self._store.options()
        save_s = elapsed(lambda: contender.save(self._saved, uri, options))
        self._clear()
        load_s = elapsed(lambda: contender.load(self._loaded, uri, options))
        on_rank_0(lambda: self._store.remove(uri))
        return {"save_s": save_s, "load_s": load_s}

    def examine(self, contender: Contender) -> Row:
        """Measure bytes and requests of all ranks and the peak of the rank with most memory, and check the loaded
        values."""
        uri = on_rank_0(self._store.make)
        options = self._store.options(metered=True)
        row: Row = {}
        for stage, call, state in (("save", contender.save, self._saved), ("load", contender.load, self._loaded)):
            self._clear()
            before = self._moved()
            with Peak() as peak:
                call(state, uri, options)
            moved = self._moved()
            row |= {f"{stage}_{key}": value - before[key] for key, value in moved.items()}
            row[f"{stage}_peak"] = max(_gathered(peak.nbytes))
        right = all(self._loaded[name].to_local().equal(values) for name, values in self._expected.items())
        if not all(_gathered(right)):
            raise AssertionError(f"{type(contender).__name__} loaded values that differ from the saved ones")
        row["needed"] = sum(_gathered(sum(values.nbytes for values in self._expected.values())))
        on_rank_0(lambda: self._store.remove(uri))
        return row

    def _clear(self) -> None:
        for tensor in self._loaded.values():
            tensor.to_local().zero_()

    def _moved(self) -> dict[str, int]:
        """Return bytes and requests so far: counted on the wire for S3, as system calls for a local disk."""
        dist.barrier()
        if self._store.is_s3:
            seen = on_rank_0(lambda: traffic(self._store.counts))
            return {"written": seen.sent, "read": seen.received, "requests": seen.requests}
        calls = _gathered(moved_by_calls())
        written, read, out, back = (sum(rank[key] for rank in calls) for key in ("wchar", "rchar", "syscw", "syscr"))
        return {"written": written, "read": read, "requests": out + back}


def _gathered(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def run_rank(store: BenchmarkStore, names: list[str], sizes: dict[str, int], repeat: int) -> list[Row]:
    """Return one row per contender."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        session = Session(store, sizes)
        contenders = {name: CONTENDERS[name]() for name in names}
        for contender in contenders.values():
            session.time(contender)
        rows = {name: session.examine(contender) for name, contender in contenders.items()}
        times: dict[str, list[Row]] = {name: [] for name in names}
        for _, name in alternate(names, repeat):
            times[name].append(session.time(contenders[name]))
    for name, row in rows.items():
        for key in ("save_s", "load_s"):
            row[f"{key}_all"] = [seconds[key] for seconds in times[name]]
            row[key] = median(row[f"{key}_all"])
    return [{"store": store.name, "contender": name, **row} for name, row in rows.items()]


def run(stores: list[BenchmarkStore], names: list[str], sizes: dict[str, int], repeat: int) -> list[Row]:
    """Return one row per store and contender."""
    header(*COLUMNS)
    rows: list[Row] = []
    for store in stores:
        with RankPool() as pool:
            found = pool.run(RANKS, run_rank, store, available(names, store), sizes, repeat, timeout_s=4 * 3600)[0]
        for row in found:
            line(
                *(row["store"], row["contender"], f"{row['save_s']:.2f}", f"{row['load_s']:.2f}"),
                *(f"{row['save_written'] / 1e6:.0f}", f"{row['load_read'] / 1e6:.0f}"),
                f"{row['save_requests']}, {row['load_requests']}",
                f"{row['save_peak'] / 1e6:.0f}, {row['load_peak'] / 1e6:.0f}",
            )
        rows += found
    return rows


def draw(rows: list[Row], figure: Any) -> None:
    """Draw bars of seconds: one row of plots for saving and one for loading, one column per store."""
    stores = list(dict.fromkeys(row["store"] for row in rows))
    plots = figure.subplots(2, len(stores), squeeze=False)
    for across, store in enumerate(stores):
        here = [row for row in rows if row["store"] == store]
        for down, stage in enumerate(("save", "load")):
            axes = plots[down][across]
            seconds = [row[f"{stage}_s"] for row in here]
            low = [row[f"{stage}_s"] - min(row[f"{stage}_s_all"]) for row in here]
            high = [max(row[f"{stage}_s_all"]) - row[f"{stage}_s"] for row in here]
            colors = ["tab:green" if row["contender"].startswith("reshard") else "tab:gray" for row in here]
            bars = axes.barh([row["contender"] for row in here], seconds, xerr=[low, high], color=colors)
            axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
            axes.margins(x=0.2)
            axes.invert_yaxis()
            axes.tick_params(labelsize=8)
            axes.set_xlabel("seconds", fontsize=8)
            axes.set_title(f"{stage}, {store}", fontsize=9)


def main(argv: list[str] | None = None) -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--stores", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--large", action="store_true", help=f"{LARGE_LAYERS} layers instead of {LAYERS}: 2.1 GB")
    parser.add_argument("--layers", type=positive, help="the number of layers, of 16.8 MB each")
    parser.add_argument(
        "--repeat", type=positive, default=5, help="timed runs of each contender (default: %(default)s)"
    )
    parser.add_argument(
        "--folder", help="the folder for the data of all stores (default: the system's temporary folder)"
    )
    arguments = parser.parse_args(argv)
    layers = arguments.layers or (LARGE_LAYERS if arguments.large else LAYERS)
    with opened(arguments.stores, arguments.folder) as stores:
        rows = run(stores, arguments.contenders, {"layers": layers}, arguments.repeat)
    for row in rows:
        row["layers"] = layers
    write(arguments, rows, draw)


if __name__ == "__main__":
    main()
