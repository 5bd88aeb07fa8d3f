"""Reads that ranks share: one rank reads bytes from the store and sends them to the others that need them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType

import numpy as np
import torch

from ...planner.shared_reads import Unit, UnitPart
from ..errors import StoppedError, StoreError
from ..runtime.peers import Peers
from ..runtime.process_group import CHECK_EVERY_S, Interrupt
from ..runtime.threads import Pool
from ..stores.base import Store
from ..stores.retry import read_whole
from .fetcher import Fetched, Fetcher, ObjectRanges

MAX_WAITING = 16
"""The number of threads that wait for messages. A message arrives in its buffer even if no thread waits for it yet."""
_Done = Callable[["Future[Fetched]"], None]


@dataclass(slots=True)
class _Progress:
    """The state of a unit on this rank."""

    unit: Unit
    left: int
    """The number of parts that this rank needs and has not been given."""
    begun: bool = False
    data: memoryview | None = None
    """Its bytes. If another rank is the reader: this rank's parts, one after another."""
    waiting: list[tuple[UnitPart, _Done]] = field(default_factory=list)


class SharedFetcher(Fetcher):
    """A fetcher that gets some bytes from other ranks, and sends others to them.

    All ranks start their fetches in the order of the units, so the first unit that is incomplete can always proceed.

    Args:
        store: the store.
        units: the units that this rank reads or receives.
        peers: the other ranks.
        max_held_bytes: the maximum number of bytes of units that this rank has read and not sent yet. A single unit may
            exceed it.
    """

    def __init__(self, store: Store, units: Sequence[Unit], peers: Peers, max_held_bytes: int) -> None:
        super().__init__(store)
        self.workers_fetch = False
        can = store.capabilities
        if self._pool is None and can.async_reads is None:
            self._pool = Pool(can.concurrent_reads, "reshard-fetch")
        self._peers = peers
        self._max_held_bytes = max_held_bytes
        # Separate threads, so that a message that waits for another rank never delays one that this rank waits for.
        self._receives = Pool(MAX_WAITING, "reshard-receive")
        self._sends = Pool(1, "reshard-send")
        self._waits = Pool(MAX_WAITING, "reshard-sent")
        self._changed = threading.Condition()
        self._held_bytes = 0
        self._postponed: list[_Progress] = []
        """Units to read later, in order."""
        self._reading: dict[int, _Progress] = {}
        self._sending = 0
        self._error: Exception | None = None
        self._unsent: StoreError | None = None
        """Why a unit cannot be sent, if the executor has not failed for the same reason."""
        self._of_part: dict[tuple[str, int, int, int], tuple[_Progress, UnitPart]] = {}
        for unit in units:
            mine = unit.parts[peers.rank]
            progress = _Progress(unit, len(mine))
            for part in mine:
                self._of_part[(unit.name, part.start, part.stop, part.count)] = progress, part

    @property
    def max_requests(self) -> int:
        return max(self._capabilities.concurrent_reads, MAX_WAITING)

    @property
    def group_bytes(self) -> int:
        return 0

    def start(self, wanted: ObjectRanges, done: _Done) -> None:
        name, ranges = wanted
        found = self._of_part.get((name, ranges[0][0], ranges[-1][1], len(ranges)))
        if found is None:
            super().start(wanted, done)
            return
        progress, part = found
        data: memoryview | None = None
        begins = False
        with self._changed:
            if progress.data is not None:
                data = self._take(progress, part)
            else:
                progress.waiting.append((part, done))
                begins, progress.begun = not progress.begun, True
        if data is not None:
            done(_done_with(data))
        elif begins and progress.unit.reader == self._peers.rank:
            self._begin_reads(progress)
        elif begins:
            self._begin_to_receive(progress)

    def check(self) -> None:
        """Raise the error of a message that failed."""
        if self._error is not None:
            raise self._error

    def finish(self, interrupt: Interrupt) -> None:
        """Wait until everything has been sent.

        Args:
            interrupt: called regularly. If it raises an error, this stops with it.
        """
        while True:
            self.check()
            if self._unsent is not None:
                raise self._unsent
            with self._changed:
                if not self._sending and not self._postponed:
                    return
                self._changed.wait(CHECK_EVERY_S)
            interrupt()

    def _begin_to_receive(self, progress: _Progress) -> None:
        unit = progress.unit
        buffer = torch.empty(sum(part.size for part in unit.parts[self._peers.rank]), dtype=torch.uint8, device="cpu")
        try:
            received = self._peers.receive(buffer, unit.reader, unit.number)
        except RuntimeError as error:  # another rank has closed the connection
            self._lost(error)
            return
        self._receives.submit(self._receive, progress, buffer, received)

    def _begin_reads(self, *added: _Progress) -> None:
        """Start to read units in order, until the bytes that wait to be sent reach the limit."""
        begun: list[Unit] = []
        with self._changed:
            self._postponed += added
            while self._postponed:
                unit = self._postponed[0].unit
                nbytes = unit.stop - unit.start
                if self._held_bytes and self._held_bytes + nbytes > self._max_held_bytes:
                    break
                self._held_bytes += nbytes
                self._sending += 1
                begun.append(unit)
                self._reading[unit.number] = self._postponed.pop(0)
        for unit in begun:
            super().start((unit.name, [(unit.start, unit.stop)]), partial(self._read_done, unit.number))

    def _receive(self, progress: _Progress, buffer: torch.Tensor, received: Callable[[], None]) -> None:
        try:
            received()
        except Exception as error:
            self._lost(error)
            return
        self._arrived(progress, buffer.numpy().data)

    def _read_done(self, number: int, future: Future[Fetched]) -> None:
        """Pass on a unit that has been read. The thread that read it calls this."""
        with self._changed:
            progress = self._reading.pop(number)
        try:
            found = future.result()
        except CancelledError:
            return  # the read has been stopped
        except Exception as error:
            self._fail(error)
            return
        unit = progress.unit
        if isinstance(found, StoreError):
            self._arrived(progress, found)  # the executor names the tensor
            return
        data = memoryview(found)
        is_whole = len(data) == unit.stop - unit.start
        with contextlib.suppress(RuntimeError):  # the pool accepts no task if the read has been stopped
            self._sends.submit(partial(self._send, unit, data) if is_whole else partial(self._read_again, progress))
        if is_whole:
            self._arrived(progress, data)

    def _read_again(self, progress: _Progress) -> None:
        """Read a unit for which the answer was too short, and pass it on."""
        unit = progress.unit
        try:
            data = memoryview(read_whole(self._store, unit.name, unit.start, unit.stop))
        except StoreError as error:
            self._arrived(progress, error)
            return
        except Exception as error:
            self._fail(error)
            return
        if len(data) == unit.stop - unit.start:
            self._send(unit, data)
            self._arrived(progress, data)
            return
        self._unsent = StoreError(
            f"object {unit.name!r} in {self._store.location} was cut short: it ends before byte {unit.stop}"
        )
        if all(part.stop <= unit.start + len(data) for part in unit.parts[self._peers.rank]):
            self._fail(self._unsent)  # the executor would not notice it
        else:
            self._arrived(progress, memoryview(b""))  # it reads its part again, and names the tensor

    def _send(self, unit: Unit, data: memoryview) -> None:
        """Begin to send the parts of a unit to the ranks that need them."""
        try:
            payloads: dict[tuple[UnitPart, ...], torch.Tensor] = {}
            sent = []
            for rank, parts in unit.parts.items():
                if rank != self._peers.rank:
                    if parts not in payloads:
                        payloads[parts] = _joined([_cut(data, unit, part) for part in parts])
                    sent.append(self._peers.send(payloads[parts], rank, unit.number))
            self._waits.submit(self._wait_until_sent, unit, list(payloads.values()), sent)
        except Exception as error:
            self._lost(error)

    def _wait_until_sent(self, unit: Unit, payloads: list[torch.Tensor], sent: Sequence[Callable[[], None]]) -> None:
        try:
            for wait in sent:
                wait()
        except Exception as error:
            self._lost(error)
            return
        payloads.clear()
        with self._changed:
            self._sending -= 1
            self._held_bytes -= unit.stop - unit.start
            self._changed.notify_all()
        self._begin_reads()

    def _arrived(self, progress: _Progress, data: memoryview | StoreError) -> None:
        """Pass the parts of a unit to the executor."""
        found: list[tuple[_Done, Fetched]] = []
        with self._changed:
            waiting, progress.waiting = progress.waiting, []
            if not isinstance(data, StoreError):
                progress.data = data
            for part, done in waiting:
                found.append((done, data if isinstance(data, StoreError) else self._take(progress, part)))
        for done, one in found:  # without the lock: the executor has its own
            done(_done_with(one))

    def _take(self, progress: _Progress, part: UnitPart) -> memoryview:
        """Return the bytes of a part, and forget the unit after its last part. The caller holds the lock."""
        unit, data = progress.unit, progress.data
        assert data is not None
        progress.left -= 1
        if progress.left == 0:
            progress.data = None
        if unit.reader == self._peers.rank:
            return _cut(data, unit, part)
        mine = unit.parts[self._peers.rank]
        begin = sum(one.size for one in mine[: mine.index(part)])
        return data[begin : begin + part.size]

    def _fail(self, error: Exception) -> None:
        """Let `check` and `finish` raise an error."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def _lost(self, error: Exception) -> None:
        """Record an error of a message. It is usually the consequence of another rank's error."""
        self._fail(StoppedError(f"another rank has failed: {type(error).__name__}: {error}"))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        for pool in (self._receives, self._sends, self._waits):
            pool.abandon()
        if error is not None or self._error is not None:
            self._peers.abort()


def _done_with(found: Fetched) -> Future[Fetched]:
    future: Future[Fetched] = Future()
    future.set_result(found)
    return future


def _cut(data: memoryview, unit: Unit, part: UnitPart) -> memoryview:
    """Cut a part out of its unit, and join its byte ranges."""
    begin = part.start - unit.start
    if part.count == 1:
        return data[begin : begin + part.nbytes]
    if not len(data):
        return data
    values = np.frombuffer(data, np.uint8)[begin:]
    shape, strides = (part.count, part.nbytes), (part.stride, 1)
    runs = np.lib.stride_tricks.as_strided(values, shape, strides, writeable=False)
    return np.ascontiguousarray(runs).reshape(-1).data


def _joined(parts: Sequence[memoryview]) -> torch.Tensor:
    """Return parts as one tensor of bytes."""
    made = torch.empty(sum(map(len, parts)), dtype=torch.uint8, device="cpu")
    array, begin = made.numpy(), 0
    for part in parts:
        array[begin : begin + len(part)] = np.frombuffer(part, np.uint8)
        begin += len(part)
    return made
