"""Writes the native format of reshard."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ....planner.box import Box
from ....planner.entries import Kind
from ...formats.native.manifest import DATA_NAME, MANIFEST_NAME, encode_manifest, info_of_save
from ...formats.native.native_source import NativeSource
from ...formats.native.write_records import PackedRecords, assemble_index, record_from_json, record_to_json
from ...formats.user_metadata import plain_metadata
from ...stores.base import Store
from ...tensors.splitting import group_by_bytes
from ...writing.object_layout import ShardToWrite
from ...writing.object_writer import write_objects
from ..source_stream import SourceStream
from ..work_items import Item, Piece
from .target import UnitRecord, WorkUnit, in_pieces


class NativeTarget:
    """Writes data objects for each unit. The manifest commits the checkpoint."""

    format = "reshard"
    commit_name = MANIFEST_NAME

    def __init__(self, codec: str, budget_bytes: int | None, metadata: Mapping[str, Any] | None = None) -> None:
        self._codec = codec
        self._metadata = plain_metadata(metadata)
        self._budget_bytes = budget_bytes

    def units(self, items: Sequence[Item]) -> list[WorkUnit]:
        return in_pieces(items)

    def write(
        self, store: Store, label: str, unit: WorkUnit, stream: SourceStream, interrupt: Callable[[], None]
    ) -> UnitRecord:
        load = _GroupedLoads(unit, stream).load if store.capabilities.buffers_objects else _load_in_order(unit, stream)
        values = stream.values(piece for piece in unit.pieces if not piece.item.is_tensor)
        shards = [_shard(piece, values, load) for piece in unit.pieces]
        records = write_objects(store, label, shards, self._codec, budget_bytes=self._budget_bytes, interrupt=interrupt)
        return {
            "files": [record.name for record in records],
            "bytes": sum(record.nbytes for record in records),
            "objects": [record_to_json(record) for record in records],
        }

    def commit_bytes(
        self, location: str, items: Sequence[Item], records: Sequence[UnitRecord], paths: Mapping[str, Any]
    ) -> bytes:
        objects = [record_from_json(found) for record in records for found in record["objects"]]
        empty = {item.name: (item.dtype, item.shape) for item in items if item.is_tensor and not item.nbytes}
        index = assemble_index([PackedRecords.of(objects)], empty)
        return encode_manifest(index, dict(paths), info_of_save(self._codec), self._metadata)

    def orphans(self, store: Store, conversion: str, names: Iterable[str]) -> list[str]:
        manifest = NativeSource.find(store)
        kept = {name for name, _ in manifest.objects} if manifest else set(names)
        return [name for name in names if DATA_NAME.fullmatch(name) and f"-{conversion}-" in name and name not in kept]


Load = Callable[[Item, Box], torch.Tensor]


class _GroupedLoads:
    """Loads pieces for objects that are written concurrently. The first load of a piece also reads its neighbours."""

    def __init__(self, unit: WorkUnit, stream: SourceStream) -> None:
        self._groups: dict[str, list[tuple[Piece, _PieceGroup]]] = {}
        """For each item, its pieces and their groups."""
        tensors = (piece for piece in unit.pieces if piece.item.is_tensor)
        for pieces in group_by_bytes(tensors, stream.group_bytes // 2):
            group = _PieceGroup(pieces, stream)
            for piece in pieces:
                self._groups.setdefault(piece.item.name, []).append((piece, group))

    def load(self, item: Item, box: Box) -> torch.Tensor:
        piece, group = next(found for found in self._groups[item.name] if _has(found[0], item, box))
        return group.load(piece, box)


class _PieceGroup:
    """Pieces that are read together, and kept until all have been loaded."""

    def __init__(self, pieces: list[Piece], stream: SourceStream) -> None:
        self._pieces = pieces
        self._stream = stream
        self._lock = threading.Lock()
        self._read: dict[Piece, torch.Tensor] = {}
        self._left = 0
        """The number of elements that have not been loaded yet."""

    def load(self, piece: Piece, box: Box) -> torch.Tensor:
        with self._lock:
            if not self._read:
                self._read = dict(zip(self._pieces, self._stream.read(self._pieces), strict=True))
                self._left = sum(piece.box.numel for piece in self._pieces)
            part = self._read[piece][box.relative_to(piece.box).slices]
            self._left -= box.numel
            if self._left <= 0:
                self._read = {}
            return part


def _load_in_order(unit: WorkUnit, stream: SourceStream) -> Load:
    """Return a function that loads pieces, or parts of them, for one object that needs them in order.

    If the object is written again, the pieces are read again from the start.
    """
    tensors = [piece for piece in unit.pieces if piece.item.is_tensor]
    values = stream.tensors(tensors)
    at = 0
    tensor: torch.Tensor | None = None

    def load(item: Item, box: Box) -> torch.Tensor:
        nonlocal values, at, tensor
        if tensor is None or not _has(tensors[at], item, box):
            following = at + 1
            if tensor is None or following == len(tensors) or not _has(tensors[following], item, box):
                values, following = stream.tensors(tensors), 0
            tensor = None
            at, tensor = following, next(values)
        return tensor[box.relative_to(tensors[at].box).slices]

    return load


def _has(piece: Piece, item: Item, box: Box) -> bool:
    return piece.item is item and piece.box.intersect(box) == box


def _shard(piece: Piece, values: Iterator[tuple[Kind, bytes, Any]], load: Load) -> ShardToWrite:
    item = piece.item
    if item.is_tensor:
        return ShardToWrite(item.name, Kind.TENSOR, item.torch_dtype, item.shape, piece.box, partial(load, item))
    kind, data, _ = next(values)
    return ShardToWrite.of_value(item.name, kind, data)
