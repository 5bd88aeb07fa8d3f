"""A TCP proxy between a real client and a real server, that does what networks and servers do: for tests of faults.

It runs on a thread of its own. Faults are drawn with a seed: some connections are told to slow down (503), or are never
answered; some pieces of the answers are cut short, and the connection reset, or closed as if all were well.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
HANGS_S = 30


@dataclass(frozen=True)
class Faults:
    """How often which fault is met, as parts of 1."""

    reset: float = 0
    """Of the pieces of answers: cut short, and the connection reset."""
    truncate: float = 0
    """Of the pieces of answers: cut short, and the connection closed in good order."""
    slow_down: float = 0
    """Of the connections: the first request is answered by 503 SlowDown."""
    hang: float = 0
    """Of the connections: taken, and never answered."""
    latency_s: float = 0
    """Before each piece of an answer is passed on."""
    seed: int = 0


class Proxy:
    """Passes connections on to an endpoint. `counts` tells how often which fault was met."""

    def __init__(self, endpoint: str, faults: Faults) -> None:
        address = urlsplit(endpoint)
        assert address.hostname is not None
        self._target = (address.hostname, address.port)
        self._faults = faults
        self._rng = random.Random(faults.seed)
        self.counts: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None] | None] = set()
        """Of the connections: the loop itself would let the collector have them."""

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
                await self._pass_on(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(asyncio.current_task())
            with contextlib.suppress(OSError):
                writer.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
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


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()


@contextlib.contextmanager
def proxied(endpoint: str, faults: Faults) -> Iterator[tuple[str, Proxy]]:
    """The endpoint of a running proxy in front of another, and the proxy."""
    proxy = Proxy(endpoint, faults)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="proxy", daemon=True)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(proxy.serve(), loop).result()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", proxy
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
