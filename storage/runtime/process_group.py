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
from typing import Any, NoReturn, ParamSpec, TypeVar, cast

import torch.distributed as dist
from torch.distributed import distributed_c10d

from ...planner.errors import CheckpointError
from ...planner.masking import harmless
from ..errors import ArgumentError, RankError, StoppedError, nearest
from .gc_pauses import gc_disabled
from .lost_ranks import Poller, Watch, new_key
from .messages import Messages

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


class Alarm:
    """Lets a rank that fails stop the other ranks soon, through a key in the process group's own store.

    `with alarm:` sounds the alarm if its block raises. `check` raises StoppedError if another rank has sounded it. The
    error itself travels in the collective that follows. All ranks must create their alarms in the same order.

    Args:
        process_group: the group of the ranks, or None for the default group.
        alone: whether this rank works without the others. Its alarm then does nothing.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None, *, alone: bool = False) -> None:
        check_process_group(process_group)
        self._watch: Watch | None = None
        self._poller: Poller | None = None
        self._is_heard = False
        self._sounded = False
        self._checked = 0.0
        if not alone and is_distributed() and dist.get_world_size(process_group) > 1:
            group = process_group or dist.group.WORLD
            assert group is not None
            self._key = new_key("alarm", group)
            self._watch = Watch.of(group)
            self._poller = Poller.add(self, self._watch.store)

    def check(self) -> None:
        """Raise StoppedError if another rank has failed, and RankError if one is lost."""
        if self._watch is None:
            return
        if self._poller is None or not self._poller.is_running:
            now = time.monotonic()
            if now - self._checked < CHECK_EVERY_S:
                return
            self._checked = now
            self.poll(self._watch.store)
        if self._is_heard:
            raise StoppedError("another rank has failed")
        self._watch.check()

    def poll(self, store: Any) -> None:
        """Read the key. The poller calls this."""
        self._is_heard = self._is_heard or store.check([self._key])

    def __enter__(self) -> Alarm:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is not None:
            self.sound(error)

    def sound(self, error: BaseException) -> None:
        """Sound the alarm, unless the error only reports that another rank has failed."""
        is_known = isinstance(error, StoppedError) or (isinstance(error, RankError) and error.group_is_broken)
        if self._watch is None or self._sounded or is_known:
            return
        with contextlib.suppress(RuntimeError):  # the group is broken: the other ranks fail anyway
            self._watch.store.set(self._key, "failed")
            self._sounded = True

    def close(self) -> None:
        """Remove the key. Call it when all ranks know of the failure."""
        if self._poller is not None:
            self._poller.remove(self)
        if self._sounded and self._watch is not None and self._watch.lost is None:
            with contextlib.suppress(RuntimeError):
                self._watch.store.delete_key(self._key)


def on_all_ranks(task: Callable[[], T], process_group: dist.ProcessGroup | None) -> list[T]:
    """Run a task on every rank; see `Collectives.on_all_ranks`."""
    return Collectives(process_group).on_all_ranks(task)


def on_rank_0(task: Callable[[], T], process_group: dist.ProcessGroup | None) -> T:
    """Run a task on rank 0, and return its result on every rank. Its error is raised on every rank."""
    is_first = rank_of(process_group) == 0
    return cast(T, on_all_ranks(lambda: task() if is_first else None, process_group)[0])


class Collectives:
    """The collective calls of a group: they send objects from all ranks to rank 0, and an answer to each rank.

    Args:
        process_group: The group of the ranks, or None for the default group. Without a process group, this process is
            the only rank. If the group has no gloo, its first `Collectives` create another group, which is
            collective.
        background: Whether to create a group of its own, which is collective. Any thread may then use it while
            the training uses the process group, and also after `destroy_process_group`.

    Raises:
        ArgumentError: This process is not in the group, or the argument is no group.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None, *, background: bool = False) -> None:
        check_process_group(process_group)
        self.is_distributed = is_distributed()
        self.rank, self.size = 0, 1
        self.process_group = process_group
        self._messages: Messages | None = None
        if self.is_distributed:
            check_member(process_group)
            group: Any = process_group or dist.group.WORLD
            if background:
                group = self.process_group = new_gloo_group(group)
                _own_groups.add(group)
            self.rank, self.size = dist.get_rank(process_group), dist.get_world_size(process_group)
            messages = group if _has_gloo(group) else _gloo_group(group)
            if self.size > 1:
                self._messages = Messages(messages, Watch.of(group))

    def on_all_ranks(self, task: Callable[[], T]) -> list[T]:
        """Run a task on every rank and return the results of all ranks, in the order of ranks.

        If the task fails on any rank, all ranks wait for each other, and then raise the error of the lowest rank that
        failed. A rank that was interrupted raises its own exception, such as KeyboardInterrupt.
        """
        if self._messages is None:
            return [self._alone(task)]
        with self._messages.in_call():
            data, cause = self._outcome(task)
            with _after(cause):
                outcomes = self._messages.gather(data)
                answer: bytes | None = None
                if outcomes is not None:
                    failed = _first_failure(outcomes)
                    values = None if failed else [bytes(one) for one in outcomes]
                    answer = _packed(values, failed)
                found = self._messages.broadcast(answer)
        with gc_disabled():
            parts, failed = _unpacked(found)
            if failed is not None:
                self._raise(failed, cause)
            return [_unpacked(memoryview(one))[0] for one in parts]

    def through_rank_0(self, task: Callable[[], T], combine: Callable[[list[T]], list[R]]) -> R:
        """Run a task on every rank, combine the results on rank 0, and return to each rank its part.

        If the task fails on any rank, or if `combine` fails, all ranks raise the error, as in `on_all_ranks`.

        Args:
            task: Runs on every rank.
            combine: Receives the results in the order of ranks. Returns a list with one item for each rank.
        """
        if self._messages is None:
            return self._alone(lambda: combine([task()])[0])
        with self._messages.in_call():
            data, cause = self._outcome(task)
            with _after(cause):
                outcomes = self._messages.gather(data)
            answers: list[bytes] = []
            if outcomes is not None:
                failed = _first_failure(outcomes)
                if failed is None:
                    try:
                        answers = _combined(outcomes, combine)
                    except BaseException as error:
                        cause = error
                        failed = 0, self._with_rank(error)
                if failed is not None:
                    answers = [_packed(None, failed)] * self.size
            with _after(cause):
                part, failed = _unpacked(self._messages.scatter(answers))
        if failed is not None:
            self._raise(failed, cause)
        return cast(R, part)

    def _alone(self, task: Callable[[], T]) -> T:
        """Run a task on the only rank."""
        try:
            return task()
        except BaseException as error:
            self._raise((0, self._with_rank(error)), error)

    def _outcome(self, task: Callable[[], object]) -> tuple[bytes, BaseException | None]:
        """Run a task. Return its result or error as bytes, and the error."""
        try:
            return _packed(task(), None), None
        except BaseException as error:
            return _packed(None, self._with_rank(error)), error

    def _raise(self, failed: tuple[int, CheckpointError], cause: BaseException | None) -> NoReturn:
        """Raise the error of a rank, or the exception that interrupted this rank."""
        if cause is not None and not isinstance(cause, Exception):
            raise cause
        at, failure = failed
        raise failure from (harmless(cause) if at == self.rank and cause and cause is not failure else None)

    def _with_rank(self, error: BaseException) -> CheckpointError:
        found = portable(error)
        if self.is_distributed:
            found.rank = self.rank
        return found


@contextlib.contextmanager
def _after(cause: BaseException | None) -> Iterator[None]:
    """Exchange the outcome of a task. If this rank was interrupted, this exception is raised, and no RankError."""
    try:
        yield
    except RankError:
        if cause is None or isinstance(cause, Exception):
            raise
        raise cause from None


_own_groups: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()


def is_own_group(group: dist.ProcessGroup | None) -> bool:
    """Return whether `Collectives(background=True)` created a group, so that only reshard uses it."""
    return group is not None and group in _own_groups


_gloo_groups: weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = weakref.WeakKeyDictionary()
_last_numbers: weakref.WeakKeyDictionary[Any, dict[tuple[int, ...], int]] = weakref.WeakKeyDictionary()
"""For each default group and some of its ranks: the number of the last group of them. See `new_gloo_group`."""


def _gloo_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Return a gloo group of the ranks of another group. The first call for a group is collective."""
    found = _gloo_groups.get(group)
    if found is None:
        found = _gloo_groups[group] = new_gloo_group(group)
    return found


def _has_gloo(group: dist.ProcessGroup) -> bool:
    """Return whether a group sends tensors on the CPU over gloo."""
    return "cpu:gloo" in dist.get_backend_config(group)


def _can_talk(group: dist.ProcessGroup) -> bool:
    """Return whether `Collectives` of a group needs no new group."""
    return _has_gloo(group) or group in _gloo_groups


def new_gloo_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Create a gloo group of the ranks of another group, which only these ranks call. Collective.

    torch names such a group by its ranks and by the number of groups that this process is in. Ranks that are in
    different numbers of groups would give it different names, and wait for each other forever. Therefore, ranks in
    fewer groups create some temporary groups first.
    """
    ranks = dist.get_process_group_ranks(group)
    count = len(distributed_c10d._world.pg_names)
    last = _last_numbers.setdefault(dist.group.WORLD, {})
    number = last[tuple(ranks)] = _largest(max(count, last.get(tuple(ranks), -1) + 1), group)
    fillers: list[dist.ProcessGroup] = []
    try:
        while len(fillers) < number - count:
            fillers.append(_new_gloo_group([dist.get_rank()]))
        messages = Collectives(group)._messages if _can_talk(group) else None
        return messages.wait_for(lambda: _new_gloo_group(ranks)) if messages else _new_gloo_group(ranks)
    finally:
        for filler in fillers:
            dist.destroy_process_group(filler)


def _new_gloo_group(ranks: list[int]) -> dist.ProcessGroup:
    options: dict[str, Any] = {} if ranks == sorted(ranks) else {"sort_ranks": False}
    created: Any = dist.new_group(ranks, backend="gloo", use_local_synchronization=True, **options)
    return cast(dist.ProcessGroup, created)


def _largest(number: int, group: dist.ProcessGroup) -> int:
    """Return the largest of the numbers that the ranks of a group pass. Collective.

    Messages over gloo notice a rank that has died. Without gloo, the numbers go through the store of the process group.
    """
    if _can_talk(group):
        return max(Collectives(group).on_all_ranks(lambda: number))
    store, key = distributed_c10d._get_default_store(), new_key("groups", group)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    store.set(f"{key}/{rank}", str(number))
    if rank == 0:
        store.set(f"{key}/largest", str(max(int(store.get(f"{key}/{other}")) for other in range(size))))
    return int(store.get(f"{key}/largest"))


def _packed(value: Any, failure: Any) -> bytes:
    """Return a value or a failure as bytes. The first one shows which of them it is."""
    return b"\0" + pickle.dumps(value) if failure is None else b"\1" + pickle.dumps(failure)


def _unpacked(data: memoryview) -> tuple[Any, Any]:
    """Return a value and None, or None and a failure."""
    found = pickle.loads(data[1:])  # noqa: S301 (from a rank of the same program)
    return (None, found) if data[0] else (found, None)


def _first_failure(outcomes: Sequence[memoryview]) -> tuple[int, CheckpointError] | None:
    """Return the lowest rank that failed and its error, or None. Results are not unpickled."""
    failures = {rank: _unpacked(outcome)[1] for rank, outcome in enumerate(outcomes) if outcome[0]}
    return first_failure(failures) if failures else None


def _combined(outcomes: Sequence[memoryview], combine: Callable[[list[T]], list[R]]) -> list[bytes]:
    with gc_disabled():
        parts = combine([_unpacked(outcome)[0] for outcome in outcomes])
        packed = {id(part): _packed(part, None) for part in {id(part): part for part in parts}.values()}
        return [packed[id(part)] for part in parts]


def first_failure(failures: Mapping[int, E]) -> tuple[int, E]:
    """Return the lowest rank that failed, and its error. Ranks that another rank stopped are ignored."""
    origins = [rank for rank, error in failures.items() if not isinstance(error, StoppedError)]
    rank = min(origins or failures)
    return rank, failures[rank]


def portable(error: BaseException) -> CheckpointError:
    """Return an error as one of reshard's classes, which every rank can pickle and unpickle.

    A subclass that reshard does not define becomes the nearest class of reshard. Any other exception becomes a
    RankError.
    """
    if isinstance(error, CheckpointError):
        return error if type(error) is nearest(error) else nearest(error)(str(error))
    return RankError(f"{type(error).__name__}: {error}".removesuffix(": "))


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
