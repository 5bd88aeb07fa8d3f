"""`reshard.async_save`: a save that copies what it writes, and writes it while training goes on."""

from __future__ import annotations

import enum
import numbers
import os
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch.distributed as dist

from ..planner.errors import CheckpointError
from .errors import ArgumentError, BusyError, nearest
from .runtime.arguments import check_choice, check_nbytes
from .runtime.background import BackgroundThread, is_exiting
from .runtime.forks import generation
from .runtime.logs import logger_of
from .runtime.process_group import (
    Alarm,
    Collectives,
    check_member,
    check_process_group,
    is_distributed,
    is_own_group,
    portable,
)
from .runtime.progress import Meter, OnProgress, Progress
from .runtime.reports import RankReport, Report
from .runtime.torch_modes import without_torch_modes
from .save import Saving
from .stores.base import Store
from .tensors.state_dict import check_mapping, has_stateful
from .writing.checkpoint_writer import SaveOptions, Written
from .writing.coordinator import Assignment, RankContents, ReusablePlan
from .writing.object_writer import write_objects
from .writing.staging import (
    Staging,
    default_staging_bytes,
    split_to_fit,
    staged_bytes,
)
from .writing.writer_process import PickledStore, WriteInProcess, writer_process

logger = logger_of(__name__)

CHOICES = {
    "staging": ("blocking", "overlapped"),
    "busy": ("wait", "refuse", "skip"),
    "background": ("thread", "process"),
}


@dataclass(frozen=True, slots=True)
class _AsyncOptions:
    """The options that only `async_save` has. They must be the same on all ranks."""

    staging: str
    busy: str
    background: str

    def __post_init__(self) -> None:
        for option, choices in CHOICES.items():
            check_choice(option, getattr(self, option), choices)


def _words(options: _AsyncOptions) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in asdict(options).items())


class AsyncSave:
    """A save that was begun by `reshard.async_save`.

    Its methods are not collective. The save ends on all ranks at about the same time.
    """

    def __init__(self, meter: Meter, *, skipped: bool = False) -> None:
        self._meter = meter
        self._generation = generation()
        self._staged = threading.Event()
        self._ended = threading.Event()
        self._asked = False
        self._thread = 0
        """The identifier of the thread that writes."""
        self._report: Report | None = None
        self._error: BaseException | None = None
        self.skipped = skipped
        """Whether nothing was saved, because another save was running and `busy` is "skip"."""
        self.location = meter.location
        """The location of the checkpoint."""

    def done(self) -> bool:
        """Return whether the save has ended, successfully or not."""
        return self._ended.is_set()

    def result(self, timeout: float | None = None) -> Report:
        """Wait for the save to end, and return its report.

        An interrupt such as Ctrl-C ends the wait, but not the save.

        Args:
            timeout: the longest time to wait, in seconds. Default: no limit.

        Raises, on every rank:
            TimeoutError: the save has not ended in this time. It continues.
            StoreError, CommitError, RankError, ...: the save failed; see `reshard.save`.
        """
        error = self.exception(timeout)
        if error is not None:
            raise error
        assert self._report is not None
        return self._report

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the save to end, and return its error, or None if it succeeded.

        Args:
            timeout: the longest time to wait, in seconds. Default: no limit.

        Raises:
            TimeoutError: the save has not ended in this time. It continues.
        """
        self._wait(self._ended, timeout, "ended")
        self._asked = True
        return self._error

    def wait_staged(self, timeout: float | None = None) -> None:
        """Wait until the tensors have been copied. They may change afterwards.

        With `staging="overlapped"`, call it before the tensors change, for example before `optimizer.step()`. Work that
        is queued on the current stream of a device afterwards begins when the copies from this device are done.

        Args:
            timeout: the longest time to wait, in seconds. Default: no limit.

        Raises:
            TimeoutError: the copies were not finished in this time.
        """
        self._wait(self._staged, timeout, "copied the tensors")

    def before(self, optimizer: Any) -> None:
        """Call `wait_staged` before the next step of an optimizer, once.

        Args:
            optimizer: a `torch.optim.Optimizer`.
        """
        if not hasattr(optimizer, "register_step_pre_hook"):
            raise ArgumentError(
                f"before() takes a torch.optim.Optimizer, got {type(optimizer)}: call wait_staged() before its step"
            )

        saves = _awaited_by.get(optimizer)
        if saves is None:
            saves = _awaited_by[optimizer] = []
            optimizer.register_step_pre_hook(partial(_wait_staged, saves))
        saves.append(self)

    @property
    def progress(self) -> Progress:
        """How much of this rank's part has been written."""
        return self._meter.progress

    def _wait(self, event: threading.Event, timeout: float | None, what: str) -> None:
        if self._generation != generation():
            raise ArgumentError("this save belongs to the process that began it: a forked child cannot wait for it")
        if timeout is not None and not (
            isinstance(timeout, numbers.Real) and not isinstance(timeout, bool) and timeout <= threading.TIMEOUT_MAX
        ):
            raise ArgumentError(f"timeout must be a number of seconds, or None to wait without limit, got {timeout!r}")
        if not event.wait(timeout):
            raise TimeoutError(f"the save to {self.location} has not {what} after {timeout} s")

    @property
    def _unreported(self) -> BaseException | None:
        """The error that nobody has asked for."""
        return None if self._asked or not self.done() else self._error

    def _end(self, report: Report | None, error: BaseException | None) -> None:
        self._report, self._error = report, error
        self._staged.set()
        self._ended.set()

    def __repr__(self) -> str:
        if self.skipped:
            return f"AsyncSave({self.location!r}, skipped)"
        state = "failed" if self._error else "saved" if self.done() else "running"
        return f"AsyncSave({self.location!r}, {state})"


_awaited_by: weakref.WeakKeyDictionary[Any, list[AsyncSave]] = weakref.WeakKeyDictionary()
"""The saves that the next step of an optimizer waits for. Its hook stays: torch fails if a hook removes itself while it
calls others."""


def _wait_staged(saves: list[AsyncSave], *args: object) -> None:
    while saves:
        if saves[0]._generation == generation():  # a forked child has memory of its own
            saves[0].wait_staged()
        del saves[0]


class _Ranks:
    """The ranks of a process group that save together, and their last save."""

    _known: ClassVar[weakref.WeakKeyDictionary[dist.ProcessGroup, _Ranks]] = weakref.WeakKeyDictionary()
    _alone: ClassVar[_Ranks | None] = None

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        # Two groups, so that planning the next save does not meet the end of the last one.
        self.planning = Collectives(process_group, background=not is_own_group(process_group))
        self.writing = Collectives(process_group, background=True)
        self.last: AsyncSave | None = None
        self.plan: ReusablePlan | None = None
        """The plan of the last save."""
        self.generation = generation()

    @classmethod
    def of(cls, process_group: dist.ProcessGroup | None) -> _Ranks:
        """Return the ranks of a group. The first call for a group is collective."""
        check_process_group(process_group)
        if not is_distributed():
            if cls._alone is None or cls._alone.generation != generation():
                cls._alone = cls(None)
            return cls._alone
        check_member(process_group)
        group = process_group or dist.group.WORLD
        assert group is not None
        found = cls._known.get(group)
        if found is None:
            found = cls._known[group] = cls(group)
        return found


class _Step(enum.Enum):
    """How far a call of `async_save` is."""

    FAILED = "the last save failed, and its error has not been raised"
    BUSY = "the last save is running"
    READY = "the ranks plan next"
    REPLAN = "the last plan does not fit: the ranks plan again"
    PLANNED = "the ranks have planned"


@dataclass(frozen=True, slots=True)
class _RankState:
    """What a rank sends to rank 0."""

    options: _AsyncOptions
    step: _Step
    contents: RankContents | None = None
    error: CheckpointError | None = None


@dataclass(frozen=True, slots=True)
class _Answer:
    """What rank 0 sends to a rank."""

    step: _Step
    assigned: Assignment | None = None
    error: CheckpointError | None = None


def async_save(
    state_dict: Mapping[str, Any],
    uri: str | os.PathLike[str] | Store,
    *,
    codec: str = "zstd",
    storage_options: Mapping[str, Any] | None = None,
    process_group: dist.ProcessGroup | None = None,
    overwrite: bool = False,
    allow_pickle: bool = True,
    budget_bytes: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    progress: OnProgress = False,
    staging: Literal["blocking", "overlapped"] = "blocking",
    staging_bytes: int | None = None,
    busy: Literal["wait", "refuse", "skip"] = "wait",
    background: Literal["thread", "process"] = "process",
) -> AsyncSave:
    """Save a state dict while training goes on. Collective: every rank of the group calls it.

    The call plans the save and copies what this rank will write into memory that is kept for the next save. Then it
    returns, and the tensors may change. Encoding, writing and the commit follow in the background. The checkpoint
    exists when the commit is done, which `AsyncSave.result` waits for. If the process is killed before that, an older
    checkpoint at the same location is unchanged.

    When the interpreter exits, it waits for saves that are running. Their errors are logged.

    Args:
        state_dict, uri, codec, storage_options, process_group, overwrite, allow_pickle, budget_bytes, metadata: see
            `reshard.save`.
        progress: True for a progress bar on rank 0, or a function that is called with a `Progress` on every rank, in a
            thread of reshard.
        staging: "blocking" returns when the values have been copied. "overlapped" returns at once and copies in the
            background: call `AsyncSave.wait_staged` before the tensors change.
        staging_bytes: the memory for copies on this rank. If what it writes takes more, a warning says so, and the rest
            is written before the call returns. Default: half of the available memory, divided by the number of ranks on
            the machine.
        busy: what to do if the last `async_save` of the group is still running: "wait" for it, "refuse" with a
            BusyError, or "skip", which saves nothing and returns a handle with `skipped` True. The decision is the same
            on all ranks.
        background: what encodes and writes: a "process", which leaves the trainer's interpreter alone, or a "thread".

    Returns:
        The running save.

    Raises, on every rank:
        BusyError: a save is running, and `busy` is "refuse", or this is called from its own progress callback.
        CheckpointExistsError, UnsupportedURIError, StoreError, UnsupportedValueError, DtypeError, LayoutError,
        DestinationError, ArgumentError: as `reshard.save`, if planning finds it.
        CheckpointError: the last save of the group failed, and `result` and `exception` were not called on every rank.
            Nothing was saved by this call: call it again.
    """
    options = SaveOptions(codec, storage_options, overwrite, allow_pickle, budget_bytes, metadata)
    return async_save_with(
        state_dict,
        uri,
        options,
        process_group,
        progress,
        staging=staging,
        staging_bytes=staging_bytes,
        busy=busy,
        background=background,
    )


@without_torch_modes()
def async_save_with(
    state_dict: Mapping[str, Any],
    uri: str | os.PathLike[str] | Store,
    options: SaveOptions,
    process_group: dist.ProcessGroup | None,
    progress: OnProgress = False,
    *,
    staging: str = "blocking",
    staging_bytes: int | None = None,
    busy: str = "wait",
    background: str = "process",
) -> AsyncSave:
    """Save a state dict while training goes on. See `async_save`."""
    ranks = _Ranks.of(process_group)
    last = ranks.last
    if busy == "wait" and last is not None:
        if last._thread == threading.get_ident() and not last.done():
            raise BusyError(
                f"async_save was called from the progress callback of the save to {last.location}, and would wait for "
                "that save: pass busy='skip' or 'refuse', or save elsewhere"
            )
        last._ended.wait()
    saving = Saving(uri, options, progress, ranks.planning.rank, ranks.planning.size, ranks.plan)
    remote: list[PickledStore] = []

    def checked() -> _AsyncOptions:
        chosen = _AsyncOptions(staging, busy, background)
        check_nbytes(staging_bytes=staging_bytes)
        saving.open()
        check_mapping(state_dict)
        if background == "process" and not remote and not is_exiting():
            remote.append(PickledStore.of(uri, options.storage_options))
        return chosen

    def begin() -> _RankState:
        """Return what this rank knows, but call no state_dict() of a value: all ranks may have to take part in it."""
        chosen = checked()
        if last is not None and (busy != "wait" or last._error is not None):
            return _state_after(last, chosen)
        return _RankState(chosen, _Step.READY) if has_stateful(state_dict) else plan(is_repeated=False)

    def plan(*, is_repeated: bool) -> _RankState:
        return _RankState(checked(), _Step.PLANNED, saving.describe(state_dict, is_repeated=is_repeated))

    decide = partial(_decide, saving)
    answer = ranks.planning.through_rank_0(begin, decide)
    while answer.step in (_Step.READY, _Step.REPLAN):
        is_repeated = answer.step is _Step.REPLAN
        answer = ranks.planning.through_rank_0(partial(plan, is_repeated=is_repeated), decide)
    if answer.error is not None:
        assert last is not None
        last._asked = True
        raise answer.error
    if answer.assigned is None:
        return _skipped(saving, ranks)
    ranks.plan = saving.reusable_plan(answer.assigned)
    save = AsyncSave(saving.meter)
    running = _BackgroundSave(save, saving, ranks.writing, remote[0] if remote else None)
    ranks.last = save
    running.begin(answer.assigned, staging_bytes, overlapped=staging == "overlapped")
    return save


def _state_after(last: AsyncSave, options: _AsyncOptions) -> _RankState:
    """Return what this rank knows about the last save."""
    if not last.done():
        return _RankState(options, _Step.BUSY)
    if last._unreported is not None:
        return _RankState(options, _Step.FAILED, error=_error_of_last_save(last))
    return _RankState(options, _Step.READY)


def _check_options(states: Sequence[_RankState]) -> _AsyncOptions:
    """Return the options of all ranks. Raise ArgumentError if they differ."""
    options = [state.options for state in states]
    for rank, other in enumerate(options):
        if other != options[0]:
            raise ArgumentError(
                "the ranks of one async_save passed different options: rank 0 "
                f"{_words(options[0])}; rank {rank} {_words(other)}"
            )
    return options[0]


def _decide(saving: Saving, states: Sequence[_RankState]) -> list[_Answer]:
    """Return for each rank what to do next. Only rank 0 calls it.

    Raises:
        BusyError: a save is running, and `busy` is "refuse".
        ArgumentError, CheckpointExistsError: as `SaveCoordinator.assign`.
    """
    options = _check_options(states)
    errors = [state.error for state in states if state.error is not None]
    if errors:
        return [_Answer(_Step.FAILED, error=errors[0])] * len(states)
    steps = {state.step for state in states}
    if _Step.BUSY in steps and options.busy == "refuse":
        raise BusyError(
            "the last async_save of these ranks is still running: wait for its result(), or pass busy='wait' or "
            "busy='skip'"
        )
    for step in (_Step.BUSY, _Step.READY):
        if step in steps:
            return [_Answer(step)] * len(states)
    assigned = saving.coordinator.assign([state.contents for state in states if state.contents is not None])
    return [_Answer(_Step.REPLAN if one is None else _Step.PLANNED, one) for one in assigned]


def _error_of_last_save(save: AsyncSave) -> CheckpointError:
    """Return the error of an earlier save, with a message that says so."""
    assert save._error is not None
    error = portable(save._error)
    return nearest(error)(f"the last async_save, to {save.location}, failed, and nothing was saved now: {error}")


def _skipped(saving: Saving, ranks: _Ranks) -> AsyncSave:
    save = AsyncSave(saving.meter, skipped=True)
    reports = tuple(RankReport(rank) for rank in range(ranks.planning.size))
    save._end(Report(ranks.planning.rank, reports), None)
    return save


class _BackgroundSave:
    """Copies and writes for an AsyncSave.

    Args:
        collectives: used in the background.
        remote: the store, if the writer process writes.
    """

    def __init__(self, save: AsyncSave, saving: Saving, collectives: Collectives, remote: PickledStore | None) -> None:
        self._save = save
        self._saving = saving
        self._collectives = collectives
        self._remote = remote
        # All ranks must create their alarms in the same order, so not in the background.
        self._saving.writer.alarm = Alarm(collectives.process_group)
        self._saving.writer.in_writer_process = remote is not None
        self._staging: Staging | None = None
        self._error: BaseException | None = None

    def begin(self, assigned: Assignment, staging_bytes: int | None, *, overlapped: bool) -> None:
        """Copy, or start to copy, and start to write in the background.

        An error ends the save on all ranks: it is the result. Only interrupts are raised at once.

        Args:
            assigned: what this rank writes.
            staging_bytes: as for `async_save`.
            overlapped: whether to copy in the background.
        """
        try:
            with self._saving.writer.alarm:
                self._stage(assigned, staging_bytes)
                if not overlapped:
                    self._copy()
        except BaseException as error:
            self._error = error
        self._saving.release_tensors()
        BackgroundThread(self._run, "reshard-save")
        if self._error is not None and not isinstance(self._error, Exception):
            raise self._error

    def _stage(self, assigned: Assignment, staging_bytes: int | None) -> None:
        saving = self._saving
        saving.accept_plan(assigned)
        most = default_staging_bytes() if staging_bytes is None else int(staging_bytes)
        at_once, later = split_to_fit(saving.shards, most, saving.codec)
        if at_once:
            nbytes = sum(shard.nbytes for shard in at_once)
            logger.warning(
                "this rank writes %d bytes, but staging_bytes is %d: %d bytes are written before async_save returns",
                staged_bytes(saving.shards),
                most,
                nbytes,
            )
            saving.writer.write(at_once, write_objects)
        if self._remote is not None:
            writer_process()  # starts while the values are copied
        begin = time.perf_counter()
        self._staging = Staging.begin(later)
        self._saving.seconds["stage"] = time.perf_counter() - begin

    def _copy(self) -> None:
        """Finish the copies, unless this has been done."""
        assert self._staging is not None
        if not self._save._staged.is_set():
            begin = time.perf_counter()
            self._staging.copy()
            self._saving.seconds["stage"] += time.perf_counter() - begin
            self._save._staged.set()

    def _run(self) -> None:
        self._save._thread = threading.get_ident()
        report, error = None, None
        try:
            with without_torch_modes():
                report = self._saving.write_and_commit(self._collectives, self._write)
        except BaseException as raised:
            error = raised if isinstance(raised, Exception) else portable(raised)
            logger.error("the save to %s failed: %s", self._save.location, error)
        self._save._end(report, error)

    def _write(self) -> Written:
        try:
            if self._error is not None:
                raise self._error
            with self._saving.writer.alarm, self._saving.meter:
                self._copy()
                return self._write_staged()
        finally:
            if self._staging is not None:
                self._staging.close()

    def _write_staged(self) -> Written:
        assert self._staging is not None
        arena, shards = self._staging.arena, self._staging.shards
        if self._remote is not None:
            return self._saving.writer.write(shards, WriteInProcess(writer_process(), self._remote, arena))
        return self._saving.writer.write([shard.shard(arena.bytes) for shard in shards], write_objects)
