"""Messages between the ranks of a process group, while each rank does its own work."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from .connections import Connections


class Peers:
    """Sends and receives bytes between the ranks of a group, over gloo.

    The messages have a gloo group of their own, so that they do not mix with those of the training.
    """

    _made: ClassVar[weakref.WeakKeyDictionary[dist.ProcessGroup, Peers]] = weakref.WeakKeyDictionary()

    def __init__(self, group: Any, rank: int, size: int) -> None:
        self._group = group
        self.rank = rank
        self.size = size

    @classmethod
    def of(cls, process_group: dist.ProcessGroup | None) -> Peers:
        """Return the peers of a group. The first call for a group, and each one after `abort`, is collective."""
        group = process_group or dist.group.WORLD
        assert group is not None
        if group not in cls._made:
            ranks = dist.get_process_group_ranks(group)
            options: dict[str, Any] = {} if ranks == sorted(ranks) else {"sort_ranks": False}
            created = dist.new_group(ranks, backend="gloo", use_local_synchronization=True, **options)
            cls._made[group] = cls(created, dist.get_rank(process_group), len(ranks))
        return cls._made[group]

    def send(self, data: torch.Tensor, rank: int, number: int) -> Callable[[], None]:
        """Begin to send bytes to a rank.

        Args:
            data: a contiguous tensor on the CPU. It must not change before the result has been called.
            rank: the receiver.
            number: the number of the message. Messages of two ranks are matched by it.

        Returns:
            A function that waits until the bytes have been sent.
        """
        work = self._group.send([data], rank, number)
        return lambda: self._wait(work)

    def receive(self, data: torch.Tensor, rank: int, number: int) -> Callable[[], None]:
        """Begin to receive bytes from a rank into a tensor. Return a function that waits for them. See `send`."""
        work = self._group.recv([data], rank, number)
        return lambda: self._wait(work)

    def _wait(self, work: Any) -> None:
        work.wait()

    def abort(self) -> None:
        """End all messages that have not been sent or received, on this rank and soon on the others."""
        for group, peers in list(self._made.items()):
            if peers is self:
                del self._made[group]
        Connections(self._group, self.rank, self.size).close()
