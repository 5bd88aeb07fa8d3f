"""The stores of the benchmarks: a local disk, S3 on loopback, and the same S3 behind two links."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec

from tests.proxy import Link, linked
from tests.servers import KEY, SECRET, Server, seaweedfs

NAMES = ("local", "s3", "far-s3", "slow-s3")
LINKS = {"far-s3": Link(round_trip_s=0.020), "slow-s3": Link(round_trip_s=0.020, bytes_per_s=200e6)}
"""The bandwidth applies to each direction. All connections share it."""
REGION = "us-east-1"
RANGES = 8


@dataclass(frozen=True)
class BenchmarkStore:
    """A store to measure. Each run uses a new URI in it, so that no cache contains the data, and removes it
    afterwards."""

    name: str
    folder: str = ""
    """The folder of a local store."""
    server: Server | None = None
    """The S3 server."""
    endpoint: str = ""
    """The endpoint that clients use."""
    metered: str = ""
    """The endpoint of a link that counts bytes and requests. It is the same as `endpoint` if that link counts."""
    counts: str = ""
    """The file that `tests.proxy.traffic` reads."""

    @property
    def is_s3(self) -> bool:
        return self.server is not None

    def options(self, *, metered: bool = False) -> dict[str, Any]:
        """Return the storage_options that a user would pass."""
        return self.server.through(self.metered if metered else self.endpoint).options if self.server else {}

    def make(self) -> str:
        """Create an empty location, and return its URI."""
        name = f"run-{uuid.uuid4().hex}"
        if self.server is None:
            os.mkdir(os.path.join(self.folder, name))
            return os.path.join(self.folder, name, "checkpoint")
        filesystem = fsspec.filesystem(self.server.protocol, **self.server.options)
        filesystem.mkdir(name)
        filesystem.pipe_file(f"{name}/first", b"SeaweedFS creates the volumes of a bucket at its first write")
        return f"s3://{name}/checkpoint"

    def remove(self, uri: str) -> None:
        """Remove a location that `make` created, with its contents."""
        if self.server is None:
            shutil.rmtree(os.path.dirname(uri))
            return
        filesystem = fsspec.filesystem(self.server.protocol, **self.server.options)
        filesystem.call_s3("delete_bucket", Bucket=urlsplit(uri).netloc)  # SeaweedFS also removes the contents


@contextlib.contextmanager
def opened(names: Sequence[str], folder: str | None = None) -> Iterator[list[BenchmarkStore]]:
    """Open stores, with the servers and links that they need, until the block ends.

    Args:
        names: the names of the stores.
        folder: the folder of the local store and of the data of the S3 server. By default, the system's temporary
            folder.
    """
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder, prefix="reshard-bench-")))
        server = None
        if set(names) - {"local"}:
            (root / "s3").mkdir()
            server = stack.enter_context(seaweedfs(root / "s3"))
        stores = []
        for name in names:
            if server is None or name == "local":
                stores.append(BenchmarkStore(name, folder=str(root)))
            else:
                slow = name in LINKS
                metered, counts = stack.enter_context(linked(server.endpoint, LINKS.get(name, Link())))
                stores.append(BenchmarkStore(name, "", server, metered if slow else server.endpoint, metered, counts))
                if slow:
                    print(measure_link(stores[-1]), flush=True)
        yield stores


def credentials() -> None:
    """Set the credentials in the environment, for clients that read them from there."""
    os.environ.update(AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET, AWS_REGION=REGION, AWS_DEFAULT_REGION=REGION)


def measure_link(store: BenchmarkStore, nbytes: int = 100_000_000) -> str:
    """Measure the link of a store with bare GETs: a small one, one of `nbytes`, and concurrent ranges of the same
    object."""
    assert store.server is not None
    uri = store.make()
    key = uri.removeprefix("s3://")
    direct = fsspec.filesystem("s3", **store.server.options)
    direct.pipe_file(f"{key}/small", b"x")
    direct.pipe_file(f"{key}/large", bytes(nbytes))
    try:
        signed = fsspec.filesystem("s3", **store.options())
        small, large = signed.sign(f"{key}/small"), signed.sign(f"{key}/large")
        with contextlib.closing(http.client.HTTPConnection(urlsplit(store.endpoint).netloc)) as connection:
            _get(connection, small)  # opens the connection
            small_s = min(_get(connection, small) for _ in range(3))
            large_s = _get(connection, large)
        part = nbytes // RANGES
        with ThreadPoolExecutor(RANGES) as pool:
            begin = time.perf_counter()
            list(pool.map(lambda at: _get_range(store.endpoint, large, at * part, part), range(RANGES)))
            ranges_s = time.perf_counter() - begin
    finally:
        store.remove(uri)
    return (
        f"{store.name}: a GET of 1 byte takes {small_s * 1e3:.1f} ms; one of {nbytes / 1e6:.0f} MB {large_s:.3f} s "
        f"({nbytes / 1e6 / large_s:.0f} MB/s); the same in {RANGES} concurrent ranges {ranges_s:.3f} s "
        f"({nbytes / 1e6 / ranges_s:.0f} MB/s)"
    )


def _get_range(endpoint: str, url: str, start: int, nbytes: int) -> None:
    with contextlib.closing(http.client.HTTPConnection(urlsplit(endpoint).netloc)) as connection:
        _get(connection, url, {"Range": f"bytes={start}-{start + nbytes - 1}"})


def _get(connection: http.client.HTTPConnection, url: str, headers: Mapping[str, str] | None = None) -> float:
    """Run one GET, and return its seconds."""
    buffer = bytearray(1 << 20)
    begin = time.perf_counter()
    parts = urlsplit(url)
    connection.request("GET", f"{parts.path}?{parts.query}", headers=headers or {})
    with connection.getresponse() as response:
        assert response.status in (200, 206), response.status
        while response.readinto(buffer):
            pass
    return time.perf_counter() - begin
