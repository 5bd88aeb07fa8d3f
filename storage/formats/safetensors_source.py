"""safetensors files as a source: a single file, or the files of a folder in the layout of Hugging Face.

A file consists of 8 bytes with the size of the header, the header in JSON, and the row-major tensors, one after another
without gaps. The header is checked as the format demands: https://github.com/huggingface/safetensors#format. Files that
torch's HuggingFaceStorageWriter wrote for each rank contain shards. Their headers say which part of the tensor a shard
is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...planner.box import Box
from ...planner.entries import ITEMSIZES, MAX_TENSOR_DIMENSIONS, MAX_TOTAL_BYTES, Encoding, Kind
from ...planner.text import first_few
from ..errors import CorruptCheckpointError, DtypeError
from ..runtime.brief import brief, reason
from ..tensors.dtypes import is_packed
from .foreign import Shards
from .hf_index import MAX_FILES_IN_ERROR, FilesSource, WeightMap, duplicate_tensor_error, select_by_index
from .metadata_reader import MALFORMED_ERRORS, MetadataReader

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
MAX_SAFETENSORS_HEADER_BYTES = 100_000_000
"""The limit of the format."""
FIRST_HEADER_READ_BYTES = 64 * 1024
"""How many bytes of a file the first request reads."""
TORCH_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu", "F4": "float4_e2m1fn_x2",
}  # fmt: skip
"""The name in torch of each dtype of the format."""
SAFETENSORS_DTYPES = {name: word for word, name in TORCH_DTYPES.items()}
"""The name in the format of each dtype of torch."""
REMAINS = (
    "files of another save remain in the folder, or a file is missing. Remove the files of the other save, or save "
    "again into an empty folder"
)
"""Why shards may not form a whole tensor, and what to do."""


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """A tensor, as the header of a file describes it."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """The first byte of its values in the object."""
    offsets: tuple[int, ...] | None
    """The offsets in the whole tensor, if this is a shard that DCP saved."""
    unknown: str | None = None
    """The name in the format of its dtype, if it is not in TORCH_DTYPES. `dtype` is then empty."""


class SafetensorsSource(FilesSource):
    """The tensors in safetensors files."""

    format = "safetensors"

    def __init__(self, reader: MetadataReader, names: Sequence[str], weight_map: WeightMap | None = None) -> None:
        """Read the headers.

        Args:
            reader: reads the store.
            names: the files.
            weight_map: the index that says which file contains which tensor, if there is one.

        Raises:
            CorruptCheckpointError: a header is damaged or contradicts itself.
            ObjectNotFoundError: a file is missing.
            StoreError: the store cannot be read.
        """
        super().__init__(reader, names, weight_map)
        self._has_shards = False
        columns = zip(*self.objects, strict=True) if self.objects else ((), ())
        headers = reader.many(lambda name, size: read_header(reader, name, 0, size), *map(list, columns))
        found: dict[str, list[tuple[int, TensorHeader]]] = {}
        for at, (tensors, notes) in enumerate(headers):
            self.info |= notes
            for name, tensor in tensors.items():
                found.setdefault(name, []).append((at, tensor))
        self.info |= {"files": len(self.objects)}
        if weight_map is not None:
            selected = select_by_index(self, found, weight_map)
            for name, parts in selected.items():
                if (
                    parts[0][1].offsets is not None
                ):  # an index names one file for each tensor, but shards are in several files
                    selected[name] = [part for part in found[name] if part[1].offsets is not None]
            found = selected
        for name, parts in sorted(found.items()):
            self._add(name, parts)

    def contradiction(self, what: object) -> CorruptCheckpointError:
        return super().contradiction(f"{what}; {REMAINS}" if self._has_shards else what)

    def _add(self, name: str, parts: list[tuple[int, TensorHeader]]) -> None:
        first = parts[0][1]
        files = [self.objects[at][0] for at, _ in parts]
        if len(parts) > 1 and any(tensor.offsets is None for _, tensor in parts):
            raise duplicate_tensor_error(self, name, files)
        unknown = next((at for at, (_, tensor) in enumerate(parts) if tensor.unknown is not None), None)
        if unknown is not None:
            self.refuse(
                name,
                DtypeError,
                f"the safetensors file {files[unknown]!r} in {self.store.location}: {name!r} has the dtype "
                f"{parts[unknown][1].unknown!r} of safetensors, which reshard cannot read. The other tensors can be "
                "read",
            )
            return
        boxes = [Box(tensor.offsets or (0,) * len(tensor.shape), tensor.shape) for _, tensor in parts]
        self._has_shards |= first.offsets is not None
        if any(
            tensor.dtype != first.dtype or box.ndim != boxes[0].ndim
            for box, (_, tensor) in zip(boxes, parts, strict=True)
        ):
            self._refuse_shards(name, f"the shards of {name!r} do not fit each other", boxes, files)
            return
        shape = tuple(max(box.offsets[d] + box.sizes[d] for box in boxes) for d in range(boxes[0].ndim))
        rows = [
            (box, at, tensor.start, box.numel * ITEMSIZES[tensor.dtype], Encoding.PLAIN)
            for box, (at, tensor) in zip(boxes, parts, strict=True)
            if box.numel
        ]
        held = sum(box.numel for box in boxes)
        self.check(name, Kind.TENSOR, first.dtype, shape)
        if held != math.prod(shape) or len({row[0] for row in rows}) != len(rows):
            what = f"the shards of {name!r} hold {held} elements, its shape {shape} has {math.prod(shape)}"
            self._refuse_shards(name, what, boxes, files)
            return
        self.add_tensor(name, first.dtype, shape, Shards.of(rows, len(shape)))

    def _refuse_shards(self, name: str, what: str, boxes: Sequence[Box], files: Sequence[str]) -> None:
        """Make a tensor unreadable because its shards do not form a whole tensor."""
        held = [f"{file!r} holds {box}" for box, file in zip(boxes, files, strict=True)]
        reason = f"{what}: {first_few(held, MAX_FILES_IN_ERROR)}, in {self.store.location}; {REMAINS}"
        self.refuse(name, CorruptCheckpointError, reason, files[0])


def read_header(
    reader: MetadataReader, name: str, start: int, stop: int
) -> tuple[dict[str, TensorHeader], dict[str, Any]]:
    """Read the header of a safetensors file.

    Args:
        reader: reads the store.
        name: the object.
        start, stop: the byte range of the file in the object.

    Returns:
        The tensors by name, and the `__metadata__` of the file.

    Raises:
        CorruptCheckpointError: the header is damaged, or does not fit the size of the file.
        StoreError: the store cannot be read.
    """
    where = f"the safetensors file {name!r} in {reader.store.location}"
    first = reader.whole(name, start, min(start + FIRST_HEADER_READ_BYTES, stop))
    nbytes = int.from_bytes(first[:8], "little")
    if len(first) < 8 or nbytes > min(MAX_SAFETENSORS_HEADER_BYTES, stop - start - 8) or first[8:9] != b"{":
        raise CorruptCheckpointError(
            f"{where} has no header: it begins with {first[:9]!r}, and has {stop - start} bytes"
        )
    if 8 + nbytes > len(first):
        first += reader.exactly(name, start + len(first), start + 8 + nbytes)
    try:
        header = json.loads(first[8 : 8 + nbytes], object_pairs_hook=_without_duplicates)
        notes = {str(key): str(value) for key, value in header.pop("__metadata__", {}).items()}
        sharding = json.loads(notes.pop("DCP_SHARDING_INFO", "{}"))
        tensors = {name: _tensor(name, row, start + 8 + nbytes, sharding.get(name)) for name, row in header.items()}
        spans = sorted(tuple(row["data_offsets"]) for row in header.values())
    except MALFORMED_ERRORS as error:
        raise CorruptCheckpointError(f"{where} has a malformed header: {reason(error)}") from error
    end = 0
    for begin, until in spans:
        if begin != end:
            raise CorruptCheckpointError(f"{where} has a gap or an overlap at byte {begin} of its data")
        end = until
    due = 8 + nbytes + end
    if start + due != stop:
        why = "it was cut short"
        if stop - start > due:
            why = f"{stop - start - due} bytes too many follow the last tensor, so the file was changed"
        raise CorruptCheckpointError(f"{where} has {stop - start} bytes, but its header describes {due}: {why}")
    return tensors, notes


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict. Raise ValueError if two values have the same name."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("two values have the same name")
    return made


def _tensor(name: str, row: dict[str, Any], data_start: int, sharding: dict[str, Any] | None) -> TensorHeader:
    word = row["dtype"]
    if type(word) is not str:
        raise ValueError(f"{name!r} has the dtype {brief(word)}")
    dtype, shape, (begin, end) = TORCH_DTYPES.get(word, ""), tuple(row["shape"]), row["data_offsets"]
    offsets = None if sharding is None else tuple(sharding["saved_offsets"])
    possible = all(type(n) is int and 0 <= n <= MAX_TOTAL_BYTES for n in (*shape, *(offsets or ()), begin, end))
    if not possible or len(shape) > MAX_TENSOR_DIMENSIONS or (offsets is not None and len(offsets) != len(shape)):
        raise ValueError(f"{name!r} has the shape {brief(shape)} and the bytes [{brief(begin)}, {brief(end)})")
    if not dtype:
        return TensorHeader(dtype, shape, data_start + begin, offsets, word)
    if is_packed(dtype):
        if not shape or shape[-1] % 2:
            raise ValueError(f"{name!r} has the shape {brief(shape)} of half bytes")
        shape = (*shape[:-1], shape[-1] // 2)
    if Box.whole(shape).numel * ITEMSIZES[dtype] != end - begin:
        raise ValueError(f"{name!r}, {dtype} {shape}, does not take the bytes [{begin}, {end})")
    return TensorHeader(dtype, shape, data_start + begin, offsets)
