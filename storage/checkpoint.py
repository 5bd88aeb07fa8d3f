"""A checkpoint that is open for reading: what `reshard.open` returns. Needs no process group."""

from __future__ import annotations

import os
from collections.abc import Iterator, KeysView, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch

from ..planner.box import Box
from ..planner.chunk_reads import Want
from ..planner.errors import ShapeMismatchError
from ..planner.html import table
from ..planner.index import missing_tensor
from ..planner.layout import Layout, matches
from ..planner.rank_plans import RankPlans, plan_ranks, rank_tensors
from ..planner.request_costs import RequestCosts
from .errors import ArgumentError, DestinationError
from .formats.detect import open_source
from .formats.hf_config import read_tp_plan
from .formats.source import Source, check_readable
from .maintenance.verify import DamagedChunk, verify
from .reading.read_tensors import ReadOptions, check_is_tensor, read_boxes
from .reading.value_reads import ValueRead, check_values, value_wants
from .runtime.limits import check_budget
from .runtime.logs import logger_of
from .runtime.process_group import rank_of
from .runtime.progress import Meter, OnProgress
from .runtime.torch_modes import undisturbed
from .stores.base import Store, close_store
from .tensors.casts import check_dtype, loses_bits, weight_dtype
from .tensors.dtypes import torch_dtype
from .tensors.name_patterns import Patterns, by_new_name, check_renames, matches_any, new_name, patterns_of
from .tensors.state_dict import nest
from .tensors.tensor_classes import missing_memory

logger = logger_of(__name__)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a checkpoint says of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: int
    stored_bytes: int


class Checkpoint:
    """A checkpoint open for reading. It keeps the manifest in memory, and reads the rest when you ask for it.

    Use it as a context manager, or call `close`, to close its files at once. It is a collection of names: `in`, `len`,
    `keys` and iteration cover tensors and other values.
    """

    def __init__(self, source: Source, *, closes_store: bool = True) -> None:
        """
        Args:
            closes_store: whether `close` closes the store, too. It does not if the caller opened it.
        """
        self._opened: Source | None = source
        self._closes_store = closes_store
        self._tensors = {
            entry.name: TensorInfo(entry.shape, torch_dtype(entry.dtype), chunks, stored)
            for entry, (chunks, stored) in zip(source.entries, source.sizes, strict=True)
            if entry.is_tensor
        }

    @property
    def _source(self) -> Source:
        if self._opened is None:
            raise ArgumentError("the checkpoint is closed: open it again with reshard.open")
        return self._opened

    def close(self) -> None:
        """Close the files of the checkpoint. Every later read raises ArgumentError; closing again does nothing."""
        if self._opened is not None and self._closes_store:
            close_store(self._opened.store)
        self._opened = None

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def keys(self) -> KeysView[str]:
        """Return the names of the tensors and of the other values that can be read."""
        return dict.fromkeys(entry.name for entry in self._source.entries).keys()

    @property
    def location(self) -> str:
        """Where it is."""
        return self._source.location

    @property
    def info(self) -> Mapping[str, Any]:
        """By what it was written, when, with which codec and from how many ranks."""
        return MappingProxyType(self._source.info)

    @property
    def format(self) -> str:
        """ "reshard", "dcp", "safetensors" or "torch"."""
        return self._source.format

    @property
    def tp_plan(self) -> dict[str, str]:
        """The tensor-parallel plan in the `config.json` beside it, as rules for a Layout; empty where there is none.

        Raises CorruptCheckpointError where it is none, StoreError.
        """
        return read_tp_plan(self._source.store)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors by name."""
        return MappingProxyType(self._tensors)

    @property
    def objects(self) -> tuple[str, ...]:
        """The names of the values that are not tensors."""
        return tuple(entry.name for entry in self._source.entries if not entry.is_tensor)

    @property
    def unreadable(self) -> Mapping[str, str]:
        """The names that cannot be read, and why. They are in neither `tensors` nor `objects`.

        Asking for one of them raises an error with this message; the other names can be read.
        """
        return MappingProxyType({name: found.reason for name, found in self._source.unreadable.items()})

    @property
    def damaged(self) -> tuple[str, ...]:
        """The names in `unreadable` whose values are missing or contradict each other, as after an incomplete copy."""
        return tuple(name for name, found in self._source.unreadable.items() if found.is_damage)

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names that files of the checkpoint hold, but its index (`*.index.json`) does not list. They are not read."""
        return self._source.left_out

    @undisturbed()
    def read(
        self,
        name: str,
        box: Box | None = None,
        *,
        out: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        budget_bytes: int | None = None,
        max_over_read: float | None = None,
    ) -> torch.Tensor:
        """Read a tensor, or a box of it, fetching only the chunks that the box meets.

        Args:
            name: the tensor's name.
            box: the part to read; the whole tensor by default.
            out: a tensor of the box's sizes to read into, in place, on any device and of any dtype that the stored
                one can be cast to; a new one by default.
            dtype: of the new tensor; the stored one by default. float32 values are read as bfloat16 from a third of
                their bytes, with the same result as a cast.
            device: of the new tensor; the CPU by default.
            budget_bytes, max_over_read: as of `reshard.load`.

        Raises:
            MissingTensorError, ShapeMismatchError, DtypeError, DestinationError: the call does not fit the tensor.
            DtypeError, UnsupportedFormatError, CorruptCheckpointError: the name is one of `unreadable`.
            CorruptCheckpointError, StoreError: the bytes are not to be had; `out` is as it was, unless the message
                says otherwise.
        """
        check_is_tensor(self._source, name)
        check_dtype(dtype)
        if out is not None and (reason := missing_memory(out)):
            raise DestinationError(f"{name!r}: out {reason}")
        entry = self._source.entry(name)
        wanted = Box.whole(entry.shape) if box is None else box
        if not wanted.fits(entry.shape):
            raise ShapeMismatchError(f"{name!r} has shape {entry.shape}, {wanted} is not inside it")
        self._source.index([Want(name, wanted)])  # what it says is checked before memory is taken on its word
        if out is None:
            out = torch.empty(wanted.sizes, dtype=dtype or torch_dtype(entry.dtype), device=device or "cpu")
        elif tuple(out.shape) != wanted.sizes:
            raise ShapeMismatchError(f"{name!r}: out has shape {tuple(out.shape)}, the box {wanted} has {wanted.sizes}")
        elif dtype not in (None, out.dtype):
            raise DestinationError(f"{name!r}: out has dtype {out.dtype}, and dtype={dtype} was asked for")
        elif device is not None and torch.empty(0, device=device).device != out.device:
            raise DestinationError(f"{name!r}: out is on {out.device}, and device={str(device)!r} was asked for")
        options = ReadOptions(budget_bytes=budget_bytes, max_over_read=max_over_read)
        read_boxes(self._source, [Want(name, wanted)], [out], options=options)
        return out

    @undisturbed()
    def read_value(self, name: str, *, allow_pickle: bool = False, budget_bytes: int | None = None) -> Any:
        """Read a value that is not a tensor.

        Args:
            allow_pickle, budget_bytes: as of `reshard.load`.

        Raises:
            ArgumentError: it takes more bytes than `budget_bytes`.
            MissingTensorError: there is none of this name.
            UnsafeValueError: it is pickled in a way that torch.load(weights_only=True) refuses, and `allow_pickle`
                is False.
        """
        if self._source.entry(name).is_tensor:
            raise DestinationError(f"{name!r} is a tensor: read it with read()")
        check_budget(budget_bytes)
        check_values(self._source, [name], budget_bytes)
        blob = ValueRead(self._source, name)
        read_boxes(self._source, blob.wants, blob.tensors, options=ReadOptions(budget_bytes=budget_bytes))
        return blob.value(allow_pickle=allow_pickle)

    @undisturbed()
    def plan(
        self, layout: Layout, *, names: str = "*", max_over_read: float | None = None, costs: RequestCosts | None = None
    ) -> RankPlans:
        """What every rank of a layout would read, from the manifest alone.

        Args:
            names: a pattern as in a layout: "model" stands for all below it.
            max_over_read: as of `reshard.load`.
            costs: what requests cost at another store, to plan for; of this one, as far as it is known, by default.

        Raises LayoutError, and what `read` raises for a name of `unreadable` that matches.
        """
        check_readable(self._source, names)
        index, gap_limits = self._source.index(self._matching(names)), self._source.gap_limits(max_over_read, costs)
        return plan_ranks(index, layout, names, gap_limits, self.location)

    @undisturbed()
    def layout_of(self, name: str) -> tuple[list[Box], tuple[int, ...]]:
        """The shards that a tensor was saved as, and in how many parts each dimension is cut into chunks.

        Raises MissingTensorError, CorruptCheckpointError, StoreError.
        """
        entry = self._source.entry(name)
        index = self._source.index([Want(name, Box.whole(entry.shape))])
        return index.shards_of(index.position(name)), entry.grid.parts

    def _matching(self, names: str) -> list[Want]:
        return [Want(name, Box.whole(info.shape)) for name, info in self._tensors.items() if matches(names, name)]

    @undisturbed()
    def load_rank(
        self,
        layout: Layout,
        rank: int,
        *,
        names: str = "*",
        exclude: Patterns = (),
        rename: Mapping[str, str] | None = None,
        allow_missing: Patterns = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        budget_bytes: int | None = None,
        max_over_read: float | None = None,
        progress: OnProgress = False,
    ) -> dict[str, torch.Tensor]:
        """Read the local tensors of one rank of a layout, by name. No process group is needed.

        Args:
            names: a pattern as in a layout: "model" leaves out the optimizer beside it.
            exclude: patterns of names that are left out.
            rename: patterns of names, and what the tensors are called instead, as of `reshard.load`. The rules of the
                layout are for the new names.
            allow_missing: patterns of names that are left out if they cannot be read (see `unreadable`).
            dtype: of floating-point tensors of one dimension or more; the stored one by default. float32 values of a
                native checkpoint are read as bfloat16 from a third of their bytes.
            device: of the tensors; the CPU by default.
            budget_bytes, max_over_read, progress: as of `reshard.load`.

        Raises LayoutError, ArgumentError, DtypeError, CorruptCheckpointError, StoreError, and what `read` raises for a
        name of `unreadable` that the rank would hold.
        """
        excluded, may_miss = patterns_of("exclude", exclude), patterns_of("allow_missing", allow_missing)
        check_dtype(dtype)
        check_renames("rename", rename or {})

        def is_held(name: str) -> bool:
            is_taken = not matches_any(excluded, name) and not matches_any(may_miss, name)
            return is_taken and layout.holds(new_name(name, rename or {}), rank)

        check_readable(self._source, names, is_held)
        taken = [
            entry
            for entry in self._source.entries
            if entry.is_tensor and matches(names, entry.name) and not matches_any(excluded, entry.name)
        ]
        if not taken and names != "*":
            raise missing_tensor(names, self._tensors)
        stored_names = by_new_name((entry.name for entry in taken), lambda name: new_name(name, rename or {}))
        entries = [replace(entry, name=new) for new, entry in zip(stored_names, taken, strict=True)]
        tensors: dict[str, torch.Tensor] = {}
        wants: list[Want] = []
        views: list[torch.Tensor] = []
        held_tensors = rank_tensors(entries, layout, rank)
        self._source.index(Want(stored_names[want.name], want.box) for held in held_tensors for want in held.wants)
        for held in held_tensors:
            stored = torch_dtype(held.entry.dtype)
            to = weight_dtype(stored, held.entry.shape, dtype)
            local = torch.empty(held.local.shape, dtype=to, device=device or "cpu")
            tensors[held.entry.name] = local
            for want, at in zip(held.wants, held.local.local_offsets, strict=True):
                wants.append(Want(stored_names[want.name], want.box))
                views.append(local[Box(at, want.box.sizes).slices])
        draws = rank_of(None) == 0
        with Meter("load", progress, location=self.location, rank=rank, draws=draws) as meter:
            options = ReadOptions(rank, budget_bytes, max_over_read, meter=meter)
            read_boxes(self._source, wants, views, options=options)
        rounded = [
            name for name, local in tensors.items() if loses_bits(self._tensors[stored_names[name]].dtype, local.dtype)
        ]
        if rounded and draws:
            logger.info("%d tensors were cast to fewer bits, to %s: %s, ...", len(rounded), dtype, rounded[0])
        return tensors

    @undisturbed()
    def state_dict(
        self,
        *,
        names: str = "*",
        allow_pickle: bool = False,
        device: torch.device | str | None = None,
        budget_bytes: int | None = None,
        max_over_read: float | None = None,
        progress: OnProgress = False,
    ) -> dict[Any, Any]:
        """Read all values, whole, into the dicts and lists in which they were saved.

        Names stay flat where the format does not tell more, as safetensors; DCP itself makes strings of all keys.

        Args:
            names: a pattern as in a layout: "model" leaves out the optimizer beside it.
            device: of the tensors; the CPU by default.
            allow_pickle, budget_bytes, max_over_read, progress: as of `reshard.load`.

        Raises MissingTensorError where nothing matches, UnsafeValueError, CorruptCheckpointError, StoreError, and what
        `read` raises for a name of `unreadable` that matches.
        """
        check_readable(self._source, names)
        entries = [entry for entry in self._source.entries if matches(names, entry.name)]
        if not entries and names != "*":
            raise missing_tensor(names, (entry.name for entry in self._source.entries))
        objects = [entry.name for entry in entries if not entry.is_tensor]
        held = [entry for entry in entries if entry.is_tensor]
        wants = [Want(entry.name, Box.whole(entry.shape)) for entry in held]
        check_budget(budget_bytes)
        check_values(self._source, objects, budget_bytes)
        # What it says is checked before memory is taken on its word, and read at once.
        self._source.index([*wants, *value_wants(self._source, objects)])
        blobs = [ValueRead(self._source, name) for name in objects]
        on = device or "cpu"
        tensors = [torch.empty(entry.shape, dtype=torch_dtype(entry.dtype), device=on) for entry in held]
        with Meter("load", progress, location=self.location) as meter:
            options = ReadOptions(budget_bytes=budget_bytes, max_over_read=max_over_read, meter=meter)
            read_boxes(self._source, wants, tensors, blobs, options)
        values: dict[str, Any] = {want.name: tensor for want, tensor in zip(wants, tensors, strict=True)}
        values |= {blob.name: blob.value(allow_pickle=allow_pickle) for blob in blobs}
        in_order = {entry.name: values[entry.name] for entry in entries}
        return nest(in_order, self._source.paths)

    @undisturbed()
    def verify(self, *, quick: bool = False, progress: OnProgress = False) -> list[DamagedChunk]:
        """Read all that the checkpoint is made of, several requests at once; the chunks that are damaged or missing.

        Other formats have no checksums of chunks: slices of DCP are held against the CRC-32s of their records (which
        torch writes unless it is told not to, by `set_crc32_options`), and of the rest it is seen that it is there.

        Names that are missing (`damaged`) are listed too. Other names of `unreadable` are checked in a native
        checkpoint only.

        Args:
            quick: look at the objects' sizes alone; what it lists may then be several chunks at once.
            progress: True for a bar, or a function that is called with a `Progress`.

        Raises StoreError where the store fails otherwise than by not having an object.
        """
        missing = [
            DamagedChunk(name, Box((), ()), found.object, 0, 0, found.reason)
            for name, found in self._source.unreadable.items()
            if found.is_damage
        ]
        return missing + verify(self._source.store, self._source.index(), quick=quick, progress=progress)

    def __repr__(self) -> str:
        if self._opened is None:
            return "Checkpoint(closed)"
        stored = sum(tensor.stored_bytes for tensor in self._tensors.values())
        return (
            f"Checkpoint({self.location!r}, {self.format}: {len(self._tensors)} tensors, {len(self.objects)} objects, "
            f"{stored / 1e6:.1f} MB stored"
            + (f"; {len(self._source.unreadable)} names cannot be read" if self._source.unreadable else "")
            + ")"
        )

    def _repr_html_(self) -> str:
        columns = ("tensor", "dtype", "shape", "chunks", "MB stored")
        rows = [
            (
                name,
                str(info.dtype).removeprefix("torch."),
                " x ".join(map(str, info.shape)),
                info.chunks,
                f"{info.stored_bytes / 1e6:.2f}",
            )
            for name, info in self._tensors.items()
        ]
        return table(repr(self), columns, rows)


def open_checkpoint(
    uri: str | os.PathLike[str] | Store,
    *,
    storage_options: Mapping[str, Any] | None = None,
    format: str | None = None,
) -> Checkpoint:
    """Open a checkpoint of any format for reading; fetches its metadata. Needs no process group.

    Args:
        uri: a path, a URI that fsspec opens, or a Store.
        storage_options: passed to fsspec.
        format: "reshard", "dcp", "safetensors" or "torch"; by default what is found there.

    Raises CheckpointNotFoundError, NotCommittedError, CorruptCheckpointError, UnsupportedVersionError, StoreError,
    UnsupportedURIError.
    """
    return Checkpoint(open_source(uri, storage_options, format), closes_store=not isinstance(uri, Store))
