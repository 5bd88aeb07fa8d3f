"""The process group: who this rank is, and how what one rank met becomes known to all.

Without a process group, one process is a world of one.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch.distributed as dist

from ..planner.errors import CheckpointError
from .errors import RankError, nearest

P = ParamSpec("P")
T = TypeVar("T")


def is_distributed() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def rank_of(process_group: dist.ProcessGroup | None) -> int:
    """This process's rank in the group."""
    return dist.get_rank(process_group) if is_distributed() else 0


def on_all_ranks(task: Callable[[], T], process_group: dist.ProcessGroup | None) -> list[T]:
    """Run `task` on every rank and return what each rank's gave, in order.

    If it fails anywhere, every rank raises the error of the lowest rank that failed, once all have come to an end.
    """
    outcome: tuple[T | None, CheckpointError | None]
    cause: Exception | None = None
    rank = rank_of(process_group)
    try:
        outcome = task(), None
    except Exception as error:
        cause = error
        outcome = None, of_rank(rank, error)
    outcomes: list[Any] = [outcome]
    if is_distributed():
        outcomes = [None] * dist.get_world_size(process_group)
        with lost_ranks_told():
            dist.all_gather_object(outcomes, outcome, group=process_group)
    for at, (_, failure) in enumerate(outcomes):
        if failure is not None:
            raise failure from (cause if at == rank and cause is not failure else None)
    return [value for value, _ in outcomes]


@contextlib.contextmanager
def lost_ranks_told() -> Iterator[None]:
    """Make a RankError of what a process group raises when a rank has died, or has not come."""
    try:
        yield
    except RuntimeError as error:
        raise RankError(f"the process group broke, as it does when a rank dies: {error}") from error


def of_rank(rank: int, error: BaseException) -> CheckpointError:
    """The error as one of reshard's own, with the rank on which it happened."""
    found = portable(error)
    if is_distributed():
        found.rank = rank
    return found


def portable(error: BaseException) -> CheckpointError:
    """The error as one of reshard's own classes, which every rank can pickle and unpickle.

    A subclass of somebody's becomes the class of reshard that it derives from; anything else becomes a RankError.
    """
    if isinstance(error, CheckpointError):
        return error if type(error) is nearest(error) else nearest(error)(str(error))
    return RankError(f"{type(error).__name__}: {error}")


def raises_portable(method: Callable[P, T]) -> Callable[P, T]:
    """Make what a method raises fit to travel between ranks: DCP pickles it."""

    @functools.wraps(method)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(*args, **kwargs)
        except Exception as error:
            found = portable(error)
            if found is error:
                raise
            raise found from error

    return wrapped
