"""TCP proxies between a real client and a real server, which simulate faults and slow links.

`proxied`, for tests of faults, runs in a thread. It draws faults with a seed: some connections are answered with 503 or
never; some pieces of answers are truncated, and the connection is then reset or closed normally.

`overloaded` answers requests with 503 for a while, and later those beyond a limit. It records all requests.

`linked`, for benchmarks, is a link with a given round trip time and bandwidth, which counts its traffic. It runs in a
separate process, so that it takes no CPU time from the threads that are measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import mmap
import os
import random
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from urllib.parse import urlsplit

SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
HANGS_S = 30
PIECE_BYTES = 256 * 1024
WINDOW_BYTES = 16 * 1024 * 1024
"""The maximum number of bytes in flight of a connection of a link, in one direction."""
BURST_S = 0.010
"""How much idle time of a link a burst may use afterwards, since timers are late, above all on a busy machine."""
METHODS = (b"GET ", b"PUT ", b"POST ", b"HEAD ", b"DELETE ")


@dataclass(frozen=True)
class Faults:
    """The probabilities of the faults."""

    reset: float = 0
    """Per piece of an answer: it is truncated, and the connection is reset."""
    truncate: float = 0
    """Per piece of an answer: it is truncated, and the connection is closed normally."""
    slow_down: float = 0
    """Per connection: the first request is answered with 503 SlowDown."""
    hang: float = 0
    """Per connection: it is accepted and never answered."""
    latency_s: float = 0
    """The delay of each piece of an answer."""
    seed: int = 0


class Proxy:
    """Forwards connections to an endpoint with faults. `counts` has the number of faults of each kind."""

    def __init__(self, endpoint: str, faults: Faults) -> None:
        address = urlsplit(endpoint)
        assert address.hostname is not None
        self._target = (address.hostname, address.port)
        self._faults = faults
        self._rng = random.Random(faults.seed)
        self.counts: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None] | None] = set()
        """The tasks of the connections. The loop has only weak references to them."""

    async def serve(self) -> asyncio.Server:
        return await asyncio.start_server(self._connection, "127.0.0.1", 0)

    def _draw(self, *kinds: str) -> str:
        odds = [getattr(self._faults, kind) for kind in kinds]
        kind = self._rng.choices([*kinds, "none"], [*odds, 1 - sum(odds)])[0]
        self.counts[kind] += 1
        return kind

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        kind = self._draw("slow_down", "hang")
        self._tasks.add(asyncio.current_task())
        try:
            if kind == "hang":
                await asyncio.sleep(HANGS_S)
            elif kind == "slow_down":
                await reader.readuntil(b"\r\n\r\n")
                writer.write(b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\n")
                writer.write(b"Content-Length: %d\r\n\r\n%s" % (len(SLOW_DOWN), SLOW_DOWN))
                await writer.drain()
            else:
                await self._forward(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(asyncio.current_task())
            with contextlib.suppress(OSError):
                writer.close()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection(*self._target)
        requests = asyncio.create_task(_copy(reader, server_writer))
        try:
            while data := await server_reader.read(65536):
                if self._faults.latency_s:
                    await asyncio.sleep(self._faults.latency_s)
                kind = self._draw("reset", "truncate")
                writer.write(data if kind == "none" else data[: self._rng.randrange(len(data))])
                await writer.drain()
                if kind == "reset":
                    writer.transport.abort()
                if kind != "none":
                    return
        finally:
            requests.cancel()
            server_writer.close()


class OverloadedProxy:
    """Forwards requests without a body to an endpoint, and refuses those that are too many with 503.

    Args:
        endpoint: The endpoint.
        is_down: Returns whether all requests are refused now.
        max_in_progress: How many requests are forwarded at the same time otherwise.
    """

    def __init__(self, endpoint: str, is_down: Callable[[], bool], max_in_progress: int) -> None:
        address = urlsplit(endpoint)
        assert address.hostname is not None
        self._target = (address.hostname, address.port)
        self._is_down = is_down
        self._max_in_progress = max_in_progress
        self._in_progress = 0
        self.requests: list[bool] = []
        """Whether each request was refused."""
        self._tasks: set[asyncio.Task[None] | None] = set()

    async def serve(self) -> asyncio.Server:
        return await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=512)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.current_task())
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if not head.startswith((b"GET ", b"HEAD ")):
                    raise ValueError(f"the proxy forwards only GET and HEAD, got {head[:80]!r}")
                is_refused = self._is_down() or self._in_progress >= self._max_in_progress
                self.requests.append(is_refused)
                if not is_refused:
                    await self._forward(head, writer)
                    return
                body = b"" if head.startswith(b"HEAD ") else SLOW_DOWN
                writer.write(b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\n")
                writer.write(b"Content-Length: %d\r\n\r\n%s" % (len(SLOW_DOWN), body))
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(asyncio.current_task())
            with contextlib.suppress(OSError):
                writer.close()

    async def _forward(self, head: bytes, writer: asyncio.StreamWriter) -> None:
        """Forward a request and its answer. Both connections are closed afterwards."""
        self._in_progress += 1
        try:
            server_reader, server_writer = await asyncio.open_connection(*self._target)
            try:
                lines = [each for each in head.split(b"\r\n")[:-2] if not each.lower().startswith(b"connection:")]
                server_writer.write(b"\r\n".join([*lines, b"Connection: close", b"", b""]))
                await _copy(server_reader, writer)
            finally:
                server_writer.close()
        finally:
            self._in_progress -= 1


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()


@contextlib.contextmanager
def proxied(endpoint: str, faults: Faults) -> Iterator[tuple[str, Proxy]]:
    """Run a proxy in front of an endpoint. Yield the endpoint of the proxy, and the proxy."""
    proxy = Proxy(endpoint, faults)
    with _serving(proxy) as own_endpoint:
        yield own_endpoint, proxy


@contextlib.contextmanager
def overloaded(
    endpoint: str, is_down: Callable[[], bool], max_in_progress: int
) -> Iterator[tuple[str, OverloadedProxy]]:
    """Run an `OverloadedProxy`. Yield the endpoint of the proxy, and the proxy."""
    proxy = OverloadedProxy(endpoint, is_down, max_in_progress)
    with _serving(proxy) as own_endpoint:
        yield own_endpoint, proxy


@contextlib.contextmanager
def _serving(proxy: Proxy | OverloadedProxy) -> Iterator[str]:
    """Run a proxy in a thread. Yield its endpoint."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="proxy", daemon=True)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(proxy.serve(), loop).result()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        asyncio.run_coroutine_threadsafe(_stop(server), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _stop(server: asyncio.Server) -> None:
    server.close()
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(frozen=True)
class Link:
    """A link between client and server."""

    round_trip_s: float = 0
    """Half of it is the delay in each direction. Opening a connection takes one round trip more."""
    bytes_per_s: float = float("inf")
    """The bandwidth in each direction, which all connections share."""


@dataclass(frozen=True)
class Traffic:
    """The traffic of a link."""

    requests: int
    """HTTP requests."""
    sent: int
    """Bytes from the clients to the server, headers included."""
    received: int
    """Bytes from the server to the clients, headers included."""

    def __sub__(self, before: Traffic) -> Traffic:
        return Traffic(*(a - b for a, b in zip(astuple(self), astuple(before), strict=True)))


_COUNTS = struct.Struct("<3q")


def traffic(counts: str) -> Traffic:
    """Read the traffic of a link from its file of counts."""
    with open(counts, "rb") as file:
        return Traffic(*_COUNTS.unpack(file.read(_COUNTS.size)))


@contextlib.contextmanager
def linked(endpoint: str, link: Link) -> Iterator[tuple[str, str]]:
    """Run a link in front of an endpoint. Yield the endpoint of the link, and its file of counts for `traffic`."""
    with tempfile.NamedTemporaryFile(prefix="link-") as counts:
        counts.write(bytes(_COUNTS.size))
        counts.flush()
        command = [sys.executable, __file__, endpoint, counts.name, str(link.round_trip_s), str(link.bytes_per_s)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                yield process.stdout.readline().strip(), counts.name
            finally:
                process.kill()


class _Direction:
    """One direction of a link. It has a clock that each piece of any connection advances by its transfer time."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._free_at = 0.0
        self.passed = 0

    async def take(self, nbytes: int) -> None:
        """Wait until the link has sent some bytes."""
        self.passed += nbytes
        now = time.monotonic()
        self._free_at = max(self._free_at, now - BURST_S) + nbytes / self._link.bytes_per_s
        if self._free_at > now:
            await asyncio.sleep(self._free_at - now)


class _LinkServer:
    """Forwards connections over a link."""

    def __init__(self, endpoint: str, link: Link, counts: mmap.mmap) -> None:
        address = urlsplit(endpoint)
        assert address.hostname is not None
        self._target = (address.hostname, address.port)
        self._link = link
        self._counts = counts
        self._up, self._down = _Direction(link), _Direction(link)
        self._requests = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0), backlog=512) as listening:
            listening.setblocking(False)
            print(f"http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
            while True:
                client, _ = await loop.sock_accept(listening)
                task = asyncio.create_task(self._connection(client))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _connection(self, client: socket.socket) -> None:
        server = socket.socket()
        with client, server, contextlib.suppress(OSError):
            for end in (client, server):
                end.setblocking(False)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().sock_connect(server, self._target)
            opened = time.monotonic() + self._link.round_trip_s
            up = asyncio.create_task(self._carry(client, server, self._up, opened))
            down = asyncio.create_task(self._carry(server, client, self._down, opened))
            await asyncio.wait((up, down), return_when=asyncio.FIRST_COMPLETED)
            if not down.done():  # the client has closed its half of the connection
                await asyncio.wait((down,), timeout=HANGS_S)
            for task in (up, down):
                task.cancel()
            await asyncio.gather(up, down, return_exceptions=True)

    async def _carry(self, source: socket.socket, sink: socket.socket, direction: _Direction, opened: float) -> None:
        """Forward one direction of a connection. Data arrives in order, half a round trip after it was sent."""
        loop = asyncio.get_running_loop()
        in_flight: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(WINDOW_BYTES // PIECE_BYTES)
        delivering = asyncio.create_task(_deliver(in_flight, sink))
        try:
            while data := await loop.sock_recv(source, PIECE_BYTES):
                if direction is self._up and data.startswith(METHODS):
                    self._requests += 1
                await direction.take(len(data))
                _COUNTS.pack_into(self._counts, 0, self._requests, self._up.passed, self._down.passed)
                await in_flight.put((max(time.monotonic(), opened) + self._link.round_trip_s / 2, data))
            await in_flight.put((time.monotonic() + self._link.round_trip_s / 2, b""))
            await delivering
        finally:
            delivering.cancel()


async def _deliver(in_flight: asyncio.Queue[tuple[float, bytes]], sink: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due, data = await in_flight.get()
        now = time.monotonic()
        if due > now:
            await asyncio.sleep(due - now)
        if not data:
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_WR)
            return
        await loop.sock_sendall(sink, data)


def _exit_with_the_parent() -> None:
    sys.stdin.read()
    os._exit(0)


def _serve_link() -> None:
    parser = argparse.ArgumentParser(
        description="Run a link in front of an endpoint, and print the endpoint of the link."
    )
    parser.add_argument("endpoint")
    parser.add_argument("counts")
    parser.add_argument("round_trip_s", type=float)
    parser.add_argument("bytes_per_s", type=float)
    arguments = parser.parse_args()
    threading.Thread(target=_exit_with_the_parent, daemon=True).start()
    link = Link(arguments.round_trip_s, arguments.bytes_per_s)
    with open(arguments.counts, "r+b") as file, mmap.mmap(file.fileno(), _COUNTS.size) as counts:
        asyncio.run(_LinkServer(arguments.endpoint, link, counts).serve())


if __name__ == "__main__":
    _serve_link()
