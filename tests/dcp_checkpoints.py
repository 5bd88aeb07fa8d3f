"""DCP checkpoints without ranks: saved in one process, or assembled from shards."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from reshard.planner.box import Box
from reshard.storage.stores.memory import MemoryStore

METADATA = ".metadata"


class OfRank(FileSystemWriter):
    """Writes what one of several ranks writes without collectives."""

    def __init__(self, path: str, number: int, **options: Any) -> None:
        super().__init__(path, sync_files=False, **options)
        self._number = number

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_writer(is_coordinator, rank=self._number, use_collectives=False)

    def _metadata_exists(self) -> bool:
        return False


def torch_saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def put_together(
    tensors: Mapping[str, tuple[torch.Tensor, Sequence[Box]]],
    objects: dict[str, object] | None = None,
    change: Callable[[Metadata], object] = lambda metadata: None,
) -> MemoryStore:
    """Return a checkpoint of tensors in shards. The i-th shard of each tensor is in the file of rank i.

    Args:
        change: A change to the metadata before it is pickled.
    """
    store = MemoryStore()
    files: dict[str, bytes] = {}
    metadata = Metadata({}, storage_data={})

    def add(index: MetadataIndex, rank: int, data: bytes) -> None:
        name = f"__{rank}_0.distcp"
        begin = len(files.setdefault(name, b""))
        files[name] += data
        metadata.storage_data[index] = _StorageInfo(name, begin, len(data))

    for name, (values, parts) in tensors.items():
        chunks = [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in parts]
        properties = TensorProperties(values.dtype)
        metadata.state_dict_metadata[name] = TensorStorageMetadata(properties, values.shape, chunks)
        for rank, box in enumerate(parts):
            add(MetadataIndex(name, box.offsets, rank), rank, torch_saved(values[box.slices].clone()))
    for name, value in (objects or {}).items():
        metadata.state_dict_metadata[name] = BytesStorageMetadata()
        add(MetadataIndex(name), 0, torch_saved(value))
    change(metadata)
    store.content = {METADATA: pickle.dumps(metadata), **files}
    return store


def rows(count: int, *shape: int) -> list[Box]:
    """Return the boxes of a shape that is split into parts of `count` rows."""
    return [
        Box((at, *(0 for _ in shape[1:])), (min(count, shape[0] - at), *shape[1:])) for at in range(0, shape[0], count)
    ]
