"""Messages between rank 0 and the other ranks of a group, over gloo. If a rank dies, all ranks raise an error."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch
from torch.distributed import distributed_c10d

from ..errors import RankError
from .lost_ranks import DIED, STEP_S, Watch
from .threads import Pool

T = TypeVar("T")
SETTLE_S = 0.1
"""The connections of processes that were killed together do not close at the same moment."""
SHORT_BYTES = 1024
"""Messages up to this size, with 16 bytes for their lengths, travel in one collective."""
_LENGTHS_BYTES = 16
_SAME = 2**64 - 1
"""In place of the length of the longest part: all parts are the same, and are broadcast."""


class Messages:
    """Sends bytes between rank 0 and the other ranks of a group. All methods are collective.

    While a rank waits, it looks once per second whether a rank is lost. It can be interrupted.

    Args:
        group: a group with gloo. Its methods are called directly, because the functions of torch.distributed stop
            working after destroy_process_group.
        watch: knows which ranks are lost.

    Raises, from all methods:
        RankError: a rank died. The group is broken.
    """

    def __init__(self, group: Any, watch: Watch) -> None:
        self._group = group
        self._watch = watch
        self._rank, self._size = watch.rank, watch.size
        self._connections = watch.connect(group)

    def in_call(self) -> contextlib.AbstractContextManager[None]:
        """See `Watch.in_call`."""
        return self._watch.in_call()

    def gather(self, data: bytes) -> list[memoryview] | None:
        """Send bytes to rank 0. Rank 0 gets the bytes of all ranks, the others get None."""
        heads = self._gather(_head(len(data), 0, data))
        longest = torch.zeros(1, dtype=torch.int64, device="cpu")
        lengths = [_lengths(head)[0] for head in heads]
        if heads:
            longest[0] = max(lengths)
        self._broadcast(longest)
        if int(longest) <= SHORT_BYTES - _LENGTHS_BYTES:
            return [_rest(head, length) for head, length in zip(heads, lengths, strict=True)] if heads else None
        received = self._gather(_padded(data, int(longest)))
        return [_bytes(one)[:length] for one, length in zip(received, lengths, strict=True)] if heads else None

    def scatter(self, parts: Sequence[bytes]) -> memoryview:
        """Return on each rank its item of the list of rank 0. Only rank 0 reads the list.

        If all items are one object, it is broadcast: rank 0 then does not send it once for each rank.
        """
        longest = max(map(len, parts), default=0)
        if longest > SHORT_BYTES - _LENGTHS_BYTES and all(part is parts[0] for part in parts):
            longest = _SAME
        head = self._scatter([_head(len(part), longest, part) for part in parts], SHORT_BYTES)
        length, longest = _lengths(head)
        if longest == _SAME:
            return self.broadcast(parts[0] if parts else None)
        if longest <= SHORT_BYTES - _LENGTHS_BYTES:
            return _rest(head, length)
        return _bytes(self._scatter([_padded(part, longest) for part in parts], longest))[:length]

    def broadcast(self, data: bytes | None) -> memoryview:
        """Return on each rank the bytes of rank 0. Only rank 0 reads the argument."""
        length = 0 if data is None else len(data)
        head = _head(length, length, data or b"")
        self._broadcast(head)
        length, _ = _lengths(head)
        if length <= SHORT_BYTES - _LENGTHS_BYTES:
            return _rest(head, length)
        received = _padded(data or b"", length)
        self._broadcast(received)
        return _bytes(received)

    def wait_for(self, task: Callable[[], T]) -> T:
        """Run a task in which the ranks wait for each other in C code, in a thread, and return its result.

        A rank that dies ends the wait. The thread then stays until the timeout of the task.
        """
        with self.in_call():
            running = _Task(task)
            self._finish(lambda: running)
        return running.future.result()

    def _gather(self, data: torch.Tensor) -> list[torch.Tensor]:
        options = distributed_c10d.GatherOptions()
        options.rootRank = 0
        received = [torch.empty_like(data) for _ in range(self._size)] if self._rank == 0 else []
        self._finish(lambda: self._group.gather([received] if received else [], [data], options))
        return received

    def _scatter(self, parts: list[torch.Tensor], nbytes: int) -> torch.Tensor:
        options = distributed_c10d.ScatterOptions()
        options.rootRank = 0
        part = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        self._finish(lambda: self._group.scatter([part], [parts] if self._rank == 0 else [], options))
        return part

    def _broadcast(self, data: torch.Tensor) -> None:
        options = distributed_c10d.BroadcastOptions()
        options.rootRank = 0
        self._finish(lambda: self._group.broadcast([data], options))

    def _finish(self, begin: Callable[[], Any]) -> None:
        """Begin a collective, and wait until it has ended."""
        try:
            work = begin()
            while not work.is_completed():
                with contextlib.suppress(RuntimeError):  # its time is over, or it failed: then the last `wait` raises
                    work.wait(timedelta(seconds=STEP_S))
                if not work.is_completed():
                    self._watch.check()
            work.wait()
        except RankError:
            self._connections.close()
            raise
        except RuntimeError as error:
            self._announce(error)
            self._connections.close()
            raise self._watch.broken() from error
        except BaseException as error:
            self._watch.announce([self._rank], f"was interrupted: {type(error).__name__}")
            self._connections.close()
            raise

    def _announce(self, error: RuntimeError) -> None:
        """Find out which ranks are lost, and let all ranks know. A rank does so before it closes its connections."""
        if "imed out" in str(error):  # gloo has closed all connections
            absent = self._watch.absent()
            reason = "did not make the same call within the timeout of the process group" if absent else str(error)
            self._watch.announce(absent, reason)
            return
        time.sleep(SETTLE_S)
        lost = self._connections.closed()
        self._watch.announce(lost, DIED if lost else str(error))


class _Task(Generic[T]):
    """A task in a thread, as a work of torch.distributed."""

    def __init__(self, task: Callable[[], T]) -> None:
        pool = Pool(1, "reshard-group")
        self.future = pool.submit(task)
        pool.shutdown(wait=False)

    def is_completed(self) -> bool:
        return self.future.done()

    def wait(self, timeout: timedelta | None = None) -> None:
        with contextlib.suppress(TimeoutError):
            self.future.result(None if timeout is None else timeout.total_seconds())


def _head(length: int, longest: int, data: bytes) -> torch.Tensor:
    """Return the head of a message: two lengths, and the bytes if they fit."""
    head = length.to_bytes(8, "little") + longest.to_bytes(8, "little")
    return _padded(head + data if length <= SHORT_BYTES - _LENGTHS_BYTES else head, SHORT_BYTES)


def _lengths(head: torch.Tensor) -> tuple[int, int]:
    data = _bytes(head)
    return int.from_bytes(data[:8], "little"), int.from_bytes(data[8:16], "little")


def _rest(head: torch.Tensor, length: int) -> memoryview:
    return _bytes(head)[_LENGTHS_BYTES : _LENGTHS_BYTES + length]


def _bytes(data: torch.Tensor) -> memoryview:
    return data.numpy().data


def _padded(data: bytes, nbytes: int) -> torch.Tensor:
    padded = torch.zeros(nbytes, dtype=torch.uint8, device="cpu")
    padded.numpy().data[: len(data)] = data
    return padded
