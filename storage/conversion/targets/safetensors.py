"""Writes safetensors: files of limited size, and an index, as Hugging Face does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ....planner.box import Box
from ....planner.entries import ITEMSIZES
from ...errors import ArgumentError, DtypeError
from ...formats.safetensors_source import INDEX_SUFFIX, SAFETENSORS_DTYPES
from ...stores.base import Store
from ...tensors.dtypes import as_array, as_bytes, is_packed
from ...tensors.splitting import group_by_bytes, row_boxes
from ..source_stream import SourceStream
from ..work_items import Item, Piece
from .target import UnitRecord, WorkUnit

INDEX = f"model{INDEX_SUFFIX}"
METADATA_KEY = "__metadata__"
"""The key of the header that is not a tensor."""
ALIGNMENT = 8
"""The header is padded with spaces to a multiple of this."""


class SafetensorsTarget:
    """Writes a file for each unit. The index commits the checkpoint. There can be only tensors."""

    format = "safetensors"
    commit_name = INDEX

    def __init__(self, max_file_bytes: int) -> None:
        self._max_file_bytes = max_file_bytes
        self._files = 0

    def units(self, items: Sequence[Item]) -> list[WorkUnit]:
        """Return a unit for each file.

        Raises:
            DtypeError: safetensors does not have the dtype of a tensor.
            ArgumentError: the name of a tensor is reserved.
        """
        _check_dtypes(items)
        for item in items:
            _check_item(item)
        pieces = (Piece(item, Box.whole(item.shape)) for item in items)
        files = list(group_by_bytes(pieces, self._max_file_bytes)) or [[]]
        self._files = len(files)
        return [WorkUnit(number, tuple(sorted(pieces, key=_file_order))) for number, pieces in enumerate(files)]

    def write(
        self, store: Store, label: str, unit: WorkUnit, stream: SourceStream, interrupt: Callable[[], None]
    ) -> UnitRecord:
        name = f"model-{unit.number + 1:05}-of-{self._files:05}.safetensors"
        store.delete([name])
        header = _header([piece.item for piece in unit.pieces])
        nbytes = len(header)
        with store.create(name) as out:
            out.write(header)
            pieces = (
                Piece(piece.item, box) for piece in unit.pieces for box in row_boxes(piece.item.shape, piece.item.dtype)
            )
            for tensor in stream.tensors(pieces):
                interrupt()
                data = as_bytes(as_array(tensor))
                out.write(data.data)
                nbytes += len(data)
        return {"files": [name], "bytes": nbytes, "tensors": [piece.item.name for piece in unit.pieces]}

    def commit_bytes(
        self, location: str, items: Sequence[Item], records: Sequence[UnitRecord], paths: Mapping[str, Any]
    ) -> bytes:
        index = {
            "metadata": {"total_size": sum(item.nbytes for item in items)},
            "weight_map": {name: record["files"][0] for record in records for name in record["tensors"]},
        }
        return json.dumps(index, indent=2).encode()

    def orphans(self, store: Store, conversion: str, names: Iterable[str]) -> list[str]:
        return []


def _check_dtypes(items: Sequence[Item]) -> None:
    """Check that safetensors has the dtype of every item.

    Raises:
        DtypeError: it does not.
    """
    lacking = [item for item in items if item.dtype not in SAFETENSORS_DTYPES]
    if not lacking:
        return
    first = lacking[0]
    more = f" (nor those of {len(lacking) - 1} more tensors)" if len(lacking) > 1 else ""
    cast = " Or cast it to complex64 before it is saved." if first.dtype == "complex128" else ""
    raise DtypeError(
        f"{first.source!r} has dtype {first.dtype}, which safetensors does not have{more}. Leave it out with "
        f"exclude= (--exclude), or write format='reshard' or 'dcp'.{cast}"
    )


def _check_item(item: Item) -> None:
    if is_packed(item.dtype) and not item.shape:
        raise DtypeError(
            f"{item.source!r} is a scalar of {item.dtype}, which holds two values: safetensors has no shape for it. "
            "Leave it out with exclude= (--exclude), or write format='reshard' or 'dcp'"
        )
    if item.name == METADATA_KEY:
        raise ArgumentError(
            f"safetensors cannot have a tensor named {METADATA_KEY!r}: give it another name with rename= (--rename)"
        )


def _file_order(piece: Piece) -> tuple[int, str]:
    """Sort large elements first, so that each tensor starts at a multiple of its itemsize."""
    return -ITEMSIZES[piece.item.dtype], piece.item.name


def _header(items: Sequence[Item]) -> bytes:
    header: dict[str, Any] = {METADATA_KEY: {"format": "pt"}}
    at = 0
    for item in items:
        shape = list(item.shape)
        if is_packed(item.dtype):  # two values an element
            shape[-1] *= 2
        header[item.name] = {
            "dtype": SAFETENSORS_DTYPES[item.dtype],
            "shape": shape,
            "data_offsets": [at, at + item.nbytes],
        }
        at += item.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
