"""Locate the values of a tensor in a torch.save file by the first bytes of the file.

Such a file is a zip. It begins with the pickle of the tensor, which has its dtype, shape and strides. Records with the
writer's version and byte order follow, and then the uncompressed values (torch/serialization.py,
caffe2/serialize/inline_container.h).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from ....planner.entries import ITEMSIZES
from ...errors import CorruptCheckpointError, UnsafeValueError
from .inert_unpickler import INERT_SIZE, InertDict, InertFunction, checked_sizes, load_inert
from .zip_records import LOCAL_HEADER, LOCAL_MAGIC

MAX_PREAMBLE_BYTES = 1024
"""The values of a single tensor begin within so many bytes of its torch.save file."""
_STORAGES = {
    "BoolStorage": "bool", "ByteStorage": "uint8", "CharStorage": "int8", "ShortStorage": "int16",
    "IntStorage": "int32", "LongStorage": "int64", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "FloatStorage": "float32",
    "DoubleStorage": "float64", "ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    dtype: str
    """Empty for an untyped storage."""
    numel: int
    """In elements of the dtype; in bytes for an untyped storage."""


@dataclass(frozen=True, slots=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


# torch passes one more argument if the values are the conjugates or negatives of the stored ones. That fails here.
def _rebuilt(storage: _Storage, offset: int, shape: Any, strides: Any, grad: Any, hooks: Any) -> _Tensor:
    return _rebuilt_typed(storage, offset, shape, strides, grad, hooks, storage.dtype)


def _rebuilt_typed(
    storage: _Storage, offset: int, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: str
) -> _Tensor:
    (first,) = checked_sizes((offset,))
    if not isinstance(storage, _Storage):
        raise TypeError("a tensor has no storage")
    return _Tensor(storage, first, checked_sizes(shape), checked_sizes(strides), dtype)


_TENSOR_GLOBALS = {
    ("torch._utils", "_rebuild_tensor_v2"): InertFunction(_rebuilt),
    ("torch._utils", "_rebuild_tensor_v3"): InertFunction(_rebuilt_typed),
    ("collections", "OrderedDict"): InertDict,
    ("torch", "Size"): INERT_SIZE,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
    ("torch.storage", "UntypedStorage"): "",
}


def _storage(pid: Any) -> _Storage:
    _, dtype, key, _, numel = pid
    if type(key) is not str:
        raise TypeError("a storage has no name")
    return _Storage(key, dtype, *checked_sizes((numel,)))


@functools.lru_cache(1024)
def _tensor_of(record: bytes) -> _Tensor | None:
    """Return the tensor in a record that begins with its pickle. Tensors of the same shape have the same pickle."""
    try:
        tensor, _ = load_inert(record, _TENSOR_GLOBALS, "the tensor's pickle", _storage)
    except (CorruptCheckpointError, UnsafeValueError):
        return None
    return tensor if isinstance(tensor, _Tensor) else None


def locate_values(preamble: bytes, nbytes: int, dtype: str, shape: tuple[int, ...]) -> int | None:
    """Find the row-major values of a tensor in a torch.save file.

    Args:
        preamble: the first MAX_PREAMBLE_BYTES of the file, or the whole file.
        nbytes: the size of the file.
        dtype: the planner's name of the tensor's dtype.
        shape: the tensor's shape.

    Returns:
        The first byte of the values in the file. None if they are not row-major in one byte range, if they are of
        another dtype or shape, or if the preamble does not show where they are.
    """
    name, at = _local_header(preamble, 0)
    if not name.endswith("/data.pkl"):
        return None
    end = preamble.find(LOCAL_MAGIC, at)
    while (tensor := _tensor_of(preamble[at:end]) if end > 0 else None) is None and end > 0:
        end = preamble.find(LOCAL_MAGIC, end + 1)  # the pickle may contain these bytes
    if tensor is None or tensor.shape != shape or tensor.dtype != dtype:
        return None
    stored = tensor.storage.numel if tensor.storage.dtype else tensor.storage.numel // ITEMSIZES[dtype]
    if not is_row_major(shape, tensor.strides) or tensor.offset + math.prod(shape) > stored:
        return None
    record = f"{name.removesuffix('data.pkl')}data/{tensor.storage.key}"
    at = end
    while (at := preamble.find(LOCAL_MAGIC, at)) >= 0:
        found, begin = _local_header(preamble, at)
        if found.endswith("/byteorder") and not preamble.startswith(b"little", begin):
            return None
        if found == record:
            first = begin + tensor.offset * ITEMSIZES[dtype]
            fits = first + math.prod(shape) * ITEMSIZES[dtype] <= nbytes
            return first if fits else None
        at += len(LOCAL_MAGIC)
    return None


def _local_header(preamble: bytes, at: int) -> tuple[str, int]:
    """Return the name of the record whose local header is at a byte, and where its content begins. Empty if none is."""
    if len(preamble) < at + LOCAL_HEADER.size or not preamble.startswith(LOCAL_MAGIC, at):
        return "", at
    fields = LOCAL_HEADER.unpack_from(preamble, at)
    method, name_bytes, extra_bytes = fields[3], fields[9], fields[10]
    begin = at + LOCAL_HEADER.size
    name = preamble[begin : begin + name_bytes].decode("utf-8", "replace")
    return ("" if method else name), begin + name_bytes + extra_bytes


def is_row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Return whether elements with these strides are stored row-major without gaps."""
    contiguous = list(accumulate(reversed(shape), lambda a, b: a * b, initial=1))[-2::-1] if shape else []
    return len(strides) == len(shape) and all(
        n == 1 or stride == want for n, stride, want in zip(shape, strides, contiguous, strict=True)
    )
