"""`Checkpoint`: a checkpoint that is open for reading, as `reshard.open` returns it. It needs no process group."""

from __future__ import annotations

import copy
import math
import numbers
import os
from collections.abc import Iterable, Iterator, KeysView, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..planner.box import Box
from ..planner.chunk_reads import WantedBox
from ..planner.entries import Entry
from ..planner.errors import MissingTensorError, ShapeMismatchError
from ..planner.html import table
from ..planner.layout import Layout, unused_rules
from ..planner.rank_plans import RankPlans, check_layout_fits, plan_ranks, rank_tensors
from ..planner.request_costs import REMOTE_COSTS, RequestCosts
from ..planner.text import counted, quoted
from .errors import ArgumentError, CorruptCheckpointError, DestinationError
from .formats.detect import open_source
from .formats.hf_config import read_tp_plan
from .formats.source import Source, check_readable
from .maintenance.verify import DamagedChunk, verify
from .reading.read_tensors import ReadOptions, check_is_tensor, read_boxes
from .reading.scale_layouts import check_scale_layouts
from .reading.shared_read import check_cooperative, may_share
from .reading.value_buffers import ValueBuffer, check_values, decode_all, whole_wants
from .runtime.arguments import check_nbytes, check_progress
from .runtime.brief import reason
from .runtime.deferred_writes import finish_writes
from .runtime.logs import logger_of
from .runtime.process_group import check_member, check_process_group, rank_of
from .runtime.progress import Meter, OnProgress
from .runtime.torch_modes import without_torch_modes
from .stores.base import Store, close_store
from .stores.open import absolute_location
from .tensors.casts import check_dtype, loses_bits, weight_dtype
from .tensors.dtypes import torch_dtype
from .tensors.name_patterns import Patterns, Selection, matches_any, patterns_of
from .tensors.state_dict import nest
from .tensors.tensor_classes import missing_memory

if TYPE_CHECKING:
    import torch.distributed as dist

    from .lazy.weights import LazyWeights

logger = logger_of(__name__)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """The metadata of one tensor of a checkpoint."""

    shape: tuple[int, ...]
    """The global shape."""
    dtype: torch.dtype
    chunks: int
    """The number of chunks that the tensor is stored as."""
    stored_bytes: int
    """The size of the chunks as stored, in bytes."""


class Checkpoint:
    """A checkpoint that is open for reading.

    It keeps the metadata in memory and reads tensors when you call one of its methods. Use it as a context manager, or
    call `close`, to close its files. `in`, `len`, `keys` and iteration cover the names of tensors and other values.

    It can be pickled, with its storage options: the process that unpickles it opens it again. If there is another
    checkpoint then, this raises CorruptCheckpointError.
    """

    def __init__(self, source: Source, arguments: _Arguments | None = None) -> None:
        """
        Args:
            source: the open source.
            arguments: what it was opened with. By default, the checkpoint cannot be pickled.
        """
        self._opened: Source | None = source
        self._arguments = arguments
        self._tensors = {
            entry.name: TensorInfo(entry.shape, torch_dtype(entry.dtype), chunks, stored)
            for entry, (chunks, stored) in zip(source.entries, source.sizes, strict=True)
            if entry.is_tensor
        }
        self._names = dict.fromkeys(entry.name for entry in source.entries)

    def _check_open(self) -> None:
        if self._opened is None:
            raise ArgumentError("the checkpoint is closed: open it again with reshard.open")

    @property
    def _source(self) -> Source:
        self._check_open()
        assert self._opened is not None
        return self._opened

    def close(self) -> None:
        """Close the files of the checkpoint. Later reads raise ArgumentError. Closing twice has no effect."""
        is_of_caller = self._arguments is not None and isinstance(self._arguments.uri, Store)
        if self._opened is not None and not is_of_caller:
            close_store(self._opened.store)
        self._opened = None

    def __reduce__(self) -> tuple[Any, ...]:
        if self._arguments is None:
            raise ArgumentError("only a checkpoint that reshard.open has opened can be pickled")
        return _opened_again, (self._arguments, self._source.fingerprint())

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
        self._check_open()
        return self._names.keys()

    @property
    def location(self) -> str:
        """The path or URI of the checkpoint."""
        return self._source.location

    @property
    def info(self) -> Mapping[str, Any]:
        """What the writer recorded: its version, the time, the codec, the number of ranks."""
        return MappingProxyType(self._source.info)

    @property
    def metadata(self) -> dict[str, Any]:
        """A copy of the `metadata` that was passed to `reshard.save`.

        It is empty if nothing was passed, and for other formats.

        Raises:
            CorruptCheckpointError: it cannot be decoded.
        """
        return copy.deepcopy(dict(self._source.metadata))

    @property
    def format(self) -> str:
        """The format: "reshard", "dcp", "safetensors" or "torch"."""
        return self._source.format

    @property
    def tp_plan(self) -> dict[str, str]:
        """The tensor-parallel plan of the model's `config.json`, as rules for a Layout. Empty if there is no plan.

        Raises:
            CorruptCheckpointError: the file or its plan is not valid.
            StoreError: the file cannot be read.
        """
        return read_tp_plan(self._source.store)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The metadata of the tensors, by name."""
        return MappingProxyType(self._tensors)

    @property
    def value_names(self) -> tuple[str, ...]:
        """The names of the values that are not tensors."""
        return tuple(entry.name for entry in self._source.entries if not entry.is_tensor)

    @property
    def unreadable(self) -> Mapping[str, str]:
        """The names that cannot be read, and the reasons. They are not in `tensors` or `value_names`.

        Reading one of them raises an error with this reason. All other names can be read.
        """
        return MappingProxyType({name: found.reason for name, found in self._source.unreadable.items()})

    @property
    def damaged(self) -> tuple[str, ...]:
        """The names in `unreadable` whose data is missing or contradictory, for example after an incomplete copy."""
        return tuple(name for name, found in self._source.unreadable.items() if found.is_damage)

    @property
    def unindexed(self) -> tuple[str, ...]:
        """Names that are in the files but not in the checkpoint's index (`*.index.json`). They are not read."""
        return self._source.unindexed

    @without_torch_modes()
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
        """Read a tensor, or a box of it. Only the chunks that overlap the box are fetched.

        Args:
            name: the name of the tensor.
            box: the part to read. Default: the whole tensor.
            out: a tensor to read into, with the sizes of the box. Its dtype and device may differ from the stored ones.
                Default: a new tensor.
            dtype: the dtype of the new tensor. Default: the stored dtype. Reading float32 that was saved with
                codec "zstd" as bfloat16 fetches only the heads, about a third of the uncompressed bytes; the result is
                the same as a cast.
            device: the device of the new tensor. Default: the CPU.
            budget_bytes, max_over_read: see `reshard.load`.

        Returns:
            `out`, or the new tensor.

        Raises:
            MissingTensorError, ShapeMismatchError, DtypeError, DestinationError: the arguments do not fit the tensor.
            ArgumentError: an argument is not valid, such as a device that this machine does not have.
            DtypeError, UnsupportedFormatError, CorruptCheckpointError: the name is in `unreadable`.
            CorruptCheckpointError, StoreError: the bytes cannot be read. `out` is unchanged, unless the message says
                otherwise.
        """
        check_is_tensor(self._source, name)
        _check_box(box)
        check_dtype(dtype)
        to_device = _checked_device(device)
        if out is not None and (reason := missing_memory(out)):
            raise DestinationError(f"{name!r}: out {reason}")
        entry = self._source.entry(name)
        wanted = entry.whole if box is None else box
        if not wanted.fits(entry.shape):
            raise ShapeMismatchError(
                f"{name!r} has shape {entry.shape}, and {wanted} is not inside it: pass a box inside the shape"
            )
        self._source.index([WantedBox(name, wanted)])  # checks the metadata before a tensor of this size is allocated
        if out is None:
            out = torch.empty(wanted.sizes, dtype=dtype or torch_dtype(entry.dtype), device=to_device)
        elif tuple(out.shape) != wanted.sizes:
            raise ShapeMismatchError(
                f"{name!r}: out has shape {tuple(out.shape)}, but the box {wanted} has {wanted.sizes}: pass an out "
                "with these sizes"
            )
        elif dtype not in (None, out.dtype):
            raise DestinationError(
                f"{name!r}: out has dtype {out.dtype}, but dtype={dtype} was passed: omit one of them"
            )
        elif device is not None and to_device != out.device:
            raise DestinationError(
                f"{name!r}: out is on {out.device}, but device={str(device)!r} was passed: omit one of them"
            )
        options = ReadOptions(budget_bytes=budget_bytes, max_over_read=max_over_read)
        finish_writes("Checkpoint.read", [out])
        read_boxes(self._source, [WantedBox(name, wanted)], [out], options=options)
        return out

    @without_torch_modes()
    def read_value(self, name: str, *, allow_pickle: bool = False, budget_bytes: int | None = None) -> Any:
        """Read a value that is not a tensor.

        Args:
            allow_pickle, budget_bytes: see `reshard.load`.

        Raises:
            ArgumentError: the value has more bytes than `budget_bytes`.
            DestinationError: the name is a tensor.
            MissingTensorError: the checkpoint has no such name.
            UnsafeValueError: the value is pickled in a way that torch.load(weights_only=True) refuses, and
                `allow_pickle` is False.
        """
        if self._source.entry(name).is_tensor:
            raise DestinationError(f"{name!r} is a tensor: read it with read()")
        check_nbytes(budget_bytes=budget_bytes)
        check_values(self._source, [name], budget_bytes)
        [read] = ValueBuffer.of(self._source, [name])
        read_boxes(self._source, read.wants, read.tensors, options=ReadOptions(budget_bytes=budget_bytes))
        return read.value(allow_pickle=allow_pickle)

    @without_torch_modes()
    def plan(
        self,
        layout: Layout,
        *,
        include: Patterns = "*",
        exclude: Patterns = (),
        rename: Mapping[str, str] | None = None,
        max_over_read: float | None = None,
        costs: RequestCosts | None = None,
        cooperative: bool | Literal["auto"] = False,
    ) -> RankPlans:
        """Plan what every rank of a layout would read. This reads metadata only.

        Args:
            include, exclude, rename: the tensors to plan for; see `load_rank`.
            max_over_read: see `reshard.load`.
            costs: the costs of requests to another store, to plan for that store. Default: those of this checkpoint's
                store, as far as they are known.
            cooperative: True to plan for ranks that share the read, as with `reshard.load(cooperative=True)`. The
                plans then show what each rank sends and receives. "auto" shares it if that is estimated to save time,
                which is never the case on a disk. False, the default, suits `load_rank`, which needs no other ranks.

        Raises:
            MissingTensorError: a pattern matches no name; see `load_rank`.
            ArgumentError, LayoutError: the arguments do not fit the checkpoint.
            DtypeError, UnsupportedFormatError, CorruptCheckpointError: a selected name is in `unreadable`.
            StoreError: the metadata cannot be read.
        """
        selection = Selection.of(include, exclude, rename)
        self._check_layout(layout, selection)
        check_cooperative(cooperative)
        if costs is not None and not (math.isfinite(costs.latency_s) and 0 < costs.bytes_per_s < math.inf):
            raise ArgumentError(f"the latency and the bandwidth of costs must be finite numbers, got {costs}")
        check_readable(self._source, selection.includes)
        entries = self._selected_tensors(selection)
        index = self._source.index(WantedBox(entry.name, entry.whole) for entry in entries.values())
        limits = self._source.gap_limits(max_over_read, costs)
        speed = (costs or REMOTE_COSTS).bytes_per_s
        if costs is None and not may_share(self._source, cooperative):
            cooperative = False
        plans = plan_ranks(index, layout, entries, limits, self.location, cooperative, speed)
        self._warn_of_layout(layout, selection, entries)
        return plans

    def _selected_tensors(self, selection: Selection, may_miss: Sequence[str] = ()) -> dict[str, Entry]:
        """Return the selected tensors by their new names. Raises MissingTensorError, ArgumentError."""
        tensors = {entry.name: entry for entry in self._source.entries if entry.is_tensor}
        values = [name for name in self.value_names if selection.includes(name)]
        if values and not any(map(selection.includes, tensors)):
            if not tensors:
                raise MissingTensorError(f"{self.location} has no tensors, only values such as {values[0]!r}")
            raise MissingTensorError(f"{values[0]!r} is a value, not a tensor: read it with read_value")
        includable = [*tensors, *self._source.unreadable]
        selection.check([*includable, *self.value_names], may_miss=may_miss, includable=includable)
        return {new: tensors[name] for new, name in selection.select(tensors).items()}

    def _check_layout(self, layout: object, selection: Selection) -> None:
        """Check that a layout fits the tensors of the checkpoint, selected or not. Raise ArgumentError, LayoutError."""
        if not isinstance(layout, Layout):
            raise ArgumentError(f"layout must be a reshard.Layout, got {layout!r}")
        check_layout_fits(layout, self._new_names(selection))

    def _new_names(self, selection: Selection) -> list[str]:
        """Return the names of all tensors in the layout."""
        return list(map(selection.new_name, [*self._tensors, *self._source.unreadable]))

    def _warn_of_layout(self, layout: Layout, selection: Selection, selected: Iterable[str]) -> None:
        """Warn on rank 0 if a layout does not fit the tensors of the checkpoint, selected or not.

        Args:
            selected: the names of the selected tensors, in the layout.
        """
        if rank_of(None) == 0:
            warn_of_layout(layout, self._new_names(selection), self.location)
            warn_of_selection(layout, selected)

    @without_torch_modes()
    def shards_of(self, name: str) -> tuple[list[Box], tuple[int, ...]]:
        """Return the shards that a tensor was saved as, and the number of parts that each dimension is cut into.

        Raises:
            MissingTensorError: the checkpoint has no tensor of this name.
            CorruptCheckpointError, StoreError: the metadata cannot be read.
        """
        entry = self._source.entry(name)
        index = self._source.index([WantedBox(name, entry.whole)])
        return index.shards_of(index.position(name)), entry.grid.parts

    @without_torch_modes()
    def load_rank(
        self,
        layout: Layout,
        rank: int,
        *,
        include: Patterns = "*",
        exclude: Patterns = (),
        rename: Mapping[str, str] | None = None,
        allow_missing: Patterns = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        budget_bytes: int | None = None,
        max_over_read: float | None = None,
        progress: OnProgress = False,
    ) -> dict[str, torch.Tensor]:
        """Read the local tensors of one rank of a layout. This needs no process group.

        Args:
            layout: which part of each tensor each rank holds. Rank 0 logs a warning if a pattern of its rules matches
                no tensor of the checkpoint.
            rank: the rank whose tensors are read, from 0 to `layout.world_size - 1`.
            include: patterns of the names to read. `*` matches any text, and "model" also matches every name below it,
                such as "model.w". `?` and `[...]` are special, too, as in `fnmatch`: `glob.escape(name)` matches a name
                that contains them.
            exclude: patterns of names that are not read, even if `include` matches them.
            rename: patterns of names and what the tensors are called instead; see `reshard.load`. The rules of the
                layout apply to the new names.
            allow_missing: patterns of names that are skipped if they are missing or cannot be read (see
                `unreadable`).
            dtype: the dtype of floating-point tensors with at least one dimension. Default: the stored dtype. Reading
                float32 that was saved with codec "zstd" as bfloat16 fetches only the heads: about a third of the
                uncompressed bytes.
            device: the device of the tensors. Default: the CPU.
            budget_bytes, max_over_read, progress: see `reshard.load`.

        Returns:
            The rank's local tensors by their new names.

        Raises:
            MissingTensorError: a pattern of `include` matches no tensor, one of `exclude` no name, or one of `rename`
                no selected name.
            ArgumentError, LayoutError, DtypeError: the arguments do not fit the checkpoint, or the layout cuts a
                quantised weight and its scales at different places.
            DtypeError, UnsupportedFormatError, CorruptCheckpointError: a name that the rank would hold is in
                `unreadable`.
            CorruptCheckpointError, StoreError: the bytes cannot be read.
        """
        selection, may_miss = Selection.of(include, exclude, rename), patterns_of("allow_missing", allow_missing)
        check_dtype(dtype)
        to_device = _checked_device(device)
        check_progress(progress)
        self._check_layout(layout, selection)

        def is_held(name: str) -> bool:
            is_wanted = selection.includes(name) and not matches_any(may_miss, name)
            return is_wanted and layout.holds(selection.new_name(name), rank)

        check_readable(self._source, is_held)
        tensors: dict[str, torch.Tensor] = {}
        stored: dict[str, torch.dtype] = {}
        wants: list[WantedBox] = []
        views: list[torch.Tensor] = []
        entries = self._selected_tensors(selection, may_miss)
        check_scale_layouts(layout, entries)
        held_tensors = rank_tensors(entries, layout, rank)
        self._warn_of_layout(layout, selection, entries)
        self._source.index(want for held in held_tensors for want in held.wants)
        for held in held_tensors:
            stored[held.name] = torch_dtype(held.entry.dtype)
            to = weight_dtype(stored[held.name], held.entry.shape, dtype)
            local = torch.empty(held.local.shape, dtype=to, device=to_device)
            tensors[held.name] = local
            for want, at in zip(held.wants, held.local.local_offsets, strict=True):
                wants.append(want)
                views.append(local[Box(at, want.box.sizes).slices])
        draws = rank_of(None) == 0
        with Meter("load", progress, location=self.location, rank=rank, draws=draws) as meter:
            options = ReadOptions(rank, budget_bytes, max_over_read, meter=meter)
            read_boxes(self._source, wants, views, options=options)
        rounded = [name for name, local in tensors.items() if loses_bits(stored[name], local.dtype)]
        if rounded and draws:
            logger.info("%d tensors were cast to fewer bits, to %s: %s, ...", len(rounded), dtype, rounded[0])
        return tensors

    @without_torch_modes()
    def state_dict(
        self,
        *,
        include: Patterns = "*",
        exclude: Patterns = (),
        allow_pickle: bool = False,
        device: torch.device | str | None = None,
        budget_bytes: int | None = None,
        max_over_read: float | None = None,
        progress: OnProgress = False,
    ) -> dict[Any, Any]:
        """Read whole tensors and values into the nested dicts and lists that they were saved from.

        Names stay flat if the format does not record the nesting (safetensors). DCP turns all keys into strings. A list
        becomes a dict if some of its items are missing: because they are not read, or because DCP saves no empty dicts.

        Args:
            include, exclude: patterns of the names to read; see `load_rank`.
            allow_pickle, budget_bytes, max_over_read, progress: see `reshard.load`.
            device: the device of the tensors. Default: the CPU.

        Raises:
            MissingTensorError: a pattern of `include` or `exclude` matches no name.
            ArgumentError: an argument is not valid.
            DtypeError, UnsupportedFormatError, CorruptCheckpointError: a selected name is in `unreadable`.
            UnsafeValueError: a value needs `allow_pickle`.
            CorruptCheckpointError, StoreError: the bytes cannot be read.
        """
        selection = Selection.of(include, exclude)
        check_readable(self._source, selection.includes)
        selection.check([*(entry.name for entry in self._source.entries), *self._source.unreadable])
        entries = [entry for entry in self._source.entries if selection.includes(entry.name)]
        value_names = [entry.name for entry in entries if not entry.is_tensor]
        held = [entry for entry in entries if entry.is_tensor]
        wants = [WantedBox(entry.name, entry.whole) for entry in held]
        check_nbytes(budget_bytes=budget_bytes)
        to_device = _checked_device(device)
        check_progress(progress)
        check_values(self._source, value_names, budget_bytes)
        # Reads and checks all metadata before tensors of these sizes are allocated.
        self._source.index([*wants, *whole_wants(self._source, value_names)])
        stored_values = ValueBuffer.of(self._source, value_names)
        tensors = [torch.empty(entry.shape, dtype=torch_dtype(entry.dtype), device=to_device) for entry in held]
        with Meter("load", progress, location=self.location, rank=rank_of(None)) as meter:
            options = ReadOptions(budget_bytes=budget_bytes, max_over_read=max_over_read, meter=meter)
            read_boxes(self._source, wants, tensors, stored_values, options)
        values: dict[str, Any] = {want.name: tensor for want, tensor in zip(wants, tensors, strict=True)}
        values |= zip(value_names, decode_all(stored_values, allow_pickle=allow_pickle), strict=True)
        return nest({entry.name: values[entry.name] for entry in entries}, self._source.paths)

    def lazy(
        self,
        *,
        process_group: dist.ProcessGroup | None = None,
        cooperative: bool | Literal["auto"] = "auto",
        budget_bytes: int | None = None,
        max_over_read: float | None = None,
        progress: OnProgress = False,
    ) -> LazyWeights:
        """Return the tensors without their values, to be copied by ordinary torch code.

        Inside a `with` block, slicing, views, casts, `torch.cat`, `torch.stack` and `copy_` are recorded. At the end of
        the block, one plan reads the byte ranges of exactly those slices, straight into the destinations:

            with checkpoint.lazy() as weights:
                q, k = weights["q.weight"], weights["k.weight"]
                layer.qk.weight.data[:64].copy_(q.narrow(0, rank * 64, 64))
                layer.qk.weight.data[64:].copy_(k.narrow(0, rank * 64, 64))

        Args:
            process_group: ranks that share their reads. All of them must enter the block, call `fill` equally often,
                and leave the block; if one fails, all raise its error. Default: each rank reads by itself.
            cooperative: whether the ranks of `process_group` read once what several of them need; see `reshard.load`.
            budget_bytes, max_over_read, progress: see `reshard.load`.

        Raises:
            ArgumentError: the checkpoint is closed, or an argument is not valid.
        """
        from .lazy.recorder import LazyOptions
        from .lazy.weights import LazyWeights

        check_nbytes(budget_bytes=budget_bytes)
        check_progress(progress)
        check_cooperative(cooperative)
        check_process_group(process_group)
        if process_group is not None:
            check_member(process_group)
        self._source.gap_limits(max_over_read)  # checks the argument
        options = LazyOptions(budget_bytes, max_over_read, progress, process_group, cooperative)
        return LazyWeights(lambda: self._source, options)

    @without_torch_modes()
    def verify(self, *, quick: bool = False, progress: OnProgress = False) -> list[DamagedChunk]:
        """Read the whole checkpoint and return the chunks that are damaged or missing.

        Other formats have no checksums of chunks. Shards of DCP and torch.save files are compared with the CRC-32s of
        their zip records, which torch writes unless `torch.serialization.set_crc32_options` turns them off. Of
        safetensors files, only the sizes are checked.

        Names in `damaged` are in the result too. Other names in `unreadable` are only checked in a native checkpoint.

        Args:
            quick: check only the sizes of the objects. One entry of the result may then cover several chunks.
            progress: True for a progress bar, or a function that is called with a `Progress`.

        Raises:
            StoreError: the store failed, other than by not having an object.
        """
        check_progress(progress)
        missing = [
            DamagedChunk(name, Box((), ()), found.object, 0, 0, found.reason)
            for name, found in self._source.unreadable.items()
            if found.is_damage
        ]
        source = self._source
        return missing + verify(source.store, source.index(), quick=quick, records=source.records, progress=progress)

    def __repr__(self) -> str:
        if self._opened is None:
            return "Checkpoint(closed)"
        stored = sum(tensor.stored_bytes for tensor in self._tensors.values())
        return (
            f"Checkpoint({self.location!r}, {self.format}: {counted(len(self._tensors), 'tensor')}, "
            f"{counted(len(self.value_names), 'value')}, {stored / 1e6:.1f} MB stored"
            + (f"; {counted(len(self._source.unreadable), 'name')} cannot be read" if self._source.unreadable else "")
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


def warn_of_selection(layout: Layout, selected: Iterable[str]) -> None:
    """Log a warning if no rule of a layout matches a selected tensor, so that all of them are replicated."""
    selected = list(selected)
    if layout.rules and selected and len(unused_rules(layout, selected)) == len(layout.rules):
        logger.warning(
            "no pattern of the layout matches a selected tensor, so none of them is sharded: %s",
            quoted(selected),
        )


def warn_of_layout(layout: Layout, names: Iterable[str], location: str) -> None:
    """Log warnings if rules or stages of a layout match none of the tensors of a checkpoint, or stages are missing."""
    names = list(names)
    if layout.has_empty_rules and layout.world_size > 1:
        logger.warning(
            "the rules of the layout are empty, so each of %d ranks reads every tensor of %s whole: pass rules, which "
            "tp_plan has only if config.json has a plan",
            layout.world_size,
            location,
        )
    if unused := unused_rules(layout, names):
        logger.warning(
            "%d of %d patterns of the layout match no tensor of %s: %s; a tensor that no pattern matches is replicated",
            len(unused),
            len(layout.rules),
            location,
            quoted(unused),
        )
    if unknown := sorted({name for name, _ in layout.stages}.difference(names)):
        logger.warning(
            "%d of %d names in the stages of the layout are not in %s: %s",
            len(unknown),
            len(layout.stages),
            location,
            quoted(unknown),
        )
    if not layout.stages and dict(zip(layout.mesh.names, layout.mesh.sizes, strict=True)).get("pp", 1) > 1:
        logger.warning(
            'the mesh has the dimension "pp", but the layout has no stages, so every rank holds the tensors of all '
            "stages: pass stages=, for example from reshard.layout.even_stages"
        )


def _checked_device(device: torch.device | str | None) -> torch.device:
    """Return a device; None is the CPU. Raise ArgumentError if there is no such device."""
    try:
        return torch.empty(0, device="cpu" if device is None else device).device
    except Exception as error:  # a torch without CUDA raises AssertionError
        raise ArgumentError(f"device={str(device)!r} cannot be used: {reason(error)}") from error


def _check_box(box: object) -> None:
    if box is not None and not (
        isinstance(box, Box) and all(isinstance(n, numbers.Integral) for n in (*box.offsets, *box.sizes))
    ):
        raise ArgumentError(f"box must be a reshard.Box of integers, got {box!r}")


def open_checkpoint(
    uri: str | os.PathLike[str] | Store,
    *,
    storage_options: Mapping[str, Any] | None = None,
    format: str | None = None,
) -> Checkpoint:
    """Open a checkpoint of any format for reading. This reads its metadata and needs no process group.

    Args:
        uri: a path, a URI that fsspec can open, or a Store.
        storage_options: options for fsspec.
        format: "reshard", "dcp", "safetensors" or "torch". Default: detect the format.

    Raises:
        CheckpointNotFoundError, NotCommittedError: there is no checkpoint.
        CorruptCheckpointError, UnsupportedVersionError, UnsupportedFormatError: it cannot be read.
        StoreError, UnsupportedURIError: the location cannot be read.
    """
    source = open_source(uri, storage_options, format)
    location = uri if isinstance(uri, Store) else absolute_location(os.fspath(uri))
    return Checkpoint(source, _Arguments(location, storage_options, format))


@dataclass(frozen=True, slots=True)
class _Arguments:
    """What a checkpoint was opened with."""

    uri: str | Store = field(repr=False)  # these may contain secrets
    storage_options: Mapping[str, Any] | None = field(repr=False)
    format: str | None


def _opened_again(arguments: _Arguments, fingerprint: str) -> Checkpoint:
    """Open a checkpoint that was pickled."""
    checkpoint = open_checkpoint(arguments.uri, storage_options=arguments.storage_options, format=arguments.format)
    if checkpoint._source.fingerprint() != fingerprint:
        location = checkpoint.location
        checkpoint.close()
        raise CorruptCheckpointError(f"the checkpoint at {location} was replaced after it had been pickled")
    return checkpoint
