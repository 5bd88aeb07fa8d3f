"""Writes the format of torch.distributed.checkpoint, which `dcp.load` reads without reshard."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from ....planner.entries import Kind
from ...formats.dcp_metadata import METADATA, TYPED_PATHS
from ...formats.value_codec import torch_save
from ...stores.base import Store
from ...tensors.state_dict import path_for_dcp, path_to_json
from ..source_stream import SourceStream
from ..work_items import Item
from .target import UnitRecord, WorkUnit, in_pieces


class DcpTarget:
    """Writes a `.distcp` file for each unit. `.metadata` commits the checkpoint."""

    format = "dcp"
    commit_name = METADATA

    def units(self, items: Sequence[Item]) -> list[WorkUnit]:
        return in_pieces(items)

    def write(
        self, store: Store, label: str, unit: WorkUnit, stream: SourceStream, interrupt: Callable[[], None]
    ) -> UnitRecord:
        file = f"__{unit.number}_0.distcp"
        store.delete([file])
        slices: list[dict[str, Any]] = []
        at = 0
        tensors = stream.tensors(piece for piece in unit.pieces if piece.item.is_tensor)
        values = stream.values(piece for piece in unit.pieces if not piece.item.is_tensor)
        with store.create(file) as out:
            for piece in unit.pieces:
                interrupt()
                item, box = piece.item, piece.box
                if item.is_tensor:
                    # torch.save would write the whole storage of a view.
                    data = torch_save(next(tensors).clone(memory_format=torch.contiguous_format))
                else:
                    kind, encoded, value = next(values)
                    data = encoded if kind is Kind.TORCH_SAVE else torch_save(value)
                out.write(data)
                slices.append({"name": item.name, "offsets": box.offsets, "sizes": box.sizes, "length": len(data)})
                at += len(data)
        return {"files": [file], "bytes": at, "slices": slices}

    def commit_bytes(
        self, location: str, items: Sequence[Item], records: Sequence[UnitRecord], paths: Mapping[str, Any]
    ) -> bytes:
        chunks: dict[str, list[ChunkStorageMetadata]] = {}
        storage: dict[MetadataIndex, _StorageInfo] = {}
        tensors = {item.name for item in items if item.is_tensor}
        for record in records:
            at = 0
            for shard in record["slices"]:
                name, offsets = shard["name"], torch.Size(shard["offsets"])
                index = MetadataIndex(name, offsets) if name in tensors else MetadataIndex(name)
                chunks.setdefault(name, []).append(ChunkStorageMetadata(offsets, torch.Size(shard["sizes"])))
                storage[index] = _StorageInfo(record["files"][0], at, shard["length"])
                at += shard["length"]
        entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        for item in items:
            if not item.is_tensor:
                entries[item.name] = BytesStorageMetadata()
                continue
            shape = torch.Size(item.shape)
            empty = ChunkStorageMetadata(torch.Size([0] * len(shape)), shape)
            properties = TensorProperties(dtype=item.torch_dtype)
            entries[item.name] = TensorStorageMetadata(properties, shape, chunks.get(item.name, [empty]))
        planner_data: dict[str, Any] = {item.name: path_for_dcp(paths.get(item.name, (item.name,))) for item in items}
        typed = {name: path_to_json(path) for name, path in paths.items() if path_for_dcp(path) != path}
        if typed:  # DCP ignores keys that are not names of entries
            planner_data[TYPED_PATHS] = typed
        metadata = Metadata(entries, planner_data, storage, StorageMeta(location), CURRENT_DCP_VERSION)
        return pickle.dumps(metadata)

    def orphans(self, store: Store, conversion: str, names: Iterable[str]) -> list[str]:
        return []
