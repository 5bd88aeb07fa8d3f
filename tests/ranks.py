"""A pool of real ranks: processes that stay alive between tests and join a new gloo group for each test.

A process that imports torch takes seconds to start. Here one process imports it, and the ranks are forked from that
process. `with RankPool() as pool: pool.run(world_size, function, *args)` runs a module-level function on ranks 0 to
world_size - 1.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

PRELOADED = [
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "reshard.storage.load",
    "reshard.storage.save",
]
TORCH_WARNINGS = (
    "FSDP",
    ".*FullyShardedDataParallel",
    "`_get_pg_default_device`",
    "Multiple backends are",
    "Please use DTensor",
)
"""The beginnings of warnings that torch's FSDP1 emits in normal use."""


class RankFailed(AssertionError):
    """A rank raised, died or did not answer."""


class RankPool:
    """Processes that act as ranks. Each is started when it is first needed."""

    def __init__(self, preloaded: Sequence[str] = PRELOADED) -> None:
        """
        Args:
            preloaded: the modules to import before the ranks are forked. The first pool of a process determines them.
        """
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(preloaded))
        self._workers: list[tuple[Any, Connection]] = []
        # one folder for all runs: torch's FileStore aborts its process if its folder is gone when it is freed, which
        # may be later than the answer of the rank
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._runs = 0

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120) -> list[Any]:
        """Run a function on all ranks, and return their results in the order of ranks.

        Raises:
            RankFailed: A rank raised, died or did not answer. The message has the tracebacks.
        """
        while len(self._workers) < world_size:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_work, args=(theirs,))
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        self._folder = self._folder or tempfile.TemporaryDirectory()
        self._runs += 1
        meeting = os.path.join(self._folder.name, f"store-{self._runs}")
        try:
            for rank in range(world_size):
                self._workers[rank][1].send((rank, world_size, meeting, function, args))
        except (BrokenPipeError, ConnectionResetError) as error:
            self.close()
            raise RankFailed("a process died before it began") from error
        return self._collect(world_size, timeout_s)

    def _collect(self, world_size: int, timeout_s: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting = {self._workers[rank][1]: rank for rank in range(world_size)}
        while waiting:
            ready = wait(list(waiting), timeout=10 if failures else timeout_s)
            if not ready:
                silent = sorted(waiting.values())
                self.close()
                details = "".join(failures.values())
                raise RankFailed(f"ranks {silent} did not answer in time\n{details}")
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    ok, value = connection.recv()
                except (EOFError, ConnectionResetError):
                    ok, value = False, "the process died"
                if ok:
                    results[rank] = value
                else:
                    failures[rank] = f"rank {rank}:\n{value}"
        if failures:
            if any("the process died" in failure for failure in failures.values()):
                self.close()
            raise RankFailed("\n".join(failures[rank] for rank in sorted(failures)))
        return [results[rank] for rank in range(world_size)]

    def kill(self, ranks: Sequence[int]) -> None:
        """Kill ranks with SIGKILL."""
        for process, _ in [worker for rank, worker in enumerate(self._workers) if rank in ranks]:
            process.kill()

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all ranks."""
        for process, connection in self._workers:
            process.kill()
            process.join()
            connection.close()
        self._workers.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def _work(connection: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    warnings.simplefilter("error")
    for beginning in TORCH_WARNINGS:
        warnings.filterwarnings("ignore", message=beginning)
    while True:
        try:
            rank, world_size, meeting, function, args = connection.recv()
        except EOFError:
            return
        os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
        _join(rank, world_size, meeting)
        try:
            try:
                answer = True, function(*args)
            finally:
                if dist.is_initialized():
                    dist.destroy_process_group()
        except BaseException:
            answer = False, traceback.format_exc()
        connection.send(answer)


def _join(rank: int, world_size: int, meeting: str) -> None:
    """Join a group, and wait until all ranks have joined: a rank that leaves earlier would break the connections.

    A process that cannot join exits, since torch cannot start again in it.
    """
    import torch.distributed as dist

    try:
        timeout = timedelta(seconds=60)
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size, timeout=timeout
        )
        dist.barrier()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
