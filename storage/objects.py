"""Values that are not tensors, as bytes: JSON where that holds them exactly, torch.save where it does not.

JSON here knows what state dicts hold: numbers, strings, None, bytes, lists, tuples, dicts with any keys, numpy arrays
(the states of random generators). What JSON itself has no word for is a dict with one key that begins with "$".
Reading it runs no code. What needs pickle is written by torch.save and read with weights_only=True.
"""

from __future__ import annotations

import base64
import io
import json
import re
from typing import Any

import numpy as np
import torch

from ..planner.index import Kind
from .errors import CorruptCheckpointError, UnsafeObjectError
from .opaque import ZSTD_MAGIC, check_file, decompress

MOST_OBJECT_BYTES = 2**30
"""What an object may take once it is decompressed."""
_REFUSED = re.compile(r"Unsupported global|unsupported GLOBAL|Unsupported class|unrecognized function|Can only build")


class _NotJson(TypeError):
    """The value needs pickle."""


def encode_object(value: Any) -> tuple[Kind, bytes]:
    """A value as bytes, and how they are to be read."""
    try:
        return Kind.JSON, json.dumps(_to_json(value), separators=(",", ":"), allow_nan=False).encode()
    except (_NotJson, RecursionError, UnicodeEncodeError):
        return Kind.TORCH_SAVE, torch_save(value)


def decode_object(name: str, kind: Kind, data: bytes, *, allow_pickle: bool = False) -> Any:
    """The value that was encoded.

    Raises:
        UnsafeObjectError: it is pickled in a way that weights_only=True refuses, and `allow_pickle` is False.
        CorruptCheckpointError: the bytes are no such encoding.
    """
    try:
        if kind is Kind.JSON:
            return _from_json(json.loads(data))
        if data.startswith(ZSTD_MAGIC):  # as DCP's extension leaves it
            data = decompress(data, MOST_OBJECT_BYTES)
        if not allow_pickle:
            check_file(data)
        return torch.load(io.BytesIO(data), weights_only=not allow_pickle, map_location="cpu")
    except Exception as error:
        refused = None if kind is Kind.JSON or allow_pickle else _refusal(str(error))
        if refused is None:
            raise CorruptCheckpointError(f"object {name!r} is not what its encoding should be: {error!r}") from error
        raise UnsafeObjectError(
            f"object {name!r} needs more of pickle than torch.load(weights_only=True) allows, which could run code: "
            f"{refused.rstrip(' ./')}. If you trust whoever wrote this checkpoint, load it with allow_pickle=True"
        ) from error


def torch_save(value: Any) -> bytes:
    """A value as torch.save writes it."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _refusal(message: str) -> str | None:
    """The line of torch's long message that names the class or function that it refused; None where it did not."""
    lines = (line.strip() for line in message.splitlines())
    return next((line for line in lines if _REFUSED.search(line)), None)


def _to_json(value: Any) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if np.isfinite(value) else {"$float": repr(value)}
    if kind is list:
        return [_to_json(item) for item in value]
    if kind is tuple:
        return {"$tuple": [_to_json(item) for item in value]}
    if kind is dict:
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: _to_json(item) for key, item in value.items()}
        return {"$dict": [[_to_json(key), _to_json(item)] for key, item in value.items()]}
    if kind is bytes:
        return {"$bytes": base64.b64encode(value).decode("ascii")}
    if kind is complex:
        return {"$complex": [_to_json(value.real), _to_json(value.imag)]}
    if kind is np.ndarray or (isinstance(value, np.generic) and value.dtype.kind in "biufc"):
        return _array_to_json(value)
    raise _NotJson(f"{kind} is not of JSON")


def _array_to_json(value: Any) -> Any:
    if value.dtype.kind not in "biufc" or value.dtype.hasobject:
        raise _NotJson(f"an array of {value.dtype} is not of JSON")
    word = "$array" if isinstance(value, np.ndarray) else "$scalar"
    content = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode("ascii")
    return {word: [value.dtype.str, list(value.shape), content]}


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    word = next(iter(value), "")
    if len(value) != 1 or not word.startswith("$"):
        return {key: _from_json(item) for key, item in value.items()}
    content = value[word]
    match word:
        case "$float":
            return float(content)
        case "$tuple":
            return tuple(_from_json(item) for item in content)
        case "$dict":
            return {_from_json(key): _from_json(item) for key, item in content}
        case "$bytes":
            return base64.b64decode(content, validate=True)
        case "$complex":
            return complex(_from_json(content[0]), _from_json(content[1]))
        case "$array" | "$scalar":
            dtype, shape, encoded = content
            array = np.frombuffer(base64.b64decode(encoded, validate=True), np.dtype(dtype)).reshape(shape)
            return array.copy() if word == "$array" else array.reshape(-1)[0]
    raise ValueError(f"unknown word {word!r}")
