"""reshard's own format as the target of a conversion."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ....planner.box import Box
from ....planner.index import Kind
from ...formats.native.manifest import DATA_NAME, NAME, Manifest, encode_manifest
from ...formats.native.write_records import assemble_index, record_from_json, record_to_json
from ...stores.base import Store
from ...tensors.pieces import Item, Piece, in_groups
from ...version import __version__
from ...writing.object_layout import ShardToWrite
from ...writing.object_writer import write_objects
from ..source_stream import Values
from .target import Done, Unit, in_pieces


class NativeTarget:
    """Writes data objects and the manifest."""

    format = "reshard"
    commits = NAME

    def __init__(self, codec: str, budget_bytes: int | None) -> None:
        self._codec = codec
        self._budget_bytes = budget_bytes

    def units(self, items: Sequence[Item]) -> list[Unit]:
        return in_pieces(items)

    def write(self, store: Store, label: str, unit: Unit, values: Values, interrupt: Callable[[], None]) -> Done:
        load = _Shared(unit, values).load if store.capabilities.buffers_objects else _in_order(unit, values)
        objects = values.objects(piece for piece in unit.pieces if not piece.item.is_tensor)
        shards = [_shard(piece, objects, load) for piece in unit.pieces]
        records = write_objects(store, label, shards, self._codec, budget_bytes=self._budget_bytes, interrupt=interrupt)
        return {
            "files": [record.name for record in records],
            "bytes": sum(record.nbytes for record in records),
            "objects": [record_to_json(record) for record in records],
        }

    def commit(self, location: str, items: Sequence[Item], done: Sequence[Done], paths: Mapping[str, Any]) -> bytes:
        records = [record_from_json(record) for unit in done for record in unit["objects"]]
        empty = {item.name: (item.dtype, item.shape) for item in items if item.is_tensor and not item.nbytes}
        index = assemble_index(records, empty)
        info = {
            "writer": f"reshard {__version__}",
            "torch": torch.__version__,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "codec": self._codec,
        }
        return encode_manifest(index, dict(paths), info)

    def orphans(self, store: Store, conversion: str, names: Iterable[str]) -> list[str]:
        manifest = Manifest.find(store)
        kept = {name for name, _ in manifest.objects} if manifest else set(names)
        return [name for name in names if DATA_NAME.fullmatch(name) and f"-{conversion}-" in name and name not in kept]


Load = Callable[[Item, Box], torch.Tensor]


class _Shared:
    """Loads for objects that are written at once: who needs a piece first reads it, and those near it, for all."""

    def __init__(self, unit: Unit, values: Values) -> None:
        self._groups: dict[str, list[tuple[Piece, _Group]]] = {}
        """Of each item, its pieces and the groups that they are in."""
        tensors = (piece for piece in unit.pieces if piece.item.is_tensor)
        for pieces in in_groups(tensors, values.group_bytes // 2):
            group = _Group(pieces, values)
            for piece in pieces:
                self._groups.setdefault(piece.item.name, []).append((piece, group))

    def load(self, item: Item, box: Box) -> torch.Tensor:
        piece, group = next(found for found in self._groups[item.name] if _has(found[0], item, box))
        return group.load(piece, box)


class _Group:
    """Pieces that are read at once, and kept until all of them were loaded."""

    def __init__(self, pieces: list[Piece], values: Values) -> None:
        self._pieces = pieces
        self._values = values
        self._lock = threading.Lock()
        self._read: dict[Piece, torch.Tensor] = {}
        self._left = 0
        """Elements that were not loaded yet."""

    def load(self, piece: Piece, box: Box) -> torch.Tensor:
        with self._lock:
            if not self._read:
                self._read = dict(zip(self._pieces, self._values.read(self._pieces), strict=True))
                self._left = sum(piece.box.numel for piece in self._pieces)
            part = self._read[piece][box.relative_to(piece.box).slices]
            self._left -= box.numel
            if self._left <= 0:
                self._read = {}
            return part


def _in_order(unit: Unit, values: Values) -> Load:
    """For one object, which takes the pieces, or parts of them, in their order; anew, where its writing is."""
    tensors = [piece for piece in unit.pieces if piece.item.is_tensor]
    stream = values.stream(tensors)
    at = 0
    tensor: torch.Tensor | None = None

    def load(item: Item, box: Box) -> torch.Tensor:
        nonlocal stream, at, tensor
        if tensor is None or not _has(tensors[at], item, box):
            following = at + 1
            if tensor is None or following == len(tensors) or not _has(tensors[following], item, box):
                stream, following = values.stream(tensors), 0
            tensor = None
            at, tensor = following, next(stream)
        return tensor[box.relative_to(tensors[at].box).slices]

    return load


def _has(piece: Piece, item: Item, box: Box) -> bool:
    return piece.item is item and piece.box.intersect(box) == box


def _shard(piece: Piece, objects: Iterator[tuple[Kind, bytes, Any]], load: Load) -> ShardToWrite:
    item = piece.item
    if item.is_tensor:
        return ShardToWrite(item.name, Kind.TENSOR, item.torch_dtype, item.shape, piece.box, partial(load, item))
    kind, data, _ = next(objects)
    blob = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    whole = Box.whole((len(blob),))
    return ShardToWrite(item.name, kind, blob.dtype, whole.sizes, whole, lambda box: blob[box.slices])
