"""Ranks of a process group: how they share results and errors, and how a rank that fails stops the others.

Without a process group, a process is the only rank.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from ...planner.errors import CheckpointError
from ...planner.masking import harmless
from ..errors import ArgumentError, RankError, StoppedError, nearest

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")
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


def check_process_group(process_group: object) -> None:
    """Raise ArgumentError if an argument is neither a process group nor None."""
    if process_group is None or process_group is dist.GroupMember.NON_GROUP_MEMBER:
        return
    if not isinstance(process_group, dist.ProcessGroup):
        raise ArgumentError(
            f"process_group must be a torch.distributed.ProcessGroup or None, got {process_group!r}; the group of a "
            "DeviceMesh is mesh.get_group()"
        )


def check_member(process_group: dist.ProcessGroup | None) -> None:
    """Raise ArgumentError if this process is not in a group."""
    if dist.get_rank(process_group) < 0:
        raise ArgumentError(
            f"rank {dist.get_rank()} is not in the process group that was passed: only its ranks may call"
        )


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


class Exchange:
    """Sends objects from all ranks of a group to rank 0, and a part of the answer to each rank.

    Args:
        process_group: The group of the ranks, or None for the default group. Without a process group, this process is
            the only rank.

    Raises:
        ArgumentError: This process is not in the group, or the argument is no group.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        check_process_group(process_group)
        self.is_distributed = is_distributed()
        self.rank, self.size = 0, 1
        self._group: dist.ProcessGroup | None = None
        if self.is_distributed:
            self._group = process_group or dist.group.WORLD
            self.rank, self.size = dist.get_rank(process_group), dist.get_world_size(process_group)
            check_member(process_group)

    def through_rank_0(
        self, task: Callable[[], T], combine: Callable[[list[T]], list[R]], arrivals: Arrivals | None = None
    ) -> R:
        """Run a task on every rank, combine the results on rank 0, and return to each rank its part.

        If the task fails on any rank, or if `combine` fails, all ranks raise the error: that of the lowest rank that
        failed. A rank that was interrupted raises its own exception, such as KeyboardInterrupt.

        Args:
            task: Runs on every rank.
            combine: Receives the results in the order of ranks. Returns a list with one item for each rank.
            arrivals: Records which ranks have run the task. By default, a new one.
        """
        cause: BaseException | None = None
        outcome: tuple[T | None, CheckpointError | None]
        try:
            outcome = task(), None
        except BaseException as error:
            cause = error
            outcome = None, self._of_rank(error)
        arrivals = arrivals or Arrivals(self._group)
        arrivals.arrive()
        with naming_lost_ranks(arrivals):
            outcomes = self._gather(outcome)
        answers: list[Any] = []
        if outcomes is not None:
            failures = {at: failure for at, (_, failure) in enumerate(outcomes) if failure is not None}
            try:
                if not failures:
                    answers = [(part, None) for part in combine([value for value, _ in outcomes])]
            except BaseException as error:
                cause = error
                failures = {0: self._of_rank(error)}
            if failures:
                answers = [(None, first_failure(failures))] * self.size
        with naming_lost_ranks(arrivals):
            answer: tuple[R, tuple[int, CheckpointError] | None] = self._scatter(answers)
        arrivals.forget()
        if cause is not None and not isinstance(cause, Exception):
            raise cause
        part, failed = answer
        if failed is not None:
            at, failure = failed
            raise failure from (harmless(cause) if at == self.rank and cause and cause is not failure else None)
        return part

    def _of_rank(self, error: BaseException) -> CheckpointError:
        found = portable(error)
        if self.is_distributed:
            found.rank = self.rank
        return found

    def _gather(self, value: Any) -> list[Any] | None:
        """Return the values of all ranks on rank 0, and None on the others."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, group=self._group, group_dst=0)
        return values

    def _scatter(self, values: list[Any]) -> Any:
        """Return on each rank its item of the list of rank 0."""
        if self.size == 1:
            return values[0]
        part: list[Any] = [None]
        dist.scatter_object_list(part, values if self.rank == 0 else None, group=self._group, group_src=0)
        return part[0]


class BackgroundExchange(Exchange):
    """An exchange over gloo that works in any thread, while the training uses the process group.

    It creates a group of its own. This is collective. It keeps working after `destroy_process_group`, so that a save
    that was begun before can end.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        super().__init__(process_group)
        self._raw: dist.ProcessGroup | None = None
        if self._group is not None:
            ranks = dist.get_process_group_ranks(self._group)
            options: dict[str, Any] = {} if ranks == sorted(ranks) else {"sort_ranks": False}
            created: Any = dist.new_group(ranks, backend="gloo", use_local_synchronization=True, **options)
            self._raw = self._group = created

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The group that was created."""
        return self._raw

    # These methods do not call functions of torch.distributed, which forget all groups in destroy_process_group.

    def _gather(self, value: Any) -> list[Any] | None:
        if self._raw is None or self.size == 1:
            return [value]
        data = _to_bytes(value)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self._raw.allgather([sizes], [torch.tensor([len(data)], dtype=torch.int64)]).wait()
        data = _padded(data, max(map(int, sizes)))
        options = distributed_c10d.GatherOptions()
        options.rootRank = 0
        received = [torch.empty_like(data) for _ in sizes] if self.rank == 0 else []
        self._raw.gather([received] if received else [], [data], options).wait()
        return [_from_bytes(one[: int(size)]) for one, size in zip(received, sizes, strict=True)] if received else None

    def _scatter(self, values: list[Any]) -> Any:
        if self._raw is None or self.size == 1:
            return values[0]
        parts = [_to_bytes(value) for value in values]
        nbytes = torch.tensor([max(map(len, parts), default=0)], dtype=torch.int64)
        self._raw.broadcast([nbytes], distributed_c10d.BroadcastOptions()).wait()
        options = distributed_c10d.ScatterOptions()
        options.rootRank = 0
        part = torch.empty(int(nbytes), dtype=torch.uint8)
        self._raw.scatter([part], [[_padded(one, int(nbytes)) for one in parts]] if parts else [], options).wait()
        return _from_bytes(part)


def _to_bytes(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _from_bytes(data: torch.Tensor) -> Any:
    return pickle.loads(data.numpy().data)  # noqa: S301 (from a rank of the same program)


def _padded(data: torch.Tensor, nbytes: int) -> torch.Tensor:
    return torch.cat([data, data.new_zeros(nbytes - len(data))])


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
        broken = RankError(f"the process group broke, probably because a rank died{who}: {error}")
        broken.group_is_broken = True
        raise broken from error


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
