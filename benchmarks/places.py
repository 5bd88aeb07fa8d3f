"""Where checkpoints lie while they are measured: a local disk, S3 on loopback, and the same S3 behind two links."""

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
"""Bandwidth is in each direction, shared by all connections."""
REGION = "us-east-1"
RANGES = 8


@dataclass(frozen=True)
class Place:
    """One place. Each run has a URI of its own in it, so that nothing is found in a cache, and disks do not fill."""

    name: str
    folder: str = ""
    """Of a local place."""
    server: Server | None = None
    """Of S3."""
    endpoint: str = ""
    """Where clients reach it."""
    metered: str = ""
    """Where they reach it by a link that counts; the same as `endpoint` where that one does."""
    counts: str = ""
    """What `tests.proxy.traffic` reads."""

    @property
    def is_s3(self) -> bool:
        return self.server is not None

    def options(self, *, metered: bool = False) -> dict[str, Any]:
        """storage_options, as a user gives them."""
        return self.server.through(self.metered if metered else self.endpoint).options if self.server else {}

    def make(self) -> str:
        """The URI of a new empty place."""
        name = f"run-{uuid.uuid4().hex}"
        if self.server is None:
            os.mkdir(os.path.join(self.folder, name))
            return os.path.join(self.folder, name, "checkpoint")
        filesystem = fsspec.filesystem(self.server.protocol, **self.server.options)
        filesystem.mkdir(name)
        filesystem.pipe_file(f"{name}/first", b"the volumes of a bucket are made when it is first written")
        return f"s3://{name}/checkpoint"

    def remove(self, uri: str) -> None:
        """Remove a place with all that is in it."""
        if self.server is None:
            shutil.rmtree(os.path.dirname(uri))
            return
        filesystem = fsspec.filesystem(self.server.protocol, **self.server.options)
        filesystem.call_s3("delete_bucket", Bucket=urlsplit(uri).netloc)  # with what is in it: SeaweedFS allows that


@contextlib.contextmanager
def opened(names: Sequence[str], folder: str | None = None) -> Iterator[list[Place]]:
    """The places, with the servers and links that they need, until the block ends.

    `folder` is where the local place and the data of the S3 server are: by default the system's for temporary files.
    """
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder, prefix="reshard-bench-")))
        server = None
        if set(names) - {"local"}:
            (root / "s3").mkdir()
            server = stack.enter_context(seaweedfs(root / "s3"))
        places = []
        for name in names:
            if server is None or name == "local":
                places.append(Place(name, folder=str(root)))
            else:
                slow = name in LINKS
                metered, counts = stack.enter_context(linked(server.endpoint, LINKS.get(name, Link())))
                places.append(Place(name, "", server, metered if slow else server.endpoint, metered, counts))
                if slow:
                    print(link_in_words(places[-1]), flush=True)
        yield places


def credentials() -> None:
    """For clients that take them from the environment: the endpoint is not theirs to send elsewhere."""
    os.environ.update(AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET, AWS_REGION=REGION, AWS_DEFAULT_REGION=REGION)


def link_in_words(place: Place, nbytes: int = 100_000_000) -> str:
    """Measure a place's link by bare GETs: a small one, one of `nbytes`, and that one cut into ranges, all at once."""
    assert place.server is not None
    uri = place.make()
    key = uri.removeprefix("s3://")
    direct = fsspec.filesystem("s3", **place.server.options)
    direct.pipe_file(f"{key}/small", b"x")
    direct.pipe_file(f"{key}/large", bytes(nbytes))
    try:
        signed = fsspec.filesystem("s3", **place.options())
        small, large = signed.sign(f"{key}/small"), signed.sign(f"{key}/large")
        with contextlib.closing(http.client.HTTPConnection(urlsplit(place.endpoint).netloc)) as connection:
            _get(connection, small)  # opens the connection
            small_s = min(_get(connection, small) for _ in range(3))
            large_s = _get(connection, large)
        part = nbytes // RANGES
        with ThreadPoolExecutor(RANGES) as pool:
            begin = time.perf_counter()
            list(pool.map(lambda at: _get_range(place.endpoint, large, at * part, part), range(RANGES)))
            ranges_s = time.perf_counter() - begin
    finally:
        place.remove(uri)
    return (
        f"{place.name}: a GET of 1 byte takes {small_s * 1e3:.1f} ms; one of {nbytes / 1e6:.0f} MB {large_s:.3f} s "
        f"({nbytes / 1e6 / large_s:.0f} MB/s); the same in {RANGES} ranges at once {ranges_s:.3f} s "
        f"({nbytes / 1e6 / ranges_s:.0f} MB/s)"
    )


def _get_range(endpoint: str, url: str, start: int, nbytes: int) -> None:
    with contextlib.closing(http.client.HTTPConnection(urlsplit(endpoint).netloc)) as connection:
        _get(connection, url, {"Range": f"bytes={start}-{start + nbytes - 1}"})


def _get(connection: http.client.HTTPConnection, url: str, headers: Mapping[str, str] | None = None) -> float:
    """Seconds of one GET."""
    buffer = bytearray(1 << 20)
    begin = time.perf_counter()
    parts = urlsplit(url)
    connection.request("GET", f"{parts.path}?{parts.query}", headers=headers or {})
    with connection.getresponse() as response:
        assert response.status in (200, 206), response.status
        while response.readinto(buffer):
            pass
    return time.perf_counter() - begin
