"""`CheckpointManager`: saves, keeps and restores the checkpoints of a training run."""

from __future__ import annotations

import atexit
import operator
import os
import signal
import weakref
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, Literal, SupportsFloat, TypeVar, cast

import torch.distributed as dist

from ...planner.errors import CheckpointError
from ...planner.masking import masked
from ..async_save import CHOICES, AsyncSave, async_save_with
from ..errors import ArgumentError, CheckpointNotFoundError
from ..formats.native.codec import check_codec
from ..formats.native.manifest import MANIFEST_NAME
from ..formats.user_metadata import plain_metadata
from ..load import load
from ..maintenance.catalog import location_of
from ..reading.load_options import LoadOptions
from ..runtime.arguments import check_choice, check_flags, check_nbytes
from ..runtime.forks import generation
from ..runtime.logs import logger_of
from ..runtime.process_group import Collectives, is_distributed, on_all_ranks, on_rank_0, rank_of
from ..runtime.progress import OnProgress
from ..runtime.reports import Report
from ..save import save_with
from ..stores.base import exists
from ..stores.local import LocalStore, NodeLocalStore
from ..stores.open import absolute_location, open_store
from ..stores.uris import join_location
from ..tensors.name_patterns import Patterns
from ..tensors.state_dict import check_mapping
from ..writing.checkpoint_writer import SaveOptions
from .calls import News, RestoreCall, SaveCall, SaveOrder, checked_candidates, checked_order
from .lease import Lease, LeaseMark, last_mark
from .manager_threads import ManagerThreads, wait_for_dropped
from .mirror import MirrorCopier, remove_local_leftovers, remove_local_objects
from .policies import Policy, SavedStep, by_metric, check_mode, check_policies
from .requested_saves import SAVE, STOP, RequestedSaves, StopSignals, checked_signals
from .restoring import restore_latest
from .run_catalog import RunEntry, check_metrics, metadata_of, step_folder
from .run_controller import Candidate, RunController, with_step
from .run_location import RunLocation

logger = logger_of(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Running:
    """A save that runs in the background."""

    handle: AsyncSave
    entry: RunEntry


class CheckpointManager:
    """Saves the checkpoints of a training run, removes those that are no longer needed, and restores the latest one.

    Each step is stored at `root/step-…` as an ordinary checkpoint, which `reshard.load` and `reshard.open` can read.
    Creating the manager is collective, and so are `save`, `restore`, `wait` and `close`: every rank calls them, in the
    same order. Rank 0 lists the checkpoints and decides; the other ranks receive its decisions.

    Use it as a context manager, or call `close`. One manager at a time may save to a location.

    Args:
        root: the location of the run, a path or a URI that fsspec can open.
        save_every: `save` saves steps that are divisible by this number. None: it saves at every call.
        mirror: a second location, to which complete checkpoints are copied in the background. `root` is then usually a
            local disk, which need not be shared: each rank copies what it wrote. `restore` reads from `root` if all
            ranks see the whole checkpoint there, and from the mirror otherwise. The policies apply to both.
        mirror_options: options of `mirror` for fsspec.
        keep: policies such as `reshard.latest(3)`. A checkpoint is kept if any policy keeps it. The last one is always
            kept. None keeps all checkpoints.
        asynchronous: whether training continues while a checkpoint is written.
        staging, background: see `reshard.async_save`. With "overlapped", call `wait_staged` before `optimizer.step()`.
        process_group: the ranks of the run. Default: the default group if there is one.
        storage_options: options of `root` for fsspec.
        codec, allow_pickle, budget_bytes: see `reshard.save`.
        signals: the signals after which all ranks make one last save, at the same step. `should_stop` is then True.
            Pass () to handle none.
        read_only: whether the manager only restores. It then does not conflict with a manager that saves.

    Raises, on every rank:
        RunInUseError: another manager saves to this location.
        ArgumentError: an argument is not valid, or the ranks passed different ones.
        StoreError, UnsupportedURIError: the location cannot be listed or written.
    """

    _root_lease: Lease | None = None
    _mirror_lease: Lease | None = None
    """Only on rank 0, and not if the manager only restores."""

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        save_every: int | None = None,
        keep: Sequence[Policy] | None = None,
        asynchronous: bool = True,
        staging: Literal["blocking", "overlapped"] = "blocking",
        background: Literal["thread", "process"] = "process",
        mirror: str | os.PathLike[str] | None = None,
        process_group: dist.ProcessGroup | None = None,
        storage_options: Mapping[str, Any] | None = None,
        mirror_options: Mapping[str, Any] | None = None,
        codec: str = "zstd",
        allow_pickle: bool = True,
        budget_bytes: int | None = None,
        signals: Iterable[signal.Signals | int] = (signal.SIGTERM,),
        read_only: bool = False,
    ) -> None:
        stop_signals: list[int] = []

        def prepare() -> tuple[str, str, int | None, bool, str, bool]:
            check_flags(asynchronous=asynchronous, read_only=read_only, allow_pickle=allow_pickle)
            check_codec(codec)
            check_nbytes(budget_bytes=budget_bytes)
            self._async_options = _async_options(staging, background) if asynchronous else {}
            self._policies = check_policies(keep)
            self._save_every = None if save_every is None else _whole_number("save_every", save_every, minimum=1)
            stop_signals.extend(checked_signals(signals))
            self._root, self._mirror = _locations(root, mirror)
            # The locations are compared as they were passed: the current folders of the ranks may differ.
            return _as_passed(root), _as_passed(mirror), self._save_every, asynchronous, codec, read_only

        self._is_closed = True  # until everything below has succeeded
        Collectives(process_group)  # raises ArgumentError if this rank is not in the group
        passed = on_all_ranks(prepare, process_group)
        if len(set(passed)) > 1:
            raise ArgumentError(
                "the ranks passed different arguments (root, mirror, save_every, asynchronous, codec, read_only): "
                + "; ".join(masked(str(arguments)) for arguments in dict.fromkeys(passed))
            )
        self._asynchronous = asynchronous
        self._storage_options = storage_options
        self._mirror_options = mirror_options
        self._save_options = SaveOptions(
            codec, storage_options, overwrite=False, allow_pickle=allow_pickle, budget_bytes=budget_bytes, metadata=None
        )
        self._read_only = read_only
        self._group = _own_group(process_group)
        self._copier: MirrorCopier | None = None
        self._controller: RunController | None = None
        """On rank 0."""
        self._running: _Running | None = None
        self._requested = RequestedSaves(self._group)
        self._signals = StopSignals((), partial(self._requested.request, STOP))
        self._threads = ManagerThreads(self, self._requested.close, self._root)
        try:
            if not read_only:
                wait_for_dropped(self._root)
            self._is_shared = self._take_leases()
            self._copier = self._open_mirror()
            self._saved = self._open_run()
            self._signals = self._handle_signals(() if read_only else stop_signals)
        except BaseException:
            self._end()
            raise
        self._is_closed = False
        self._generation = generation()

    def _handle_signals(self, signals: Iterable[int]) -> StopSignals:
        handlers = StopSignals(signals, partial(self._requested.request, STOP))
        # If the manager is dropped without `close`, a signal must not wait for a save that is never made.
        weakref.finalize(self, handlers.close).atexit = False
        return handlers

    def _take_leases(self) -> bool:
        """Take the leases on rank 0, unless the manager only restores.

        Returns:
            Whether all ranks see the objects of rank 0 at the root.
        """

        def take(location: str, options: Mapping[str, Any] | None) -> Lease:
            lease = Lease(location, options, owner=self)
            self._threads.ends.callback(lease.release)
            atexit.register(_release_at_exit, weakref.ref(lease))
            return lease

        def take_both() -> LeaseMark:
            self._root_lease = take(self._root, self._storage_options)
            if self._mirror is not None:
                self._mirror_lease = take(self._mirror, self._mirror_options)
            return self._root_lease.mark

        def find() -> LeaseMark | None:
            return last_mark(open_store(self._root, self._storage_options))

        def sees(mark: LeaseMark) -> list[bool]:
            return on_all_ranks(lambda: mark.is_in(open_store(self._root, self._storage_options)), self._group)

        mark = on_rank_0(find if self._read_only else take_both, self._group)
        if mark is None:  # no manager has saved here
            return True
        seen = sees(mark)
        if self._read_only and not all(seen):  # a manager may have taken the lease over at this moment
            seen = sees(on_rank_0(find, self._group) or mark)
        is_local = isinstance(open_store(self._root, self._storage_options), LocalStore)
        if not all(seen) and (self._mirror is None or not is_local):
            raise ArgumentError(
                f"rank {seen.index(False)} does not see what rank 0 {'sees at' if self._read_only else 'writes to'} "
                f"{self._root}: all ranks must save to one shared location, or copy what they save to one: pass mirror="
            )
        return all(seen)

    def _open_mirror(self) -> MirrorCopier | None:
        if self._mirror is None or self._read_only:
            return None
        copier = MirrorCopier(self._root, self._storage_options, self._mirror, self._mirror_options, self._group)
        self._threads.ends.callback(copier.close)
        return copier

    def _open_run(self) -> tuple[SavedStep, ...]:
        """List the checkpoints on rank 0, and return them on every rank."""

        def open_run() -> tuple[tuple[SavedStep, ...], set[str]]:
            options, is_shared = self._storage_options, self._is_shared
            root = RunLocation(self._root, options, self._policies, self._root_lease, is_shared=is_shared)
            mirror = None
            if self._mirror is not None:
                mirror = RunLocation(self._mirror, self._mirror_options, self._policies, self._mirror_lease)
            self._controller = RunController(root, mirror, self._copier)
            self._threads.waits.append(self._controller.wait_for_removals)
            self._threads.ends.callback(self._controller.close)
            saved, folders = self._controller.saved(), self._controller.folders()
            self._controller.begin()
            return saved, folders

        saved, folders = on_rank_0(open_run, self._group)
        if not self._is_shared and self._rank:
            try:
                remove_local_leftovers(self._root, folders)
            except CheckpointError as error:  # of this rank only
                logger.warning("old data in %s could not be removed: %s", masked(self._root), error)
        return saved

    @property
    def _rank(self) -> int:
        return rank_of(self._group)

    @property
    def root(self) -> str:
        """The location of the run."""
        return self._root

    @property
    def should_stop(self) -> bool:
        """Whether the last save after a signal, or after `save_now(stop=True)`, was made. The same on every rank."""
        return self._requested.should_stop

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, in order. The same on every rank.

        Checkpoints that a later save has abandoned, because training went back to an earlier step, are left out. This
        makes no request: the list is as of the last call of `save` that saved, `restore` or `wait`.
        """
        return [found.step for found in self._saved]

    def checkpoints(self) -> list[SavedStep]:
        """Return the complete checkpoints with their times and metrics, in the order of steps. See `steps`."""
        return list(self._saved)

    def latest_step(self) -> int | None:
        """Return the step of the latest complete checkpoint, or None if no checkpoint is complete. See `steps`."""
        return self._saved[-1].step if self._saved else None

    def best_step(self, metric: str, mode: Literal["min", "max"] = "min") -> int | None:
        """Return the step with the best value of a metric, or None if no checkpoint has it. See `steps`.

        Checkpoints without the metric, or with NaN, do not count. Of equal values, the later step is returned.

        Args:
            metric: the name of the metric.
            mode: "min" if small values are good, "max" if large ones are.
        """
        check_mode(mode)
        ranked = by_metric(self._saved, metric, mode)
        return ranked[0].step if ranked else None

    def location(self, step: int) -> str:
        """Return where the checkpoint of a step is stored, whether or not it exists."""
        return join_location(self._root, step_folder(_whole_number("step", step)))

    def handles(self, number: signal.Signals | int) -> bool:
        """Return whether all ranks make one last save after a signal. See `signals`."""
        return self._signals.handles(number)

    def is_due(self, step: int) -> bool:
        """Return whether `save` saves a step without being forced or requested to."""
        return self._save_every is None or _whole_number("step", step) % self._save_every == 0

    def save(
        self,
        step: int,
        state_dict: Mapping[str, Any],
        metrics: Mapping[str, SupportsFloat] | None = None,
        *,
        force: bool = False,
        metadata: Mapping[str, Any] | None = None,
    ) -> bool:
        """Save a step if it is due. Collective: every rank calls it, once in each step.

        A call that does not save makes no request and no collective. A save that is running is waited for first; if it
        failed, its error is raised.

        Args:
            step: the number of the step. It must be the same on every rank.
            state_dict: see `reshard.save`.
            metrics: numbers that the policies and `best_step` use. Those of rank 0 are stored.
            force: save even if the step is not due, and replace a checkpoint of this step.
            metadata: plain data to store with the checkpoint; see `reshard.save`. That of rank 0 is stored.

        Returns:
            Whether a save was made, or was started if the manager is asynchronous. False if the step is not due, or if
            there is a checkpoint of this step already.

        Raises, on every rank:
            ArgumentError: the run has a checkpoint of a later step: `restore` was not called, or the step that it
                returned was ignored. Or an argument is not valid.
            RunInUseError: another manager has taken over this run.
            CheckpointError: what `reshard.save` raises.
        """
        self._check_may_save()
        number = _whole_number("step", step)
        is_requested = self._requested.begin_call()
        if not (force or is_requested or self.is_due(number)):
            return False
        self._finish_running()
        is_made = self._save(number, state_dict, metrics, force, metadata)
        if is_requested:
            self._finish_running()  # the process may be killed soon
            self._requested.end_save()
            if self.should_stop:
                self._signals.close()
        return is_made

    def save_now(self, *, stop: bool = False) -> None:
        """Request a save by all ranks in one of their next calls of `save`, from any thread of any rank.

        The ranks agree on the call, so all save the same step. The call that saves returns when the checkpoint is
        complete.

        Args:
            stop: whether this save is the last one. `should_stop` is then True on every rank. Pass True if the process
                will be ended soon, for example because the machine is preempted.
        """
        self._check_may_save()
        self._requested.request(STOP if stop else SAVE)

    def restore(
        self,
        state_dict: MutableMapping[str, Any],
        step: int | None = None,
        *,
        strict: bool = True,
        allow_missing: Patterns = (),
        exclude: Patterns = (),
        rename: Mapping[str, str] | None = None,
        allow_pickle: bool = False,
        budget_bytes: int | None = None,
        progress: OnProgress = False,
    ) -> int | None:
        """Load the latest checkpoint that is complete and not damaged, in place. Collective.

        If a checkpoint turns out to be damaged or unreadable while it is read, on any rank, a warning names it, and all
        ranks load the previous one. This overwrites everything that was loaded from the damaged one.
        Other errors are raised: a state dict that does not fit, a store that is not available or refuses access.

        Checkpoints of later steps than the restored one are abandoned: they are no longer listed. When a new checkpoint
        is complete, they are removed, unless the manager keeps all checkpoints.

        Args:
            state_dict: see `reshard.load`, as for all other arguments.
            step: the step to load. Then no other checkpoint is loaded if it is damaged. Default: the latest one.

        Returns:
            The step that was loaded, or None if the run has no checkpoint. Then the state dict is unchanged.

        Raises, on every rank:
            CheckpointNotFoundError: there is no complete checkpoint of `step`.
            CorruptCheckpointError: all checkpoints are damaged. The loads may have overwritten a part of the state
                dict.
            StoreError: no checkpoint can be loaded, and not only because of damage. The same applies. Or the run is no
                longer at its location.
            RunInUseError: another manager has taken over this run.
            ArgumentError: the state dict is empty on all ranks, or another argument is not valid.
            CheckpointError: what `reshard.load` raises for other reasons than damage.
        """
        self._check_open()
        self._finish_running()

        def load_from(candidate: Candidate) -> Report:
            return load(
                state_dict,
                candidate.uri,
                strict=strict,
                allow_missing=allow_missing,
                exclude=exclude,
                rename=rename,
                storage_options=self._options_of(candidate),
                process_group=self._group,
                allow_pickle=allow_pickle,
                budget_bytes=budget_bytes,
                progress=progress,
            )

        def options() -> LoadOptions:
            return LoadOptions.of(strict, allow_missing, exclude, rename, allow_pickle, budget_bytes)

        def begin() -> RestoreCall:
            check_mapping(state_dict)
            options()
            wanted = None if step is None else _whole_number("step", step)
            candidates = [] if self._controller is None else self._controller.begin_restore(wanted)
            return RestoreCall(wanted, bool(state_dict), candidates)

        try:
            calls = self._on_all_ranks("restore()", begin)
            candidates = checked_candidates(calls)
            wanted = calls[0].step
            if wanted is not None and all(candidate.entry.problem for candidate in candidates):
                raise _no_such_step(wanted, candidates, self._root, self._saved)
            candidates = self._visible(candidates)
            found = restore_latest(state_dict, candidates, load_from, options(), self._options_of, self._group)
            if self._controller is not None and found is not None:
                self._controller.rewind(found.entry)
        finally:
            if self._controller is not None:
                self._controller.end_restore()
        self._update()
        return None if found is None else found.entry.step

    def wait_staged(self) -> None:
        """Wait until the tensors that are being saved have been copied. They may change afterwards.

        Call it before `optimizer.step()` if `staging` is "overlapped". It returns at once if no save is running.
        """
        if self._running is not None:
            self._running.handle.wait_staged()

    def wait(self) -> None:
        """Wait until the running save has finished, and removals too. Collective. Raises the error of the save."""
        self._wait("wait()")

    def close(self) -> None:
        """Wait like `wait`, and end the manager. Collective. Closing twice has no effect."""
        if self._is_closed or self._generation != generation():
            return
        try:
            self._wait("close()")
        finally:
            self._end()

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif not self._is_closed and self._generation == generation():
            # Other ranks may not come here, so this calls no collective.
            try:
                self._finish_running()
            except Exception as failed:
                logger.error("the last save failed, too: %s", failed)
            finally:
                self._end(deliver_signals=False)  # a signal would hide the exception

    def __repr__(self) -> str:
        return f"CheckpointManager({masked(self._root)!r}, steps={self.steps() if not self._is_closed else 'closed'})"

    def _end(self, *, deliver_signals: bool = True) -> None:
        self._is_closed = True
        unseen = self._signals.close()
        self._threads.end()
        if deliver_signals and not self.should_stop:
            for number in unseen:  # no save has served them, and they may have to end the process
                logger.warning("signal %d arrived before the manager was closed, and is now handled as before", number)
                os.kill(os.getpid(), number)

    def _check_open(self) -> None:
        if self._is_closed:
            raise ArgumentError("the CheckpointManager is closed: create a new one")
        if self._generation != generation():
            raise ArgumentError(
                "this CheckpointManager belongs to the process that created it: a forked child cannot use it"
            )

    def _check_may_save(self) -> None:
        self._check_open()
        if self._read_only:
            raise ArgumentError("this CheckpointManager is read_only and cannot save: create it with read_only=False")

    def _wait(self, call: str) -> None:
        self._check_open()
        self._finish_running()
        self._on_rank_0(RunController.wait, call=call)
        self._update()

    def _on_all_ranks(self, call: str, task: Callable[[], T]) -> list[T]:
        """Run a task on every rank, and return the results of all ranks.

        Args:
            call: the method that the user called. If it is not the same on all ranks, all of them raise ArgumentError.
        """
        found = on_all_ranks(lambda: (call, task()), self._group)
        first = found[0][0]
        for rank, (other, _) in enumerate(found):
            if other.partition("(")[0] != first.partition("(")[0]:
                raise ArgumentError(
                    f"rank {rank} called {other} while rank 0 called {first} of the CheckpointManager: every rank must "
                    "call the same methods in the same order"
                )
        return [result for _, result in found]

    def _on_rank_0(self, task: Callable[[RunController], T], *, call: str = "") -> T:
        """Run a task on rank 0, and return its result on every rank. Its error is raised on every rank."""
        found = self._on_all_ranks(call, lambda: None if self._controller is None else task(self._controller))
        return cast(T, found[0])

    def _update(self) -> None:
        """Send the checkpoints of the run from rank 0 to all ranks. Collective."""
        self._accept(self._on_rank_0(News.of))

    def _accept(self, news: News) -> None:
        self._saved = news.saved
        if self._controller is not None:
            self._controller.root.forget_removed(news.removed)  # all ranks know of them now
        if not self._is_shared and self._rank:
            # No rank writes before all ranks have come here, so the folders have nothing new.
            remove_local_objects(self._root, news.removed)

    def _visible(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Return the candidates that all ranks see: some may be on a local disk. Collective with a mirror."""
        if self._mirror is None:
            return list(candidates)

        def sees(candidate: Candidate) -> bool:
            if candidate.on_mirror or candidate.entry.problem:
                return True
            return exists(open_store(candidate.uri, self._options_of(candidate)), MANIFEST_NAME)

        seen = on_all_ranks(lambda: list(map(sees, candidates)), self._group)
        return [found for found, by_all in zip(candidates, map(all, zip(*seen, strict=True)), strict=True) if by_all]

    def _options_of(self, candidate: Candidate) -> Mapping[str, Any] | None:
        return self._mirror_options if candidate.on_mirror else self._storage_options

    def _finish_running(self) -> None:
        """Wait for the running save, if there is one. Raises its error."""
        running = self._running
        if running is None:
            return
        error = running.handle.exception()
        if self._controller is not None:
            self._controller.wait_for_saves()
        self._running = None
        if error is not None:
            raise error
        self._saved = with_step(self._saved, running.entry.saved)

    def _save(
        self,
        step: int,
        state_dict: Mapping[str, Any],
        metrics: Mapping[str, SupportsFloat] | None,
        force: bool,
        metadata: Mapping[str, Any] | None,
    ) -> bool:
        def prepare() -> SaveCall:
            checked = check_metrics(metrics)
            plain_metadata(metadata)
            check_mapping(state_dict)
            has_entries = bool(state_dict)
            if self._controller is None:
                return SaveCall(step, force, has_entries)
            if self._root_lease is not None:  # that of the mirror is checked before each copy
                self._root_lease.check()
            decision = self._controller.begin_save(step, checked, force=force)
            if not decision.is_skipped:
                on_failure.callback(self._controller.end_save, decision.entry, is_committed=False)
            stored = metadata_of(decision.entry, metadata)
            # The news comes last: `begin_save` may have waited for a removal from this folder.
            return SaveCall(step, force, has_entries, SaveOrder(decision, stored, News.of(self._controller)))

        with ExitStack() as on_failure:
            order = checked_order(self._on_all_ranks(f"save({step})", prepare))
            self._accept(order.news)
            if order.decision.is_skipped:
                return False
            begun = self._begin_save(step, state_dict, order)
            on_failure.pop_all()
        entry = order.decision.entry
        if isinstance(begun, AsyncSave):
            self._running = _Running(begun, entry)
            if self._controller is not None:
                self._controller.follow_save(entry, begun.exception)
        else:
            self._saved = with_step(self._saved, entry.saved)
            if self._controller is not None:
                self._controller.end_save(entry, is_committed=True)
        return True

    def _begin_save(self, step: int, state_dict: Mapping[str, Any], order: SaveOrder) -> AsyncSave | Report:
        uri = self.location(step) if self._is_shared else NodeLocalStore(open_store(self.location(step)).location)
        options = replace(self._save_options, overwrite=order.decision.overwrite, metadata=order.metadata)
        if self._root_lease is not None:  # another manager may take over the run while this one writes
            options = replace(options, before_commit=self._root_lease.check)
        if self._asynchronous:
            return async_save_with(state_dict, uri, options, self._group, **self._async_options)
        return save_with(state_dict, uri, options, self._group)


def _locations(root: str | os.PathLike[str], mirror: str | os.PathLike[str] | None) -> tuple[str, str | None]:
    """Return the locations of a run and its mirror. Raises ArgumentError if they overlap, or if one is empty."""
    if "" in (root, mirror):
        raise ArgumentError('root and mirror must not be empty; "." is the current folder')
    at = absolute_location(location_of(root))
    if mirror is None:
        return at, None
    copies = absolute_location(location_of(mirror))
    if copies == at:
        raise ArgumentError(f"root and mirror are the same location, {masked(at)}")
    if copies.startswith(at.rstrip("/") + "/"):
        raise ArgumentError(f"mirror={masked(copies)} is inside root={masked(at)}: pass a location outside")
    return at, copies


def _as_passed(location: str | os.PathLike[str] | None) -> str:
    return "" if location is None else location_of(location)


def _no_such_step(
    step: int, candidates: Sequence[Candidate], root: str, saved: Sequence[SavedStep]
) -> CheckpointNotFoundError:
    steps = ", ".join(str(found.step) for found in saved[-8:]) or "none"
    reason = f": {candidates[0].entry.problem}" if candidates else ""
    return CheckpointNotFoundError(
        f"there is no complete checkpoint of step {step} at {root}{reason}. Complete checkpoints: {steps}"
    )


def _async_options(staging: str, background: str) -> dict[str, Any]:
    check_choice("staging", staging, CHOICES["staging"])
    check_choice("background", background, CHOICES["background"])
    return {"staging": staging, "background": background}


def _whole_number(name: str, value: Any, *, minimum: int = 0) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if isinstance(value, bool) or number < minimum:
        raise ArgumentError(f"{name} must be a whole number of {minimum} or more, got {value!r}")
    return number


def _own_group(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Create a gloo group of the same ranks; None without a process group or with one rank.

    The collectives of the manager then do not wait for a device, and cannot meet other collectives of the ranks.
    """
    if not is_distributed() or dist.get_world_size(process_group) == 1:
        return process_group
    return Collectives(process_group, background=True).process_group


def _release_at_exit(lease: weakref.ref[Lease]) -> None:
    found = lease()
    if found is not None:
        found.release()
