"""A process that encodes and writes what a trainer has staged in shared memory, so that the trainer's GIL stays free.

A trainer has one writer process, which is started by its first save of this kind and kept for the next. It starts
without the trainer's main module. It ends when the trainer ends, however that happens. Only the objects are written
there: the ranks agree and commit in the trainer.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import reduction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, RankError, StoppedError, StoreError
from ..formats.native.write_records import ObjectRecord
from ..runtime.background import call_at_exit
from ..runtime.brief import reason
from ..runtime.forks import fork_safe_lock, generation
from ..runtime.gc_pauses import gc_less_often
from ..runtime.logs import logger_of
from ..runtime.process_group import Interrupt, never, portable
from ..stores.base import Store
from ..stores.memory import MemoryStore
from ..stores.open import open_store
from ..stores.retry import discard
from .object_writer import write_objects
from .staging import STAGING, Arena, StagedShard, mapped

logger = logger_of(__name__)
POLL_S = 0.1
"""The time between two checks of the connection, and between two messages about progress."""
WATCH_S = 1.0
"""The time between two checks whether the trainer is alive."""
WARN_AFTER_S = 60.0
"""After how long without progress a warning is logged, and how often it is repeated."""
LET_STOP_S = 10.0
"""How long a writer process may take to stop and to remove what it wrote. Then it is killed."""
LET_EXIT_S = 5.0
NICENESS = 10
"""Added to the niceness of the writer process, so that training has priority on shared cores."""
_START = """
import json, sys
sys.path[:] = json.loads(sys.argv[3])
from importlib import import_module
import_module(sys.argv[4]).serve(int(sys.argv[1]), int(sys.argv[2]))
"""


@dataclass(frozen=True, slots=True)
class PickledStore:
    """A location and its storage options, for another process, and the state of this process that opening it uses."""

    data: bytes = field(repr=False)
    folder: str
    """The working directory, to which a path is relative."""
    environment: dict[str, str] = field(repr=False)
    """The environment variables, which may contain credentials."""
    umask: int

    @classmethod
    def of(cls, location: str | os.PathLike[str] | Store, options: Mapping[str, Any] | None) -> PickledStore:
        """Pickle a location. Raise ArgumentError if another process cannot open it."""
        if isinstance(location, Store) and type(location).__module__ == "__main__":
            raise ArgumentError(
                f"background='process' needs a store that another process can import, but {type(location)} is defined "
                "in the main module: move it to a module, or use background='thread'"
            )
        if isinstance(location, MemoryStore) or str(location).startswith("memory:"):
            raise ArgumentError(
                f"{location.location if isinstance(location, MemoryStore) else location} is in the memory of this "
                "process, so background='process' cannot write it: use background='thread'"
            )
        try:
            data = pickle.dumps((location if isinstance(location, Store) else os.fspath(location), options))
        except Exception as error:
            what = f"the store {type(location)}" if isinstance(location, Store) else "storage_options"
            raise ArgumentError(
                f"background='process' needs to pickle {what}, which failed: {reason(error)}. Pass a URI with plain "
                "options, or use background='thread'"
            ) from error
        try:
            folder = os.getcwd()
        except OSError as error:
            raise ArgumentError(
                f"background='process' needs a working directory, but that of this process is gone: {reason(error)}. "
                "Call os.chdir, or use background='thread'"
            ) from error
        return cls(data, folder, dict(os.environ), _umask())

    def open(self) -> Store:
        """Open the store.

        This process takes over the working directory, the environment variables and the umask of the trainer.

        Raises:
            ArgumentError: it cannot be unpickled.
            StoreError: the folder cannot be entered, so that a relative path would be another one.
            CheckpointError: what `open_store` raises.
        """
        try:
            os.chdir(self.folder)
        except OSError as error:
            raise StoreError(
                f"the writer process cannot change to {self.folder}, the working directory of the trainer when it "
                f"called async_save: {reason(error)}. Do not remove it while a save runs, or use background='thread'"
            ) from error
        for name in os.environ.keys() - self.environment.keys():
            del os.environ[name]
        for name, value in self.environment.items():
            if os.environ.get(name) != value:
                os.environ[name] = value
        os.umask(self.umask)
        try:
            location, options = pickle.loads(self.data)  # noqa: S301 (from the trainer)
        except Exception as error:
            raise ArgumentError(
                f"the writer process cannot unpickle the store: {reason(error)}. Use background='thread'"
            ) from error
        return open_store(location, options)


def _umask() -> int:
    """Return the umask of this process."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    found = os.umask(0o077)  # without /proc it can only be read by a change, which is a strict one for other threads
    os.umask(found)
    return found


@dataclass(frozen=True, slots=True)
class Job:
    """What a writer process writes: the arguments of `write_objects`."""

    store: PickledStore
    arena: int
    """The number of the arena that contains the values."""
    label: str
    shards: list[StagedShard]
    codec: str
    budget_bytes: int | None
    number: int = 0
    """The position among the jobs of the process, from 1 on."""


class WriterProcess:
    """A writer process, in the trainer."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        arguments = [str(theirs.fileno()), str(os.getpid()), json.dumps(sys.path), __name__]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C in a terminal is for the trainer
            )
        self._connection = Connection(ours.detach())
        self._lock = threading.Lock()
        """Held while a job is done."""
        self._sending = threading.Lock()
        self._jobs = 0
        self._arenas: set[int] = set()

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_alive(self) -> bool:
        """Return whether the process runs."""
        return not self._connection.closed and self._process.poll() is None

    def write(
        self,
        job: Job,
        arena: Arena,
        interrupt: Interrupt,
        wrote: Callable[[int], None],
        remove: Callable[[list[ObjectRecord]], None],
    ) -> list[ObjectRecord]:
        """Write staged shards, after the jobs of other saves. `interrupt` and `wrote` are those of `write_objects`.

        Args:
            remove: called with what was written, if the job was done when `interrupt` raised an error.

        Raises what `write_objects` raises, and RankError if the process ended.
        """
        while not self._lock.acquire(timeout=POLL_S):
            interrupt()
        try:
            self._jobs += 1
            try:
                self._map(arena)
                self._send("write", replace(job, number=self._jobs))
            except OSError as error:
                raise self._lost() from error
            return self._await(interrupt, wrote, remove)
        finally:
            self._lock.release()

    def _await(
        self,
        interrupt: Interrupt,
        wrote: Callable[[int], None],
        remove: Callable[[list[ObjectRecord]], None],
    ) -> list[ObjectRecord]:
        written, last, warnings = 0, time.monotonic(), 0
        while True:
            if (idle_s := time.monotonic() - last) > WARN_AFTER_S * (warnings + 1):
                warnings += 1
                logger.warning(
                    "the writer process %d has written nothing for %.0f s: its store does not answer, or the process "
                    "was stopped",
                    self.pid,
                    idle_s,
                )
            try:
                interrupt()
            except BaseException:
                remove(self._stop())
                raise
            kind, value = self._receive()
            if kind == "failed":
                raise value
            if kind == "done":
                records: list[ObjectRecord] = value
                wrote(sum(record.bytes_needed for record in records) - written)
                return records
            if value:
                last, warnings = time.monotonic(), 0
            written += value
            wrote(value)

    def _receive(self) -> tuple[str, Any]:
        """Return the next message, or that nothing was written if none arrives within POLL_S."""
        try:
            return self._connection.recv() if self._connection.poll(POLL_S) else ("wrote", 0)
        except (EOFError, OSError) as error:
            raise self._lost() from error

    def _stop(self) -> list[ObjectRecord]:
        """Stop the job, and wait until the process has removed what it wrote.

        Returns:
            What it wrote, if it was done before.
        """
        deadline = time.monotonic() + LET_STOP_S
        with contextlib.suppress(EOFError, OSError):
            self._send("stop", self._jobs)
            while time.monotonic() < deadline:
                if self._connection.poll(POLL_S):
                    answer: tuple[str, Any] = self._connection.recv()
                    kind, value = answer
                    if kind != "wrote":
                        return value if kind == "done" else []
        self._process.kill()
        self._connection.close()  # the next save starts another process: this one may take long to end
        return []

    def _map(self, arena: Arena) -> None:
        if arena.number not in self._arenas:
            with self._sending:
                self._connection.send(("map", (arena.number, arena.nbytes)))
                reduction.send_handle(self._connection, arena.fd, self._process.pid)
            self._arenas.add(arena.number)

    def unmap(self, arena: Arena) -> None:
        """Let the process forget an arena whose memory is returned to the system."""
        if arena.number in self._arenas:
            self._arenas.discard(arena.number)
            with contextlib.suppress(OSError):
                self._send("unmap", arena.number)

    def _send(self, kind: str, value: Any) -> None:
        with self._sending:
            self._connection.send((kind, value))

    def _lost(self) -> RankError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(LET_EXIT_S)
        return RankError(
            f"the writer process {self.pid} ended while it wrote, with exit code {self._process.poll()} (-9: probably "
            "because the machine had no memory left; pass a smaller budget_bytes). reshard.gc removes what it wrote"
        )

    def close(self) -> None:
        """End the process, if it is not writing."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            with contextlib.suppress(OSError):
                self._send("end", None)  # a child of the trainer may keep the connection open
            self._connection.close()
            try:
                self._process.wait(LET_EXIT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        finally:
            self._lock.release()


@dataclass(frozen=True, slots=True)
class WriteInProcess:
    """Does what `write_objects` does, for staged shards and in the writer process."""

    process: WriterProcess
    store: PickledStore
    arena: Arena

    def __call__(
        self,
        store: Store,
        label: str,
        shards: Sequence[StagedShard],
        codec: str,
        *,
        budget_bytes: int | None = None,
        interrupt: Interrupt = never,
        failed: Callable[[BaseException], None] = lambda error: None,
        wrote: Callable[[int], None] = lambda nbytes: None,
    ) -> list[ObjectRecord]:
        job = Job(self.store, self.arena.number, label, list(shards), codec, budget_bytes)

        def remove(records: list[ObjectRecord]) -> None:
            discard(store, [record.name for record in records])

        try:
            return self.process.write(job, self.arena, interrupt, wrote, remove)
        except BaseException as error:
            failed(error)
            raise


_processes: dict[int, WriterProcess] = {}
"""The writer process of each generation of forks. A child does not use that of its parent, and must not close it."""
_processes_lock = fork_safe_lock()


def writer_process() -> WriterProcess:
    """Return the writer process of this process. It is started if it does not run."""
    with _processes_lock:
        found = _processes.get(generation())
        if found is None or not found.is_alive():
            if found is not None:
                found.close()
            found = _processes[generation()] = WriterProcess()
        return found


def end_writer_process() -> None:
    """End the writer process of this process, if there is one and it is not writing."""
    with _processes_lock:
        found = _processes.get(generation())
        if found is not None:
            found.close()


def _unmap(arena: Arena) -> None:
    found = _processes.get(generation())
    if found is not None:
        found.unmap(arena)


STAGING.closing = _unmap
call_at_exit(end_writer_process)


# In the writer process


class _Server:
    """The work of a writer process."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._arenas: dict[int, npt.NDArray[np.uint8]] = {}
        self._stopped = 0
        """The number of the last job that the trainer stopped."""
        self._wrote = 0
        """Bytes that were written since the last message."""
        self._counting = threading.Lock()

    def receive(self) -> None:
        """Receive messages until the trainer ends or says so, and then end this process."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                kind, value = self._connection.recv()
                if kind == "map":
                    number, nbytes = value
                    fd = reduction.recv_handle(self._connection)
                    self._arenas[number] = mapped(fd, nbytes)
                    os.close(fd)
                elif kind == "unmap":
                    self._arenas.pop(value, None)
                elif kind == "stop":
                    self._stopped = value
                elif kind == "end":
                    break
                else:
                    self._jobs.put(value)
        os._exit(0)

    def work(self) -> None:
        """Write job after job."""
        while True:
            job = self._jobs.get()
            try:
                answer: tuple[str, Any] = "done", self._write(job)
            except BaseException as error:
                answer = "failed", portable(error)
            self._send(*answer)
            del job, answer

    def _write(self, job: Job) -> list[ObjectRecord]:
        self._wrote = 0
        memory = self._arenas[job.arena]
        with gc_less_often():
            return write_objects(
                job.store.open(),
                job.label,
                [shard.shard(memory) for shard in job.shards],
                job.codec,
                budget_bytes=job.budget_bytes,
                interrupt=lambda: self._check(job.number),
                wrote=self._count,
            )

    def _count(self, nbytes: int) -> None:
        with self._counting:
            self._wrote += nbytes

    def _check(self, number: int) -> None:
        if self._stopped >= number:
            raise StoppedError("the trainer stopped this save")
        with self._counting:
            wrote, self._wrote = self._wrote, 0
        if wrote:
            self._send("wrote", wrote)

    def _send(self, kind: str, value: Any) -> None:
        with self._sending:
            self._connection.send((kind, value))


def serve(fd: int, trainer: int) -> None:
    """Run a writer process.

    Args:
        fd: the socket to the trainer.
        trainer: the process ID of the trainer.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # the trainer decides when to end
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    server = _Server(Connection(fd))
    threading.Thread(target=server.receive, name="reshard-receive", daemon=True).start()
    threading.Thread(target=_watch, args=(trainer,), name="reshard-watch", daemon=True).start()
    server.work()


def _watch(trainer: int) -> None:
    """End this process when the trainer has ended. A child of the trainer may keep the connection open."""
    while os.getppid() == trainer:
        time.sleep(WATCH_S)
    os._exit(1)
