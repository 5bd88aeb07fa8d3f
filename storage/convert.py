"""`reshard.convert`: a checkpoint of one format into another, in pieces, by one process or several, resumable.

What is to be written is cut into units, the same on every rank and in every run; of those that do not stand yet, a
rank writes every n-th. Each unit that stands is noted beside it (`targets/notes.py`), so that a rerun after a kill
goes on with those that are missing. The target's commit comes last.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from ..planner.index import Entry, Kind, missing
from ..planner.layout import matches
from .checksums import checksum
from .dcp import check_codec
from .errors import ArgumentError, ObjectNotFoundError
from .logs import logger_of
from .open_source import open_source
from .pieces import Item
from .progress import Meter, OnProgress
from .ranks import Alarm, Interrupt, is_distributed, on_all_ranks, rank_of
from .reports import RankReport, Report
from .resources import check_budget
from .retrying_store import retried
from .source import Source
from .sources.reads import Reads
from .store import Store, open_store
from .targets.dcp import DcpTarget
from .targets.native import NativeTarget
from .targets.notes import Notes, Stand
from .targets.safetensors import SafetensorsTarget
from .targets.target import Done, Target, Unit
from .tensors import dtype_name, torch_dtype
from .values import Values
from .version import __version__

logger = logger_of(__name__)

TARGETS = ("reshard", "dcp", "safetensors")
MAX_FILE_BYTES = 5_000_000_000
"""Of safetensors files: what Hugging Face's own writers took as the default for long."""
SAMPLES = 4
"""Of each object of a source whose metadata does not change with its values."""
SAMPLE_BYTES = 4096
Place = str | os.PathLike[str] | Store


def convert(
    src: Place,
    dst: Place,
    *,
    format: str = "reshard",
    names: str | Mapping[str, str] = "*",
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
    """Convert a checkpoint. Collective where there is a process group: its ranks share the work.

    Values are read and written in pieces of some 16 MiB, whatever their size. A call that was killed can be made again,
    with the same arguments, and goes on where it was.

    Args:
        src: the checkpoint to read, of any format; a path, a URI that fsspec opens, or a Store.
        dst: a place without a checkpoint, or one that the same conversion has begun.
        format: what to write: "reshard", "dcp" or "safetensors".
        names: a pattern, as in a layout, of what is taken; or patterns and what becomes of them, as in
            `{"model.*": "*"}`: the first that matches a name gives the new one, whose "*" is what the pattern's stood
            for. What matches none is left out.
        dtype: what floating-point tensors are cast to, but for those that are packed, two values a byte. float32 values
            of a native checkpoint are read as bfloat16 from a third of their bytes.
        codec: of "reshard": "zstd" or "none".
        max_file_bytes: of "safetensors": a file has no more of values, unless for one tensor.
        src_format: what `src` is, as `reshard.open` takes it.
        src_options, dst_options: passed to fsspec.
        process_group, budget_bytes, progress: as of `reshard.load`.

    Returns: what each rank did. `skipped` are the objects that the format has no place for: safetensors has tensors
    only.

    Raises, on every rank and naming the rank that failed:
        CheckpointExistsError: there is a checkpoint at `dst`, or the remains of one, or of another conversion.
        MissingTensorError: nothing matches `names`.
        ArgumentError: an argument is none of those that there are, two tensors would have the same name, or the ranks
            were given different arguments.
        CommitError: the store failed in the very moment of the commit; the same call again finds out.
        and what `reshard.open` and `reshard.load` raise.
    """
    rank, alarm = rank_of(process_group), Alarm(process_group)
    world = dist.get_world_size(process_group) if is_distributed() else 1
    meter = Meter("convert", progress, rank=rank)
    conversion = _Conversion(rank, world, budget_bytes, meter)

    def prepare() -> tuple[str, str]:
        check_budget(budget_bytes)
        _check(format, codec, names, dtype, max_file_bytes)
        target: Target = DcpTarget()
        if format == "reshard":
            target = NativeTarget(codec, budget_bytes)
        elif format == "safetensors":
            target = SafetensorsTarget(max_file_bytes)
        source = open_source(src, src_options, src_format)
        what = [format, codec, max_file_bytes, __version__]
        return conversion.prepare(source, open_store(dst, dst_options), target, names, dtype, what)

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
    return Report(rank, tuple(ranks), conversion.skipped)


def _check(
    format: str, codec: str, names: str | Mapping[str, str], dtype: torch.dtype | None, max_file_bytes: int
) -> None:
    """Raises ArgumentError for what cannot be, whatever is to be converted."""
    check_codec(codec)
    if format not in TARGETS:
        raise ArgumentError(f"format must be one of {TARGETS}, got {format!r}")
    if dtype is not None and (not dtype.is_floating_point or "_x2" in str(dtype)):
        raise ArgumentError(f"floating-point tensors cannot be cast to {dtype}")
    if max_file_bytes < 1:
        raise ArgumentError(f"max_file_bytes must be at least 1, got {max_file_bytes}")
    for pattern, new in {} if isinstance(names, str) else names.items():
        if pattern.count("*") > 1 or new.count("*") > pattern.count("*"):
            raise ArgumentError(f"{pattern!r}: {new!r}: a pattern has one '*' at most, and its new name no more")


class _Conversion:
    """One rank's part of a conversion."""

    source: Source
    target: Target
    store: Store
    items: list[Item]
    units: list[Unit]
    notes: Notes
    stand: Stand
    """As rank 0 found it."""

    def __init__(self, rank: int, world: int, budget_bytes: int | None, meter: Meter) -> None:
        self._rank = rank
        self._world = world
        self._budget = budget_bytes
        self._meter = meter
        self.skipped: tuple[str, ...] = ()

    def prepare(
        self,
        source: Source,
        store: Store,
        target: Target,
        names: str | Mapping[str, str],
        dtype: torch.dtype | None,
        what: list[Any],
    ) -> tuple[str, str]:
        """Find out what is to be done; what tells it from any other conversion, and where. Raises as `convert`."""
        self.source, self.store, self.target = source, store, target
        items = _items(source, names, dtype)
        if isinstance(target, SafetensorsTarget):
            self.skipped = tuple(item.name for item in items if item.kind is not Kind.TENSOR)
            items = [item for item in items if item.kind is Kind.TENSOR]
        self.items, self.units = items, target.units(items)
        self.notes = Notes(store, target)
        self._reads = Reads(source.store)
        cut = [len(unit.pieces) for unit in self.units]
        of_source = [source.format, source.location, dict(source.info), source.objects, source.sizes]
        self._told = _checksum([what, of_source, [repr(item) for item in items], cut])
        return self._told, store.location

    def begin(self) -> Stand:
        """Take the place, or find out what stands there already. By one rank. Raises as `Notes.begin`."""
        return self.notes.begin(_checksum([self._told, *_samples(self.source, self._reads)]))

    def work(self, interrupt: Interrupt) -> RankReport:
        """Write this rank's units that do not stand yet."""
        begin = time.perf_counter()
        written = 0
        missing = [unit for unit in self.units if unit.number not in self.stand.units and not self.stand.committed]
        own = missing[self._rank :: self._world]
        self._meter.location = self.store.location
        self._meter.expect(sum(piece.nbytes for unit in own for piece in unit.pieces))
        with closing(Values(self.source, self._rank, self._budget, self._meter.add)) as values:
            for unit in own:
                interrupt()
                self.notes.check(self.stand.conversion)
                written += retried(partial(self._write, unit, values, interrupt))["bytes"]
        report = values.report
        seconds = {**report.seconds, "total": time.perf_counter() - begin}
        return replace(
            report,
            bytes_fetched=report.bytes_fetched + self._reads.bytes_read,
            bytes_written=written,
            requests=report.requests + self._reads.requests,
            seconds=seconds,
        )

    def _write(self, unit: Unit, values: Values, interrupt: Interrupt) -> Done:
        conversion, before = self.stand.conversion, self._meter.done
        try:
            done = self.target.write(self.store, f"{conversion}-{self._rank:05}", unit, values, interrupt)
            self.notes.note(conversion, unit, done)
        except BaseException:
            self._meter.add(before - self._meter.done)
            raise
        return done

    def commit(self) -> int:
        """Make the checkpoint whole, and remove what is no part of it. Returns the bytes that were written."""
        conversion, nbytes = self.stand.conversion, 0
        if not self.stand.committed:
            done = self.notes.finished(conversion, self.units)
            data = self.target.commit(self.store.location, self.items, done, _paths(self.source, self.items))
            self.notes.commit(conversion, data)
            nbytes = len(data)
        self.notes.clean(conversion)
        return nbytes


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


def _items(source: Source, names: str | Mapping[str, str], dtype: torch.dtype | None) -> list[Item]:
    """What is to be written, by its new names. Raises MissingTensorError, ArgumentError."""
    items: dict[str, Item] = {}
    for entry in source.entries:
        name = _renamed(entry.name, names)
        if name is None:
            continue
        if not name:
            raise ArgumentError(f"{entry.name!r} would be left without a name")
        if name in items:
            raise ArgumentError(f"both {items[name].source!r} and {entry.name!r} would be named {name!r}")
        items[name] = Item(name, entry.name, entry.kind, _cast(entry, dtype), entry.shape)
    if not items and source.entries:
        patterns = [names] if isinstance(names, str) else list(names)
        raise missing(", ".join(patterns), (entry.name for entry in source.entries))
    return [items[name] for name in sorted(items)]


def _renamed(name: str, names: str | Mapping[str, str]) -> str | None:
    if isinstance(names, str):
        return name if matches(names, name) else None
    for pattern, new in names.items():
        head, star, tail = pattern.partition("*")
        if not star and name == pattern:
            return new
        if star and len(name) >= len(head) + len(tail) and name.startswith(head) and name.endswith(tail):
            return new.replace("*", name[len(head) : len(name) - len(tail)])
    return None


def _cast(entry: Entry, dtype: torch.dtype | None) -> str:
    """The dtype to write, by the planner's name. Raises DtypeError."""
    is_cast = entry.kind is Kind.TENSOR and torch_dtype(entry.dtype).is_floating_point and "_x2" not in entry.dtype
    return entry.dtype if dtype is None or not is_cast else dtype_name(entry.name, dtype)


def _paths(source: Source, items: Iterable[Item]) -> dict[str, tuple[str | int, ...]]:
    """Where the items that keep their names stand in the state dict that was saved."""
    return {item.name: source.paths[item.source] for item in items if item.source == item.name in source.paths}
