"""`reshard.convert`: a checkpoint of one format into another, in pieces, by one process or several, resumable.

What is to be written is cut into units, the same on every rank and in every run; of those that do not stand yet, a
rank writes every n-th. Each unit that stands is noted beside it (`targets/notes.py`), so that a rerun after a kill
goes on with those that are missing. The target's commit comes last.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from ...planner.entries import Entry
from ...planner.errors import CheckpointError
from ..errors import ArgumentError, CorruptCheckpointError, ObjectNotFoundError
from ..formats.detect import open_source
from ..formats.metadata_reads import Reads
from ..formats.native.codec import check_codec
from ..formats.source import Source
from ..reading.value_reads import check_values
from ..runtime.brief import reason
from ..runtime.checksums import checksum
from ..runtime.limits import check_budget
from ..runtime.logs import logger_of
from ..runtime.process_group import Alarm, Interrupt, is_distributed, on_all_ranks, rank_of
from ..runtime.progress import Meter, OnProgress
from ..runtime.reports import Cast, RankReport, Report
from ..runtime.torch_modes import undisturbed
from ..stores.base import Store
from ..stores.open import open_store
from ..stores.retry import retried
from ..tensors.casts import check_dtype, check_is_not_scaled, loses_bits, scale_names, weight_dtype
from ..tensors.dtypes import dtype_name, is_packed, torch_dtype
from ..tensors.name_patterns import Patterns, Selection, matches_any, patterns_of, quoted
from ..tensors.state_dict import Path, renamed_path
from ..version import __version__
from .journal import Journal, JournalState
from .result_check import check_converted
from .source_stream import SourceStream
from .targets.dcp import DcpTarget
from .targets.native import NativeTarget
from .targets.safetensors import SafetensorsTarget
from .targets.target import ConversionTarget, UnitRecord, WorkUnit
from .work_items import Item

logger = logger_of(__name__)

TARGETS = ("reshard", "dcp", "safetensors")
MAX_FILE_BYTES = 5_000_000_000
"""Of safetensors files: what Hugging Face's own writers took as the default for long."""
SAMPLES = 4
"""Of each object of a source whose metadata does not change with its values."""
SAMPLE_BYTES = 4096
Place = str | os.PathLike[str] | Store


@undisturbed()
def convert(
    src: Place,
    dst: Place,
    *,
    format: str = "reshard",
    include: Patterns = "*",
    exclude: Patterns = (),
    rename: Mapping[str, str] | None = None,
    allow_missing: Patterns = (),
    dtype: torch.dtype | None = None,
    codec: str = "zstd",
    max_file_bytes: int = MAX_FILE_BYTES,
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
            in a byte). Casting float32 values of a native checkpoint to bfloat16 reads about a third of the bytes.
        codec: the codec of the format "reshard": "zstd" or "none".
        max_file_bytes: the largest size of a file of the format "safetensors". A larger tensor gets its own file.
        src_format: the format of `src`; see `reshard.open`.
        src_options, dst_options: options for fsspec.
        process_group, budget_bytes, progress: see `reshard.load`.

    Returns:
        What each rank did. `dropped` lists the names in `src` that were not converted: those that `include` does not
        match or `exclude` matches, those that the index of `src` does not list, and, if the format is "safetensors",
        values that are not tensors. `cast` lists the tensors that were rounded to `dtype`.

    Raises, on every rank and naming the rank that failed:
        CheckpointExistsError: `dst` contains a checkpoint, or a part of one or of another conversion.
        MissingTensorError: a pattern of `include`, `exclude` or `rename` matches no name.
        DtypeError, UnsupportedFormatError, CorruptCheckpointError: a selected name cannot be read (see
            `Checkpoint.unreadable`), or the format that is written does not have its dtype.
        ArgumentError: an argument is not valid, two tensors would have the same name, or the ranks passed different
            arguments.
        CommitError: the store failed during the commit. Call again to find out whether the commit succeeded.
        Also what `reshard.open` and `reshard.load` raise.
    """
    rank, alarm = rank_of(process_group), Alarm(process_group)
    world = dist.get_world_size(process_group) if is_distributed() else 1
    meter = Meter("convert", progress, rank=rank)
    conversion = _Conversion(rank, world, budget_bytes, meter)

    def prepare() -> tuple[str, str]:
        check_budget(budget_bytes)
        _check_arguments(format, codec, dtype, max_file_bytes)
        selection = Selection.of(include, exclude, rename)
        may_miss = patterns_of("allow_missing", allow_missing)
        target: ConversionTarget = DcpTarget()
        if format == "reshard":
            target = NativeTarget(codec, budget_bytes)
        elif format == "safetensors":
            target = SafetensorsTarget(max_file_bytes)
        source = open_source(src, src_options, src_format)
        what = [format, codec, max_file_bytes, __version__]
        return conversion.prepare(source, open_store(dst, dst_options), target, selection, may_miss, dtype, what)

    def work() -> RankReport:
        with alarm, meter:
            return conversion.work(meter.watching(alarm.check))

    try:
        if len(set(on_all_ranks(prepare, process_group))) > 1:
            raise ArgumentError("the ranks of one conversion were given different checkpoints, places or arguments")
        stands = on_all_ranks(lambda: conversion.begin() if rank == 0 else None, process_group)
        [conversion.stand] = [stand for stand in stands if stand is not None]
        reports = on_all_ranks(work, process_group)
        committed = on_all_ranks(lambda: conversion.commit() if rank == 0 else 0, process_group)
    finally:
        alarm.close()
    ranks = [_with_written(report, n) for report, n in zip(reports, committed, strict=True)]
    logger.info("converted %s to %s: %s", conversion.source.location, conversion.store.location, ranks[rank].words)
    if conversion.dropped and rank == 0:
        logger.info("%d names were not converted: %s", len(conversion.dropped), quoted(conversion.dropped))
    return Report(rank, tuple(ranks), dropped=conversion.dropped)


def _check_arguments(format: str, codec: str, dtype: torch.dtype | None, max_file_bytes: int) -> None:
    """Raises ArgumentError for what cannot be, whatever is to be converted."""
    check_codec(codec)
    check_dtype(dtype)
    if format not in TARGETS:
        raise ArgumentError(f"format must be one of {TARGETS}, got {format!r}")
    if dtype is not None and (not dtype.is_floating_point or is_packed(dtype)):
        raise ArgumentError(f"floating-point tensors cannot be cast to {dtype}")
    if max_file_bytes < 1:
        raise ArgumentError(f"max_file_bytes must be at least 1, got {max_file_bytes}")


class _Conversion:
    """One rank's part of a conversion."""

    source: Source
    target: ConversionTarget
    store: Store
    items: list[Item]
    units: list[WorkUnit]
    notes: Journal
    stand: JournalState
    """As rank 0 found it."""

    def __init__(self, rank: int, world: int, budget_bytes: int | None, meter: Meter) -> None:
        self._rank = rank
        self._world = world
        self._budget = budget_bytes
        self._meter = meter
        self.dropped: tuple[str, ...] = ()
        self.cast: tuple[Cast, ...] = ()

    def prepare(
        self,
        source: Source,
        store: Store,
        target: ConversionTarget,
        selection: Selection,
        may_miss: Sequence[str],
        dtype: torch.dtype | None,
        what: list[Any],
    ) -> tuple[str, str]:
        """Find out what is to be done; what tells it from any other conversion, and where. Raises as `convert`."""
        self.source, self.store, self.target = source, store, target
        items = _items(source, selection, may_miss, dtype)
        if isinstance(target, SafetensorsTarget):
            items = [item for item in items if item.is_tensor]
        converted = {item.source for item in items}
        names = (*(entry.name for entry in source.entries), *source.unreadable, *source.unindexed)
        self.dropped = tuple(name for name in names if name not in converted)
        for item in items:
            if not item.is_tensor:
                check_values(source, [item.source], self._budget)
        self.items, self.units = items, target.units(items)
        stored = ((item, source.entry(item.source).dtype) for item in items if item.is_tensor)
        self.cast = tuple(
            Cast(item.name, dtype, item.dtype)
            for item, dtype in stored
            if dtype != item.dtype and loses_bits(torch_dtype(dtype), item.torch_dtype)
        )
        self.journal = Journal(store, target)
        self._reads = Reads(source.store)
        cut = [len(unit.pieces) for unit in self.units]
        of_source = [source.format, source.location, dict(source.info), source.objects, source.sizes]
        self._told = _checksum([what, of_source, [repr(item) for item in items], cut])
        return self._told, store.location

    def begin(self) -> JournalState:
        """Take the place, or find out what stands there already. By one rank. Raises as `Journal.begin`."""
        return self.journal.begin(_checksum([self._told, *_samples(self.source, self._reads)]))

    def work(self, interrupt: Interrupt) -> RankReport:
        """Write this rank's units that do not stand yet."""
        begin = time.perf_counter()
        written = 0
        missing = [unit for unit in self.units if unit.number not in self.stand.units and not self.stand.committed]
        own = missing[self._rank :: self._world]
        self._meter.location = self.store.location
        self._meter.expect(sum(piece.nbytes for unit in own for piece in unit.pieces))
        with closing(SourceStream(self.source, self._rank, self._budget, self._meter.add, interrupt)) as values:
            try:
                for unit in own:
                    interrupt()
                    self.journal.check(self.stand.conversion)
                    written += retried(partial(self._write, unit, values, interrupt))["bytes"]
            except BaseException:
                with suppress(Exception):  # the first error is the one to tell
                    self.journal.write(self.stand.conversion)
                raise
            retried(partial(self.journal.write, self.stand.conversion))
        report = values.report
        seconds = {**report.seconds, "total": time.perf_counter() - begin}
        return replace(
            report,
            bytes_fetched=report.bytes_fetched + self._reads.bytes_read,
            bytes_written=written,
            requests=report.requests + self._reads.requests,
            seconds=seconds,
            cast=self.cast,
        )

    def _write(self, unit: WorkUnit, values: SourceStream, interrupt: Interrupt) -> UnitRecord:
        conversion, before = self.stand.conversion, self._meter.done
        try:
            done = self.target.write(self.store, f"{conversion}-{self._rank:05}", unit, values, interrupt)
            self.journal.note(conversion, unit, done)
        except BaseException:
            self._meter.add(before - self._meter.done)
            raise
        return done

    def commit(self) -> int:
        """Make the checkpoint whole, and remove what is no part of it. Returns the bytes that were written."""
        conversion, nbytes = self.stand.conversion, 0
        if self.stand.committed:
            check_converted(self.store, self.target.format, self.items, {})
        else:
            data = self._made_of(self.journal.finished(conversion, self.units))
            check_converted(self.store, self.target.format, self.items, {self.target.commits: data})
            self.journal.commit(conversion, data)
            nbytes = len(data)
        self.journal.clean(conversion)
        return nbytes

    def _made_of(self, done: Sequence[UnitRecord]) -> bytes:
        """Return the object that makes the checkpoint whole. Raises CorruptCheckpointError."""
        try:
            return self.target.commit(self.store.location, self.items, done, _item_paths(self.source, self.items))
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, CheckpointError) as error:
            raise CorruptCheckpointError(
                f"the notes of the conversion in {self.store.location} are damaged: {reason(error)}. Remove what is "
                "there, and convert again"
            ) from error


def _with_written(report: RankReport, nbytes: int) -> RankReport:
    """A rank's report, with what it wrote to commit."""
    return replace(report, bytes_written=report.bytes_written + nbytes)


def _checksum(told: list[Any]) -> str:
    return f"{checksum(json.dumps(told).encode()):016x}"


def _samples(source: Source, reads: Reads) -> list[str]:
    """Checksums of a few of the bytes of a source that may have been saved anew, with other values, under its names."""
    if source.format == "reshard":
        return []  # no two saves have objects of the same names
    wanted = [
        (name, start, min(start + SAMPLE_BYTES, nbytes))
        for name, nbytes in source.objects
        for start in sorted({max(0, nbytes - SAMPLE_BYTES) * i // (SAMPLES - 1) for i in range(SAMPLES)})
        if nbytes
    ]
    if not wanted:
        return []

    def sample(name: str, start: int, stop: int) -> str:
        try:
            return f"{checksum(reads.read(name, start, stop)):016x}"
        except ObjectNotFoundError:
            return ""  # who reads the values will tell

    return reads.many(sample, *map(list, zip(*wanted, strict=True)))


def _items(source: Source, selection: Selection, may_miss: Sequence[str], dtype: torch.dtype | None) -> list[Item]:
    """Return what to write, sorted by new names.

    Raises:
        MissingTensorError: a pattern matches no name.
        ArgumentError: two names would become the same.
        DtypeError, UnsupportedFormatError, CorruptCheckpointError, UnsafeValueError: a selected name cannot be read.
    """
    names = [*(entry.name for entry in source.entries), *source.unreadable]
    selection.check_all(names, may_miss)
    for name, unreadable in source.unreadable.items():
        if selection.includes(name) and not matches_any(may_miss, name):
            raise unreadable.kind(f"{unreadable.reason}. To convert the rest, pass exclude={name!r} (--exclude)")
    scales = scale_names(names)
    selected = selection.select(name for name in names if name not in source.unreadable)
    items = []
    for new, name in sorted(selected.items()):
        entry = source.entry(name)
        items.append(Item(new, name, entry.kind, _cast(entry, dtype, scales), entry.shape))
    return items


def _cast(entry: Entry, dtype: torch.dtype | None, scales: Sequence[str]) -> str:
    """The dtype to write, by the planner's name. Raises DtypeError."""
    if not entry.is_tensor or dtype is None:
        return entry.dtype
    stored = torch_dtype(entry.dtype)
    to = weight_dtype(stored, entry.shape, dtype)
    check_is_not_scaled(entry.name, stored, to, scales)
    return dtype_name(entry.name, to)


def _item_paths(source: Source, items: Iterable[Item]) -> dict[str, Path]:
    """The paths of items in the state dict that was saved, as far as their names still follow them.

    New names may be those of containers of others: then only items that keep their names have paths.
    """
    known = [item for item in items if item.source in source.paths]
    found = {item.name: renamed_path(source.paths[item.source], item.name) for item in known}
    paths = {name: path for name, path in found.items() if path is not None}
    containers = {path[:length] for path in paths.values() for length in range(1, len(path))}
    if containers.isdisjoint(paths.values()):
        return paths
    return {item.name: source.paths[item.source] for item in known if item.name == item.source}
