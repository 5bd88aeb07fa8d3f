"""How near a load comes to the floor: the same byte ranges, fetched bare.

    python -m benchmarks.overhead [--places local s3 slow-s3] [--ranks 1 4] [--layers N] [--repeat N]

A checkpoint of the MLP, saved by 4 FSDP ranks with codec "none", is loaded by 1 rank and by 4 TP ranks. Beside it, the
same ranks read the requests of their own plans: by os.preadv into buffers that are used again, or into memory for all
of them, or by ranged GETs, with obstore and with s3fs; each with as many requests at once as reshard has. On a disk,
two more do what any load has to: they verify the bytes in their place, or in a buffer from which they copy them there.
The contenders take turns; a run lasts from a barrier to the next. GB/s are of all ranks together. What a load does
beyond the bare ranges: open the manifest, plan, verify checksums, copy into the tensors.
"""

from __future__ import annotations

import asyncio
import functools
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import fsspec
import numpy as np
import torch
from fsspec.asyn import sync

import reshard
from benchmarks.common import Row, alternate, arguments_of, header, installed, line, median, positive, write
from benchmarks.contenders import State
from benchmarks.models import TP_PLAN, mlp, under
from benchmarks.places import NAMES, REGION, Place, opened
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
class Piece:
    """One request of a plan."""

    path: str
    """Of the object, as a URI or on the disk."""
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


Bare = Callable[[Sequence[Piece]], object]
"""A way to fetch byte ranges and do nothing with them."""


def pieces_of(uri: str, options: dict[str, Any], ranks: int, rank: int) -> list[Piece]:
    """The requests of a rank's plan."""
    objects = open_source(uri, options).objects
    requests = reshard.open(uri, storage_options=options).plan(reshard.Layout({"tp": ranks}, TP_PLAN))[rank].requests
    columns = zip(requests.objects.tolist(), requests.starts.tolist(), requests.stops.tolist(), strict=True)
    return [Piece(f"{uri}/{objects[at][0]}", start, stop) for at, start, stop in columns]


def read_into(buffer: memoryview, piece: Piece) -> None:
    descriptor = os.open(piece.path, os.O_RDONLY)
    try:
        done = 0
        while done < piece.nbytes:
            done += os.preadv(descriptor, [buffer[done : piece.nbytes]], piece.start + done)
    finally:
        os.close(descriptor)


def buffers_of_threads() -> Callable[[Piece], memoryview]:
    """For each thread a buffer of its own, which stays in the cache."""
    own = threading.local()

    def buffer(piece: Piece) -> memoryview:
        found: memoryview = getattr(own, "buffer", memoryview(b""))
        if len(found) < piece.nbytes:
            own.buffer = found = aligned_buffer(0, piece.nbytes)
        return found[: piece.nbytes]

    return buffer


def by_preadv(options: dict[str, Any]) -> Bare:
    """Threads, each with a buffer of its own."""
    buffer = buffers_of_threads()
    pool = ThreadPoolExecutor(LOCAL_READS)
    return lambda pieces: list(pool.map(lambda piece: read_into(buffer(piece), piece), pieces))


def by_preadv_kept(options: dict[str, Any], *, verified: bool = False, copied: bool = False) -> Bare:
    """Threads; every byte has a place of its own, as in a load, and each run writes to the same places.

    Args:
        verified: take the checksum of what was read.
        copied: read into a buffer of the thread's own, and copy that to the place.
    """
    places: list[memoryview] = []
    buffer = buffers_of_threads()
    pool = ThreadPoolExecutor(LOCAL_READS)

    def read(place: memoryview, piece: Piece) -> None:
        into = buffer(piece) if copied else place
        read_into(into, piece)
        if verified:
            checksum(into)
        if copied:
            np.copyto(np.frombuffer(place, np.uint8), np.frombuffer(into, np.uint8))

    def fetch(pieces: Sequence[Piece]) -> None:
        places.extend(aligned_buffer(0, piece.nbytes) for piece in pieces[len(places) :])
        list(pool.map(read, places, pieces))

    return fetch


def by_obstore(options: dict[str, Any]) -> Bare:
    """Threads that share a client."""
    import obstore
    from obstore.store import S3Store

    stores: dict[str, S3Store] = {}
    endpoint = options["client_kwargs"]["endpoint_url"]

    def read(piece: Piece) -> None:
        parts = urlsplit(piece.path)
        data = obstore.get_range(stores[parts.netloc], parts.path.lstrip("/"), start=piece.start, end=piece.stop)
        assert len(data) == piece.nbytes

    pool = ThreadPoolExecutor(REMOTE_READS)

    def fetch(pieces: Sequence[Piece]) -> None:
        for bucket in {urlsplit(piece.path).netloc for piece in pieces} - set(stores):
            stores[bucket] = S3Store(
                bucket,
                endpoint=endpoint,
                access_key_id=KEY,
                secret_access_key=SECRET,
                region=REGION,
                client_options={"allow_http": True},
            )
        list(pool.map(read, pieces))

    return fetch


def by_s3fs(options: dict[str, Any]) -> Bare:
    """Coroutines on s3fs' own loop."""
    filesystem = fsspec.filesystem("s3", **options, config_kwargs={"max_pool_connections": 64})

    async def fetch(pieces: Sequence[Piece]) -> None:
        room = asyncio.Semaphore(REMOTE_READS)

        async def read(piece: Piece) -> None:
            async with room:
                data = await filesystem._cat_file(piece.path, start=piece.start, end=piece.stop)
                assert len(data) == piece.nbytes

        await asyncio.gather(*map(read, pieces))

    return lambda pieces: sync(filesystem.loop, fetch, pieces)


def bare_ways(place: Place) -> dict[str, Callable[[dict[str, Any]], Bare]]:
    """Those that work at a place and are installed."""
    if not place.is_s3:
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


def load_rank(place: Place, uri: str, layers: int, ranks: int, repeat: int) -> dict[str, Any]:
    """Bytes that all of this rank's requests fetch, and seconds of each run by contender."""
    rank = torch.distributed.get_rank()
    options = place.options()
    state: State = under("tp", mlp(seed=1, layers=layers)).state_dict()
    pieces = pieces_of(uri, options, ranks, rank)
    seconds: dict[str, list[float]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bare = {name: make(options) for name, make in bare_ways(place).items()}
        calls: dict[str, Callable[[], object]] = {
            **{name: functools.partial(way, pieces) for name, way in bare.items()},
            "reshard none": lambda: reshard.load(state, uri, storage_options=options),
        }
        for at, name in alternate(list(calls), repeat + 1):
            took = elapsed(calls[name])
            if at > 0:
                seconds.setdefault(name, []).append(took)
    return {"nbytes": sum(piece.nbytes for piece in pieces), "requests": len(pieces), "seconds": seconds}


def run(places: list[Place], counts: list[int], layers: int, repeat: int) -> list[Row]:
    """One row a place, number of ranks and contender."""
    header("place", "ranks", "contender", "requests of a rank", "s", "GB/s", "of the fastest bare")
    rows: list[Row] = []
    for place in places:
        uri = place.make()
        with RankPool() as pool:
            pool.run(SAVED_BY, save_rank, uri, place.options(), layers)
            for ranks in counts:
                found = pool.run(ranks, load_rank, place, uri, layers, ranks, repeat, timeout_s=3600)
                nbytes = sum(rank["nbytes"] for rank in found)
                seconds = {name: median(times) for name, times in found[0]["seconds"].items()}
                floor = min(took for name, took in seconds.items() if name != "reshard none")
                for name, took in seconds.items():
                    row: Row = {"place": place.name, "ranks": ranks, "contender": name, "nbytes": nbytes}
                    row |= {"requests": max(rank["requests"] for rank in found), "seconds": took}
                    row |= {"all": found[0]["seconds"][name], "of_floor": floor / took}
                    rows.append(row)
                    speed = f"{nbytes / 1e9 / took:.2f}"
                    line(place.name, ranks, name, row["requests"], f"{took:.3f}", speed, f"{row['of_floor']:.0%}")
        place.remove(uri)
    return rows


def draw(rows: list[Row], figure: Any) -> None:
    """Bars of GB/s, a plot for each place."""
    places = list(dict.fromkeys(row["place"] for row in rows))
    for axes, place in zip(figure.subplots(1, len(places), squeeze=False)[0], places, strict=True):
        here = [row for row in rows if row["place"] == place]
        speeds = [row["nbytes"] / 1e9 / row["seconds"] for row in here]
        colors = ["tab:green" if row["contender"].startswith("reshard") else "tab:gray" for row in here]
        names = [f"{row['contender']}, {row['ranks']} rank{'s' if row['ranks'] > 1 else ''}" for row in here]
        axes.bar_label(axes.barh(names, speeds, color=colors), fmt="%.2f", padding=3, fontsize=8)
        axes.margins(x=0.2)
        axes.invert_yaxis()
        axes.set_xlabel("GB/s", fontsize=8)
        axes.set_title(place, fontsize=9)
        axes.tick_params(labelsize=7)


def main(argv: list[str] | None = None) -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--places", nargs="+", choices=NAMES, default=["local", "s3"])
    parser.add_argument("--ranks", type=positive, nargs="+", default=[1, 4], help="that load (default: 1 4)")
    parser.add_argument("--layers", type=positive, default=32, help="of 16.8 MB each (default: %(default)s)")
    parser.add_argument("--repeat", type=positive, default=5, help="timed runs of each (default: %(default)s)")
    parser.add_argument("--folder", help="where the data of all places lies (default: the system's temporary folder)")
    arguments = parser.parse_args(argv)
    with opened(arguments.places, arguments.folder) as places:
        rows = run(places, arguments.ranks, arguments.layers, arguments.repeat)
    write(arguments, rows, draw)


if __name__ == "__main__":
    main()
