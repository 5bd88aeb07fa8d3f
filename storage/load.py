"""`reshard.load`: every rank plans its own reads from the metadata.

There are two collectives. The first makes sure that all ranks opened the same checkpoint, and that it fits the state
dicts of all of them, before anything is changed. The second spreads the errors and the reports of reading.
"""

from __future__ import annotations

import itertools
import os
import time
from bisect import bisect_left
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import record_function

from ..planner.chunk_reads import Want
from ..planner.entries import Kind
from ..planner.errors import CheckpointError, MissingTensorError, ShapeMismatchError
from ..planner.index import nearest_names
from .errors import ArgumentError, DestinationError
from .formats.detect import open_source
from .formats.source import Source
from .reading.read_tensors import (
    BoxReads,
    DecodedTensor,
    ReadOptions,
    check_is_tensor,
    counting_metadata,
    execute_reads,
    read_boxes,
)
from .reading.value_reads import ValueRead, check_values, value_wants
from .runtime.limits import check_budget
from .runtime.logs import logger_of
from .runtime.process_group import Alarm, OpenedCheckpoint, check_same_checkpoint, is_distributed, on_all_ranks, rank_of
from .runtime.progress import Meter, OnProgress
from .runtime.reports import Cast, RankReport, Report
from .runtime.torch_modes import undisturbed
from .stores.base import Store
from .tensors.casts import check_is_not_scaled, loses_bits, scale_names
from .tensors.dtypes import LocalShard, torch_dtype
from .tensors.local_shards import local_shards
from .tensors.name_patterns import Patterns, by_new_name, check_renames, matches_any, patterns_of, quoted
from .tensors.state_dict import (
    Key,
    Leaf,
    Path,
    flatten,
    name_of,
    nest,
    renamed_path,
    state_to_stateful,
    stateful_to_state,
)
from .tensors.tensor_classes import is_whole, missing_memory, overrides_dispatch

logger = logger_of(__name__)


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What of a state dict is loaded, and from which names."""

    strict: bool = True
    allow_missing: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    allow_pickle: bool = False
    budget_bytes: int | None = None
    max_over_read: float | None = None


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

    Each rank reads what its own tensors hold, whatever layout the checkpoint was saved under. Tensors are written in
    place, and cast where their dtype differs; float32 values are read as bfloat16 at a third of the bytes. Other
    values are replaced. What the state dict does not name is not read.

    A tensor of a class with its own `__torch_dispatch__`, such as a quantised one, is written by the class's own
    `copy_`. Floating-point tensors that are cast to fewer bits are listed in the report, and logged once.

    Args:
        state_dict: the destination: plain tensors, DTensors or ShardedTensors, and values, in nested dicts and
            lists. Stateful values are given their loaded state.
        uri: a path, a URI that fsspec opens, or a Store.
        strict: whether every name must be in the checkpoint; if not, missing ones are left and reported.
        allow_missing: patterns of names that may be missing, as "optimizer.*"; they are left and reported.
        exclude: patterns of names of the state dict that are left as they are.
        rename: patterns of names in the checkpoint, and their names in the state dict, as in
            `{"*_orig_mod.*": "**", "module.*": "*"}`. They are applied one after another, each once. A star of the new
            name is replaced by what the star at the same position in the pattern matched. Other names stay.
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
        MissingTensorError, ShapeMismatchError, DtypeError, DestinationError, LayoutError: the state dict does not fit.
            Nothing was changed on any rank, unless an integer does not fit: then nothing on the rank that has it.
        ArgumentError: an argument is wrong, or the ranks opened different checkpoints. Nothing was changed.
        CorruptCheckpointError, StoreError: the bytes are not to be had. The tensor that the error names is as it
            was, unless the message says otherwise; others may have been loaded.
        UnsafeValueError: an object needs `allow_pickle`.
    """
    rank = rank_of(process_group)
    alarm, meter = Alarm(process_group), Meter("load", progress, rank=rank)
    begin = time.perf_counter()
    loading: list[_Loading] = []

    def prepare() -> OpenedCheckpoint:
        if not isinstance(strict, bool):
            raise ArgumentError(
                f"strict must be True or False, got {strict!r}; allow_missing= takes patterns of names that may be "
                "missing"
            )
        check_budget(budget_bytes)
        check_renames("rename", rename or {})
        options = LoadOptions(
            strict,
            patterns_of("allow_missing", allow_missing),
            patterns_of("exclude", exclude),
            rename or {},
            allow_pickle,
            budget_bytes,
            max_over_read,
        )
        with record_function("reshard.open"):
            source = open_source(uri, storage_options, format)
        opened = OpenedCheckpoint(source.location, source.fingerprint() if is_distributed() else "")
        loading.append(_Loading(state_dict, source, options))
        return opened

    def task() -> RankReport:
        with alarm, meter:
            meter.location = loading[0].source.location
            report = loading[0].run(rank, alarm, meter)
        seconds = {"open": opened - begin, **report.seconds, "total": time.perf_counter() - begin}
        report = replace(report, seconds=seconds)
        logger.info("loaded from %s: %s", meter.location, report.words)
        return report

    try:
        check_same_checkpoint(on_all_ranks(prepare, process_group))
        opened = time.perf_counter()
        reports = on_all_ranks(task, process_group)
    finally:
        alarm.close()
    done = loading[0]
    done.put_values()
    state_to_stateful(state_dict, done.states)
    report = Report(rank, tuple(reports), done.missing_keys, done.unexpected_keys)
    if rank == 0:
        done.log(report)
    return report


class _Loading:
    """One rank's part of a load: what goes where.

    Raises what `load` raises where the checkpoint does not fit; nothing is changed.
    """

    def __init__(self, state_dict: Mapping[str, Any], source: Source, options: LoadOptions) -> None:
        self.source = source
        self.states = stateful_to_state(state_dict)
        self._options = options
        named = flatten(self.states)
        leaves = {name: leaf for name, leaf in named.items() if not matches_any(options.exclude, name)}
        there = [*(entry.name for entry in source.entries), *source.unreadable]
        self._stored = by_new_name(there, options.rename)
        """What the checkpoint has, by the name in the state dict, and the name there."""
        present = {name: leaf for name, leaf in leaves.items() if name in self._stored and not self._may_miss(name)}
        self._inside_values: list[tuple[Leaf, Any]] = []
        """Leaves that are a part of an object of the checkpoint, each with its value."""
        self._opened: dict[Path, Any] = {}
        """The values in those objects, by the path in the state dict."""
        self._containers: list[tuple[Leaf, list[str]]] = []
        """Leaves that are dicts or lists in the checkpoint, each with the names in it."""
        self.missing_keys: tuple[str, ...] = ()
        """Names that are not in the checkpoint."""
        self._find_others({name: leaf for name, leaf in leaves.items() if name not in present}, present)
        self.unexpected_keys = self._find_unexpected(named)
        """Names that the checkpoint has below a key of the state dict, which itself has not."""
        self._cast: dict[str, Cast] = {}
        self._values: list[tuple[Leaf, Any]] = []
        """The values of leaves that are not tensors, once they are read."""
        self._plan(present)

    def _may_miss(self, name: str) -> bool:
        """Whether a name cannot be read, and was said to be one that may be missing."""
        return self._stored[name] in self.source.unreadable and matches_any(self._options.allow_missing, name)

    def _plan(self, present: Mapping[str, Leaf]) -> None:
        """Work out what to read, and check that it fits."""
        source = self.source
        wants, destinations = self._destinations(present.values())
        given = self._given()
        inside = [name for _, names in self._containers for name in names]
        tensors = [name for name in inside if self._kind(name) is Kind.TENSOR]
        self._objects = [leaf for leaf in present.values() if self._kind(leaf.name) is not Kind.TENSOR]
        self._value_names = [leaf.name for leaf in self._objects]
        self._value_names += [name for name in inside if self._kind(name) is not Kind.TENSOR]
        wants += [Want(self._stored[name], source.entry(self._stored[name]).whole) for name in tensors]
        # All of the metadata is read at once, and checked before memory is taken on its word.
        objects = [self._stored[name] for name in self._value_names]
        check_values(source, objects, self._options.budget_bytes)
        source.index([*wants, *value_wants(source, objects)])
        self._built: dict[str, torch.Tensor] = {}
        """Tensors of dicts and lists that the state dict does not have."""
        for name in tensors:
            entry = source.entry(self._stored[name])
            self._built[name] = torch.empty(entry.shape, dtype=torch_dtype(entry.dtype), device="cpu")
        for leaf in (*self._objects, *(leaf for leaf, _ in (*self._containers, *self._inside_values))):
            if not isinstance(leaf.container, (MutableMapping, list)):
                raise DestinationError(
                    f"{leaf.name!r} is in a {type(leaf.container).__name__}, where no value can be replaced: use a dict"
                )
        self._reads = BoxReads.of(source, wants, [*destinations, *self._built.values()], given)

    def _kind(self, name: str) -> Kind:
        return self.source.entry(self._stored[name]).kind

    def _destinations(self, leaves: Iterable[Leaf]) -> tuple[list[Want], list[torch.Tensor]]:
        wants: list[Want] = []
        destinations: list[torch.Tensor] = []
        for leaf in leaves:
            stored = self._stored[leaf.name]
            for box, tensor in _shards_to_load(leaf, self.source, stored):
                wants.append(Want(stored, box))
                destinations.append(tensor)
                self._note_cast(leaf.name, torch_dtype(self.source.entry(stored).dtype), tensor.dtype)
        return wants, destinations

    def _given(self) -> list[DecodedTensor]:
        """The tensors that were taken out of objects, and where they go."""
        given: list[DecodedTensor] = []
        scales = scale_names(map(name_of, self._opened))
        for leaf, value in self._inside_values:
            if isinstance(value, torch.Tensor):
                for box, tensor in _local_shards(leaf, tuple(value.shape)):
                    check_is_not_scaled(leaf.name, value.dtype, tensor.dtype, scales)
                    self._note_cast(leaf.name, value.dtype, tensor.dtype)
                    given.append(DecodedTensor(leaf.name, value.detach()[box.slices], tensor))
        return given

    def _note_cast(self, name: str, stored: torch.dtype, to: torch.dtype) -> None:
        if loses_bits(stored, to):
            self._cast[name] = Cast(name, *(str(dtype).removeprefix("torch.") for dtype in (stored, to)))

    def _find_others(self, missing: Mapping[str, Leaf], present: Mapping[str, Leaf]) -> None:
        """Find what the checkpoint has not under its own name, but as a part of an object, or in parts.

        Raises MissingTensorError for what it does not have.
        """
        if not missing:
            return
        self._in_order = sorted(self._stored)
        inside: dict[str, list[Leaf]] = {}
        lost: list[Leaf] = []
        for leaf in missing.values():
            outer = (name_of(leaf.path[:length]) for length in range(len(leaf.path) - 1, 0, -1))
            found = next((name for name in outer if name in self._stored and self._kind(name) is not Kind.TENSOR), None)
            if found is not None:
                inside.setdefault(found, []).append(leaf)
            elif leaf.is_empty_dict:  # `unread` lists what the checkpoint has below it
                continue
            elif not isinstance(leaf.value, torch.Tensor) and (below := self._below(leaf.name)):
                self._containers.append((leaf, below))
            else:
                lost.append(leaf)
        lost += self._take_out(inside)
        options = self._options
        fatal = [leaf for leaf in lost if options.strict and not matches_any(options.allow_missing, leaf.name)]
        if fatal:
            raise MissingTensorError(self._describe_missing(fatal, present))
        self.missing_keys = tuple(leaf.name for leaf in lost)

    def _below(self, name: str) -> list[str]:
        """The names of the checkpoint below another one, but for those that are excluded."""
        begin = bisect_left(self._in_order, f"{name}.")
        following = (self._in_order[at] for at in range(begin, len(self._in_order)))
        below = itertools.takewhile(lambda other: other.startswith(f"{name}."), following)
        return [other for other in below if not matches_any(self._options.exclude, other)]

    def _take_out(self, inside: Mapping[str, list[Leaf]]) -> list[Leaf]:
        """Take values out of the objects that hold them. Returns the leaves whose objects do not."""
        names = [self._stored[name] for name in inside]
        check_values(self.source, names, self._options.budget_bytes)
        self.source.index(value_wants(self.source, names))
        blobs = [ValueRead(self.source, name) for name in names]
        read_boxes(self.source, [], [], blobs)
        lost = []
        for (name, leaves), blob in zip(inside.items(), blobs, strict=True):
            value = blob.value(allow_pickle=self._options.allow_pickle)
            path = leaves[0].path[: _length(leaves[0].path, name)]
            self._opened |= {(*path, *leaf.path[1:]): leaf.value for leaf in flatten({name: value}).values()}
            for leaf in leaves:
                try:
                    found = _descend(value, leaf.path[len(path) :])
                except LookupError:
                    lost.append(leaf)
                    continue
                if isinstance(leaf.value, torch.Tensor) != isinstance(found, torch.Tensor):
                    raise DestinationError(
                        f"{leaf.name!r} is {type(found).__name__} in the checkpoint, and {type(leaf.value).__name__} "
                        "in the state dict"
                    )
                self._inside_values.append((leaf, found))
        return lost

    def _find_unexpected(self, named: Mapping[str, Leaf]) -> tuple[str, ...]:
        inner = tuple(f"{key}." for key, state in self.states.items() if isinstance(state, (Mapping, list)))
        taken = {name for _, names in self._containers for name in names}
        inside_values = [name_of(path) for path in self._opened]
        opened = {name_of(path[:length]) for path in self._opened for length in range(1, len(path))}
        return tuple(
            name
            for name in dict.fromkeys((*self._stored, *inside_values))
            if name not in named
            and name.startswith(inner)
            and name not in taken
            and name not in opened
            and not matches_any(self._options.exclude, name)
        )

    def run(self, rank: int, alarm: Alarm, meter: Meter) -> RankReport:
        """Read. Raises what `load` raises for the bytes."""
        options = self._options
        blobs = {name: ValueRead(self.source, self._stored[name]) for name in self._value_names}
        reading = ReadOptions(rank, options.budget_bytes, options.max_over_read, alarm.check, meter)
        report = execute_reads(self.source, self._reads, list(blobs.values()), reading)
        values = {name: blob.value(allow_pickle=options.allow_pickle) for name, blob in blobs.items()}
        self._values = [(leaf, values[leaf.name]) for leaf in self._objects]
        for leaf, names in self._containers:
            parts = {name: self._built[name] if name in self._built else values[name] for name in names}
            self._values.append((leaf, self._assembled(leaf, parts)))
        return counting_metadata(replace(report, cast=tuple(self._cast.values())), self.source)

    def _assembled(self, leaf: Leaf, parts: Mapping[str, Any]) -> Any:
        """A dict or a list that the checkpoint has in parts."""
        top = "value"
        paths: dict[str, Path] = {}
        for name in parts:
            path = renamed_path(self.source.paths.get(self._stored[name], ()), name) or ()
            known = name_of(path[: len(leaf.path)]) == leaf.name
            paths[name] = (top, *(path[len(leaf.path) :] if known else (name[len(leaf.name) + 1 :],)))
        return nest(parts, paths)[top]

    def put_values(self) -> None:
        """Put the values that are not tensors into the state dict, once all ranks have read."""
        for leaf, value in (*self._values, *self._inside_values):
            if not isinstance(leaf.value, torch.Tensor):
                leaf.replace(value)

    def log(self, report: Report) -> None:
        """Log what a caller may not expect, each once."""
        if self.unexpected_keys:
            unexpected = self.unexpected_keys
            message = f"{len(unexpected)} names of the checkpoint are not in the state dict: {_first(unexpected)}"
            logger.warning("%s", "; ".join(filter(None, (message, self._resized(unexpected[0], "list")))))
        if report.cast:
            shown = [f"{cast.name} ({cast.stored} → {cast.to})" for cast in report.cast]
            logger.warning("%d tensors were cast to fewer bits: %s", len(report.cast), _first(shown))

    def _resized(self, name: str, *kinds: str) -> str:
        """Which list or dict around a name has another number of items in the checkpoint; empty where none has."""
        stored = ((new, self.source.paths.get(old)) for new, old in self._stored.items())
        known = (renamed_path(path, new) for new, path in stored if path is not None)
        theirs = _children([*filter(None, known), *self._opened])
        ours = _children(leaf.path for leaf in flatten(self.states).values())
        for end in _dots(name):
            outer = name[:end]
            if outer in ours and outer in theirs and len(ours[outer]) != len(theirs[outer]):
                kind = "list" if all(type(part) is int for part in (*ours[outer], *theirs[outer])) else "dict"
                counts = f"{len(theirs[outer])} items in the checkpoint and {len(ours[outer])} in the state dict"
                return f"the {kind} {outer!r} has {counts}" if kind in (kinds or ("list", "dict")) else ""
        return ""

    def _describe_missing(self, missing: list[Leaf], present: Mapping[str, Leaf]) -> str:
        """Which names are missing, and where they may be meant to be."""
        names = list(self._stored)
        message = f"the checkpoint has no {quoted([leaf.name for leaf in missing])}"
        memories = {memory: leaf.name for leaf in present.values() if (memory := _memory(leaf))}
        for leaf in missing:
            if tied := memories.get(_memory(leaf)):
                return (
                    f"{message}; {leaf.name!r} shares its memory with {tied!r}, which it has: leave {leaf.name!r} out "
                    f"of the state dict, or pass allow_missing={leaf.name!r}"
                )
        first = missing[0].name
        for name in names:
            if name.endswith(f".{first}"):
                return f"{message}; it has {name!r}: nest the state dict under {name.removesuffix(first)[:-1]!r}"
            if first.endswith(f".{name}"):
                return f"{message}; it has {name!r}: the state dict is nested too deeply"
        for path, value in self._opened.items():
            if isinstance(value, Mapping) and first.startswith(f"{name_of(path)}."):
                return f"{message}; {name_of(path)!r} is an empty dict in the checkpoint"
        if resized := self._resized(first):
            return f"{message}; {resized}"
        near = nearest_names(first, names, 5) or names[:5]
        found = f"it has {', '.join(map(repr, near))}" + (", ..." if len(near) < len(names) else "")
        return (
            f"{message}; {found if names else 'it is empty'}; strict=False leaves out what is missing, and "
            "allow_missing= what its patterns match"
        )


def _shards_to_load(leaf: Leaf, source: Source, stored: str) -> list[LocalShard]:
    """What this rank holds of a leaf's tensor; nothing of an object. Raises where it does not fit the checkpoint."""
    entry = source.entry(stored)
    if not isinstance(leaf.value, torch.Tensor):
        if entry.is_tensor:
            raise DestinationError(
                f"{leaf.name!r} is a tensor of shape {entry.shape} in the checkpoint, and {type(leaf.value).__name__} "
                "in the state dict: give it a tensor to load into"
            )
        return []
    check_is_tensor(source, stored)
    return _local_shards(leaf, entry.shape)


def _local_shards(leaf: Leaf, shape: tuple[int, ...]) -> list[LocalShard]:
    """What this rank holds of a leaf's tensor, which has this shape in the checkpoint."""
    tensor: torch.Tensor = leaf.value
    try:
        reason = missing_memory(tensor) if is_whole(tensor) else ""
        if reason:
            raise DestinationError(f"{leaf.name!r} {reason}; it cannot be loaded into")
        if tuple(tensor.size()) != shape:
            raise ShapeMismatchError(
                f"{leaf.name!r} has shape {shape} in the checkpoint and {tuple(tensor.size())} in the state dict"
            )
        return [(box, local) for box, local in local_shards(leaf.name, tensor) if box.numel]
    except CheckpointError:
        raise
    except Exception as error:
        raise DestinationError(
            f"{leaf.name!r}, a {type(tensor).__name__}, cannot be loaded into: {type(error).__name__}: {error}"
        ) from error


def _descend(value: Any, path: Path) -> Any:
    """Return the value at a path inside of another one. Raises LookupError if there is no such path."""
    for part in path:
        if isinstance(part, int):
            if not isinstance(value, (list, tuple)):
                raise KeyError(part)
            value = value[part]
        elif isinstance(value, Mapping):
            keys = {str(key): key for key in value}
            value = value[part.value if isinstance(part, Key) and part.value in value else keys[str(part)]]
        else:
            raise KeyError(part)
    return value


def _length(path: Path, name: str) -> int:
    """How many parts of a path make up a name."""
    return next(length for length in range(1, len(path) + 1) if name_of(path[:length]) == name)


def _dots(name: str) -> list[int]:
    """The positions of the dots in a name, the last one first."""
    return [at for at in range(len(name) - 1, 0, -1) if name[at] == "."]


def _children(paths: Iterable[Path]) -> dict[str, set[str | int | Key]]:
    """The keys and positions in each dict and list."""
    found: dict[str, set[str | int | Key]] = {}
    for path in paths:
        for length in range(1, len(path)):
            found.setdefault(name_of(path[:length]), set()).add(path[length])
    return found


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _memory(leaf: Leaf) -> int:
    """Where the memory of a leaf's tensor begins; 0 where it has none of its own."""
    local = getattr(leaf.value, "_local_tensor", leaf.value)
    if not isinstance(local, torch.Tensor) or overrides_dispatch(local) or missing_memory(local):
        return 0
    return local.untyped_storage().data_ptr()
