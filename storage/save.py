"""`reshard.save`: DCP's planning and collectives, reshard's writer, reshard's errors."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from ..planner.errors import CheckpointError
from .dcp import StorageWriter
from .errors import ArgumentError, CommitError
from .formats.native.codec import check_codec
from .runtime.limits import check_budget
from .runtime.logs import logger_of
from .runtime.process_group import (
    Alarm,
    Arrivals,
    first_failure,
    is_distributed,
    naming_lost_ranks,
    of_rank,
    on_all_ranks,
    rank_of,
)
from .runtime.progress import Meter, OnProgress
from .runtime.reports import RankReport, Report
from .runtime.torch_modes import undisturbed
from .stores.base import Store
from .tensors.state_dict import Leaf, flatten, stateful_to_state
from .writing.save_plan import SavePlanner

logger = logger_of(__name__)


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
    progress: OnProgress = False,
) -> Report:
    """Save a state dict as a checkpoint. Collective: every rank of the group calls it.

    Tensors may be plain, DTensor or ShardedTensor, in nested dicts and lists; each rank writes its shards into objects
    of its own, and what several ranks hold alike is written once. The checkpoint exists once every rank has written
    and the manifest is put; a save that fails leaves what was there.

    Values that are not tensors are stored as JSON where they are plain data, and pickled otherwise. Of objects, and of
    tensors of 64 KiB or less, the ones of the lowest rank are stored; where another rank's differ, the report and a
    warning list their names.

    Args:
        state_dict: tensors and values by name. Stateful values are asked for their state.
        uri: a path, a URI that fsspec opens, or a Store.
        codec: "zstd" compresses; "none" stores values as they are, so that parts of a chunk can be read.
        storage_options: passed to fsspec.
        process_group: the ranks that save together; the default group where there is one, else this process alone.
        overwrite: replace a checkpoint that is there.
        allow_pickle: whether values that need pickle are stored. They can only be loaded with `allow_pickle=True`; the
            report and a warning list their names. If False, they raise UnsupportedValueError.
        budget_bytes: of memory that this rank may use beside the state; by default the smaller of 2 GiB and a tenth of
            what is available, shared by the ranks of a machine (by LOCAL_WORLD_SIZE, which torchrun sets).
        progress: True for a bar on rank 0, or a function that is called with a `Progress` on every rank.

    Raises, on every rank and naming the rank that failed:
        CheckpointExistsError: a checkpoint is there and `overwrite` is False.
        UnsupportedURIError, StoreError: the place cannot be opened, or not be written.
        CommitError: the store failed in the very moment of the commit; look whether the checkpoint stands.
        UnsupportedValueError, DtypeError, LayoutError: the state dict holds what cannot be stored.
        DestinationError: two values have the same name.
        ArgumentError: an argument is wrong, `state_dict` is no mapping, or the ranks were given different places or
            codecs, or different dtypes, shapes or kinds of values under one name.
        RankError: anything else.
    """
    begin = time.perf_counter()
    leaves: dict[str, Leaf] = {}

    def prepare() -> tuple[str | None, str]:
        check_codec(codec)
        check_budget(budget_bytes)
        leaves.update(flatten(stateful_to_state(state_dict)))
        return None if isinstance(uri, Store) else str(uri), codec

    # On all ranks together, so that a state that cannot be had or stored stops every one of them.
    places, codecs = zip(*on_all_ranks(prepare, process_group), strict=True)
    for what, given in ("places", set(places) - {None}), ("codecs", set(codecs)):
        if len(given) > 1:
            raise ArgumentError(f"the ranks of one save were given different {what}: {', '.join(sorted(given))}")
    writer = StorageWriter(
        uri, codec=codec, storage_options=storage_options, overwrite=overwrite, budget_bytes=budget_bytes
    )
    rank = rank_of(process_group)
    writer.alarm, writer.meter = Alarm(process_group), Meter("save", progress, rank=rank)
    writer.arrivals = Arrivals(process_group)
    try:
        with warnings.catch_warnings(), naming_lost_ranks(writer.arrivals):
            # To save from one process is no mistake here.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            metadata = dcp_save(
                {name: leaf.value for name, leaf in leaves.items()},
                storage_writer=writer,
                planner=SavePlanner(leaves, allow_pickle=allow_pickle),
                process_group=process_group,
                no_dist=not is_distributed(),
            )
    except CheckpointException as failed:
        own, _ = failed.failures.get(rank, (None, None))
        if isinstance(own, KeyboardInterrupt):  # DCP takes it for an error
            writer.discard()
            raise own from failed
        error = _first_failure(failed)
        if not isinstance(error, CommitError):
            writer.discard()
        raise error from failed
    finally:
        writer.alarm.close()
    writer.arrivals.forget()
    ranks = [RankReport(**report) for report in metadata.storage_data]
    plan_s, total_s = writer.planned_at - begin, time.perf_counter() - begin
    stages = dict(ranks[rank].seconds)
    commit_s = total_s - plan_s - stages.pop("total")  # and the wait for the slowest rank
    seconds = {"plan": plan_s, **stages, "commit": commit_s, "total": total_s}
    ranks[rank] = replace(ranks[rank], seconds=seconds)
    logger.info("saved to %s: %s", writer.meter.location, ranks[rank].words)
    return Report(rank, tuple(ranks))


def _first_failure(failed: CheckpointException) -> CheckpointError:
    """The error of the lowest rank that failed."""
    return of_rank(*first_failure({rank: error for rank, (error, _) in failed.failures.items()}))
