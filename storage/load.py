"""`reshard.load`: every rank plans its own reads from the metadata.

The ranks communicate twice. The first exchange checks that all ranks opened the same checkpoint and that it fits their
state dicts, before anything is changed. The second sends errors and reports to all ranks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch.profiler import record_function

from .errors import ArgumentError
from .formats.detect import open_source
from .reading.name_matching import LoadOptions
from .reading.read_tensors import ReadOptions
from .reading.state_dict_reads import StateDictRead
from .runtime.limits import check_budget
from .runtime.logs import logger_of
from .runtime.process_group import Alarm, OpenedCheckpoint, check_same_checkpoint, is_distributed, on_all_ranks, rank_of
from .runtime.progress import Meter, OnProgress
from .runtime.reports import RankReport, Report
from .runtime.torch_modes import undisturbed
from .stores.base import Store
from .tensors.name_patterns import Patterns, check_renames, quoted
from .tensors.state_dict import state_to_stateful, stateful_to_state

logger = logger_of(__name__)


@undisturbed()
def load(
    state_dict: MutableMapping[str, Any],
    uri: str | os.PathLike[str] | Store,
    *,
    strict: bool = True,
    allow_missing: Patterns = (),
    exclude: Patterns = (),
    rename: Mapping[str, str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    process_group: dist.ProcessGroup | None = None,
    allow_pickle: bool = False,
    budget_bytes: int | None = None,
    max_over_read: float | None = None,
    format: str | None = None,
    progress: OnProgress = False,
) -> Report:
    """Load a checkpoint of any format into a state dict, in place. Collective: every rank of the group calls it.

    Each rank reads only the parts that its own tensors hold, whatever layout the checkpoint was saved under. Tensors
    are written in place and cast if their dtype differs. Other values are replaced. Names that are not in the state
    dict are not read.

    A tensor subclass with its own `__torch_dispatch__`, such as a quantized tensor, is written by its own `copy_`.
    Floating-point tensors that are cast to fewer bits are listed in the report and logged once.

    Args:
        state_dict: the destination: tensors, DTensors, ShardedTensors and values, in nested dicts and lists. Stateful
            values receive their loaded state.
        uri: a path, a URI that fsspec can open, or a Store.
        strict: whether every name of the state dict must be in the checkpoint. If False, missing names are skipped and
            listed in the report.
        allow_missing: patterns of names that may be missing, such as "optimizer.*". They are skipped and listed in the
            report.
        exclude: patterns of names of the state dict that are not loaded.
        rename: patterns of names in the checkpoint and their names in the state dict, such as
            `{"*_orig_mod.*": "**", "module.*": "*"}`. The patterns are applied one after another. Each star of the new
            name is replaced by the text that the star at the same position of the pattern matched. Names that no
            pattern matches keep their names.
        storage_options: options for fsspec.
        process_group: the ranks that load together. Default: the default group if there is one, otherwise this process
            alone.
        allow_pickle: whether to unpickle values that torch.load(weights_only=True) refuses. This can run any code.
        budget_bytes: the memory that this rank may use in addition to the tensors. Default: the smaller of 2 GiB and a
            tenth of the available memory, divided by the number of ranks on the machine (LOCAL_WORLD_SIZE, which
            torchrun sets), but at least 64 MiB.
        max_over_read: bytes in gaps that requests may read over, as a fraction of the stored bytes that are wanted, to
            save requests. Default: 0.005 for a native checkpoint, and every gap of at most 4 KiB; 0.25 for another
            format on a disk; for another format on an object store, as much as the latency of the store justifies.
        format: "reshard", "dcp", "safetensors" or "torch". Default: detect the format.
        progress: True for a progress bar on rank 0, or a function that is called with a `Progress` on every rank.

    Returns:
        What each rank read, and which names were missing, unexpected or cast.

    Raises, on every rank and naming the rank that failed:
        CheckpointNotFoundError, NotCommittedError: there is no checkpoint.
        UnsupportedVersionError, UnsupportedFormatError, UnsupportedURIError: the checkpoint cannot be opened.
        MissingTensorError, ShapeMismatchError, DtypeError, DestinationError, LayoutError: the state dict does not fit
            the checkpoint. Nothing was changed on any rank. Exception: if an integer does not fit its dtype, other
            ranks may already have loaded tensors; only the rank that raised the error is unchanged.
        ArgumentError: an argument is not valid, or the ranks opened different checkpoints. Nothing was changed.
        CorruptCheckpointError, StoreError: the bytes cannot be read. The tensor that the error names is unchanged,
            unless the message says otherwise. Other tensors may have been loaded.
        UnsafeValueError: a value needs `allow_pickle`.
        RankError: any other error.
    """
    rank = rank_of(process_group)
    alarm, meter = Alarm(process_group), Meter("load", progress, rank=rank)
    begin = time.perf_counter()
    states: Mapping[str, Any] = {}
    prepared: list[StateDictRead] = []

    def prepare() -> OpenedCheckpoint:
        nonlocal states
        if not isinstance(strict, bool):
            raise ArgumentError(
                f"strict must be True or False, got {strict!r}; allow_missing= takes patterns of names that may be "
                "missing"
            )
        check_budget(budget_bytes)
        check_renames("rename", rename or {})
        options = LoadOptions.of(strict, allow_missing, exclude, rename, allow_pickle, budget_bytes)
        with record_function("reshard.open"):
            source = open_source(uri, storage_options, format)
        opened = OpenedCheckpoint(source.location, source.fingerprint() if is_distributed() else "")
        states = stateful_to_state(state_dict)
        prepared.append(StateDictRead(source, states, options))
        return opened

    def read() -> RankReport:
        meter.location = prepared[0].source.location
        with alarm, meter:
            report = prepared[0].run(ReadOptions(rank, budget_bytes, max_over_read, alarm.check, meter))
        seconds = {"open": opened - begin, **report.seconds, "total": time.perf_counter() - begin}
        report = replace(report, seconds=seconds)
        logger.info("loaded from %s: %s", meter.location, report.words)
        return report

    try:
        check_same_checkpoint(on_all_ranks(prepare, process_group))
        opened = time.perf_counter()
        reports = on_all_ranks(read, process_group)
    finally:
        alarm.close()
    done = prepared[0]
    done.replace_values()
    state_to_stateful(state_dict, states)
    report = Report(rank, tuple(reports), done.match.missing_keys, done.match.unexpected_keys)
    if rank == 0:
        _log(report, done.describe_unexpected_keys())
    return report


def _log(report: Report, unexpected: str) -> None:
    if unexpected:
        logger.warning("%s", unexpected)
    if report.cast:
        casts = [f"{cast.name} ({cast.stored} → {cast.to})" for cast in report.cast]
        logger.warning("%d tensors were cast to fewer bits: %s", len(casts), quoted(casts))
