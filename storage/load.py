"""`reshard.load`: every rank plans its own reads from the manifest; the only collective spreads errors and reports."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import record_function

from ..planner.errors import MissingTensorError, ShapeMismatchError
from ..planner.index import Kind, nearest_names
from ..planner.read_plan import Want
from .errors import DestinationError
from .logs import logger_of
from .open_source import open_source
from .progress import Meter, OnProgress
from .ranks import Alarm, on_all_ranks, rank_of
from .read import Blob, check_is_tensor, counting_metadata, read_boxes
from .reports import RankReport, Report
from .source import Source
from .state_dict import Leaf, flatten, state_to_stateful, stateful_to_state
from .store import Store
from .tensors import LocalShard, local_shards

logger = logger_of(__name__)


def load(
    state_dict: MutableMapping[str, Any],
    uri: str | os.PathLike[str] | Store,
    *,
    strict: bool = True,
    storage_options: Mapping[str, Any] | None = None,
    process_group: dist.ProcessGroup | None = None,
    allow_pickle: bool = False,
    budget_bytes: int | None = None,
    max_over_read: float | None = None,
    format: str | None = None,
    progress: OnProgress = False,
) -> Report:
    """Load a checkpoint of any format into a state dict, in place. Collective: every rank of the group calls it.

    Each rank reads what its own tensors hold, whatever layout the checkpoint was saved under. Tensors are written in
    place, and cast where their dtype differs; float32 values are read as bfloat16 at a third of the bytes. Other
    values are replaced. What the state dict does not name is not read.

    Args:
        state_dict: the destination: plain tensors, DTensors or ShardedTensors, and values, in nested dicts and
            lists. Stateful values are given their loaded state.
        uri: a path, a URI that fsspec opens, or a Store.
        strict: whether every name must be in the checkpoint; if not, missing ones are left and reported.
        storage_options: passed to fsspec.
        process_group: the ranks that load together; the default group where there is one, else this process alone.
        allow_pickle: unpickle objects that torch.load(weights_only=True) refuses. That can run any code.
        budget_bytes: of memory that this rank may use beside the tensors; by default the smaller of 2 GiB and a tenth
            of what is available, shared by the ranks of a machine (by LOCAL_WORLD_SIZE, which torchrun sets).
        max_over_read: bytes that may be read over between those needed, as a fraction of them, to save requests; by
            default 0.005 of a native checkpoint, 0.25 of another format on a disk, and as much as the store's latency
            makes worth it elsewhere.
        format: "reshard", "dcp", "safetensors" or "torch"; by default what is found there.
        progress: True for a bar on rank 0, or a function that is called with a `Progress` on every rank.

    Raises, on every rank and naming the rank that failed:
        CheckpointNotFoundError, NotCommittedError, UnsupportedVersionError: there is nothing to load.
        MissingTensorError, ShapeMismatchError, DtypeError, DestinationError: the state dict does not fit. Nothing
            was changed on that rank.
        CorruptCheckpointError, StoreError: the bytes are not to be had. The tensor that the error names is as it
            was, unless the message says otherwise; others may have been loaded.
        UnsafeObjectError: an object needs `allow_pickle`.
    """
    loading = _Loading(state_dict, strict, allow_pickle, budget_bytes, max_over_read)
    rank = rank_of(process_group)
    alarm, meter = Alarm(process_group), Meter("load", progress, rank=rank)

    def task() -> RankReport:
        begin = time.perf_counter()
        with alarm, meter:
            with record_function("reshard.open"):
                source = open_source(uri, storage_options, format)
            opened = time.perf_counter()
            meter.location = source.location
            report = loading.run(source, rank, alarm, meter)
        seconds = {"open": opened - begin, **report.seconds, "total": time.perf_counter() - begin}
        report = replace(report, seconds=seconds)
        logger.info("loaded from %s: %s", source.location, report.words)
        return report

    try:
        reports = on_all_ranks(task, process_group)
    finally:
        alarm.close()
    for leaf, value in loading.objects:
        leaf.replace(value)
    state_to_stateful(state_dict, loading.states)
    if loading.unread and rank == 0:
        shown = ", ".join(loading.unread[:3]) + (", ..." if len(loading.unread) > 3 else "")
        logger.warning("%d names of the checkpoint were not in the state dict: %s", len(loading.unread), shown)
    return Report(rank, tuple(reports), loading.skipped, loading.unread)


class _Loading:
    """One rank's part of a load."""

    def __init__(
        self,
        state_dict: Mapping[str, Any],
        strict: bool,
        allow_pickle: bool,
        budget_bytes: int | None,
        max_over_read: float | None,
    ) -> None:
        self._state_dict = state_dict
        self.states: dict[str, Any] = {}
        self._strict = strict
        self._allow_pickle = allow_pickle
        self._budget_bytes = budget_bytes
        self._max_over_read = max_over_read
        self.objects: list[tuple[Leaf, Any]] = []
        self.skipped: tuple[str, ...] = ()
        self.unread: tuple[str, ...] = ()

    def run(self, source: Source, rank: int, alarm: Alarm, meter: Meter) -> RankReport:
        self.states = stateful_to_state(self._state_dict)
        named = flatten(self.states)
        leaves = self._present(named, source)
        inner = tuple(f"{key}." for key, state in self.states.items() if isinstance(state, (Mapping, list)))
        there = [*(entry.name for entry in source.entries), *source.unreadable]
        self.unread = tuple(name for name in there if name not in named and name.startswith(inner))
        wants: list[Want] = []
        destinations: list[torch.Tensor] = []
        for leaf in leaves:
            for box, tensor in _shards_to_load(leaf, source):
                wants.append(Want(leaf.name, box))
                destinations.append(tensor)
        objects = [leaf for leaf in leaves if source.entry(leaf.name).kind is not Kind.TENSOR]
        blobs = [Blob(source, leaf.name) for leaf in objects]
        report = read_boxes(
            source,
            wants,
            destinations,
            blobs=blobs,
            rank=rank,
            budget_bytes=self._budget_bytes,
            max_over_read=self._max_over_read,
            interrupt=alarm.check,
            meter=meter,
        )
        self.objects = [
            (leaf, blob.value(allow_pickle=self._allow_pickle)) for leaf, blob in zip(objects, blobs, strict=True)
        ]
        return counting_metadata(report, source)

    def _present(self, leaves: dict[str, Leaf], source: Source) -> list[Leaf]:
        """The leaves that the checkpoint has. Raises MissingTensorError."""
        missing = [name for name in leaves if name not in source]
        if missing and self._strict:
            raise MissingTensorError(_describe_missing(missing, source))
        self.skipped = tuple(missing)
        return [leaf for name, leaf in leaves.items() if name in source]


def _shards_to_load(leaf: Leaf, source: Source) -> list[LocalShard]:
    """What this rank holds of a leaf's tensor; nothing of an object. Raises where it does not fit the checkpoint."""
    entry = source.entry(leaf.name)
    if not isinstance(leaf.value, torch.Tensor):
        if entry.kind is Kind.TENSOR:
            raise DestinationError(
                f"{leaf.name!r} is a tensor of shape {entry.shape} in the checkpoint, and {type(leaf.value).__name__} "
                "in the state dict: give it a tensor to load into"
            )
        return []
    check_is_tensor(source, leaf.name)
    shape = tuple(leaf.value.size())
    if shape != entry.shape:
        raise ShapeMismatchError(
            f"{leaf.name!r} has shape {entry.shape} in the checkpoint and {shape} in the state dict"
        )
    return [(box, tensor) for box, tensor in local_shards(leaf.name, leaf.value) if box.numel]


def _describe_missing(missing: list[str], source: Source) -> str:
    """Which names are missing, and where they may be meant to be."""
    names = [entry.name for entry in source.entries]
    shown = ", ".join(map(repr, missing[:5])) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
    message = f"the checkpoint has no {shown}"
    for name in names:
        if name.endswith(f".{missing[0]}"):
            return f"{message}; it has {name!r}: nest the state dict under {name.removesuffix(missing[0])[:-1]!r}"
        if missing[0].endswith(f".{name}"):
            return f"{message}; it has {name!r}: the state dict is nested too deeply"
    near = nearest_names(missing[0], names, 5) or names[:5]
    found = f"it has {', '.join(map(repr, near))}" + (", ..." if len(near) < len(names) else "")
    return f"{message}; {found if names else 'it is empty'}; strict=False leaves out what is missing"
