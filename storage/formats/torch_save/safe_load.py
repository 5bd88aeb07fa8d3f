"""Load whole torch.save files, and zstd streams of them, without running code from them.

This decodes opaque chunks: shards of DCP that its zstd extension compressed, and tensors that are not stored row-major.
Only torch.load(weights_only=True) unpickles, after a check, and no more bytes are decompressed than the values need.
"""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from typing import Any

import numpy as np
import torch
import zstandard

from ....planner.entries import ITEMSIZES
from ...errors import CorruptCheckpointError, UnsupportedFormatError
from ...runtime.brief import reason
from ...tensors.casts import loses_bits
from ...tensors.dtypes import as_array, as_bytes, torch_dtype
from ...tensors.tensor_classes import only_values, overrides_dispatch
from ..native.codec import Bytes
from .pickle_scan import check_pickle
from .zip_layout import MAX_PREAMBLE_BYTES, locate_values
from .zip_records import NotATorchZipError, ZipRecord, contents, keys_of

_REFUSAL_MESSAGE = re.compile(
    r"Unsupported global|unsupported GLOBAL|Unsupported class|unrecognized function|Can only build"
)
_USUAL_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
MAX_OVERHEAD = 64 * 1024
"""How many bytes a torch.save file may have in addition to its values."""


def decode_opaque(data: memoryview, dtype: str, shape: tuple[int, ...]) -> Bytes:
    """Decode the values of a shard.

    Args:
        data: a torch.save file of one tensor, or a zstd stream of one.
        dtype: the planner's name of the expected dtype.
        shape: the expected shape.

    Returns:
        (nbytes,) uint8, the row-major values. A view of `data` if possible.

    Raises:
        CorruptCheckpointError: the data contains something else, or cannot be read.
        UnsupportedFormatError: it is a tensor that only its own class can read.
    """
    begin = locate_values(bytes(data[:MAX_PREAMBLE_BYTES]), len(data), dtype, shape)
    if begin is not None:  # no copy is needed
        return np.frombuffer(data, np.uint8)[begin : begin + torch.Size(shape).numel() * ITEMSIZES[dtype]]
    expected = f"a tensor of {dtype} {shape}"
    content = bytes(data)
    if content.startswith(ZSTD_MAGIC):
        content = decompress(content, torch.Size(shape).numel() * ITEMSIZES[dtype] + MAX_OVERHEAD)
    try:
        tensor = load_checked(content)
    except Exception as error:
        if refused := refusal_of(error):
            raise CorruptCheckpointError(
                f"expected {expected}, got what torch.load(weights_only=True) refuses: {refused}"
            ) from error
        raise CorruptCheckpointError(f"expected {expected}, which cannot be read: {reason(error)}") from error
    if not isinstance(tensor, torch.Tensor):
        raise CorruptCheckpointError(f"expected {expected}, got {type(tensor).__name__}")
    if overrides_dispatch(tensor):
        values = only_values(tensor)
        if values is None:
            raise UnsupportedFormatError(
                f"expected {expected}, got a {type(tensor).__name__}, which keeps the values in its own form: load it "
                "with dcp.load into the same kind of tensor, and save it with reshard.save"
            )
        tensor = values
    dense = tensor.layout is torch.strided and tensor.device.type == "cpu"
    if not dense or tuple(tensor.shape) != shape:
        where = "" if dense else f", {tensor.layout} on {tensor.device.type}"
        raise CorruptCheckpointError(
            f"expected {expected}, got a tensor of {tensor.dtype} {tuple(tensor.shape)}{where}"
        )
    if str(tensor.dtype) != f"torch.{dtype}":
        tensor = _cast_back(tensor, dtype)
    return as_bytes(as_array(tensor))


def _cast_back(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """Cast a shard to its dtype in the metadata. DCP's metadata does not show what a planner has cast.

    Raises:
        CorruptCheckpointError: the cast would change values.
    """
    to = torch_dtype(dtype)
    if {tensor.dtype, to} <= _USUAL_FLOATS and not loses_bits(tensor.dtype, to):
        return tensor.to(to)
    raise CorruptCheckpointError(
        f"expected a tensor of {dtype}, got a tensor of {tensor.dtype} {tuple(tensor.shape)}. If a planner has cast it "
        "when it was saved, dcp.load reads it"
    )


def refusal_of(error: BaseException) -> str | None:
    """Return what torch.load(weights_only=True) refused: the line of its message that names a class or function."""
    lines = (line.strip() for line in str(error).splitlines())
    found = next((line for line in lines if _REFUSAL_MESSAGE.search(line)), None)
    return None if found is None else found.rstrip(" ./")


def load_checked(content: bytes) -> Any:
    """Load a torch.save file without running code from it.

    torch.load reads a new zip with the checked records, because its own zip reader might find other records in the
    file.

    Raises:
        Exception: the data is not a torch.save file, or needs more of pickle than weights_only=True allows.
    """
    rewritten = io.BytesIO()
    with zipfile.ZipFile(rewritten, "w") as archive:
        for key, data in check_file(content).items():
            if key in ("data.pkl", "version", "byteorder") or key.startswith("data/"):
                archive.writestr(f"archive/{key}", data)
    rewritten.seek(0)
    return torch.load(rewritten, weights_only=True, map_location="cpu", mmap=False)


def check_file(content: bytes) -> dict[str, memoryview]:
    """Check a torch.save file before anything in it is loaded.

    Returns:
        The contents of its records, by their names in the folder of the zip.

    Raises:
        ValueError, LookupError: the data is not a torch.save file, or its pickle does not pass `check_pickle`.
    """
    records = _by_key(contents(memoryview(content)))
    if "data.pkl" not in records:
        raise NotATorchZipError("it has no data.pkl: torch.save did not write it")
    check_pickle(bytes(records["data.pkl"]))
    return records


def _by_key(records: list[tuple[ZipRecord, memoryview]]) -> dict[str, memoryview]:
    """Return the contents of records by their names in the folder of the zip. Raise NotATorchZipError."""
    keys = keys_of([record for record, _ in records])
    return dict(zip(keys, (content for _, content in records), strict=True))


def damage_of(data: memoryview) -> str:
    """Return why a torch.save file is damaged, by the CRC-32s of its records. Empty if no damage is found.

    A zstd stream is not checked: it has a checksum only if its writer enabled that. Nor is a file without CRC-32s: all
    of them are 0 after `torch.serialization.set_crc32_options(False)`.
    """
    if data[:4] == ZSTD_MAGIC:
        return ""
    try:
        records = contents(data)
    except NotATorchZipError as error:
        return f"it is not a torch.save file: {error}"
    if not any(record.crc for record, _ in records):
        return ""
    damaged = next((record.name for record, content in records if zlib.crc32(content) != record.crc), None)
    return f"its record {damaged!r} does not match its CRC-32" if damaged else ""


def decompress(data: bytes, max_bytes: int) -> bytes:
    """Decompress a zstd stream. Raise CorruptCheckpointError if it is damaged or holds more than `max_bytes` bytes."""
    try:
        with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data), read_across_frames=True) as stream:
            content = stream.read(max_bytes + 1)
    except zstandard.ZstdError as error:
        raise CorruptCheckpointError(f"it is not a zstd stream: {error}") from error
    if len(content) > max_bytes:
        raise CorruptCheckpointError(f"it holds more than {max_bytes} bytes, the most that is expected")
    return content
