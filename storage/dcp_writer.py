"""`StorageWriter` of torch.distributed.checkpoint (DCP): DCP plans a save, reshard writes it.

DCP's planner decides what each rank writes, and its collectives pass plans and results between the ranks. Each rank
writes its items to one or more data objects. The coordinator then writes the manifest, which commits the checkpoint.
"""

from __future__ import annotations

import io
import json
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed.checkpoint.storage as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor
from torch.futures import Future

from ..planner.box import Box
from ..planner.entries import Kind
from ..planner.errors import CheckpointError
from ..planner.text import quoted
from .errors import ArgumentError, CorruptCheckpointError, UnsupportedValueError
from .formats.native.codec import check_codec
from .formats.native.commit import commit, refuse_if_there
from .formats.native.manifest import encode_manifest, info_of_save
from .formats.native.write_records import ObjectRecord, PackedRecords, assemble_index, entries_of
from .formats.user_metadata import plain_metadata
from .formats.value_codec import encode_value, needs_pickle
from .runtime.arguments import check_nbytes
from .runtime.logs import logger_of
from .runtime.process_group import Alarm, raises_portable, rank_of
from .runtime.progress import Meter
from .runtime.reports import RankReport
from .runtime.threads import cleaning_up
from .runtime.torch_modes import undisturbed
from .stores.base import Store
from .stores.open import can_open_store, open_store
from .stores.retry import without_retries
from .tensors.distributed_tensors import refuse_misplaced, waited
from .tensors.dtypes import dtype_name
from .tensors.state_dict import Path
from .tensors.tensor_classes import as_plain, check_storable, is_whole
from .writing.agreement import (
    ValueDescription,
    agreed_paths,
    check_same_metadata,
    pack_descriptions,
    unpack_descriptions,
)
from .writing.object_layout import ShardToWrite, part_of
from .writing.object_writer import write_objects

logger = logger_of(__name__)

WriteObjects = Callable[..., list[ObjectRecord]]
"""A function with the parameters of `write_objects`."""


@dataclass(frozen=True, slots=True)
class Written:
    """What a rank wrote, in plain data, because DCP pickles it."""

    records: PackedRecords
    report: dict[str, Any]
    """The report of the rank."""


@dataclass(frozen=True, slots=True)
class Agreed:
    """What the ranks agreed on before they wrote."""

    paths: Mapping[str, Path | None]
    """The path of each entry that is saved. DCP's planner may know no paths."""
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    """The dtype and shape of each tensor."""
    differing: tuple[str, ...] = ()
    """The names of small entries that differ between ranks."""


class StorageWriter(dcp.StorageWriter):
    """Writes a checkpoint in the native format, with any SavePlanner of DCP.

    Args:
        uri: a path, a URI that fsspec can open, or a Store.
        codec: "zstd" compresses. "none" stores tensors uncompressed, so that parts of a chunk can be read.
        storage_options: options for fsspec.
        overwrite: whether to replace an existing checkpoint, as DCP's own writers do. The old checkpoint can be read
            until the new one is committed; then its data is removed. Checkpoints of other tools and unfinished
            conversions are never replaced: the save raises CheckpointExistsError.
        allow_pickle, budget_bytes, metadata: see `reshard.save`.
    """

    def __init__(
        self,
        uri: str | os.PathLike[str] | Store,
        *,
        codec: str = "zstd",
        storage_options: Mapping[str, Any] | None = None,
        overwrite: bool = True,
        allow_pickle: bool = True,
        budget_bytes: int | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        check_codec(codec)
        check_nbytes(budget_bytes=budget_bytes)
        self.checkpoint_id: str | os.PathLike[str] | Store = uri
        self.save_id = uuid.uuid4().hex
        self._codec = codec
        self._storage_options = storage_options
        self._overwrite = overwrite
        self._allow_pickle = allow_pickle
        self._budget_bytes = budget_bytes
        self._metadata = plain_metadata(metadata)
        self._rank = 0
        self._opened: Store | None = None
        self._written: list[ObjectRecord] = []
        self._seconds = 0.0
        self._pickled: list[str] = []
        self.alarm = Alarm(alone=True)
        """Set by `reshard.save`, so that all ranks stop when one has failed."""
        self.meter = Meter("save")
        """Set by `reshard.save`: shows the progress."""
        self.in_writer_process = False
        """Set by `reshard.async_save`: whether a writer process writes the objects."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self.checkpoint_id = checkpoint_id
            self._opened = None
        self.save_id = uuid.uuid4().hex
        self._written, self._seconds, self._pickled = [], 0.0, []

    @raises_portable
    @undisturbed()
    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if not kwargs.get("use_collectives", True):
            raise ArgumentError("reshard commits a checkpoint once for all ranks: pass use_collectives=True")
        self._rank = kwargs.get("rank", rank_of(None))
        if is_coordinator:
            refuse_if_there(self.store, overwrite=self._overwrite)

    @property
    def store(self) -> Store:
        """The store of the checkpoint, which is opened when it is first needed."""
        if self._opened is None:
            self._opened = open_store(self.checkpoint_id, self._storage_options)
        return self._opened

    @property
    def metadata_json(self) -> str:
        """The metadata of the checkpoint. Equal metadata has the same text."""
        return json.dumps(self._metadata, sort_keys=True)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle. The process that unpickles it opens its own store."""
        return {**self.__dict__, "_opened": None}

    @undisturbed()
    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Describe the values, before the planner assigns each replica to one rank."""
        described = pack_descriptions(_described(plan))
        return replace(plan, storage_data=(described, self.metadata_json))

    @raises_portable
    @undisturbed()
    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        kept = {
            rank: plan.storage_data for rank, plan in enumerate(plans) if plan.storage_data
        }  # a custom planner may drop it
        check_same_metadata([metadata for _, metadata in kept.values()])
        first_ranks: dict[bytes, int] = {}
        for rank, (described, _) in kept.items():
            first_ranks.setdefault(described, rank)
        agreed_paths({rank: unpack_descriptions(described) for described, rank in first_ranks.items()})
        return [replace(plan, storage_data=None) for plan in plans]

    @raises_portable
    @undisturbed()
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[dcp.WriteResult]]:
        with self.meter:
            written = self.write(self.shards_to_write(plan, planner))
        # Only `finish` reads the results. DCP sends them to the coordinator, so one for each rank is enough.
        index = plan.items[0].index if plan.items else MetadataIndex("")
        future: Future[list[dcp.WriteResult]] = Future()
        future.set_result([dcp.WriteResult(index, written.report["bytes_written"], written)])
        return future

    def shards_to_write(self, plan: SavePlan, planner: SavePlanner) -> list[ShardToWrite]:
        """Return the shards that the final plan of this rank lists. Their values are read when they are written.

        Raises:
            UnsupportedValueError, LayoutError: A tensor or a value cannot be stored.
        """
        state = getattr(planner, "state_dict", {})
        refuse_misplaced(state)
        for name in {item.index.fqn for item in plan.items}:
            if isinstance(tensor := state.get(name), DTensor) and is_whole(tensor._local_tensor):
                check_storable(name, tensor._local_tensor)
        shards = [_shard_to_write(item, planner) for item in plan.items]
        self.announce(shards)
        return shards

    def announce(self, shards: Sequence[ShardToWrite]) -> None:
        """Prepare to write shards. Raises UnsupportedValueError if one needs pickle and may not use it."""
        self._pickled = self._names_of_pickled(shards)
        self.meter.expect(sum(shard.nbytes for shard in shards))

    def write(self, shards: Sequence[Any], writing: WriteObjects = write_objects) -> Written:
        """Write shards to new objects.

        Args:
            shards: In the form that `writing` takes.
            writing: Does the work: `write_objects`, or a function that calls it in another process.

        Returns:
            What this rank has written since the save began.

        Raises what `write_objects` raises.
        """
        begin = time.perf_counter()
        with self.alarm:
            records = writing(
                self.store,
                f"{self._rank:05}",
                shards,
                self._codec,
                budget_bytes=self._budget_bytes,
                interrupt=self.meter.watching(self.alarm.check),
                failed=self.alarm.sound,
                wrote=self.meter.add,
            )
        self._written += records
        self._seconds += time.perf_counter() - begin
        return Written(PackedRecords.of(self._written), self._report())

    def _report(self) -> dict[str, Any]:
        """Return the RankReport of this rank as plain data."""
        records = self._written
        stages = {stage: sum(record.seconds[stage] for record in records) for stage in ("encode", "write")}
        report = RankReport(
            rank=self._rank,
            bytes_needed=sum(record.bytes_needed for record in records),
            bytes_written=sum(record.nbytes for record in records),
            requests=len(records),
            chunks=sum(record.chunks for record in records),
            seconds={**stages, "total": self._seconds},
            pickled=tuple(self._pickled),
        )
        return asdict(report)

    def _names_of_pickled(self, shards: Sequence[ShardToWrite]) -> list[str]:
        """Return the names of the values that need pickle. Raises UnsupportedValueError if it is not allowed."""
        names = [
            shard.name
            for shard in shards
            if shard.kind is Kind.TORCH_SAVE and needs_pickle(shard.kind, bytes(shard.load(shard.box).numpy()))
        ]
        if names and not self._allow_pickle:
            raise UnsupportedValueError(
                f"{quoted(names)} needs pickle, and this save has allow_pickle=False: use plain data instead, or leave "
                "it out"
            )
        return names

    @raises_portable
    @undisturbed()
    def finish(self, metadata: Metadata, results: list[list[dcp.WriteResult]]) -> None:
        tensors = {
            name: (dtype_name(name, entry.properties.dtype), tuple(entry.size))
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        known = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
        paths = {name: known.get(name) for name in metadata.state_dict_metadata}
        metadata.storage_data = self.commit(Agreed(paths, tensors), [rank[0].storage_data for rank in results])

    def commit(self, agreed: Agreed, by_rank: Sequence[Written]) -> list[dict[str, Any]]:
        """Write the manifest, which commits the checkpoint.

        Args:
            agreed: what the ranks save.
            by_rank: what each rank wrote.

        Returns:
            The report of each rank, as plain data.

        Raises what `commit` of the native format raises. CorruptCheckpointError: an entry was not written.
        """
        packed = [written.records for written in by_rank]
        written = {entry.name for entries in entries_of(packed).values() for entry in entries}
        empty = {name: tensor for name, tensor in agreed.tensors.items() if name not in written}
        for name in agreed.paths:
            if name not in written and (name not in empty or 0 not in empty[name][1]):
                raise CorruptCheckpointError(f"no rank wrote {name!r}: the checkpoint was not committed")
        index = assemble_index(packed, empty)
        info = info_of_save(self._codec, ranks=len(by_rank), save_id=self.save_id)
        paths = {name: path for name, path in agreed.paths.items() if path is not None}
        manifest = encode_manifest(index, paths, info, self._metadata)
        reports = [written.report for written in by_rank]
        reports[self._rank]["bytes_written"] += len(manifest)
        reports[self._rank]["requests"] += 1
        pickled = sorted(name for report in reports for name in report["pickled"])
        differing = agreed.differing
        reports[self._rank]["differing"] = differing
        if pickled:
            logger.warning(
                "%d values can only be loaded with allow_pickle=True, which can run code: %s",
                len(pickled),
                quoted(pickled),
            )
        if differing:
            logger.warning(
                "%d values differ between ranks; those of the lowest rank are stored: %s. If a value belongs to one "
                "rank only, such as a random state, give it another name on each rank",
                len(differing),
                quoted(differing),
            )
        commit(
            self.store,
            manifest,
            {name for name, _ in index.objects},
            overwrite=self._overwrite,
            rank=self._rank,
            in_writer_process=self.in_writer_process,
        )
        return reports

    def discard(self) -> None:
        """Remove what this rank wrote, after a save that was not committed. Log what cannot be removed."""
        names = [record.name for record in self._written]
        if names:
            try:
                with cleaning_up():
                    without_retries(self.store).delete(names)
            except Exception as error:
                logger.warning("data objects of a failed save remain, %s: %s", ", ".join(names), error)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return can_open_store(checkpoint_id)

    def storage_meta(self) -> StorageMeta | None:
        checkpoint_id = self.checkpoint_id
        location = checkpoint_id.location if isinstance(checkpoint_id, Store) else checkpoint_id
        return StorageMeta(location, save_id=self.save_id)


def _described(plan: SavePlan) -> dict[str, ValueDescription]:
    """Return descriptions of the values of a DCP plan, with their paths if its planner flattened the state dict."""
    paths = plan.planner_data if isinstance(plan.planner_data, dict) else {}
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
    """Return a value as it is stored.

    DCP's own planner pickles every value. Therefore this takes the value from the planner before that.
    """
    is_default = isinstance(planner, DefaultSavePlanner) and (
        type(planner).resolve_data is DefaultSavePlanner.resolve_data
        and type(planner).transform_object is DefaultSavePlanner.transform_object
    )
    if is_default:
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
    return Kind.TORCH_SAVE, resolved.getvalue()
