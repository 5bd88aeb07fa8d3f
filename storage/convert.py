"""`reshard.convert`: a checkpoint of one format into another, in pieces, by one process or several, resumable.

What is to be written is cut into units, the same on every rank and in every run; a rank writes every n-th. Each unit
that stands is noted beside it, so that a rerun after a kill goes on with those that are missing. The target's commit
comes last.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from ..planner.index import ITEMSIZES, Entry, Kind, missing
from ..planner.layout import matches
from .checksums import checksum
from .dcp import check_codec
from .errors import ArgumentError, CheckpointExistsError, CorruptCheckpointError, ObjectNotFoundError
from .open_source import open_source
from .ranks import Alarm, Interrupt, on_all_ranks, rank_of
from .reports import RankReport, Report
from .retrying_store import retried
from .source import Source
from .store import Store, open_store
from .targets.dcp import DcpTarget
from .targets.native import NativeTarget
from .targets.safetensors import SafetensorsTarget
from .targets.target import Done, Item, Target, Unit
from .targets.values import Values
from .tensors import dtype_name
from .version import __version__

TARGETS = ("reshard", "dcp", "safetensors")
MAX_FILE_BYTES = 5_000_000_000
"""Of safetensors files: what Hugging Face's own writers took as the default for long."""
_NOTE = re.compile(r"\.reshard-convert-\d{6}\.json")
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
) -> Report:
    """Convert a checkpoint. Collective where there is a process group: its ranks share the work.

    Values are read and written in pieces of some 16 MiB, whatever their size. A call that was killed can be made again,
    with the same arguments, and goes on where it was.

    Args:
        src: the checkpoint to read, of any format; a path, a URI that fsspec opens, or a Store.
        dst: an empty place, or one that the same conversion has begun.
        format: what to write: "reshard", "dcp" or "safetensors".
        names: a pattern, as in a layout, of what is taken; or patterns and what becomes of them, as in
            `{"model.*": "*"}`: the first that matches a name gives the new one, whose "*" is what the pattern's stood
            for. What matches none is left out.
        dtype: what floating-point tensors are cast to. float32 values of a native checkpoint are read as bfloat16 from
            a third of their bytes.
        codec: of "reshard": "zstd" or "none".
        max_file_bytes: of "safetensors": a file has no more, unless for one tensor.
        src_format: what `src` is, as `reshard.open` takes it.
        src_options, dst_options: passed to fsspec.
        process_group, budget_bytes: as of `reshard.load`.

    Returns: what each rank did. `skipped` are the objects that the format has no place for: safetensors has tensors
    only.

    Raises, on every rank and naming the rank that failed:
        CheckpointExistsError: there is a checkpoint at `dst`, or the remains of another conversion.
        MissingTensorError: nothing matches `names`.
        ArgumentError: there is no such format or codec, or two tensors would have the same name.
        and what `reshard.open` and `reshard.load` raise.
    """
    rank, alarm = rank_of(process_group), Alarm(process_group)
    world = dist.get_world_size(process_group) if dist.is_available() and dist.is_initialized() else 1
    conversion = _Conversion(rank, world, budget_bytes)

    def prepare() -> int:
        check_codec(codec)
        if format not in TARGETS:
            raise ArgumentError(f"format must be one of {TARGETS}, got {format!r}")
        target: Target = DcpTarget()
        if format == "reshard":
            target = NativeTarget(codec, budget_bytes)
        elif format == "safetensors":
            target = SafetensorsTarget(max_file_bytes)
        source = open_source(src, src_options, src_format)
        what = [format, codec, max_file_bytes, __version__]
        return conversion.prepare(source, open_store(dst, dst_options), target, names, dtype, what)

    def work() -> RankReport:
        with alarm:
            return conversion.work(alarm.check)

    try:
        if len(set(on_all_ranks(prepare, process_group))) > 1:
            raise ArgumentError("the ranks of one conversion were given different checkpoints, places or arguments")
        reports = on_all_ranks(work, process_group)
        committed = on_all_ranks(lambda: conversion.commit() if rank == 0 else 0, process_group)
    finally:
        alarm.close()
    ranks = [_with_written(report, n) for report, n in zip(reports, committed, strict=True)]
    return Report(rank, tuple(ranks), conversion.skipped)


class _Conversion:
    """One rank's part of a conversion."""

    source: Source
    target: Target
    store: Store
    items: list[Item]
    units: list[Unit]

    def __init__(self, rank: int, world: int, budget_bytes: int | None) -> None:
        self._rank = rank
        self._world = world
        self._budget = budget_bytes
        self.skipped: tuple[str, ...] = ()

    def prepare(
        self,
        source: Source,
        store: Store,
        target: Target,
        names: str | Mapping[str, str],
        dtype: torch.dtype | None,
        what: list[Any],
    ) -> int:
        """Find out what is to be done; what tells this conversion from any other. Raises as `convert`."""
        self.source, self.store, self.target = source, store, target
        items = _items(source, names, dtype)
        if isinstance(target, SafetensorsTarget):
            self.skipped = tuple(item.name for item in items if item.kind is not Kind.TENSOR)
            items = [item for item in items if item.kind is Kind.TENSOR]
        self.items, self.units = items, target.units(items)
        told = [what, dict(source.info), source.location, source.objects, source.sizes, [repr(item) for item in items]]
        self._conversion = f"{checksum(json.dumps(told).encode()):016x}"
        _refuse_if_there(store, target)
        self._done = dict(self._notes())
        return int(self._conversion, 16)

    def _notes(self) -> Iterable[tuple[int, Done]]:
        """The units that stand. Raises CheckpointExistsError where those of another conversion do."""
        for name in self.store.list():
            if not _NOTE.fullmatch(name):
                continue
            try:
                note = json.loads(bytes(self.store.read(name, 0, max(1, self.store.size(name)))))
                conversion, number, done = note["conversion"], note["unit"], dict(note["done"])
            except (ValueError, LookupError, TypeError) as error:
                raise CorruptCheckpointError(f"{name!r} in {self.store.location} is no note of a conversion") from error
            if conversion != self._conversion:
                raise CheckpointExistsError(
                    f"another conversion was begun at {self.store.location}, of another checkpoint or with other "
                    "arguments: remove what is there, or give another place"
                )
            yield number, done

    def work(self, interrupt: Interrupt) -> RankReport:
        """Write this rank's units that do not stand yet."""
        begin = time.perf_counter()
        written = 0
        with closing(Values(self.source, self._rank, self._budget)) as values:
            for unit in self.units[self._rank :: self._world]:
                if unit.number not in self._done:
                    interrupt()
                    done = retried(partial(self._write, unit, values, interrupt))
                    written += _bytes_of(done)
        seconds = {"total": time.perf_counter() - begin}
        return replace(values.report, bytes_written=written, seconds=seconds)

    def _write(self, unit: Unit, values: Values, interrupt: Interrupt) -> Done:
        done = self.target.write(self.store, f"{self._conversion}-{self._rank:05}", unit, values, interrupt)
        note = {"conversion": self._conversion, "unit": unit.number, "done": done}
        self.store.put(_note_name(unit), json.dumps(note).encode(), overwrite=True)
        return done

    def commit(self) -> int:
        """Make the checkpoint whole, and remove the notes. Returns the bytes that were written."""
        done = dict(self._notes())
        for unit in self.units:
            if unit.number not in done:
                raise CorruptCheckpointError(f"{_note_name(unit)!r} is missing in {self.store.location}")
        paths = _paths(self.source, self.items)
        nbytes = self.target.commit(
            self.store, self._conversion, self.items, [done[unit.number] for unit in self.units], paths
        )
        self.store.delete([_note_name(unit) for unit in self.units])
        return nbytes


def _with_written(report: RankReport, nbytes: int) -> RankReport:
    """A rank's report, with what it wrote to commit."""
    return replace(report, bytes_written=report.bytes_written + nbytes)


def _note_name(unit: Unit) -> str:
    return f".reshard-convert-{unit.number:06}.json"


def _bytes_of(done: Done) -> int:
    return sum(record["nbytes"] for record in done["objects"]) if "objects" in done else int(done["bytes"])


def _refuse_if_there(store: Store, target: Target) -> None:
    try:
        store.read(target.commits, 0, 1)
    except ObjectNotFoundError:
        return
    raise CheckpointExistsError(f"there is a checkpoint at {store.location} already: it has {target.commits}")


def _items(source: Source, names: str | Mapping[str, str], dtype: torch.dtype | None) -> list[Item]:
    """What is to be written, by its new names. Raises MissingTensorError, ArgumentError."""
    items: dict[str, Item] = {}
    for entry in source.entries:
        name = _renamed(entry.name, names)
        if name is None:
            continue
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
        if pattern.count("*") > 1 or new.count("*") > pattern.count("*"):
            raise ArgumentError(f"{pattern!r}: {new!r}: a pattern has one '*' at most, and its new name no more")
        head, star, tail = pattern.partition("*")
        if name == pattern:
            return new
        if star and len(name) >= len(head) + len(tail) and name.startswith(head) and name.endswith(tail):
            return new.replace("*", name[len(head) : len(name) - len(tail)])
    return None


def _cast(entry: Entry, dtype: torch.dtype | None) -> str:
    """The dtype to write, by the planner's name. Raises DtypeError."""
    is_float = entry.dtype.startswith(("float", "bfloat")) and ITEMSIZES[entry.dtype] > 0
    return (
        dtype_name(entry.name, dtype) if dtype is not None and is_float and entry.kind is Kind.TENSOR else entry.dtype
    )


def _paths(source: Source, items: Iterable[Item]) -> dict[str, tuple[str | int, ...]]:
    """Where the items that keep their names stand in the state dict that was saved."""
    return {item.name: source.paths[item.source] for item in items if item.source == item.name in source.paths}
