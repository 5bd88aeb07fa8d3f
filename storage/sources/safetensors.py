"""safetensors files as a source: one, or those of a folder as Hugging Face lays them out.

A file is 8 bytes of header size, a header of JSON, and the tensors, row-major, one after another without a gap. What
the header says is checked as the format demands: https://github.com/huggingface/safetensors#format. Files that torch's
HuggingFaceStorageWriter wrote for each rank hold shards; their headers say of which part of the tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...planner.box import Box
from ...planner.index import ITEMSIZES, MAX_BYTES, MAX_DIMENSIONS, Encoding, Kind
from ..errors import CorruptCheckpointError, DtypeError, ObjectNotFoundError
from .foreign import ForeignSource, Shards
from .reads import Reads

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
"""The format's own bound."""
FIRST_READ_BYTES = 64 * 1024
DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu", "F4": "float4_e2m1fn_x2",
}  # fmt: skip
"""torch's names of the format's dtypes."""
NAMES = {name: word for word, name in DTYPES.items()}
"""The format's names of torch's dtypes."""
_PLAIN_NAME = re.compile(r"[^/\\\0]+")
_CONTRADICTIONS = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """Its first byte, in the file."""
    offsets: tuple[int, ...] | None
    """Where it belongs, where it is a shard that DCP saved."""


class SafetensorsSource(ForeignSource):
    """The tensors of safetensors files."""

    format = "safetensors"

    def __init__(self, reads: Reads, names: Sequence[str], weight_map: dict[str, str] | None = None) -> None:
        """
        Args:
            names: the files.
            weight_map: which of them should hold each tensor.

        Raises CorruptCheckpointError, ObjectNotFoundError, StoreError, DtypeError.
        """
        try:
            sizes = reads.many(reads.size, names)
        except ObjectNotFoundError as error:
            if weight_map is None:
                raise
            raise CorruptCheckpointError(
                f"the index says that tensors are in a file that is missing: {error}"
            ) from error
        super().__init__(reads, zip(names, sizes, strict=True))
        headers = reads.many(lambda name, size: read_header(reads, name, 0, size), names, sizes)
        found: dict[str, list[tuple[int, Tensor]]] = {}
        for at, (tensors, notes) in enumerate(headers):
            self.info |= notes
            for name, tensor in tensors.items():
                found.setdefault(name, []).append((at, tensor))
        self.info |= {"files": len(names)}
        for name, parts in sorted(found.items()):
            self._add(name, parts)
        for name, file in (weight_map or {}).items():
            if not any(self.objects[at][0] == file for at, _ in found.get(name, ())):
                raise self.contradiction(f"the index says that {name!r} is in {file!r}, which does not have it")

    @property
    def location(self) -> str:
        return f"{self.store.location}/{self.objects[0][0]}" if len(self.objects) == 1 else self.store.location

    def _add(self, name: str, parts: list[tuple[int, Tensor]]) -> None:
        first = parts[0][1]
        if len(parts) > 1 and any(tensor.offsets is None for _, tensor in parts):
            raise self.contradiction(f"two files have the tensor {name!r}")
        boxes = [Box(tensor.offsets or (0,) * len(tensor.shape), tensor.shape) for _, tensor in parts]
        if any(
            tensor.dtype != first.dtype or box.ndim != boxes[0].ndim
            for box, (_, tensor) in zip(boxes, parts, strict=True)
        ):
            raise self.contradiction(f"the shards of {name!r} do not fit each other")
        rows = {
            box: (box, at, tensor.start, box.numel * ITEMSIZES[tensor.dtype], Encoding.PLAIN)
            for box, (at, tensor) in zip(boxes, parts, strict=True)
            if box.numel
        }
        shape = tuple(max(box.offsets[d] + box.sizes[d] for box in boxes) for d in range(boxes[0].ndim))
        self.add(name, Kind.TENSOR, first.dtype, shape, Shards.of(list(rows.values()), len(shape)))


def read_header(reads: Reads, name: str, start: int, stop: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the metadata of a safetensors file, which lies in bytes [start, stop) of an object.

    Raises CorruptCheckpointError, DtypeError, StoreError.
    """
    where = f"the safetensors file {name!r} in {reads.store.location}"
    first = reads.read(name, start, min(start + FIRST_READ_BYTES, stop))
    nbytes = int.from_bytes(first[:8], "little")
    if len(first) < 8 or nbytes > min(MAX_HEADER_BYTES, stop - start - 8) or first[8:9] != b"{":
        raise CorruptCheckpointError(
            f"{where} has no header: it begins with {first[:9]!r}, and has {stop - start} bytes"
        )
    if 8 + nbytes > len(first):
        first += reads.exactly(name, start + len(first), start + 8 + nbytes)
    try:
        header = json.loads(first[8 : 8 + nbytes], object_pairs_hook=_once)
        notes = {str(key): str(value) for key, value in header.pop("__metadata__", {}).items()}
        sharding = json.loads(notes.pop("DCP_SHARDING_INFO", "{}"))
        tensors = {name: _tensor(name, row, start + 8 + nbytes, sharding.get(name)) for name, row in header.items()}
        spans = sorted(tuple(row["data_offsets"]) for row in header.values())
    except DtypeError as error:
        raise DtypeError(f"{where}: {error}") from error
    except _CONTRADICTIONS as error:
        raise CorruptCheckpointError(f"{where} has a header that is none: {error!r}") from error
    end = 0
    for begin, until in spans:
        if begin != end:
            raise CorruptCheckpointError(f"{where} has a gap or an overlap at byte {begin} of its data")
        end = until
    if start + 8 + nbytes + end != stop:
        raise CorruptCheckpointError(
            f"{where} has {stop - start} bytes where its header tells of {8 + nbytes + end}: it was cut short, or is "
            "not what it was"
        )
    return tensors, notes


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ValueError for two values of one name."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("two values have the same name")
    return made


def _tensor(name: str, row: dict[str, Any], data_start: int, sharding: dict[str, Any] | None) -> Tensor:
    if row["dtype"] not in DTYPES:
        raise DtypeError(f"{name!r} has the dtype {row['dtype']!r} of safetensors, which reshard cannot read")
    dtype, shape, (begin, end) = DTYPES[row["dtype"]], tuple(row["shape"]), row["data_offsets"]
    offsets = None if sharding is None else tuple(sharding["saved_offsets"])
    possible = all(type(n) is int and 0 <= n <= MAX_BYTES for n in (*shape, *(offsets or ()), begin, end))
    if not possible or len(shape) > MAX_DIMENSIONS or (offsets is not None and len(offsets) != len(shape)):
        raise ValueError(f"{name!r} has the shape {shape!r:.100} and the bytes [{begin!r:.100}, {end!r:.100})")
    if dtype.endswith("_x2"):
        if not shape or shape[-1] % 2:
            raise ValueError(f"{name!r} has the shape {shape} of half bytes")
        shape = (*shape[:-1], shape[-1] // 2)
    if Box.whole(shape).numel * ITEMSIZES[dtype] != end - begin:
        raise ValueError(f"{name!r}, {dtype} {shape}, does not take the bytes [{begin}, {end})")
    return Tensor(dtype, shape, data_start + begin, offsets)


def read_weight_map(reads: Reads, name: str) -> dict[str, str]:
    """Which file has which tensor, by an index of Hugging Face. Raises CorruptCheckpointError, StoreError."""
    try:
        nbytes = reads.size(name)
        if nbytes > MAX_HEADER_BYTES:
            raise ValueError(f"it has {nbytes} bytes")
        weight_map = json.loads(reads.exactly(name, 0, nbytes))["weight_map"]
        if not all(_PLAIN_NAME.fullmatch(file) and file not in (".", "..") for file in weight_map.values()):
            raise ValueError(f"a file is not one of this folder, of {sorted(map(str, set(weight_map.values())))}")
        return {str(tensor): str(file) for tensor, file in weight_map.items()}
    except _CONTRADICTIONS as error:
        raise CorruptCheckpointError(
            f"{name!r} in {reads.store.location} is no index of safetensors: {error!r}"
        ) from error
