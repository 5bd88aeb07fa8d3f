"""`reshard.save`: the ranks plan together, each rank writes, and rank 0 commits. `async_save` takes the same steps."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

from .dcp_writer import StorageWriter, WriteObjects, Written
from .errors import ArgumentError, CommitError, RankError
from .runtime.logs import logger_of
from .runtime.process_group import Alarm, Arrivals, Exchange
from .runtime.progress import Meter, OnProgress
from .runtime.reports import RankReport, Report
from .runtime.torch_modes import undisturbed
from .stores.base import Store
from .tensors.state_dict import flatten, stateful_to_state
from .writing.object_layout import ShardToWrite
from .writing.object_writer import write_objects
from .writing.save_plan import SavePlanner

logger = logger_of(__name__)


@dataclass(frozen=True, slots=True)
class SaveOptions:
    """The options that `save` and `async_save` share; see `save`."""

    codec: str
    storage_options: Mapping[str, Any] | None
    overwrite: bool
    allow_pickle: bool
    budget_bytes: int | None
    metadata: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class LocalPlan:
    """What one rank would write, before rank 0 has compared the plans and assigned the replicas."""

    location: str | None
    """None for a Store."""
    codec: str
    plan: SavePlan


class Saving:
    """A save on one rank: `open`, `local_plan`, `global_plan` on rank 0, `accept_plan`, `write`, `finish`.

    Args:
        uri: As for `save`.
        progress: As for `save`.
        rank: The rank in the process group of the save.
    """

    def __init__(
        self, uri: str | os.PathLike[str] | Store, options: SaveOptions, progress: OnProgress, rank: int
    ) -> None:
        self._begin = time.perf_counter()
        self._uri = uri
        self._options = options
        self._progress = progress
        self._rank = rank
        self.meter = Meter("save", progress, rank=rank)
        self._writer: StorageWriter | None = None
        self._planner: SavePlanner | None = None
        self._metadata: Metadata | None = None
        self.shards: list[ShardToWrite] = []
        """What this rank writes. Known after `accept_plan`."""
        self.seconds: dict[str, float] = {}
        """The seconds of the stages in which only this rank works, by stage."""

    @property
    def writer(self) -> StorageWriter:
        """The writer. `open` creates it."""
        assert self._writer is not None
        return self._writer

    @property
    def codec(self) -> str:
        return self._options.codec

    def open(self) -> None:
        """Check the options and open the store, unless this has been done. Raises what `save` raises for them."""
        if self._writer is not None:
            return
        options = self._options
        for name, passed in (("overwrite", options.overwrite), ("allow_pickle", options.allow_pickle)):
            if not isinstance(passed, bool):
                raise ArgumentError(f"{name} must be True or False, got {passed!r}")
        if not (isinstance(self._progress, bool) or callable(self._progress)):
            raise ArgumentError(f"progress must be True, False or a function, got {self._progress!r}")
        self._writer = StorageWriter(
            self._uri,
            codec=options.codec,
            storage_options=options.storage_options,
            overwrite=options.overwrite,
            budget_bytes=options.budget_bytes,
            metadata=options.metadata,
        )
        self._writer.meter = self.meter
        self.meter.location = self._writer.store.location

    def local_plan(self, state_dict: Mapping[str, Any]) -> LocalPlan:
        """Plan what this rank would write alone. Raises what `save` raises for the state dict."""
        leaves = flatten(stateful_to_state(state_dict))
        self._planner = SavePlanner(leaves, allow_pickle=self._options.allow_pickle)
        self._planner.set_up_planner({name: leaf.value for name, leaf in leaves.items()}, None, self._rank == 0)
        self.writer.set_up_storage_writer(False, rank=self._rank)
        plan = self.writer.prepare_local_plan(self._planner.create_local_plan())
        return LocalPlan(None if isinstance(self._uri, Store) else str(self._uri), self.codec, plan)

    def global_plan(self, plans: Sequence[LocalPlan]) -> list[SavePlan]:
        """Compare the plans of all ranks, and assign each replica to one of them. Only rank 0 calls it.

        Raises:
            ArgumentError: The ranks disagree.
            CheckpointExistsError: There is a checkpoint that must not be replaced.
        """
        for what, passed in (
            ("locations", {plan.location for plan in plans} - {None}),
            ("codecs", {plan.codec for plan in plans}),
        ):
            if len(passed) > 1:
                raise ArgumentError(
                    f"the ranks of one save passed different {what}: {', '.join(sorted(map(str, passed)))}"
                )
        assert self._planner is not None
        self.writer.set_up_storage_writer(True, rank=0)
        assigned, self._metadata = self._planner.create_global_plan([plan.plan for plan in plans])
        return self.writer.prepare_global_plan(assigned)

    def accept_plan(self, plan: SavePlan) -> None:
        """Receive what this rank is to write."""
        assert self._planner is not None
        self.shards = self.writer.shards_to_write(self._planner.finish_plan(plan), self._planner)
        self.seconds["plan"] = time.perf_counter() - self._begin

    def release_tensors(self) -> None:
        """Forget the tensors of the state dict, and `shards`, which read them."""
        self._planner, self.shards = None, []

    def write(self, shards: Sequence[Any], writing: WriteObjects = write_objects) -> Written:
        """Write shards; see `StorageWriter.write`."""
        return self.writer.write(shards, writing)

    def finish(self, exchange: Exchange, work: Callable[[], Written], arrivals: Arrivals | None = None) -> Report:
        """Write on every rank, commit on rank 0, and return the report. Collective.

        Args:
            work: Writes what this rank has to write.
            arrivals: See `Exchange.through_rank_0`.

        Raises what `save` raises after planning, on every rank.
        """

        has_written = False
        interrupt: BaseException | None = None

        def write() -> Written:
            nonlocal has_written
            written = work()
            has_written = True
            return written

        def commit(by_rank: list[Written]) -> list[list[dict[str, Any]]]:
            nonlocal interrupt
            assert self._metadata is not None
            try:
                return [self.writer.commit(self._metadata, by_rank)] * exchange.size
            except Exception:
                raise
            except BaseException as error:
                interrupt = error
                raise CommitError(
                    "the commit was interrupted: the manifest may or may not have been written"
                ) from error

        try:
            plain = exchange.through_rank_0(write, commit, arrivals)
        except BaseException as error:
            # A rank that lost the others, or was interrupted while it waited, may not know that rank 0 has committed.
            if not (isinstance(error, CommitError) or (has_written and _is_of_this_rank_only(error))):
                self.writer.discard()
            if interrupt is not None:
                raise interrupt from None
            raise
        finally:
            self.writer.alarm.close()
        ranks = [RankReport(**report) for report in plain]
        stages = dict(ranks[self._rank].seconds)
        total_s = time.perf_counter() - self._begin
        commit_s = total_s - stages.pop("total") - sum(self.seconds.values())  # with waiting for the slowest rank
        seconds = {**self.seconds, **stages, "commit": commit_s, "total": total_s}
        ranks[self._rank] = replace(ranks[self._rank], seconds=seconds)
        logger.info("saved to %s: %s", self.meter.location, ranks[self._rank].words)
        return Report(self._rank, tuple(ranks))


@undisturbed()
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

    Values that are not tensors are stored as JSON if they are plain data, and pickled otherwise. If several ranks have
    a value, or a tensor of 64 KiB or less, the one of the lowest rank is stored. If another rank has a different one,
    the report and a warning list its name.

    Args:
        state_dict: tensors and values by name. The state of Stateful values is saved.
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
    exchange = Exchange(process_group)
    options = SaveOptions(codec, storage_options, overwrite, allow_pickle, budget_bytes, metadata)
    saving = Saving(uri, options, progress, exchange.rank)

    def local_plan() -> LocalPlan:
        saving.open()
        return saving.local_plan(state_dict)

    plan = exchange.through_rank_0(local_plan, saving.global_plan)
    saving.writer.alarm = Alarm(process_group)

    def work() -> Written:
        with saving.writer.alarm, saving.meter:
            saving.accept_plan(plan)
            return saving.write(saving.shards)

    return saving.finish(exchange, work)


def _is_of_this_rank_only(error: BaseException) -> bool:
    """Return whether a collective ended on this rank without the answer of rank 0."""
    return not isinstance(error, Exception) or (isinstance(error, RankError) and error.group_is_broken)
