"""StorageWriter and StorageReader of torch.distributed.checkpoint: DCP plans, reshard stores.

DCP's planners decide what is written and read, and its collectives carry plans and results between ranks. Each rank's
items become a data object, or several; the coordinator makes the manifest of what all ranks wrote, and puts it last.
"""

from __future__ import annotations

import datetime
import io
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed.checkpoint.storage as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
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
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.tensor import DTensor
from torch.futures import Future

from ..planner.box import Box
from ..planner.chunk_reads import Want
from ..planner.entries import Kind
from ..planner.errors import CheckpointError
from .errors import ArgumentError, CorruptCheckpointError, UnsupportedValueError
from .formats.detect import open_source
from .formats.native.codec import check_codec
from .formats.native.commit import commit, refuse_if_there
from .formats.native.manifest import encode_manifest
from .formats.native.write_records import ObjectRecord, assemble_index
from .formats.source import Source
from .formats.value_codec import EncodedValue, encode_value, needs_pickle, torch_save
from .reading.read_tensors import ReadOptions, counting_metadata, read_boxes
from .reading.value_reads import ValueRead
from .runtime.limits import check_budget
from .runtime.logs import logger_of
from .runtime.process_group import (
    Alarm,
    Arrivals,
    OpenedCheckpoint,
    check_same_checkpoint,
    is_distributed,
    raises_portable,
    rank_of,
)
from .runtime.progress import Meter
from .runtime.reports import RankReport
from .runtime.threads import cleaning_up
from .runtime.torch_modes import undisturbed
from .stores.base import Store
from .stores.open import open_store
from .stores.retry import without_retries
from .tensors.distributed_tensors import refuse_misplaced, waited
from .tensors.dtypes import dtype_name, torch_dtype
from .tensors.name_patterns import quoted
from .tensors.state_dict import path_for_dcp
from .tensors.tensor_classes import as_plain, check_storable, is_whole, overrides_dispatch
from .version import __version__
from .writing.agreement import ValueDescription, agreed_paths
from .writing.object_layout import ShardToWrite, part_of
from .writing.object_writer import write_objects

logger = logger_of(__name__)
Location = str | os.PathLike[str] | Store


TARGET_METHODS = ("resolve_tensor", "lookup_tensor", "transform_tensor", "commit_tensor")
"""Of a LoadPlanner: what decides which tensors are read into."""


class StorageWriter(dcp.StorageWriter):
    """Writes a checkpoint in reshard's format, under any SavePlanner of DCP.

    Args:
        uri: a path or a URI that fsspec opens, or a Store.
        codec: "zstd" compresses; "none" stores values as they are, so that parts of a chunk can be read.
        storage_options: passed to fsspec.
        overwrite: whether a checkpoint that is there may be replaced, as DCP's own writers do. It stays readable
            until the new one is committed, and its data is removed after that. Checkpoints of other tools, and
            unfinished conversions, are never replaced: the save raises CheckpointExistsError.
        allow_pickle, budget_bytes: as of `reshard.save`.
    """

    def __init__(
        self,
        uri: Location,
        *,
        codec: str = "zstd",
        storage_options: Mapping[str, Any] | None = None,
        overwrite: bool = True,
        allow_pickle: bool = True,
        budget_bytes: int | None = None,
    ) -> None:
        check_codec(codec)
        check_budget(budget_bytes)
        self.checkpoint_id: Location = uri
        self.save_id = uuid.uuid4().hex
        self._codec = codec
        self._storage_options = storage_options
        self._overwrite = overwrite
        self._allow_pickle = allow_pickle
        self._budget_bytes = budget_bytes
        self._rank = 0
        self._opened: Store | None = None
        self._written: list[ObjectRecord] = []
        self.alarm = Alarm(alone=True)
        """What `reshard.save` gives, so that ranks stop when another has failed."""
        self.arrivals: Arrivals | None = None
        """As `alarm`: which ranks have written."""
        self.meter = Meter("save")
        """As `alarm`: what shows how far it is."""
        self.planned_at = 0.0
        """When DCP's planning was done, by `time.perf_counter`."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self.checkpoint_id = checkpoint_id
            self._opened = None
        self.save_id = uuid.uuid4().hex
        self._written = []

    @raises_portable
    @undisturbed()
    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if not kwargs.get("use_collectives", True):
            raise ArgumentError("reshard commits a checkpoint once for all ranks: it needs use_collectives=True")
        self._rank = kwargs.get("rank", rank_of(None))
        if is_coordinator:
            refuse_if_there(self._store(), overwrite=self._overwrite)

    def _store(self) -> Store:
        if self._opened is None:
            self._opened = open_store(self.checkpoint_id, self._storage_options)
        return self._opened

    def __getstate__(self) -> dict[str, Any]:
        """What is sent to another process, which opens a store of its own."""
        return {**self.__dict__, "_opened": None}

    @undisturbed()
    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Describe the values, before the planner has each replica written by one rank."""
        return replace(plan, storage_data=_described(plan))

    @raises_portable
    @undisturbed()
    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        agreed_paths([plan.storage_data or {} for plan in plans])
        return [replace(plan, storage_data=None) for plan in plans]

    @raises_portable
    @undisturbed()
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[dcp.WriteResult]]:
        begin = time.perf_counter()
        self.planned_at = begin
        if not getattr(planner, "holds_boxes", False):
            state = getattr(planner, "state_dict", {})
            refuse_misplaced(state)
            for name in {item.index.fqn for item in plan.items}:
                if isinstance(tensor := state.get(name), DTensor) and is_whole(tensor._local_tensor):
                    check_storable(name, tensor._local_tensor)
        shards = [_shard_to_write(item, planner) for item in plan.items]
        pickled = self._pickled(shards)
        self.meter.location = self._store().location
        self.meter.expect(sum(shard.nbytes for shard in shards))
        with self.alarm, self.meter:
            self._written = write_objects(
                self._store(),
                f"{self._rank:05}",
                shards,
                self._codec,
                budget_bytes=self._budget_bytes,
                interrupt=self.meter.watching(self.alarm.check),
                failed=self.alarm.sound,
                wrote=self.meter.add,
            )
        if self.arrivals is not None:
            self.arrivals.arrive()
        results = [dcp.WriteResult(item.index, 0, None) for item in plan.items]
        if results:
            written = sum(record.nbytes for record in self._written)
            records = self._written, time.perf_counter() - begin, pickled
            results[0] = dcp.WriteResult(plan.items[0].index, written, records)
        future: Future[list[dcp.WriteResult]] = Future()
        future.set_result(results)
        return future

    def _pickled(self, shards: Sequence[ShardToWrite]) -> list[str]:
        """The objects that can only be loaded with `allow_pickle=True`. Raises UnsupportedValueError, where strict."""
        named = [
            shard.name
            for shard in shards
            if shard.kind is Kind.TORCH_SAVE and needs_pickle(shard.kind, bytes(shard.load(shard.box).numpy()))
        ]
        if named and not self._allow_pickle:
            raise UnsupportedValueError(
                f"{quoted(named)} needs pickle, and this save has allow_pickle=False: "
                "use plain data instead, or leave it out"
            )
        return named

    @raises_portable
    @undisturbed()
    def finish(self, metadata: Metadata, results: list[list[dcp.WriteResult]]) -> None:
        by_rank = [rank[0].storage_data if rank else ([], 0.0, []) for rank in results]
        records = [record for records, _, _ in by_rank for record in records]
        index = assemble_index(records, _empty_tensors(metadata, records))
        paths = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
        info = {
            "writer": f"reshard {__version__}",
            "torch": torch.__version__,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "codec": self._codec,
            "ranks": len(results),
            "save_id": self.save_id,
        }
        manifest = encode_manifest(index, paths, info)
        reports = [_report(rank, *written) for rank, written in enumerate(by_rank)]
        reports[self._rank]["bytes_written"] += len(manifest)
        reports[self._rank]["requests"] += 1
        pickled = sorted(name for _, _, names in by_rank for name in names)
        differing = metadata.storage_data or []
        reports[self._rank]["differing"] = tuple(differing)
        metadata.storage_data = reports
        if pickled:
            logger.warning(
                "%d objects can only be loaded with allow_pickle=True, which may run code: %s",
                len(pickled),
                quoted(pickled),
            )
        if differing:
            logger.warning(
                "%d values differ between the ranks that hold them, and those of the lowest rank are stored: %s. Give "
                "each rank a name of its own for what belongs to it alone, as a random state",
                len(differing),
                quoted(differing),
            )
        commit(self._store(), manifest, {name for name, _ in index.objects}, overwrite=self._overwrite, rank=self._rank)

    def discard(self) -> None:
        """Remove what this rank wrote, after a save that was not committed; as far as the store lets it."""
        names = [record.name for record in self._written]
        if names:
            try:
                with cleaning_up():
                    without_retries(self._store()).delete(names)
            except Exception as error:
                logger.warning("data objects of a failed save remain, %s: %s", ", ".join(names), error)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return _can_open(checkpoint_id)

    def storage_meta(self) -> StorageMeta | None:
        checkpoint_id = self.checkpoint_id
        location = checkpoint_id.location if isinstance(checkpoint_id, Store) else checkpoint_id
        return StorageMeta(location, save_id=self.save_id)


class StorageReader(dcp.StorageReader):
    """Reads a checkpoint of any format, under any LoadPlanner of DCP.

    Args:
        uri: a path or a URI that fsspec opens, or a Store.
        storage_options: passed to fsspec.
        allow_pickle: hand pickled objects to the planner even where torch.load(weights_only=True) refuses them.
            The planner may run the code in them.
        budget_bytes, max_over_read, format: as of `reshard.load`.
    """

    def __init__(
        self,
        uri: Location,
        *,
        storage_options: Mapping[str, Any] | None = None,
        allow_pickle: bool = False,
        budget_bytes: int | None = None,
        max_over_read: float | None = None,
        format: str | None = None,
    ) -> None:
        check_budget(budget_bytes)
        self.checkpoint_id: Location = uri
        self._storage_options = storage_options
        self._allow_pickle = allow_pickle
        self._budget_bytes = budget_bytes
        self._max_over_read = max_over_read
        self._format = format
        self._opened: Source | None = None
        self._rank = 0
        self.load_id = uuid.uuid4().hex
        self.report: RankReport | None = None
        """What the last load did on this rank."""

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
    @undisturbed()
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        source = self._open()
        index = source.index()
        # Names that cannot be read are listed, so that a plan that wants them gets to `read_data`, which says why.
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
    @undisturbed()
    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        source = self._open()
        fingerprint = source.fingerprint() if is_distributed() else ""
        return replace(plan, storage_data=OpenedCheckpoint(source.location, fingerprint))

    @raises_portable
    @undisturbed()
    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        check_same_checkpoint([plan.storage_data for plan in plans])
        return plans

    @raises_portable
    @undisturbed()
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        refuse_misplaced(getattr(planner, "state_dict", {}))
        source = self._open()
        tensors = [item for item in plan.items if item.type is LoadItemType.TENSOR]
        objects = [item for item in plan.items if item.type is LoadItemType.BYTE_IO]
        wanted = {item.storage_index.fqn: None for item in plan.items}
        source.index([Want(name, Box.whole(source.entry(name).shape)) for name in wanted if name not in source.inline])
        blobs = [ValueRead(source, item.storage_index.fqn) for item in objects]
        wants, destinations, commits = _wants(tensors, planner)
        options = ReadOptions(self._rank, self._budget_bytes, self._max_over_read)
        report = read_boxes(source, wants, destinations, blobs, options)
        self.report = counting_metadata(report, source)
        for item, target in commits:
            planner.commit_tensor(item, target)
        for item, blob in zip(objects, blobs, strict=True):
            planner.load_bytes(item, self._for_planner(blob))
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _for_planner(self, blob: ValueRead) -> io.BytesIO:
        """An object as planners expect it, written by torch.save.

        DCP's planner unpickles without an allow-list. What it gets here is written anew from a value that was read
        with one, so that no byte of the checkpoint reaches the unpickler, unless pickle is allowed.
        """
        if self._allow_pickle and blob.kind is Kind.TORCH_SAVE:
            return io.BytesIO(blob.data)
        return io.BytesIO(torch_save(blob.value()))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return _can_open(checkpoint_id)


def _wants(
    items: Sequence[ReadItem], planner: LoadPlanner
) -> tuple[list[Want], list[torch.Tensor], list[tuple[ReadItem, torch.Tensor]]]:
    """What to read, into what, and the items to commit, each with its tensor.

    DCP has an item for each saved shard that a local tensor meets. Where its own planner hands out the tensors, all
    items of one are read as one box: reshard finds the shards itself, and a class with its own dispatch is written
    whole.
    """
    parts: dict[MetadataIndex, list[ReadItem]] = {}
    for item in items:
        parts.setdefault(item.dest_index, []).append(item)
    wants: list[Want] = []
    destinations: list[torch.Tensor] = []
    commits: list[tuple[ReadItem, torch.Tensor]] = []
    for of_one in parts.values():
        whole = _whole_target(of_one, planner)
        if whole is not None:
            box = _read_box(of_one[0])
            begin = tuple(a - b for a, b in zip(box.offsets, of_one[0].dest_offsets, strict=True))
            wants.append(Want(of_one[0].storage_index.fqn, Box(begin, tuple(whole.shape))))
            destinations.append(whole)
            commits += [(item, whole) for item in of_one]
            continue
        for item in of_one:
            target = planner.resolve_tensor(item)
            wants.append(Want(item.storage_index.fqn, _read_box(item)))
            destinations.append(as_plain(target))
            commits.append((item, target))
    return wants, destinations, commits


def _whole_target(items: Sequence[ReadItem], planner: LoadPlanner) -> torch.Tensor | None:
    """The local tensor that items of DCP's own planner make up; None where they do not, or it is another planner's."""
    if not isinstance(planner, DefaultLoadPlanner):
        return None
    kind, own = type(planner), DefaultLoadPlanner
    if any(getattr(kind, method) is not getattr(own, method) for method in TARGET_METHODS):
        return None
    named = planner.state_dict.get(items[0].dest_index.fqn)
    local = named._local_tensor if isinstance(named, DTensor) else named
    if not (isinstance(local, torch.Tensor) and is_whole(local) and overrides_dispatch(local)):
        local = planner.lookup_tensor(items[0].dest_index)
    is_covered = sum(item.lengths.numel() for item in items) == local.numel()
    if not is_covered:
        return None
    return local if overrides_dispatch(local) else as_plain(local)


def _described(plan: SavePlan) -> dict[str, ValueDescription]:
    """What a plan of DCP says of its values. Its paths are known where its planner has flattened the state dict."""
    paths = plan.planner_data if isinstance(plan.planner_data, dict) else {}
    if any(isinstance(path, ValueDescription) for path in paths.values()):  # reshard's own planner has done it
        return {}
    described: dict[str, ValueDescription] = {}
    for item in plan.items:
        name, data = item.index.fqn, item.tensor_data
        path = paths.get(name)
        path = path if isinstance(path, tuple) else (name,)
        if data is None:
            described[name] = ValueDescription(path, "value")
        else:
            kind = "tensor" if item.type is WriteItemType.TENSOR else "sharded tensor"
            dtype = str(data.properties.dtype).removeprefix("torch.")
            described[name] = ValueDescription(path, kind, dtype, tuple(data.size))
    return described


def _can_open(checkpoint_id: str | os.PathLike[str]) -> bool:
    try:
        open_store(checkpoint_id)
    except CheckpointError:
        return False
    return True


def _read_box(item: ReadItem) -> Box:
    origin = item.storage_index.offset or torch.Size([0] * len(item.lengths))
    offsets = tuple(a + b for a, b in zip(origin, item.storage_offsets, strict=True))
    return Box(offsets, tuple(item.lengths))


def _shard_to_write(item: WriteItem, planner: SavePlanner) -> ShardToWrite:
    name = item.index.fqn
    if item.type is WriteItemType.BYTE_IO:
        kind, data = _encoded_value(item, planner)
        return ShardToWrite.of_value(name, kind, data)
    assert item.tensor_data is not None
    chunk = item.tensor_data.chunk
    box = Box(tuple(chunk.offsets), tuple(chunk.sizes))

    dtype = item.tensor_data.properties.dtype

    def load(part: Box) -> torch.Tensor:
        try:
            values = planner.resolve_data(item)
        except CheckpointError:
            raise
        except Exception as error:
            raise UnsupportedValueError(f"{name!r} cannot be stored: {type(error).__name__}: {error}") from error
        assert isinstance(values, torch.Tensor)
        values = waited(values)
        check_storable(name, values)
        return part_of(name, as_plain(values), box, dtype, part)

    return ShardToWrite(name, Kind.TENSOR, dtype, tuple(item.tensor_data.size), box, load)


def _encoded_value(item: WriteItem, planner: SavePlanner) -> tuple[Kind, bytes]:
    """An object as it is stored. DCP's own planner pickles all; what is plain data is asked of it before that."""
    asks_default = isinstance(planner, DefaultSavePlanner) and (
        type(planner).resolve_data is DefaultSavePlanner.resolve_data
        and type(planner).transform_object is DefaultSavePlanner.transform_object
    )
    if asks_default:
        assert isinstance(planner, DefaultSavePlanner)
        value = planner.lookup_object(item.index)
        try:
            return encode_value(value)
        except Exception as error:
            raise UnsupportedValueError(
                f"{item.index.fqn!r}, of {type(value)}, cannot be stored: {type(error).__name__}: {error}"
            ) from error
    resolved = planner.resolve_data(item)
    assert isinstance(resolved, io.BytesIO)
    return resolved.kind if isinstance(resolved, EncodedValue) else Kind.TORCH_SAVE, resolved.getvalue()


def _empty_tensors(metadata: Metadata, records: list[ObjectRecord]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of the tensors that no rank wrote anything of. Raises CorruptCheckpointError."""
    written = {shard.name for record in records for shard in record.shards}
    empty = {}
    for name, entry in metadata.state_dict_metadata.items():
        if name in written:
            continue
        if not isinstance(entry, TensorStorageMetadata) or entry.size.numel():
            raise CorruptCheckpointError(f"no rank wrote {name!r}; the checkpoint was not committed")
        empty[name] = dtype_name(name, entry.properties.dtype), tuple(entry.size)
    return empty


def _report(rank: int, records: list[ObjectRecord], seconds: float, pickled: list[str]) -> dict[str, Any]:
    """A RankReport as plain data: DCP pickles it."""
    stages = {stage: sum(record.seconds[stage] for record in records) for stage in ("encode", "write")}
    report = RankReport(
        rank=rank,
        bytes_needed=sum(record.bytes_needed for record in records),
        bytes_written=sum(record.nbytes for record in records),
        requests=len(records),
        chunks=sum(record.chunks for record in records),
        seconds={**stages, "total": seconds},
        pickled=tuple(pickled),
    )
    return asdict(report)
