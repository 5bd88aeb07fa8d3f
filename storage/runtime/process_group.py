"""The process group: who this rank is, and how what one rank met becomes known to all.

Without a process group, one process is a world of one.
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
HEED_S = 0.5
"""How often long work asks whether it is still wanted, at most: whether another rank has failed."""
Interrupt = Callable[[], None]
"""What long work calls now and then, and stops where it raises."""


def never() -> None:
    """An Interrupt that never stops anything."""


def is_distributed() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def rank_of(process_group: dist.ProcessGroup | None) -> int:
    """This process's rank in the group."""
    return dist.get_rank(process_group) if is_distributed() else 0


class Arrivals:
    """Which ranks have come to some point of a collective call: keys in the process group's own store.

    All ranks make theirs in the same order.
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
        """Tell the other ranks that this one is here."""
        if self._store is not None:
            with contextlib.suppress(RuntimeError):  # the group is broken: what follows will say so
                self._store.set(f"{self._key}/{self._rank}", "here")

    def missing(self) -> list[int]:
        """The ranks that are not here, as far as the store tells; none before this rank has come itself."""
        if self._store is None:
            return []
        try:
            if not self._store.check([f"{self._key}/{self._rank}"]):
                return []
            return [rank for rank in range(self._world) if not self._store.check([f"{self._key}/{rank}"])]
        except RuntimeError:
            return []

    def forget(self) -> None:
        """Remove this rank's key, once all ranks are known to have come."""
        if self._store is not None:
            with contextlib.suppress(RuntimeError):
                self._store.delete_key(f"{self._key}/{self._rank}")


class Alarm:
    """Sounded by a rank that fails, so that the others stop soon: as a key in the process group's own store.

    `with alarm:` sounds it where its block raises, if it has not been before; `check` raises StoppedError where
    another rank has. It says nothing of what happened, which travels by the collective that follows. All ranks make
    their alarms in the same order.
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
        """Raises StoppedError where another rank has failed."""
        now = time.monotonic()
        if self._store is None or now - self._checked < HEED_S:
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
        """Tell the other ranks that this one has failed; not, where it was told so itself."""
        if self._store is None or self._sounded or isinstance(error, StoppedError):
            return
        with contextlib.suppress(RuntimeError):  # the group is broken: they will know
            self._store.set(self._key, "failed")
            self._sounded = True

    def close(self) -> None:
        """Take it back, once all ranks know."""
        if self._sounded and self._store is not None:
            with contextlib.suppress(RuntimeError):
                self._store.delete_key(self._key)


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
class Opened:
    """Which checkpoint a rank opened."""

    location: str
    fingerprint: str


def check_same_checkpoint(opened: Sequence[Opened]) -> None:
    """Check that all ranks opened the same checkpoint, wherever each of them finds it.

    Raises:
        ArgumentError: they did not.
    """
    ranks: dict[str, list[int]] = {}
    for rank, found in enumerate(opened):
        ranks.setdefault(found.fingerprint, []).append(rank)
    if len(ranks) > 1:
        told = "; ".join(
            f"{'rank' if len(some) == 1 else 'ranks'} {', '.join(map(str, some[:8]))}{', …' if len(some) > 8 else ''}: "
            f"{opened[some[0]].location} ({fingerprint})"
            for fingerprint, some in ranks.items()
        )
        raise ArgumentError(
            f"the ranks opened {len(ranks)} different checkpoints: {told}. Give all ranks one location that they "
            "share; if it is one already, it was overwritten while they opened it: load again"
        )


def first_failure(failures: Mapping[int, E]) -> tuple[int, E]:
    """The lowest rank that failed by itself, and its error."""
    itself = [rank for rank, error in failures.items() if not isinstance(error, StoppedError)]
    rank = min(itself or failures)
    return rank, failures[rank]


@contextlib.contextmanager
def naming_lost_ranks(arrivals: Arrivals) -> Iterator[None]:
    """Make a RankError of what a process group raises when a rank has died, or has not come in time."""
    try:
        yield
    except RuntimeError as error:
        lost = arrivals.missing()
        who = f"; not there: rank {', '.join(map(str, lost))}" if lost else ""
        raise RankError(f"the process group broke, as it does when a rank dies{who}: {error}") from error


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
            raise found from harmless(error)

    return wrapped
