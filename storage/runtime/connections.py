"""The connections of a gloo group: which of them are closed, and whether the process at the other end responds."""

from __future__ import annotations

import contextlib
import weakref
from datetime import timedelta
from typing import Any

import torch

_NO_TAG = 2**31 - 1
"""A tag of messages that are never sent."""
_PING_TAG = 2**31 - 2
PINGS = 128
"""How many pings a rank can answer without its interpreter."""


class Connections:
    """The connections of a rank to the other ranks of a gloo group.

    Args:
        group: the group. It is not kept alive: the end of a group closes its connections.
        rank: this rank.
        size: the number of ranks.
    """

    def __init__(self, group: Any, rank: int, size: int) -> None:
        self._group = weakref.ref(group)
        self.rank = rank
        self.size = size
        self._pings: list[Any] = []

    def belong_to(self, group: Any) -> bool:
        """Return whether these are the connections of a group."""
        return self._group() is group

    def closed(self) -> list[int]:
        """Return the ranks that have closed their connection to this rank, or died."""
        return [rank for rank in range(self.size) if rank != self.rank and self.is_closed(rank)]

    def is_closed(self, rank: int) -> bool:
        """Return whether a rank has closed its connection to this rank, or died."""
        return self._receive(_byte(), rank, _NO_TAG) is None

    def close(self) -> None:
        """Close the connections of this rank. Its messages end at once, those of the other ranks soon after."""
        for rank in range(self.size):
            work = None if rank == self.rank else self._receive(_byte(), rank, _NO_TAG)
            if work is not None:
                with contextlib.suppress(RuntimeError):  # gloo closes all connections of the group after a timeout
                    work.wait(timedelta(milliseconds=1))
                return

    def allow_pings(self, rank: int, count: int) -> None:
        """Let a rank ping this one. A thread of gloo answers, without Python's interpreter."""
        group = self._group()
        if group is None:
            return
        for _ in range(count):
            data = _byte()
            data[0] = 1
            with contextlib.suppress(RuntimeError):  # the connection is closed
                self._pings.append(group.send([data], rank, _PING_TAG))

    def ping(self, rank: int) -> torch.Tensor:
        """Return a byte that becomes 1 when a rank responds."""
        data = _byte()
        self._pings.append(self._receive(data, rank, _PING_TAG))
        return data

    def _receive(self, data: torch.Tensor, rank: int, tag: int) -> Any:
        """Begin to receive a message. Return None if the connection is closed."""
        group = self._group()
        if group is None:
            return None
        try:
            return group.recv([data], rank, tag)
        except RuntimeError:
            return None


def _byte() -> torch.Tensor:
    return torch.zeros(1, dtype=torch.uint8, device="cpu")
