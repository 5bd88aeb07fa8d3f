"""The overhead of a load, compared with bare reads of the same byte ranges.

    python -m benchmarks.overhead [--stores local s3 slow-s3] [--ranks 1 4] [--layers N] [--matrices N] [--repeat N]

1 rank and 4 TP ranks load a checkpoint of the MLP, which 4 FSDP ranks saved with codec "none". For comparison, the same
ranks read the byte ranges of their plans without anything else. On a disk, they use os.preadv, into buffers that are
reused or into memory for all bytes. On S3, they use ranged GETs, with obstore and with s3fs. All use as many concurrent
requests as reshard. On a disk, two more contenders do what every load must do: they compute checksums of the bytes at
their destination, or in a buffer from which they copy them to the destination. The contenders take turns. A run lasts
from one barrier to the next. GB/s are those of all ranks together. A load also opens the manifest, plans, verifies
checksums, and copies into the tensors.

A second table compares the processor time of a load with that of a bare loop in one process (`bare_loop.py`).
"""

from __future__ import annotations

import asyncio
import functools
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
import numpy as np
import torch
from fsspec.asyn import sync

import reshard
from benchmarks import bare_loop
from benchmarks.common import Row, alternate, arguments_of, header, installed, line, median, positive, write
from benchmarks.contenders import State
from benchmarks.models import TP_PLAN, mlp, under
from benchmarks.stores import NAMES, REGION, BenchmarkStore, opened
from benchmarks.timing import elapsed
from reshard.storage.formats.detect import open_source
from reshard.storage.runtime.checksums import checksum
from reshard.storage.stores.buffer_pool import aligned_buffer
from reshard.storage.stores.open import open_store
from tests.ranks import RankPool
from tests.servers import KEY, SECRET

SAVED_BY = 4
LOCAL_READS = open_store(".").capabilities.concurrent_reads
REMOTE_READS = open_store("memory://reads").capabilities.concurrent_reads


@dataclass(frozen=True)
class PlannedRead:
    """One request of a plan."""

    path: str
    """The location of the object: a URI, or a path on the disk."""
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


Bare = Callable[[Sequence[PlannedRead]], object]
"""A function that reads byte ranges and does nothing with them."""


def reads_of(uri: str, options: dict[str, Any], ranks: int, rank: int) -> list[PlannedRead]:
    """Return the requests in the plan of a rank."""
    objects = open_source(uri, options).objects
    requests = reshard.open(uri, storage_options=options).plan(reshard.Layout({"tp": ranks}, TP_PLAN))[rank].requests
    columns = zip(requests.objects.tolist(), requests.starts.tolist(), requests.stops.tolist(), strict=True)
    return [PlannedRead(f"{uri}/{objects[at][0]}", start, stop) for at, start, stop in columns]


def read_into(buffer: memoryview, planned: PlannedRead) -> None:
    descriptor = os.open(planned.path, os.O_RDONLY)
    try:
        done = 0
        while done < planned.nbytes:
            done += os.preadv(descriptor, [buffer[done : planned.nbytes]], planned.start + done)
    finally:
        os.close(descriptor)


def buffers_of_threads() -> Callable[[PlannedRead], memoryview]:
    """Return a function that returns a buffer. Each thread reuses one buffer, which stays in the CPU cache."""
    own = threading.local()

    def buffer(planned: PlannedRead) -> memoryview:
        found: memoryview = getattr(own, "buffer", memoryview(b""))
        if len(found) < planned.nbytes:
            own.buffer = found = aligned_buffer(0, planned.nbytes)
        return found[: planned.nbytes]

    return buffer


def by_preadv(options: dict[str, Any]) -> Bare:
    """Read with threads, each into one buffer that it reuses."""
    buffer = buffers_of_threads()
    pool = ThreadPoolExecutor(LOCAL_READS)
    return lambda reads: list(pool.map(lambda planned: read_into(buffer(planned), planned), reads))


def by_preadv_kept(options: dict[str, Any], *, verified: bool = False, copied: bool = False) -> Bare:
    """Read with threads. Every byte has its own destination, as in a load, and each run uses the same destinations.

    Args:
        options: unused.
        verified: compute the checksum of the bytes read.
        copied: read into a buffer of the thread, and copy from there to the destination.
    """
    destinations: list[memoryview] = []
    buffer = buffers_of_threads()
    pool = ThreadPoolExecutor(LOCAL_READS)

    def read(destination: memoryview, planned: PlannedRead) -> None:
        into = buffer(planned) if copied else destination
        read_into(into, planned)
        if verified:
            checksum(into)
        if copied:
            np.copyto(np.frombuffer(destination, np.uint8), np.frombuffer(into, np.uint8))

    def fetch(reads: Sequence[PlannedRead]) -> None:
        destinations.extend(aligned_buffer(0, planned.nbytes) for planned in reads[len(destinations) :])
        list(pool.map(read, destinations, reads))

    return fetch


def by_obstore(options: dict[str, Any]) -> Bare:
    """Read with threads that share a client."""
    import obstore
    from obstore.store import S3Store

    clients: dict[str, S3Store] = {}
    endpoint = options["client_kwargs"]["endpoint_url"]

    def read(planned: PlannedRead) -> None:
        parts = urlsplit(planned.path)
        data = obstore.get_range(clients[parts.netloc], parts.path.lstrip("/"), start=planned.start, end=planned.stop)
        assert len(data) == planned.nbytes

    pool = ThreadPoolExecutor(REMOTE_READS)

    def fetch(reads: Sequence[PlannedRead]) -> None:
        for bucket in {urlsplit(planned.path).netloc for planned in reads} - set(clients):
            clients[bucket] = S3Store(
                bucket,
                endpoint=endpoint,
                access_key_id=KEY,
                secret_access_key=SECRET,
                region=REGION,
                client_options={"allow_http": True},
            )
        list(pool.map(read, reads))

    return fetch


def by_s3fs(options: dict[str, Any]) -> Bare:
    """Read with coroutines on the event loop of s3fs."""
    filesystem = fsspec.filesystem("s3", **options, config_kwargs={"max_pool_connections": 64})

    async def fetch(reads: Sequence[PlannedRead]) -> None:
        slots = asyncio.Semaphore(REMOTE_READS)

        async def read(planned: PlannedRead) -> None:
            async with slots:
                data = await filesystem._cat_file(planned.path, start=planned.start, end=planned.stop)
                assert len(data) == planned.nbytes

        await asyncio.gather(*map(read, reads))

    return lambda reads: sync(filesystem.loop, fetch, reads)


def bare_readers(store: BenchmarkStore) -> dict[str, Callable[[dict[str, Any]], Bare]]:
    """Return the bare readers that are installed and support a store."""
    if not store.is_s3:
        return {
            "preadv": by_preadv,
            "preadv, kept": by_preadv_kept,
            "preadv, kept, verified": functools.partial(by_preadv_kept, verified=True),
            "preadv, verified, copied": functools.partial(by_preadv_kept, verified=True, copied=True),
        }
    return ({"obstore": by_obstore} if installed("obstore") else {}) | {"s3fs": by_s3fs}


def save_rank(uri: str, options: dict[str, Any], layers: int) -> None:
    state = under("fsdp", mlp(seed=0, layers=layers)).state_dict()
    reshard.save(state, uri, codec="none", storage_options=options)


def load_rank(store: BenchmarkStore, uri: str, layers: int, ranks: int, repeat: int) -> dict[str, Any]:
    """Return the bytes that the requests of this rank fetch, and the seconds of each run of each contender."""
    rank = torch.distributed.get_rank()
    options = store.options()
    state: State = under("tp", mlp(seed=1, layers=layers)).state_dict()
    reads = reads_of(uri, options, ranks, rank)
    seconds: dict[str, list[float]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bare = {name: make(options) for name, make in bare_readers(store).items()}
        calls: dict[str, Callable[[], object]] = {
            **{name: functools.partial(reader, reads) for name, reader in bare.items()},
            "reshard none": lambda: reshard.load(state, uri, storage_options=options),
        }
        for at, name in alternate(list(calls), repeat + 1):
            took = elapsed(calls[name])
            if at > 0:
                seconds.setdefault(name, []).append(took)
    return {"nbytes": sum(planned.nbytes for planned in reads), "requests": len(reads), "seconds": seconds}


def run(stores: list[BenchmarkStore], counts: list[int], layers: int, repeat: int) -> list[Row]:
    """Return one row per store, number of ranks and contender."""
    header("store", "ranks", "contender", "requests of a rank", "s", "GB/s", "of the fastest bare")
    rows: list[Row] = []
    for store in stores:
        uri = store.make()
        with RankPool() as pool:
            pool.run(SAVED_BY, save_rank, uri, store.options(), layers)
            for ranks in counts:
                found = pool.run(ranks, load_rank, store, uri, layers, ranks, repeat, timeout_s=3600)
                nbytes = sum(rank["nbytes"] for rank in found)
                seconds = {name: median(times) for name, times in found[0]["seconds"].items()}
                floor = min(took for name, took in seconds.items() if name != "reshard none")
                for name, took in seconds.items():
                    row: Row = {"store": store.name, "ranks": ranks, "contender": name, "nbytes": nbytes}
                    row |= {"requests": max(rank["requests"] for rank in found), "seconds": took}
                    row |= {"all": found[0]["seconds"][name], "of_floor": floor / took}
                    rows.append(row)
                    speed = f"{nbytes / 1e9 / took:.2f}"
                    line(store.name, ranks, name, row["requests"], f"{took:.3f}", speed, f"{row['of_floor']:.0%}")
        store.remove(uri)
    return rows


def draw(rows: list[Row], figure: Any) -> None:
    """Draw bars of GB/s, one plot per store."""
    rows = [row for row in rows if "store" in row]
    stores = list(dict.fromkeys(row["store"] for row in rows))
    for axes, store in zip(figure.subplots(1, len(stores), squeeze=False)[0], stores, strict=True):
        here = [row for row in rows if row["store"] == store]
        speeds = [row["nbytes"] / 1e9 / row["seconds"] for row in here]
        colors = ["tab:green" if row["contender"].startswith("reshard") else "tab:gray" for row in here]
        names = [f"{row['contender']}, {row['ranks']} rank{'s' if row['ranks'] > 1 else ''}" for row in here]
        axes.bar_label(axes.barh(names, speeds, color=colors), fmt="%.2f", padding=3, fontsize=8)
        axes.margins(x=0.2)
        axes.invert_yaxis()
        axes.set_xlabel("GB/s", fontsize=8)
        axes.set_title(store, fontsize=9)
        axes.tick_params(labelsize=7)


def main(argv: list[str] | None = None) -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--stores", nargs="+", choices=NAMES, default=["local", "s3"])
    parser.add_argument(
        "--ranks", type=positive, nargs="+", default=[1, 4], help="the numbers of ranks that load (default: 1 4)"
    )
    parser.add_argument(
        "--layers", type=positive, default=32, help="the number of layers, of 16.8 MB each (default: %(default)s)"
    )
    parser.add_argument(
        "--matrices", type=positive, default=8, help="the matrices of the second table, of 117 MB each (default: 8)"
    )
    parser.add_argument(
        "--repeat", type=positive, default=5, help="timed runs of each contender (default: %(default)s)"
    )
    parser.add_argument(
        "--folder", help="the folder for the data of all stores (default: the system's temporary folder)"
    )
    arguments = parser.parse_args(argv)
    with opened(arguments.stores, arguments.folder) as stores:
        rows = run(stores, arguments.ranks, arguments.layers, arguments.repeat)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rows += bare_loop.run(Path(folder), arguments.matrices, arguments.repeat)
    write(arguments, rows, draw)


if __name__ == "__main__":
    main()
