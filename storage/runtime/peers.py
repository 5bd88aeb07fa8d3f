"""Messages between the ranks of a process group, while each rank does its own work."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from .connections import Connections
from .process_group import new_gloo_group


class Peers:
    """Sends and receives bytes between the ranks of a group, over gloo.

    The messages use a separate gloo group, so they cannot mix with those of the training.
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
            cls._made[group] = cls(new_gloo_group(group), dist.get_rank(process_group), dist.get_world_size(group))
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
        work: Any = self._group.send([data], rank, number)
        return lambda: work.wait()

    def receive(self, data: torch.Tensor, rank: int, number: int) -> Callable[[], None]:
        """Begin to receive bytes from a rank into a tensor. Return a function that waits for them. See `send`."""
        work: Any = self._group.recv([data], rank, number)
        return lambda: work.wait()

    def abort(self) -> None:
        """End all messages that have not been sent or received, on this rank and soon on the others."""
        for group, peers in list(self._made.items()):
            if peers is self:
                del self._made[group]
        Connections(self._group, self.rank, self.size).close()
