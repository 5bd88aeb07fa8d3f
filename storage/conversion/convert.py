"""`reshard.convert`: converts a checkpoint to another format, in pieces, by one process or several.

A conversion can be resumed. Its output is cut into work units, in the same way on every rank and in every run. The
ranks share the units that have not been written yet, and add finished ones to a journal beside the output. The commit
of the target comes last.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from ...planner.errors import CheckpointError
from ...planner.text import quoted
from ..errors import ArgumentError, CorruptCheckpointError
from ..formats.detect import open_source
from ..formats.metadata_reader import MetadataReader
from ..formats.native.codec import check_codec
from ..formats.native.manifest import VERSION
from ..runtime.arguments import check_nbytes, check_progress
from ..runtime.brief import reason
from ..runtime.logs import logger_of
from ..runtime.process_group import Alarm, Interrupt, is_distributed, on_all_ranks, on_rank_0, rank_of
from ..runtime.progress import Meter, OnProgress
from ..runtime.reports import RankReport, Report
from ..runtime.torch_modes import without_torch_modes
from ..stores.base import Store
from ..stores.open import open_store
from ..stores.retry import retried
from ..tensors.casts import check_dtype
from ..tensors.dtypes import is_packed
from ..tensors.name_patterns import Patterns, Selection, patterns_of
from ..version import __version__
from .conversion_plan import ConversionPlan, plan_conversion
from .journal import Journal, JournalState
from .result_check import check_converted
from .source_stream import SourceStream
from .targets.dcp import DcpTarget
from .targets.native import NativeTarget
from .targets.safetensors import SafetensorsTarget
from .targets.target import ConversionTarget, UnitRecord, WorkUnit

logger = logger_of(__name__)

TARGETS = ("reshard", "dcp", "safetensors")
MAX_FILE_BYTES = 5_000_000_000
"""The default size of safetensors files. Hugging Face's writers used the same default for a long time."""


@without_torch_modes()
def convert(
    src: str | os.PathLike[str] | Store,
    dst: str | os.PathLike[str] | Store,
    *,
    format: str = "reshard",
    include: Patterns = "*",
    exclude: Patterns = (),
    rename: Mapping[str, str] | None = None,
    allow_missing: Patterns = (),
    dtype: torch.dtype | None = None,
    codec: str = "zstd",
    max_file_bytes: int | None = None,
    src_format: str | None = None,
    src_options: Mapping[str, Any] | None = None,
    dst_options: Mapping[str, Any] | None = None,
    process_group: dist.ProcessGroup | None = None,
    budget_bytes: int | None = None,
    progress: OnProgress = False,
) -> Report:
    """Convert a checkpoint to another format. If there is a process group, all ranks call this and share the work.

    Values are read and written in pieces of about 16 MiB. If a call was interrupted, call again with the same
    arguments: it continues where the first call stopped.

    Args:
        src: the checkpoint to read, of any format: a path, a URI that fsspec can open, or a Store.
        dst: a location without a checkpoint, or one at which the same conversion was interrupted.
        format: the format to write: "reshard", "dcp" or "safetensors".
        include: patterns of the names in `src` to convert. `*` matches any text, and "model" also matches every name
            below it, such as "model.w".
        exclude: patterns of names in `src` that are not converted, even if `include` matches them.
        rename: patterns of names in `src` and their new names, for example `{"model.*": "*"}`. The patterns are applied
            one after another. Each star of the new name is replaced by the text that the star at the same position of
            the pattern matched. Names that no pattern matches keep their names.
        allow_missing: patterns of names in `src` that are skipped if they are missing or cannot be read (see
            `Checkpoint.unreadable`).
        dtype: the dtype to cast floating-point tensors with at least one dimension to, except packed ones (two values
            in a byte). Casting float32 that was saved with codec "zstd" to bfloat16 reads only the heads: about a third
            of the uncompressed bytes.
        codec: the codec of the format "reshard": "zstd" or "none".
        max_file_bytes: the maximum size of a file of the format "safetensors". Default: 5 GB. A tensor that is larger
            gets its own file, which exceeds the maximum.
        src_format: the format of `src`; see `reshard.open`.
        src_options, dst_options: options for fsspec.
        process_group, budget_bytes, progress: see `reshard.load`.

    Returns:
        What each rank did. `dropped` lists the names in `src` that were not converted: those that `include` does not
        match or `exclude` matches, those that the index of `src` does not list, and, if the format is "safetensors",
        values that are not tensors. `cast` lists the tensors that were rounded to `dtype`. `pickled` lists the values
        that need `allow_pickle` when they are loaded.

    Raises, on every rank and naming the rank that failed:
        CheckpointExistsError: `dst` contains a checkpoint, or a part of one or of another conversion.
        MissingTensorError: a pattern of `include` or `exclude` matches no name, or one of `rename` no selected name.
        DtypeError, UnsupportedFormatError, CorruptCheckpointError: a selected name cannot be read (see
            `Checkpoint.unreadable`), or the format that is written does not have its dtype.
        ArgumentError: an argument is not valid, two tensors would have the same name, or the ranks passed different
            arguments.
        CommitError: the store failed during the commit. Call again to find out whether the commit succeeded.
        Also what `reshard.open` and `reshard.load` raise.
    """
    alarm = Alarm(process_group)
    rank = rank_of(process_group)
    world_size = dist.get_world_size(process_group) if is_distributed() else 1
    meter = Meter("convert", progress, rank=rank)
    conversions: list[_RankConversion] = []

    def prepare() -> tuple[str, str]:
        _check_arguments(format, codec, dtype, max_file_bytes=max_file_bytes, budget_bytes=budget_bytes)
        check_progress(progress)
        file_bytes = MAX_FILE_BYTES if max_file_bytes is None else int(max_file_bytes)
        source = open_source(src, src_options, src_format)
        plan = plan_conversion(
            source,
            _make_target(format, codec, file_bytes, budget_bytes, source.metadata),
            Selection.of(include, exclude, rename),
            patterns_of("allow_missing", allow_missing),
            dtype,
            budget_bytes=budget_bytes,
            arguments=[format, codec, file_bytes, __version__, VERSION],
        )
        store = open_store(dst, dst_options)
        conversions.append(_RankConversion(plan, store, rank, world_size, budget_bytes, meter))
        return plan.digest, store.location

    def work() -> RankReport:
        with alarm, meter:
            return conversion.work(meter.watching(alarm.check))

    try:
        if len(set(on_all_ranks(prepare, process_group))) > 1:
            raise ArgumentError(
                "the ranks passed different sources, destinations or arguments to convert: all ranks must pass the same"
            )
        [conversion] = conversions
        conversion.state = on_rank_0(conversion.begin, process_group)
        reports = on_all_ranks(work, process_group)
        committed = on_all_ranks(lambda: conversion.commit() if rank == 0 else 0, process_group)
    finally:
        alarm.close()
    ranks = tuple(
        replace(report, bytes_written=report.bytes_written + nbytes)
        for report, nbytes in zip(reports, committed, strict=True)
    )
    plan = conversion.plan
    logger.info("converted %s to %s: %s", plan.source.location, conversion.store.location, ranks[rank].words)
    if plan.dropped and rank == 0:
        logger.info("%d names were not converted: %s", len(plan.dropped), quoted(plan.dropped))
    return Report(rank, ranks, dropped=plan.dropped)


def _check_arguments(format: str, codec: str, dtype: torch.dtype | None, **limits: int | None) -> None:
    """Check the arguments that do not depend on the source.

    Raises:
        ArgumentError: one of them is not valid.
    """
    check_codec(codec)
    check_dtype(dtype)
    if format not in TARGETS:
        raise ArgumentError(f"format must be one of {TARGETS}, got {format!r}")
    check_nbytes(**limits)
    if dtype is not None and (not dtype.is_floating_point or is_packed(dtype)):
        raise ArgumentError(
            f"dtype must be a floating-point dtype with one value in each element, such as torch.bfloat16, got {dtype}"
        )


def _make_target(
    format: str, codec: str, max_file_bytes: int, budget_bytes: int | None, metadata: Mapping[str, Any]
) -> ConversionTarget:
    if format == "safetensors":
        return SafetensorsTarget(max_file_bytes)
    return NativeTarget(codec, budget_bytes, metadata) if format == "reshard" else DcpTarget()


class _RankConversion:
    """One rank's part of a conversion.

    Rank 0 calls `begin`, then all ranks set `state` to its result and call `work`, then rank 0 calls `commit`.
    """

    state: JournalState

    def __init__(
        self, plan: ConversionPlan, store: Store, rank: int, world_size: int, budget_bytes: int | None, meter: Meter
    ) -> None:
        self.plan = plan
        self.store = store
        self._journal = Journal(store, plan.target)
        self._reader = MetadataReader(plan.source.store)
        self._rank = rank
        self._world_size = world_size
        self._budget = budget_bytes
        self._meter = meter

    def begin(self) -> JournalState:
        """Claim the destination, or find out what has been written. Raises the errors of `Journal.begin`."""
        return self._journal.begin(self.plan.identify(self._reader))

    def work(self, interrupt: Interrupt) -> RankReport:
        """Write this rank's share of the units that have not been written yet."""
        begin = time.perf_counter()
        self._journal.join(self.state)
        units = self._own_units()
        self._meter.location = self.store.location
        self._meter.expect(sum(piece.nbytes for unit in units for piece in unit.pieces))
        written = 0
        with closing(SourceStream(self.plan.source, self._rank, self._budget, self._meter.add, interrupt)) as stream:
            try:
                for unit in units:
                    interrupt()
                    self._journal.check()
                    written += retried(partial(self._write, unit, stream, interrupt))["bytes"]
            except BaseException:
                with suppress(Exception):  # the first error is the one to raise
                    self._journal.flush()
                raise
            retried(self._journal.flush)
        report = stream.report
        seconds = {**report.seconds, "total": time.perf_counter() - begin}
        return replace(
            report,
            bytes_fetched=report.bytes_fetched + self._reader.bytes_read,
            bytes_written=written,
            requests=report.requests + self._reader.requests,
            seconds=seconds,
            cast=self.plan.cast,
        )

    def _own_units(self) -> list[WorkUnit]:
        if self.state.committed:
            return []
        missing = [unit for unit in self.plan.units if unit.number not in self.state.units]
        return missing[self._rank :: self._world_size]

    def _write(self, unit: WorkUnit, stream: SourceStream, interrupt: Interrupt) -> UnitRecord:
        before = self._meter.done
        try:
            label = f"{self.state.conversion}-{self._rank:05}"
            record = self.plan.target.write(self.store, label, unit, stream, interrupt)
            self._journal.add(unit, record)
        except BaseException:
            self._meter.add(before - self._meter.done)
            raise
        return record

    def commit(self) -> int:
        """Commit the checkpoint and remove the journal. Return the bytes that the commit wrote."""
        target, nbytes = self.plan.target, 0
        if self.state.committed:
            check_converted(self.store, target.format, self.plan.items, {})
        else:
            data = self._commit_object(self._journal.finished(self.plan.units))
            check_converted(self.store, target.format, self.plan.items, {target.commit_name: data})
            self._journal.commit(data)
            nbytes = len(data)
        self._journal.clean()
        return nbytes

    def _commit_object(self, records: Sequence[UnitRecord]) -> bytes:
        """Return the bytes of the object that commits the checkpoint.

        Raises:
            CorruptCheckpointError: the records are not what the target wrote.
        """
        try:
            return self.plan.target.commit_bytes(self.store.location, self.plan.items, records, self.plan.paths())
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, CheckpointError) as error:
            raise CorruptCheckpointError(
                f"the journal of the conversion in {self.store.location} is damaged: {reason(error)}. Remove the "
                "destination, and convert again"
            ) from error
