"""Shards that another tool serialised as a whole, to values: torch.save files, and zstd streams of them.

What has to be decoded as a whole: DCP's slices under its zstd extension, and tensors that were not stored row-major.
Nothing is unpickled but by torch.load(weights_only=True), and no more is decompressed than the values take.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from typing import Any

import numpy as np
import torch
import zstandard

from ....planner.entries import ITEMSIZES
from ...errors import CorruptCheckpointError
from ...runtime.brief import reason
from ...tensors.dtypes import as_array, as_bytes
from ..native.codec import Bytes
from .pickle_scan import check_pickle
from .zip_layout import MAX_PREAMBLE_BYTES, locate_values
from .zip_records import NotATorchZipError, ZipRecord, contents, keys_of

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
MAX_OVERHEAD = 64 * 1024
"""Bytes that a torch.save file has beside its values."""


def decode_opaque(data: memoryview, dtype: str, shape: tuple[int, ...]) -> Bytes:
    """The bytes of a shard's values, row-major.

    Args:
        data: a torch.save file, or a zstd stream of one.
        dtype, shape: what it should hold.

    Raises CorruptCheckpointError where it holds something else, or cannot be read.
    """
    begin = locate_values(bytes(data[:MAX_PREAMBLE_BYTES]), len(data), dtype, shape)
    if begin is not None:  # a view of them does
        return np.frombuffer(data, np.uint8)[begin : begin + torch.Size(shape).numel() * ITEMSIZES[dtype]]
    expected = f"a tensor of {dtype} {shape}"
    content = bytes(data)
    if content.startswith(ZSTD_MAGIC):
        content = decompress(content, torch.Size(shape).numel() * ITEMSIZES[dtype] + MAX_OVERHEAD)
    try:
        tensor = load_checked(content)
    except Exception as error:
        raise CorruptCheckpointError(f"it should be {expected}, and cannot be read: {reason(error)}") from error
    if not isinstance(tensor, torch.Tensor):
        raise CorruptCheckpointError(f"it should be {expected}, and is {type(tensor).__name__}")
    dense = tensor.layout is torch.strided and tensor.device.type == "cpu"
    if str(tensor.dtype) != f"torch.{dtype}" or tuple(tensor.shape) != shape or not dense:
        raise CorruptCheckpointError(
            f"it should be {expected}, and is one of {tensor.dtype} {tuple(tensor.shape)}"
            + ("" if dense else f", {tensor.layout} on {tensor.device.type}")
        )
    return as_bytes(as_array(tensor))


def load_checked(content: bytes) -> Any:
    """Read a torch.save file, without running code from it.

    torch.load is given a zip that is written anew, of the records that were checked: its own reader of zips may see
    others in the file than we do.

    Raises an Exception where it is no such file, or needs more of pickle than weights_only=True allows.
    """
    anew = io.BytesIO()
    with zipfile.ZipFile(anew, "w") as archive:
        for key, data in check_file(content).items():
            if key in ("data.pkl", "version", "byteorder") or key.startswith("data/"):
                archive.writestr(f"archive/{key}", data)
    anew.seek(0)
    return torch.load(anew, weights_only=True, map_location="cpu", mmap=False)


def check_file(content: bytes) -> dict[str, memoryview]:
    """Check a torch.save file before anything is made of it.

    Returns: the contents of its records, by their names in the folder that all of them are in.

    Raises ValueError, LookupError where it is none, or its pickle asks for what no honest one does.
    """
    records = _by_key(contents(memoryview(content)))
    if "data.pkl" not in records:
        raise NotATorchZipError("it has no data.pkl: it is not of torch.save")
    check_pickle(bytes(records["data.pkl"]))
    return records


def _by_key(records: list[tuple[ZipRecord, memoryview]]) -> dict[str, memoryview]:
    """Return the contents by the names that records have in the folder of all. Raises NotATorchZipError."""
    keys = keys_of([record for record, _ in records])
    return dict(zip(keys, (held for _, held in records), strict=True))


def damage_of(data: memoryview) -> str:
    """Why a torch.save file cannot be whole, by the CRC-32s of its records; empty where nothing tells so.

    A zstd stream has a checksum of its own only if its writer asked for one; it is not looked into.
    """
    if data[:4] == ZSTD_MAGIC:
        return ""
    try:
        records = contents(data)
    except NotATorchZipError as error:
        return f"it is no file of torch.save: {error}"
    damaged = next((record.name for record, held in records if zlib.crc32(held) != record.crc), None)
    return f"its record {damaged!r} does not match its CRC-32" if damaged else ""


def decompress(data: bytes, max_bytes: int) -> bytes:
    """What a zstd stream holds. Raises CorruptCheckpointError where it is none, or holds more than that."""
    try:
        with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data), read_across_frames=True) as stream:
            content = stream.read(max_bytes + 1)
    except zstandard.ZstdError as error:
        raise CorruptCheckpointError(f"it is no zstd stream: {error}") from error
    if len(content) > max_bytes:
        raise CorruptCheckpointError(f"it holds more than the {max_bytes} bytes that it should")
    return content
