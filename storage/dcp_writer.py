"""`StorageWriter` of torch.distributed.checkpoint (DCP): DCP plans a save, reshard writes it.

DCP's planner decides what each rank writes, and its collectives pass plans and results between the ranks. A
`CheckpointWriter` writes, as for `reshard.save`.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
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
from .errors import ArgumentError, BusyError, UnsupportedValueError
from .formats.value_codec import encode_value
from .runtime.devices import synchronize
from .runtime.logs import logger_of
from .runtime.process_group import raises_portable, rank_of
from .runtime.torch_modes import without_torch_modes
from .stores.base import Store
from .stores.open import can_open_store
from .tensors.distributed_tensors import refuse_misplaced, waited
from .tensors.dtypes import dtype_name
from .tensors.state_dict import check_nesting
from .tensors.tensor_classes import as_storable, is_whole
from .writing.agreement import (
    EntryDescription,
    agreed_paths,
    check_same_metadata,
    pack_descriptions,
    unpack_descriptions,
)
from .writing.checkpoint_writer import CheckpointWriter, SaveOptions
from .writing.object_layout import ShardToWrite, part_of
from .writing.object_writer import write_objects

logger = logger_of(__name__)


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
        options = SaveOptions(codec, storage_options, overwrite, allow_pickle, budget_bytes, metadata)
        self._writer = CheckpointWriter(uri, options)
        self._is_writing = False

    @property
    def checkpoint_id(self) -> str | os.PathLike[str] | Store:
        """The location of the checkpoint."""
        return self._writer.uri

    @checkpoint_id.setter
    def checkpoint_id(self, uri: str | os.PathLike[str] | Store) -> None:
        self._reset(uri)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self._reset(checkpoint_id)

    def _reset(self, uri: str | os.PathLike[str] | Store | None) -> None:
        if self._is_writing:
            raise BusyError(
                f"this StorageWriter still writes the checkpoint at {self.storage_meta().checkpoint_id}: wait for the "
                "future of that dcp.async_save first, or use another StorageWriter"
            )
        self._writer.reset(uri)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        self._is_writing = True
        try:
            yield
        finally:
            self._is_writing = False

    @raises_portable
    @without_torch_modes()
    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if not kwargs.get("use_collectives", True):
            raise ArgumentError("reshard commits a checkpoint once for all ranks: pass use_collectives=True")
        if self._writer.has_begun:  # DCP resets a writer that is used again only if it passes a location
            self._reset(None)
        self._writer.rank = kwargs.get("rank", rank_of(None))
        if is_coordinator:
            self._writer.check_may_save()

    @without_torch_modes()
    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Describe the values, before the planner assigns each replica to one rank."""
        described = pack_descriptions(_described(plan))
        return replace(plan, storage_data=(described, self._writer.metadata_json))

    @raises_portable
    @without_torch_modes()
    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        # A custom planner may drop the data.
        kept = {rank: plan.storage_data for rank, plan in enumerate(plans) if plan.storage_data}
        check_same_metadata([metadata for _, metadata in kept.values()])
        first_ranks: dict[bytes, int] = {}
        for rank, (described, _) in kept.items():
            first_ranks.setdefault(described, rank)
        agreed_paths({rank: unpack_descriptions(described) for described, rank in first_ranks.items()})
        return [replace(plan, storage_data=None) for plan in plans]

    @raises_portable
    @without_torch_modes()
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[dcp.WriteResult]]:
        with self._writing(), self._writer.meter:
            written = self._writer.write(self._shards_to_write(plan, planner), write_objects)
        # Only `finish` reads the results. DCP sends them to the coordinator, so one for each rank is enough.
        index = plan.items[0].index if plan.items else MetadataIndex("")
        future: Future[list[dcp.WriteResult]] = Future()
        future.set_result([dcp.WriteResult(index, written.report["bytes_written"], written)])
        return future

    def _shards_to_write(self, plan: SavePlan, planner: SavePlanner) -> list[ShardToWrite]:
        """Return the shards that the final plan of this rank lists. Their values are read when they are written.

        Raises:
            UnsupportedValueError, LayoutError: A tensor or a value cannot be stored.
        """
        state = getattr(planner, "state_dict", {})
        refuse_misplaced(state)
        tensors = {item.index.fqn: state.get(item.index.fqn) for item in plan.items}
        for name, tensor in tensors.items():
            if isinstance(tensor, DTensor) and is_whole(tensor._local_tensor):
                as_storable(name, tensor._local_tensor)
        for device in {tensor.device for tensor in tensors.values() if isinstance(tensor, torch.Tensor)}:
            synchronize(device)  # a planner may compute with the values, in other threads and on other streams
        shards = [_shard_to_write(item, planner) for item in plan.items]
        self._writer.announce(shards)
        return shards

    @raises_portable
    @without_torch_modes()
    def finish(self, metadata: Metadata, results: list[list[dcp.WriteResult]]) -> None:
        tensors = {
            name: (dtype_name(name, entry.properties.dtype), tuple(entry.size))
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        known = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
        if dropped := [name for name, path in known.items() if not isinstance(path, tuple)]:
            logger.warning("the planner's data %s is not saved: reshard stores paths only", quoted(dropped))
        paths = {name: known.get(name) for name in metadata.state_dict_metadata}
        written = [rank[0].storage_data for rank in results]
        with self._writing():
            metadata.storage_data = self._writer.commit(paths, tensors, written)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return can_open_store(checkpoint_id)

    def storage_meta(self) -> StorageMeta:
        checkpoint_id = self.checkpoint_id
        location = checkpoint_id.location if isinstance(checkpoint_id, Store) else checkpoint_id
        return StorageMeta(location, save_id=self._writer.save_id)


def _described(plan: SavePlan) -> dict[str, EntryDescription]:
    """Return descriptions of the values of a DCP plan, with their paths if its planner flattened the state dict."""
    paths = plan.planner_data if isinstance(plan.planner_data, dict) else {}
    described: dict[str, EntryDescription] = {}
    for item in plan.items:
        name, data = item.index.fqn, item.tensor_data
        path = paths.get(name)
        path = path if isinstance(path, tuple) else (name,)
        check_nesting(path)
        if data is None:
            described[name] = EntryDescription(path, "value")
        else:
            kind = "tensor" if item.type is WriteItemType.TENSOR else "sharded tensor"
            dtype = str(data.properties.dtype).removeprefix("torch.")
            described[name] = EntryDescription(path, kind, dtype, tuple(data.size))
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
        if not isinstance(values, torch.Tensor):
            raise _planner_error(name, values, "a tensor")
        values = as_storable(name, waited(values))
        if values.dtype != dtype:
            raise UnsupportedValueError(
                f"{name!r} cannot be stored: the planner's resolve_data returned {values.dtype}, but its plan has "
                f"{dtype}. A planner that casts must also change tensor_data.properties.dtype of the item"
            )
        return part_of(name, values, box, dtype, part)

    return ShardToWrite(name, Kind.TENSOR, dtype, tuple(item.tensor_data.size), box, load)


def _planner_error(name: str, found: object, expected: str) -> UnsupportedValueError:
    return UnsupportedValueError(
        f"{name!r} cannot be stored: the planner's resolve_data returned {type(found).__name__} instead of {expected}"
    )


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
    if not isinstance(resolved, io.BytesIO) or bytes(resolved.getbuffer()[:2]) != b"PK":
        raise _planner_error(item.index.fqn, resolved, "an io.BytesIO with what torch.save writes")
    return Kind.TORCH_SAVE, resolved.getvalue()
