"""`reshard.save`: the ranks plan together, each rank writes, and rank 0 commits. `async_save` takes the same steps."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from .errors import CommitError, RankError
from .runtime.arguments import check_progress
from .runtime.deferred_writes import finish_writes
from .runtime.gc_pauses import gc_disabled, gc_less_often
from .runtime.logs import logger_of
from .runtime.process_group import Alarm, Collectives
from .runtime.progress import Meter, OnProgress
from .runtime.reports import RankReport, Report
from .runtime.torch_modes import without_torch_modes
from .stores.base import Store
from .tensors.state_dict import check_mapping, flatten, stateful_to_state
from .tensors.wrapper_tensors import with_parts
from .writing.checkpoint_writer import CheckpointWriter, SaveOptions, Written
from .writing.coordinator import Assignment, RankContents, ReusablePlan, SaveCoordinator, UnchangedSinceLastPlan
from .writing.held_state import HeldState
from .writing.object_layout import ShardToWrite
from .writing.object_writer import write_objects
from .writing.save_plan import HeldShards

logger = logger_of(__name__)


class Saving:
    """A save on one rank.

    The caller calls `open`, `describe`, `coordinator.assign` with the results of all ranks (on rank 0), `accept_plan`
    with its result for this rank, and `write_and_commit`, in this order. Only the last one is collective.

    Args:
        uri: as for `save`.
        progress: as for `save`.
        rank, size: the rank in the process group of the save, and the number of ranks.
        last_plan: the plan of the last save of these ranks. If all ranks hold the same as then, it is used again.
    """

    def __init__(
        self,
        uri: str | os.PathLike[str] | Store,
        options: SaveOptions,
        progress: OnProgress,
        rank: int,
        size: int,
        last_plan: ReusablePlan | None = None,
    ) -> None:
        self._begin = time.perf_counter()
        self._uri = uri
        self._options = options
        self._progress = progress
        self._rank, self._size = rank, size
        self.meter = Meter("save", progress, rank=rank)
        self._writer: CheckpointWriter | None = None
        self._coordinator: SaveCoordinator | None = None
        self._state: HeldState | None = None
        self._held: HeldShards | None = None
        self._last_plan = last_plan
        self.shards: list[ShardToWrite] = []
        """What this rank writes. Known after `accept_plan`."""
        self.seconds: dict[str, float] = {}
        """The seconds of the stages in which only this rank works, by stage."""

    @property
    def writer(self) -> CheckpointWriter:
        """The writer. `open` creates it."""
        assert self._writer is not None
        return self._writer

    @property
    def coordinator(self) -> SaveCoordinator:
        """What plans and commits the save, if this is rank 0. `open` creates it."""
        assert self._coordinator is not None
        return self._coordinator

    @property
    def codec(self) -> str:
        return self._options.codec

    def open(self) -> None:
        """Check the options and open the store, unless this has been done. Raises what `save` raises for them."""
        if self._writer is not None:
            return
        check_progress(self._progress)
        self._writer = CheckpointWriter(self._uri, self._options, self._rank, self.meter)
        self._coordinator = SaveCoordinator(self._writer, self._last_plan)
        self.meter.location = self._writer.store.location

    def describe(self, state_dict: Mapping[str, Any], *, is_repeated: bool = False) -> RankContents:
        """Describe what this rank holds. Raises what `save` raises for the state dict.

        Args:
            state_dict: the state dict. It is read in the first call only.
            is_repeated: whether `assign` returned None before, so that it needs a description that does not refer
                to the last plan.
        """
        if self._state is None:
            states = stateful_to_state(state_dict)
            with gc_disabled():
                leaves = with_parts(flatten(states))
                tensors = [leaf.value for leaf in leaves.values() if isinstance(leaf.value, torch.Tensor)]
                finish_writes("reshard.save", tensors)
                self._state = HeldState(leaves, allow_pickle=self._options.allow_pickle, world_size=self._size)
            self._held = self._state.held
        assert self._held is not None
        held: HeldShards | UnchangedSinceLastPlan = self._held
        if self._last_plan is not None and not is_repeated and self._last_plan.held.holds_the_same_as(self._held):
            held = UnchangedSinceLastPlan(self._last_plan.number, self._held.digests)
        location = None if isinstance(self._uri, Store) else str(self._uri)
        return RankContents(location, self.codec, self.writer.metadata_json, held)

    def reusable_plan(self, assigned: Assignment) -> ReusablePlan | None:
        """Return the plan for the next save to use again."""
        if assigned.mask is None:
            return self._last_plan
        assert self._held is not None
        return ReusablePlan(assigned.number, self._held, assigned, self.coordinator.plan)

    def accept_plan(self, assigned: Assignment) -> None:
        """Receive what this rank is to write."""
        assert self._state is not None
        if assigned.mask is None:
            assert self._last_plan is not None
            assigned = self._last_plan.assigned
        assert assigned.mask is not None
        chosen = np.flatnonzero(np.unpackbits(np.frombuffer(assigned.mask, np.uint8)))
        self.shards = self._state.shards_to_write(chosen.tolist(), assigned.largest_sizes)
        self.writer.announce(self.shards)
        self.seconds["plan"] = time.perf_counter() - self._begin

    def release_tensors(self) -> None:
        """Forget the tensors of the state dict, and `shards`, which read them."""
        self._state, self.shards = None, []

    def write_and_commit(self, collectives: Collectives, work: Callable[[], Written]) -> Report:
        """Write on every rank, commit on rank 0, and return the report. Collective.

        Args:
            work: writes what this rank has to write.

        Raises what `save` raises after planning, on every rank.
        """

        has_written = False
        interrupted_by: BaseException | None = None

        def write() -> Written:
            nonlocal has_written
            written = work()
            has_written = True
            return written

        def commit(by_rank: list[Written]) -> list[list[dict[str, Any]]]:
            nonlocal interrupted_by
            try:
                return [self.coordinator.commit(by_rank)] * collectives.size
            except Exception:
                raise
            except BaseException as error:
                interrupted_by = error
                raise CommitError(
                    "the commit was interrupted: the manifest may or may not have been written"
                ) from error

        try:
            plain = collectives.through_rank_0(write, commit)
        except BaseException as error:
            # A rank that lost the others, or was interrupted while it waited, may not know that rank 0 has committed.
            may_be_committed = isinstance(error, CommitError) or (has_written and _outcome_is_unknown(error))
            if not may_be_committed:
                self.writer.discard()
            if interrupted_by is not None:
                raise interrupted_by from None
            raise
        finally:
            self.writer.alarm.close()
        return self._report([RankReport(**report) for report in plain])

    def _report(self, ranks: list[RankReport]) -> Report:
        """Add the stages of this rank to its report, and return the report of all ranks."""
        stages = dict(ranks[self._rank].seconds)
        total_s = time.perf_counter() - self._begin
        commit_s = total_s - stages.pop("total") - sum(self.seconds.values())  # with waiting for the slowest rank
        seconds = {**self.seconds, **stages, "commit": commit_s, "total": total_s}
        ranks[self._rank] = replace(ranks[self._rank], seconds=seconds)
        logger.info("saved to %s: %s", self.meter.location, ranks[self._rank].words)
        return Report(self._rank, tuple(ranks))


def save(
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
) -> Report:
    """Save a state dict as a checkpoint. Collective: every rank of the group calls it.

    The state dict may contain tensors, DTensors, ShardedTensors and other values, in nested dicts and lists. Each rank
    writes its shards to its own objects. Replicas are written once. The checkpoint exists when every rank has written
    its objects and the manifest is written. A save that fails before the commit leaves an existing checkpoint
    unchanged. After a CommitError, either the old or the new checkpoint exists.

    If a tensor consists of other tensors, such as a quantised weight of torchao, these are stored as NAME.ATTRIBUTE,
    and a description of its class as NAME.__class__. If it consists of a single tensor with the same values, this one
    is stored as NAME. A sharded tensor that consists of several tensors is refused.

    Values that are not tensors are stored as JSON if they are plain data, and pickled otherwise. Tensors in tuples and
    other objects are a part of such a value; a DTensor there is refused. If several ranks have a value, or a replicated
    tensor of 64 KiB or less, that of the lowest rank is stored; a larger replica is taken from any of the ranks. If the
    ranks have different values, the report and a warning list the name. Of larger replicas, only samples are compared.

    Args:
        state_dict: tensors and values by name, in nested dicts and lists. The state of Stateful values is saved.
        uri: a path, a URI that fsspec can open, or a Store.
        codec: "zstd" compresses. "none" stores tensors uncompressed, so that parts of a chunk can be read.
        storage_options: options for fsspec.
        process_group: the ranks that save together. Default: the default group if there is one, otherwise this process
            alone.
        overwrite: whether to replace an existing checkpoint.
        allow_pickle: whether to store values that need pickle. They can only be loaded with `allow_pickle=True`; the
            report and a warning list their names. If False, such a value raises UnsupportedValueError.
        budget_bytes: the memory that this rank may use in addition to the state dict. Default: the smaller of 2 GiB and
            a tenth of the available memory, divided by the number of ranks on the machine (LOCAL_WORLD_SIZE, which
            torchrun sets), but at least 64 MiB.
        metadata: plain data to store with the checkpoint, such as the step and metrics: a dict of strings, numbers
            (NaN and infinity included), booleans, None, lists and dicts with string keys, up to 1 MiB as JSON. All
            ranks pass the same. `Checkpoint.metadata` returns it without reading tensors.
        progress: True for a progress bar on rank 0, or a function that is called with a `Progress` on every rank.

    Returns:
        What each rank wrote, and which values differ between ranks or need pickle.

    Raises, on every rank and naming the rank that failed:
        CheckpointExistsError: there is a checkpoint, and `overwrite` is False.
        UnsupportedURIError, StoreError: the location cannot be opened or written.
        CommitError: the store failed during the commit. Check whether the checkpoint exists.
        UnsupportedValueError, DtypeError, LayoutError: the state dict contains something that cannot be stored.
        DestinationError: two values have the same name.
        ArgumentError: an argument is not valid, `state_dict` is not a mapping, or the ranks passed different locations,
            codecs or metadata, or different dtypes, shapes or kinds of values for one name.
        RankError: any other error.
    """
    options = SaveOptions(codec, storage_options, overwrite, allow_pickle, budget_bytes, metadata)
    return save_with(state_dict, uri, options, process_group, progress)


@without_torch_modes()
def save_with(
    state_dict: Mapping[str, Any],
    uri: str | os.PathLike[str] | Store,
    options: SaveOptions,
    process_group: dist.ProcessGroup | None,
    progress: OnProgress = False,
) -> Report:
    """Save a state dict. See `save`."""
    collectives = Collectives(process_group)
    saving = Saving(uri, options, progress, collectives.rank, collectives.size)

    def check() -> None:
        saving.open()
        check_mapping(state_dict)

    # All ranks may have to take part in the state_dict() of a value: first make sure that they will.
    collectives.through_rank_0(check, lambda checked: checked)
    assigned = collectives.through_rank_0(
        lambda: saving.describe(state_dict), lambda contents: saving.coordinator.assign(contents)
    )
    assert assigned is not None
    saving.writer.alarm = Alarm(process_group)

    def work() -> Written:
        with saving.writer.alarm, saving.meter, gc_less_often():
            saving.accept_plan(assigned)
            return saving.writer.write(saving.shards, write_objects)

    return saving.write_and_commit(collectives, work)


def _outcome_is_unknown(error: BaseException) -> bool:
    """Return whether a collective ended on this rank without the answer of rank 0."""
    return not isinstance(error, Exception) or (isinstance(error, RankError) and error.group_is_broken)
