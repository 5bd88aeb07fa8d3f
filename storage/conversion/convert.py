"""`reshard.convert`: a checkpoint of one format into another, in pieces, by one process or several, resumable.

What is to be written is cut into units, the same on every rank and in every run; of those that do not stand yet, a
rank writes every n-th. Each unit that stands is noted beside it (`targets/notes.py`), so that a rerun after a kill
goes on with those that are missing. The target's commit comes last.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from ...planner.entries import Entry
from ...planner.errors import CheckpointError, MissingTensorError
from ...planner.index import nearest_names
from ...planner.layout import matches
from ..errors import ArgumentError, CorruptCheckpointError, ObjectNotFoundError
from ..formats.detect import open_source
from ..formats.metadata_reads import Reads
from ..formats.native.codec import check_codec
from ..formats.source import Source, Unreadable
from ..reading.read_tensors import check_values
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
from ..tensors.name_patterns import (
    Patterns,
    by_new_name,
    check_first_matches,
    check_renames,
    matches_any,
    new_name,
    patterns_of,
    renamed,
)
from ..tensors.state_dict import Path, renamed_path
from ..version import __version__
from .journal import Notes, Stand
from .result_check import check_converted
from .source_stream import Values
from .targets.dcp import DcpTarget
from .targets.native import NativeTarget
from .targets.safetensors import SafetensorsTarget
from .targets.target import Done, Target, Unit
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
    names: str | Mapping[str, str] = "*",
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
    """Convert a checkpoint. Collective where there is a process group: its ranks share the work.

    Values are read and written in pieces of some 16 MiB, whatever their size. A call that was killed can be made again,
    with the same arguments, and goes on where it was.

    Args:
        src: the checkpoint to read, of any format; a path, a URI that fsspec opens, or a Store.
        dst: a place without a checkpoint, or one that the same conversion has begun.
        format: what to write: "reshard", "dcp" or "safetensors".
        names: a pattern, as in a layout, of what is taken; or patterns and what becomes of them, as in
            `{"model.*": "*"}`: the first that matches a name gives the new one, whose "*" is what the pattern's stood
            for; of several, each for its own. Names that match none are left out, and listed in the report. A pattern
            that matches no name is an error.
        exclude: patterns of names in `src` that are left out.
        rename: as `names` with new names, but what no pattern matches is taken too, and keeps its name; and the
            patterns are applied one after another.
        allow_missing: patterns of names in `src` that are left out if they are missing or cannot be read (see
            `Checkpoint.unreadable`).
        dtype: what floating-point tensors of one dimension or more are cast to, but for those that are packed, two
            values a byte. float32 values of a native checkpoint are read as bfloat16 from a third of their bytes.
        codec: of "reshard": "zstd" or "none".
        max_file_bytes: of "safetensors": a file has no more of values, unless for one tensor.
        src_format: what `src` is, as `reshard.open` takes it.
        src_options, dst_options: passed to fsspec.
        process_group, budget_bytes, progress: as of `reshard.load`.

    Returns: what each rank did. `skipped` are the objects that the format has no place for: safetensors has tensors
    only. `left_out` are the names of the source that were not taken. `cast` are the tensors that `dtype` rounds.

    Raises, on every rank and naming the rank that failed:
        CheckpointExistsError: there is a checkpoint at `dst`, or the remains of one, or of another conversion.
        MissingTensorError: nothing matches `names`, or one of its patterns.
        DtypeError, UnsupportedFormatError, CorruptCheckpointError: a name that would be taken cannot be read (see
            `Checkpoint.unreadable`), or the format that is written does not have its dtype.
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
        _check(format, codec, dtype, max_file_bytes)
        selection = Selection.of(names, exclude, rename, allow_missing)
        target: Target = DcpTarget()
        if format == "reshard":
            target = NativeTarget(codec, budget_bytes)
        elif format == "safetensors":
            target = SafetensorsTarget(max_file_bytes)
        source = open_source(src, src_options, src_format)
        what = [format, codec, max_file_bytes, __version__]
        return conversion.prepare(source, open_store(dst, dst_options), target, selection, dtype, what)

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
    if conversion.left_out and rank == 0:
        shown = ", ".join(conversion.left_out[:3]) + (", ..." if len(conversion.left_out) > 3 else "")
        logger.info("%d names of the source were left out: %s", len(conversion.left_out), shown)
    return Report(rank, tuple(ranks), conversion.skipped, left_out=conversion.left_out)


def _check(format: str, codec: str, dtype: torch.dtype | None, max_file_bytes: int) -> None:
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
        self.left_out: tuple[str, ...] = ()
        self.cast: tuple[Cast, ...] = ()

    def prepare(
        self,
        source: Source,
        store: Store,
        target: Target,
        selection: Selection,
        dtype: torch.dtype | None,
        what: list[Any],
    ) -> tuple[str, str]:
        """Find out what is to be done; what tells it from any other conversion, and where. Raises as `convert`."""
        self.source, self.store, self.target = source, store, target
        items, left_out = _items(source, selection, dtype)
        self.left_out = (*left_out, *source.left_out)
        if isinstance(target, SafetensorsTarget):
            self.skipped = tuple(item.name for item in items if not item.is_tensor)
            items = [item for item in items if item.is_tensor]
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
        with closing(Values(self.source, self._rank, self._budget, self._meter.add, interrupt)) as values:
            try:
                for unit in own:
                    interrupt()
                    self.notes.check(self.stand.conversion)
                    written += retried(partial(self._write, unit, values, interrupt))["bytes"]
            except BaseException:
                with suppress(Exception):  # the first error is the one to tell
                    self.notes.write(self.stand.conversion)
                raise
            retried(partial(self.notes.write, self.stand.conversion))
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
        if self.stand.committed:
            check_converted(self.store, self.target.format, self.items, {})
        else:
            data = self._made_of(self.notes.finished(conversion, self.units))
            check_converted(self.store, self.target.format, self.items, {self.target.commits: data})
            self.notes.commit(conversion, data)
            nbytes = len(data)
        self.notes.clean(conversion)
        return nbytes

    def _made_of(self, done: Sequence[Done]) -> bytes:
        """Return the object that makes the checkpoint whole. Raises CorruptCheckpointError."""
        try:
            return self.target.commit(self.store.location, self.items, done, _paths(self.source, self.items))
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


@dataclass(frozen=True, slots=True)
class Selection:
    """Which names of a checkpoint a conversion takes, and what they become."""

    pattern: str
    """What is taken."""
    renames: Mapping[str, str]
    keeps_others: bool
    """Whether names that no pattern of `renames` matches are taken too."""
    exclude: tuple[str, ...]
    allow_missing: tuple[str, ...]

    @classmethod
    def of(
        cls,
        names: str | Mapping[str, str],
        exclude: Patterns,
        rename: Mapping[str, str] | None,
        allow_missing: Patterns,
    ) -> Selection:
        """Check the arguments of `convert`. Raises ArgumentError."""
        check_renames("rename", rename or {})
        if not isinstance(names, str):
            check_renames("names", names)
            check_first_matches("names", names)
            if rename:
                raise ArgumentError("names= gives new names already: give a pattern for it, or no rename=")
        return cls(
            names if isinstance(names, str) else "*",
            (rename or {}) if isinstance(names, str) else names,
            isinstance(names, str),
            patterns_of("exclude", exclude),
            patterns_of("allow_missing", allow_missing),
        )

    def taken(self, there: Sequence[str], unreadable: Mapping[str, Unreadable]) -> dict[str, str]:
        """The names that are taken, by their new names.

        Args:
            there: all names of the checkpoint.

        Raises:
            MissingTensorError: a pattern matches no name.
            ArgumentError: two names would become one.
            DtypeError, UnsupportedFormatError, CorruptCheckpointError, UnsafeValueError: one cannot be read.
        """
        self._check_patterns(there)
        names = [name for name in there if self._takes(name)]
        for name in [name for name in names if name in unreadable]:
            if not matches_any(self.allow_missing, name):
                raise unreadable[name].kind(
                    f"{unreadable[name].reason}. To convert the rest, leave {name!r} out by names= or exclude= "
                    "(--names, --rename, --exclude)"
                )
            names.remove(name)
        return by_new_name(names, self._new_name)

    def _new_name(self, name: str) -> str:
        """Of `rename`, patterns are applied one after another; of `names`, the first that matches counts."""
        if self.keeps_others:
            return new_name(name, self.renames)
        found = renamed(name, self.renames)
        return name if found is None else found

    def _takes(self, name: str) -> bool:
        is_chosen = matches(self.pattern, name) and not matches_any(self.exclude, name)
        return is_chosen and (self.keeps_others or renamed(name, self.renames) is not None)

    def _check_patterns(self, there: Sequence[str]) -> None:
        """Raises MissingTensorError naming the patterns that match no name."""
        if not there:
            return
        if not (self.keeps_others or self.renames):
            raise MissingTensorError("the checkpoint has no name that names={} takes: it has no pattern")
        unused = [pattern for pattern in (self.pattern, *self.exclude) if not any(matches(pattern, n) for n in there)]
        current = there
        for pattern, new in self.renames.items():
            found = [renamed(name, {pattern: new}) for name in current]
            if all(made is None for made in found):
                unused.append(pattern)
            if self.keeps_others:
                current = [name if made is None else made for name, made in zip(current, found, strict=True)]
        unused = [pattern for pattern in unused if not matches_any(self.allow_missing, pattern)]
        if unused:
            parents = {name[: at.start()] + ".*" for name in there for at in re.finditer(r"\.", name)}
            near = nearest_names(unused[0], [*there, *sorted(parents)], 3) or there[:3]
            raise MissingTensorError(
                f"the checkpoint has no {', '.join(unused)!r}: no name matches the pattern; nearest are "
                f"{', '.join(map(repr, near))}"
            )


def _items(source: Source, selection: Selection, dtype: torch.dtype | None) -> tuple[list[Item], list[str]]:
    """What is to be written, by its new names, and the names that are not taken. Raises as `Selection.taken`."""
    there = [*(entry.name for entry in source.entries), *source.unreadable]
    taken = selection.taken(there, source.unreadable)
    scales = scale_names(there)
    items = []
    for new, name in sorted(taken.items()):
        entry = source.entry(name)
        items.append(Item(new, name, entry.kind, _cast(entry, dtype, scales), entry.shape))
    names = set(taken.values())
    return items, [name for name in there if name not in names]


def _cast(entry: Entry, dtype: torch.dtype | None, scales: Sequence[str]) -> str:
    """The dtype to write, by the planner's name. Raises DtypeError."""
    if not entry.is_tensor or dtype is None:
        return entry.dtype
    stored = torch_dtype(entry.dtype)
    to = weight_dtype(stored, entry.shape, dtype)
    check_is_not_scaled(entry.name, stored, to, scales)
    return dtype_name(entry.name, to)


def _paths(source: Source, items: Iterable[Item]) -> dict[str, Path]:
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
