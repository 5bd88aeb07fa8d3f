"""reshard's own format as the target of a conversion."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ...planner.box import Box
from ...planner.index import Kind
from ..commit import commit
from ..manifest import DATA_FOLDER, NAME, encode_manifest
from ..records import assemble_index, record_from_json, record_to_json
from ..store import Store
from ..version import __version__
from ..writer import ShardToWrite, write_objects
from .target import Done, Item, Piece, Unit, Values, in_pieces


class NativeTarget:
    """Writes data objects and the manifest."""

    commits = NAME

    def __init__(self, codec: str, budget_bytes: int | None) -> None:
        self._codec = codec
        self._budget_bytes = budget_bytes

    def units(self, items: Sequence[Item]) -> list[Unit]:
        return in_pieces(items)

    def write(self, store: Store, label: str, unit: Unit, values: Values, interrupt: Callable[[], None]) -> Done:
        shards = [_shard(piece, values) for piece in unit.pieces]
        records = write_objects(store, label, shards, self._codec, budget_bytes=self._budget_bytes, interrupt=interrupt)
        return {"objects": [record_to_json(record) for record in records]}

    def commit(
        self, store: Store, label: str, items: Sequence[Item], done: Sequence[Done], paths: Mapping[str, Any]
    ) -> int:
        records = [record_from_json(record) for unit in done for record in unit["objects"]]
        empty = {item.name: (item.dtype, item.shape) for item in items if item.kind is Kind.TENSOR and not item.nbytes}
        index = assemble_index(records, empty)
        info = {
            "writer": f"reshard {__version__}",
            "torch": torch.__version__,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "codec": self._codec,
        }
        manifest = encode_manifest(index, dict(paths), info)
        names = {name for name, _ in index.objects}
        commit(store, manifest, names, overwrite=False)
        remains = [name for name in store.list(DATA_FOLDER) if label in name and name not in names]
        store.delete(remains)  # of tries that were killed
        return len(manifest)


def _shard(piece: Piece, values: Values) -> ShardToWrite:
    item = piece.item
    if item.kind is Kind.TENSOR:
        load = partial(values.tensor, item)
        return ShardToWrite(item.name, Kind.TENSOR, item.torch_dtype, item.shape, piece.box, load)
    kind, data, _ = values.object(item)
    blob = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    whole = Box.whole((len(blob),))
    return ShardToWrite(item.name, kind, blob.dtype, whole.sizes, whole, lambda box: blob[box.slices])
