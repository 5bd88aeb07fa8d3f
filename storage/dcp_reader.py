"""`StorageReader`: implements the StorageReader of torch.distributed.checkpoint (DCP).

DCP plans a load, and reshard reads the data.
"""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.storage as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.tensor import DTensor
from torch.futures import Future

from ..planner.box import Box
from ..planner.chunk_reads import WantedBox
from ..planner.entries import Kind
from .errors import ArgumentError, RankError
from .formats.detect import open_source
from .formats.source import Source
from .formats.value_codec import torch_save
from .reading.opening import OpenedCheckpoint, check_same_checkpoint
from .reading.read_tensors import CheckedBoxes, ReadOptions, counting_metadata, execute_reads
from .reading.shared_read import Offer, SharedRead, check_cooperative, may_share
from .reading.value_buffers import ValueBuffer, whole_wants
from .runtime.arguments import check_nbytes
from .runtime.logs import logger_of
from .runtime.process_group import (
    is_distributed,
    raises_portable,
    rank_of,
)
from .runtime.reports import RankReport
from .runtime.torch_modes import without_torch_modes
from .stores.base import Store
from .stores.open import can_open_store
from .tensors.distributed_tensors import refuse_misplaced
from .tensors.dtypes import torch_dtype
from .tensors.state_dict import path_for_dcp
from .tensors.tensor_classes import as_plain, is_whole, overrides_dispatch

logger = logger_of(__name__)
TENSOR_METHODS = ("resolve_tensor", "lookup_tensor", "transform_tensor", "commit_tensor")
"""The methods of a LoadPlanner that decide which tensors are read into."""


class StorageReader(dcp.StorageReader):
    """Reads a checkpoint of any format, with any LoadPlanner of DCP.

    Args:
        uri: a path, a URI that fsspec can open, or a Store.
        storage_options: options for fsspec.
        allow_pickle: pass pickled values to the planner even if torch.load(weights_only=True) refuses them. The planner
            may run the code in them.
        budget_bytes, max_over_read, format: see `reshard.load`.
        cooperative: whether ranks share the read; see `reshard.load`. Only the ranks of the default process group do.
    """

    def __init__(
        self,
        uri: str | os.PathLike[str] | Store,
        *,
        storage_options: Mapping[str, Any] | None = None,
        allow_pickle: bool = False,
        budget_bytes: int | None = None,
        max_over_read: float | None = None,
        format: str | None = None,
        cooperative: bool | Literal["auto"] = "auto",
    ) -> None:
        check_nbytes(budget_bytes=budget_bytes)
        check_cooperative(cooperative)
        self.checkpoint_id: str | os.PathLike[str] | Store = uri
        self._storage_options = storage_options
        self._allow_pickle = allow_pickle
        self._budget_bytes = budget_bytes
        self._max_over_read = max_over_read
        self._format = format
        self._cooperative = cooperative
        self._opened: Source | None = None
        self._rank = 0
        self.load_id = uuid.uuid4().hex
        self.report: RankReport | None = None
        """The report of the last load on this rank."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self.checkpoint_id = checkpoint_id
        self._opened = None
        self.load_id = uuid.uuid4().hex

    def _open(self) -> Source:
        if self._opened is None:
            self._opened = open_source(self.checkpoint_id, self._storage_options, self._format)
        return self._opened

    @raises_portable
    @without_torch_modes()
    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        # A parameter named `kwargs` would tell DCP that ranks have metadata of their own. If one rank fails here, DCP
        # would call this again on that rank, and let it load without the others, which would wait for it.
        self.reset()  # DCP does so only if it passes a location, and this is the first call of every load
        source = self._open()
        index = source.index()
        # Unreadable names are listed, so that a plan with one of them reaches `read_data`, which raises the reason.
        entries: dict[str, Any] = {name: BytesStorageMetadata() for name in (*source.inline, *source.unreadable)}
        for position, entry in enumerate(index.entries):
            if entry.name in source.unreadable:
                continue
            if not entry.is_tensor:
                entries[entry.name] = BytesStorageMetadata()
                continue
            chunks = [
                ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
                for box in index.shards_of(position)
            ]
            properties = TensorProperties(dtype=torch_dtype(entry.dtype))
            entries[entry.name] = TensorStorageMetadata(properties, torch.Size(entry.shape), chunks)
        save_id, version = source.info.get("save_id"), source.info.get("version")
        return Metadata(
            entries,
            planner_data={name: path_for_dcp(path) for name, path in source.paths.items()} or None,
            storage_meta=StorageMeta(source.store.location, save_id=save_id, load_id=self.load_id),
            version=version if isinstance(version, str) else CURRENT_DCP_VERSION,
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._rank = kwargs.get("rank", rank_of(None))

    @raises_portable
    @without_torch_modes()
    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        source = self._open()
        fingerprint = source.fingerprint() if is_distributed() else ""
        opened = OpenedCheckpoint(source.location, fingerprint)
        return replace(plan, storage_data=_LocalData(opened, may_share(source, self._cooperative)))

    @raises_portable
    @without_torch_modes()
    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        local: list[_LocalData] = [plan.storage_data for plan in plans]
        check_same_checkpoint([of_rank.opened for of_rank in local])
        is_default_group = is_distributed() and len(plans) == dist.get_world_size()
        if self._cooperative is True and is_distributed() and not is_default_group:
            raise ArgumentError(
                f"cooperative=True, but {len(plans)} of the {dist.get_world_size()} ranks of the default process group "
                "load: load with all of them, or with reshard.load, which takes a process group"
            )
        shares = is_default_group and len(plans) > 1 and any(of_rank.may_share for of_rank in local)
        return [replace(plan, storage_data=shares) for plan in plans]

    @raises_portable
    @without_torch_modes()
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        # A rank whose own `finish_plan` failed is not here, and the others must not wait for it.
        if plan.storage_data is True and type(planner).finish_plan is DefaultLoadPlanner.finish_plan:
            reading = self._read_together(plan, planner)
        else:
            reading = self._prepare(plan, planner)
            self.report = self._read(reading, self._read_options)
        for item, target in reading.commits:
            planner.commit_tensor(item, target)
        for item, read in reading.values:
            planner.load_bytes(item, self._for_planner(read))
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _prepare(self, plan: LoadPlan, planner: LoadPlanner) -> _Reading:
        """Check that what a plan lists can be read. No tensor is changed."""
        refuse_misplaced(getattr(planner, "state_dict", {}))
        source = self._open()
        tensors = [item for item in plan.items if item.type is LoadItemType.TENSOR]
        values = [item for item in plan.items if item.type is LoadItemType.BYTE_IO]
        source.index(whole_wants(source, {item.storage_index.fqn: None for item in plan.items}))
        of_values = ValueBuffer.of(source, [item.storage_index.fqn for item in values])
        reads = list(zip(values, of_values, strict=True))
        wants, destinations, commits = _wants(tensors, planner)
        return _Reading(CheckedBoxes.of(source, wants, destinations, options=self._read_options), reads, commits)

    @property
    def _read_options(self) -> ReadOptions:
        return ReadOptions(self._rank, self._budget_bytes, self._max_over_read)

    def _read(self, reading: _Reading, options: ReadOptions) -> RankReport:
        values = [read for _, read in reading.values]
        report = execute_reads(self._open(), reading.boxes, values, options)
        return counting_metadata(report, self._open())

    def _read_together(self, plan: LoadPlan, planner: LoadPlanner) -> _Reading:
        """Read, and share the read with the other ranks if it pays. Collective.

        If a rank fails, all ranks raise its error.
        """
        prepared: list[_Reading] = []
        shared_read = SharedRead(self._cooperative, self._budget_bytes)

        def prepare() -> Offer | None:
            prepared.append(self._prepare(plan, planner))
            return shared_read.offer(self._open(), prepared[0].wants)

        def read() -> RankReport:
            options = replace(self._read_options, interrupt=shared_read.alarm.check, shared_read=shared_read)
            return self._read(prepared[0], options)

        try:
            self.report = shared_read.run(prepare, read)[self._rank]
        except RankError as error:
            if error.group_is_broken:
                logger.error("%s", error)  # DCP's next collective fails, too, with an error that names no rank
            raise
        return prepared[0]

    def _for_planner(self, read: ValueBuffer) -> io.BytesIO:
        """Return a value as planners expect it: written by torch.save.

        DCP's planner unpickles without an allow-list. Therefore the value is read with an allow-list and written again.
        No byte of the checkpoint reaches the planner's unpickler, unless pickle is allowed.
        """
        if self._allow_pickle and read.kind is Kind.TORCH_SAVE:
            return io.BytesIO(read.data)
        return io.BytesIO(torch_save(read.value()))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return can_open_store(checkpoint_id)


@dataclass(frozen=True, slots=True)
class _LocalData:
    """What a rank sends to the coordinator with its plan."""

    opened: OpenedCheckpoint
    may_share: bool
    """Whether the read may be shared between ranks."""


@dataclass(frozen=True, slots=True)
class _Reading:
    """What a rank reads."""

    boxes: CheckedBoxes
    values: list[tuple[ReadItem, ValueBuffer]]
    commits: list[tuple[ReadItem, torch.Tensor]]
    """The items to commit after the read, and their tensors."""

    def wants(self) -> list[WantedBox]:
        """Return what this rank may read together with other ranks."""
        return [*self.boxes.direct_wants, *(want for _, read in self.values for want in read.wants)]


def _wants(
    items: Sequence[ReadItem], planner: LoadPlanner
) -> tuple[list[WantedBox], list[torch.Tensor], list[tuple[ReadItem, torch.Tensor]]]:
    """Return the boxes to read, the tensors to read them into, and the items to commit with their tensors.

    DCP has one item for each saved shard that overlaps a local tensor. If its own planner provides the tensors, all
    items of a tensor are read as one box: reshard finds the shards itself, and a tensor subclass with its own dispatch
    must be written whole.
    """
    parts: dict[MetadataIndex, list[ReadItem]] = {}
    for item in items:
        parts.setdefault(item.dest_index, []).append(item)
    wants: list[WantedBox] = []
    destinations: list[torch.Tensor] = []
    commits: list[tuple[ReadItem, torch.Tensor]] = []
    for of_one in parts.values():
        whole = _whole_target(of_one, planner)
        if whole is not None:
            box = _read_box(of_one[0])
            begin = tuple(a - b for a, b in zip(box.offsets, of_one[0].dest_offsets, strict=True))
            wants.append(WantedBox(of_one[0].storage_index.fqn, Box(begin, tuple(whole.shape))))
            destinations.append(whole)
            commits += [(item, whole) for item in of_one]
            continue
        for item in of_one:
            target = planner.resolve_tensor(item)
            wants.append(WantedBox(item.storage_index.fqn, _read_box(item)))
            destinations.append(as_plain(target))
            commits.append((item, target))
    return wants, destinations, commits


def _whole_target(items: Sequence[ReadItem], planner: LoadPlanner) -> torch.Tensor | None:
    """Return the local tensor that the items cover; None if they do not cover it or the planner is a custom one."""
    if not isinstance(planner, DefaultLoadPlanner):
        return None
    kind, own = type(planner), DefaultLoadPlanner
    if any(getattr(kind, method) is not getattr(own, method) for method in TENSOR_METHODS):
        return None
    named = planner.state_dict.get(items[0].dest_index.fqn)
    local = named._local_tensor if isinstance(named, DTensor) else named
    if not (isinstance(local, torch.Tensor) and is_whole(local) and overrides_dispatch(local)):
        local = planner.lookup_tensor(items[0].dest_index)
    is_covered = sum(item.lengths.numel() for item in items) == local.numel()
    if not is_covered:
        return None
    return local if overrides_dispatch(local) else as_plain(local)


def _read_box(item: ReadItem) -> Box:
    origin = item.storage_index.offset or torch.Size([0] * len(item.lengths))
    offsets = tuple(a + b for a, b in zip(origin, item.storage_offsets, strict=True))
    return Box(offsets, tuple(item.lengths))
