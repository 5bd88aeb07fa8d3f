"""`reshard.save`: DCP plans the save and exchanges the plans, reshard writes."""

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
from .dcp_writer import StorageWriter
from .errors import ArgumentError, CommitError
from .formats.native.codec import check_codec
from .formats.user_metadata import plain_metadata
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
    begin = time.perf_counter()
    leaves: dict[str, Leaf] = {}

    def prepare() -> tuple[str | None, str]:
        check_codec(codec)
        check_budget(budget_bytes)
        plain_metadata(metadata)
        leaves.update(flatten(stateful_to_state(state_dict)))
        return None if isinstance(uri, Store) else str(uri), codec

    # All ranks do this together, so that an error on one of them stops all.
    locations, codecs = zip(*on_all_ranks(prepare, process_group), strict=True)
    for what, passed in ("locations", set(locations) - {None}), ("codecs", set(codecs)):
        if len(passed) > 1:
            raise ArgumentError(f"the ranks of one save passed different {what}: {', '.join(sorted(passed))}")
    writer = StorageWriter(
        uri,
        codec=codec,
        storage_options=storage_options,
        overwrite=overwrite,
        budget_bytes=budget_bytes,
        metadata=metadata,
    )
    rank = rank_of(process_group)
    writer.alarm, writer.meter = Alarm(process_group), Meter("save", progress, rank=rank)
    writer.arrivals = Arrivals(process_group)
    try:
        with warnings.catch_warnings(), naming_lost_ranks(writer.arrivals):
            # Saving from one process is intended here.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            saved = dcp_save(
                {name: leaf.value for name, leaf in leaves.items()},
                storage_writer=writer,
                planner=SavePlanner(leaves, allow_pickle=allow_pickle),
                process_group=process_group,
                no_dist=not is_distributed(),
            )
    except CheckpointException as failed:
        own, _ = failed.failures.get(rank, (None, None))
        if isinstance(own, KeyboardInterrupt):  # DCP treats it as an error
            writer.discard()
            raise own from failed
        error = _first_failure(failed)
        if not isinstance(error, CommitError):
            writer.discard()
        raise error from failed
    finally:
        writer.alarm.close()
    writer.arrivals.forget()
    ranks = [RankReport(**report) for report in saved.storage_data]
    plan_s, total_s = writer.planned_at - begin, time.perf_counter() - begin
    stages = dict(ranks[rank].seconds)
    commit_s = total_s - plan_s - stages.pop("total")  # includes waiting for the slowest rank
    seconds = {"plan": plan_s, **stages, "commit": commit_s, "total": total_s}
    ranks[rank] = replace(ranks[rank], seconds=seconds)
    logger.info("saved to %s: %s", writer.meter.location, ranks[rank].words)
    return Report(rank, tuple(ranks))


def _first_failure(failed: CheckpointException) -> CheckpointError:
    """Return the error of the lowest rank that failed."""
    return of_rank(*first_failure({rank: error for rank, (error, _) in failed.failures.items()}))
