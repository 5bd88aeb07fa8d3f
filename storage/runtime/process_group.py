"""Ranks of a process group: how they share results and errors, and how a rank that fails stops the others.

Without a process group, a process is the only rank.
"""

from __future__ import annotations

import contextlib
import functools
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, ParamSpec, TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d

from ...planner.errors import CheckpointError
from ...planner.masking import harmless
from ..errors import ArgumentError, RankError, StoppedError, nearest

P = ParamSpec("P")
T = TypeVar("T")
E = TypeVar("E", bound=BaseException)
CHECK_EVERY_S = 0.5
"""The minimum time between two checks of long work whether another rank has failed."""
Interrupt = Callable[[], None]
"""A function that long work calls from time to time. If it raises, the work ends with its exception."""


def never() -> None:
    """Do nothing, as an Interrupt that never stops the work."""


def is_distributed() -> bool:
    """Return whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def rank_of(process_group: dist.ProcessGroup | None) -> int:
    """Return the rank of this process in a group, or 0 without a process group."""
    return dist.get_rank(process_group) if is_distributed() else 0


class Arrivals:
    """Records which ranks have arrived at a collective call, as keys in the process group's own store.

    All ranks must create their instances in the same order.
    """

    _made: ClassVar[weakref.WeakKeyDictionary[dist.ProcessGroup, int]] = weakref.WeakKeyDictionary()

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self._store: distributed_c10d.Store | None = None
        if is_distributed() and dist.get_world_size(process_group) > 1:
            group = process_group or dist.group.WORLD
            assert group is not None
            count = self._made[group] = self._made.get(group, 0) + 1
            self._rank, self._world = dist.get_rank(process_group), dist.get_world_size(process_group)
            self._key = f"reshard/arrived/{group.group_name}/{count}"
            self._store = distributed_c10d._get_default_store()

    def arrive(self) -> None:
        """Record that this rank has arrived."""
        if self._store is not None:
            with contextlib.suppress(RuntimeError):  # the group is broken: the collective that follows reports it
                self._store.set(f"{self._key}/{self._rank}", "here")

    def missing(self) -> list[int]:
        """Return the ranks that have not arrived, or [] if this rank has not arrived or the store cannot be read."""
        if self._store is None:
            return []
        try:
            if not self._store.check([f"{self._key}/{self._rank}"]):
                return []
            return [rank for rank in range(self._world) if not self._store.check([f"{self._key}/{rank}"])]
        except RuntimeError:
            return []

    def forget(self) -> None:
        """Remove the key of this rank. Call it when all ranks are known to have arrived."""
        if self._store is not None:
            with contextlib.suppress(RuntimeError):
                self._store.delete_key(f"{self._key}/{self._rank}")


class Alarm:
    """Lets a rank that fails stop the other ranks soon, through a key in the process group's own store.

    `with alarm:` sounds the alarm if its block raises. `check` raises StoppedError if another rank has sounded it. The
    error itself travels in the collective that follows. All ranks must create their alarms in the same order.

    Args:
        process_group: the group of the ranks, or None for the default group.
        alone: whether this rank works without the others. Its alarm then does nothing.
    """

    _made: ClassVar[weakref.WeakKeyDictionary[dist.ProcessGroup, int]] = weakref.WeakKeyDictionary()

    def __init__(self, process_group: dist.ProcessGroup | None = None, *, alone: bool = False) -> None:
        self._store: distributed_c10d.Store | None = None
        self._sounded = False
        self._checked = 0.0
        if not alone and is_distributed() and dist.get_world_size(process_group) > 1:
            group = process_group or dist.group.WORLD
            assert group is not None
            count = self._made[group] = self._made.get(group, 0) + 1
            self._key = f"reshard/alarm/{group.group_name}/{count}"
            self._store = distributed_c10d._get_default_store()

    def check(self) -> None:
        """Raise StoppedError if another rank has failed."""
        now = time.monotonic()
        if self._store is None or now - self._checked < CHECK_EVERY_S:
            return
        self._checked = now
        if self._store.check([self._key]):
            raise StoppedError("another rank has failed")

    def __enter__(self) -> Alarm:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is not None:
            self.sound(error)

    def sound(self, error: BaseException) -> None:
        """Sound the alarm, unless the error only reports that another rank has failed."""
        if self._store is None or self._sounded or isinstance(error, StoppedError):
            return
        with contextlib.suppress(RuntimeError):  # the group is broken: the other ranks fail anyway
            self._store.set(self._key, "failed")
            self._sounded = True

    def close(self) -> None:
        """Remove the key. Call it when all ranks know of the failure."""
        if self._sounded and self._store is not None:
            with contextlib.suppress(RuntimeError):
                self._store.delete_key(self._key)


def on_all_ranks(task: Callable[[], T], process_group: dist.ProcessGroup | None) -> list[T]:
    """Run a task on every rank and return the results of all ranks, in the order of ranks.

    If the task fails on any rank, all ranks wait for each other, and then raise the error of the lowest failed rank.
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
        arrivals = Arrivals(process_group)
        arrivals.arrive()
        with naming_lost_ranks(arrivals):
            dist.all_gather_object(outcomes, outcome, group=process_group)
        arrivals.forget()
    failures = {at: failure for at, (_, failure) in enumerate(outcomes) if failure is not None}
    if failures:
        at, failure = first_failure(failures)
        raise failure from (harmless(cause) if at == rank and cause and cause is not failure else None)
    return [value for value, _ in outcomes]


@dataclass(frozen=True, slots=True)
class OpenedCheckpoint:
    """The checkpoint that a rank opened."""

    location: str
    fingerprint: str


def check_same_checkpoint(opened: Sequence[OpenedCheckpoint]) -> None:
    """Check that all ranks opened the same checkpoint. Their locations may differ.

    Raises:
        ArgumentError: the fingerprints differ.
    """
    ranks: dict[str, list[int]] = {}
    for rank, found in enumerate(opened):
        ranks.setdefault(found.fingerprint, []).append(rank)
    if len(ranks) > 1:
        opened_by = "; ".join(
            f"{'rank' if len(some) == 1 else 'ranks'} {', '.join(map(str, some[:8]))}{', …' if len(some) > 8 else ''}: "
            f"{opened[some[0]].location} ({fingerprint})"
            for fingerprint, some in ranks.items()
        )
        raise ArgumentError(
            f"the ranks opened {len(ranks)} different checkpoints: {opened_by}. Pass one shared location on all ranks; "
            "if it is the same location already, it was overwritten in the meantime: load again"
        )


def first_failure(failures: Mapping[int, E]) -> tuple[int, E]:
    """Return the lowest rank that failed, and its error. Ranks that another rank stopped are ignored."""
    origins = [rank for rank, error in failures.items() if not isinstance(error, StoppedError)]
    rank = min(origins or failures)
    return rank, failures[rank]


@contextlib.contextmanager
def naming_lost_ranks(arrivals: Arrivals) -> Iterator[None]:
    """Translate the RuntimeError of a broken process group into a RankError that names the missing ranks."""
    try:
        yield
    except RuntimeError as error:
        lost = arrivals.missing()
        who = f"; missing: rank {', '.join(map(str, lost))}" if lost else ""
        raise RankError(f"the process group broke, probably because a rank died{who}: {error}") from error


def of_rank(rank: int, error: BaseException) -> CheckpointError:
    """Return an error as one of reshard's classes, with the rank on which it happened."""
    found = portable(error)
    if is_distributed():
        found.rank = rank
    return found


def portable(error: BaseException) -> CheckpointError:
    """Return an error as one of reshard's classes, which every rank can pickle and unpickle.

    A subclass that reshard does not define becomes the nearest class of reshard. Any other exception becomes a
    RankError.
    """
    if isinstance(error, CheckpointError):
        return error if type(error) is nearest(error) else nearest(error)(str(error))
    return RankError(f"{type(error).__name__}: {error}")


def raises_portable(method: Callable[P, T]) -> Callable[P, T]:
    """Decorate a method so that it raises only errors that can be sent to other ranks, since DCP pickles them."""

    @functools.wraps(method)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(*args, **kwargs)
        except Exception as error:
            found = portable(error)
            if found is error:
                raise
            raise found from harmless(error)

    return wrapped
