"""Convert plain Python data of state dicts to JSON and back, without losing anything.

Values of JSON's own types are written unchanged. Any other value becomes a dict with one key that begins with "$", such
as `{"$tuple": [1, 2]}`. `docs/FORMAT.md` lists these type words. Reading runs no code from the file.
"""

from __future__ import annotations

import argparse
import base64
import datetime
import decimal
import fractions
import io
import json
import math
import pathlib
import types
import uuid
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from ..runtime.brief import brief

MAX_HASH_COLLISIONS = 64
"""How many keys of one dict, or values of one set, may have the same hash."""
_ARRAY_KINDS = "biufcSUmM"


class NotPlainError(TypeError):
    """The value is not plain data."""


def to_plain(value: Any) -> Any:
    """Turn a value into one that `json.dumps` writes.

    Raises:
        NotPlainError: the value, or a value inside it, is not plain data.
    """
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if kind is list:
        return [to_plain(item) for item in value]
    if kind is dict:
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: to_plain(item) for key, item in value.items()}
        return {"$dict": _pairs(value)}
    if kind is np.ndarray or isinstance(value, np.generic):
        return _array_to_plain(value)
    if kind in _WRITERS:
        word, content = _WRITERS[kind]
        return {word: content(value)}
    raise NotPlainError(f"{kind} is not plain data")


def from_plain(value: Any) -> Any:
    """Turn what `json.loads` returned back into the value.

    Raises:
        Exception: the JSON is not a result of `to_plain`. Constructors of any type may raise their own errors.
    """
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    word = next(iter(value), "")
    if len(value) != 1 or not word.startswith("$"):
        return {key: from_plain(item) for key, item in value.items()}
    if word not in _READERS:
        raise ValueError(f"unknown type word {brief(word)}")
    return _READERS[word](value[word])


def _pairs(value: Any) -> list[Any]:
    return [[to_plain(key), to_plain(item)] for key, item in value.items()]


def _to_list(values: Any) -> list[Any]:
    return [to_plain(item) for item in values]


def _to_sorted_list(values: Any) -> list[Any]:
    """Return the items of a set in a fixed order. Python's order differs between processes."""
    return sorted(_to_list(values), key=json.dumps)


def _to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _iso(value: datetime.datetime | datetime.time) -> list[Any]:
    """Return a time in ISO 8601 and its fold, which ISO 8601 lacks. Time zones with a name are not plain data."""
    if value.tzinfo is not None and type(value.tzinfo) is not datetime.timezone:
        raise NotPlainError(f"the time zone {value.tzinfo!r} is not plain data")
    return [value.isoformat(), value.fold]


def _bytes_io(value: io.BytesIO) -> list[Any]:
    return [_to_base64(value.getvalue()), value.tell()]


def _read_bytes_io(content: list[Any]) -> io.BytesIO:
    made = io.BytesIO(_from_base64(content[0]))
    if not 0 <= content[1] < 2**48:
        raise ValueError(f"a position of {brief(content[1])}")
    made.seek(content[1])
    return made


def _from_base64(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _array_to_plain(value: Any) -> Any:
    if value.dtype.kind not in _ARRAY_KINDS or value.dtype.hasobject or not value.dtype.itemsize:
        raise NotPlainError(f"an array of {value.dtype} is not plain data")
    word = "$array" if isinstance(value, np.ndarray) else "$scalar"
    return {word: [value.dtype.str, list(value.shape), _to_base64(np.ascontiguousarray(value).tobytes())]}


def _read_array(content: list[Any]) -> Any:
    text, shape, encoded = content
    dtype = np.dtype(text)
    if dtype.str != text or dtype.kind not in _ARRAY_KINDS or not dtype.itemsize:
        raise ValueError(f"{brief(text)} is not a dtype of an array")
    if not all(type(n) is int and 0 <= n < 2**48 for n in shape):
        raise ValueError(f"{brief(shape)} is not a shape")
    return np.frombuffer(_from_base64(encoded), dtype).reshape(shape).copy()


def _read_scalar(content: list[Any]) -> Any:
    if content[1] != []:
        raise ValueError(f"a scalar of the shape {brief(content[1])}")
    return _read_array(content)[()]


_WRITERS: dict[type, tuple[str, Callable[[Any], Any]]] = {
    tuple: ("$tuple", _to_list),
    set: ("$set", _to_sorted_list),
    frozenset: ("$frozenset", _to_sorted_list),
    deque: ("$deque", lambda value: [_to_list(value), value.maxlen]),
    OrderedDict: ("$ordered_dict", _pairs),
    bytes: ("$bytes", _to_base64),
    bytearray: ("$bytearray", lambda value: _to_base64(bytes(value))),
    io.BytesIO: ("$bytes_io", _bytes_io),
    complex: ("$complex", lambda value: [to_plain(value.real), to_plain(value.imag)]),
    range: ("$range", lambda value: [value.start, value.stop, value.step]),
    slice: ("$slice", lambda value: _to_list((value.start, value.stop, value.step))),
    datetime.datetime: ("$datetime", _iso),
    datetime.date: ("$date", datetime.date.isoformat),
    datetime.time: ("$time", _iso),
    datetime.timedelta: ("$timedelta", lambda value: [value.days, value.seconds, value.microseconds]),
    datetime.timezone: ("$timezone", lambda value: to_plain(value.utcoffset(None))),
    decimal.Decimal: ("$decimal", str),
    fractions.Fraction: ("$fraction", lambda value: [value.numerator, value.denominator]),
    uuid.UUID: ("$uuid", str),
    pathlib.PosixPath: ("$path", str),
    pathlib.WindowsPath: ("$path", str),
    pathlib.PurePosixPath: ("$pure_posix_path", str),
    pathlib.PureWindowsPath: ("$pure_windows_path", str),
    argparse.Namespace: ("$argparse_namespace", lambda value: _pairs(vars(value))),
    types.SimpleNamespace: ("$simple_namespace", lambda value: _pairs(vars(value))),
    type(...): ("$ellipsis", lambda value: None),
    torch.dtype: ("$torch_dtype", lambda value: str(value).removeprefix("torch.")),
    torch.device: ("$torch_device", str),
    torch.Size: ("$torch_size", list),
}


def _read_pairs(content: list[Any]) -> dict[Any, Any]:
    keys = checked_keys(from_plain(key) for key, _ in content)
    return {key: from_plain(item) for key, (_, item) in zip(keys, content, strict=True)}


def _checked_integers(content: list[Any], count: int | None = None) -> list[int]:
    """Return integers. Raise ValueError for other values, or if their number is not `count`."""
    if not all(type(n) is int for n in content) or count not in (None, len(content)):
        raise ValueError(f"{brief(content)} should be integers")
    if count is None and not all(-(2**63) <= n < 2**63 for n in content):
        raise ValueError(f"{brief(content)} has an integer of more than 64 bits")
    return content


def checked_keys(keys: Iterable[Any]) -> list[Any]:
    """Return keys. Raise ValueError if many have the same hash, because a dict of them would take quadratic time."""
    found = list(keys)
    if len(found) > MAX_HASH_COLLISIONS and max(Counter(map(hash, found)).values()) > MAX_HASH_COLLISIONS:
        raise ValueError(f"more than {MAX_HASH_COLLISIONS} keys have the same hash")
    return found


def _filled(namespace: Any, content: list[Any]) -> Any:
    attributes = _read_pairs(content)
    if not all(type(name) is str for name in attributes):
        raise TypeError("an attribute has no name")
    vars(namespace).update(attributes)
    return namespace


def _read_dtype(content: str) -> torch.dtype:
    dtype = vars(torch).get(content)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"torch.{brief(content)} is not a dtype")
    return dtype


def _read_time(kind: Any) -> Callable[[list[Any]], Any]:
    return lambda content: kind.fromisoformat(content[0]).replace(fold=content[1])


_READERS: dict[str, Callable[[Any], Any]] = {
    "$float": float,
    "$tuple": lambda content: tuple(map(from_plain, content)),
    "$set": lambda content: set(checked_keys(map(from_plain, content))),
    "$frozenset": lambda content: frozenset(checked_keys(map(from_plain, content))),
    "$deque": lambda content: deque(map(from_plain, content[0]), content[1]),
    "$dict": _read_pairs,
    "$ordered_dict": lambda content: OrderedDict(_read_pairs(content)),
    "$bytes": _from_base64,
    "$bytearray": lambda content: bytearray(_from_base64(content)),
    "$bytes_io": _read_bytes_io,
    "$complex": lambda content: complex(from_plain(content[0]), from_plain(content[1])),
    "$range": lambda content: range(*_checked_integers(content, 3)),
    "$slice": lambda content: slice(*map(from_plain, content)),
    "$datetime": _read_time(datetime.datetime),
    "$date": datetime.date.fromisoformat,
    "$time": _read_time(datetime.time),
    "$timedelta": lambda content: datetime.timedelta(*_checked_integers(content, 3)),
    "$timezone": lambda content: datetime.timezone(from_plain(content)),
    "$decimal": decimal.Decimal,
    "$fraction": lambda content: fractions.Fraction(*_checked_integers(content, 2)),
    "$uuid": uuid.UUID,
    "$path": pathlib.Path,
    "$pure_posix_path": pathlib.PurePosixPath,
    "$pure_windows_path": pathlib.PureWindowsPath,
    "$argparse_namespace": lambda content: _filled(argparse.Namespace(), content),
    "$simple_namespace": lambda content: _filled(types.SimpleNamespace(), content),
    "$ellipsis": lambda content: ...,
    "$torch_dtype": _read_dtype,
    "$torch_device": torch.device,
    "$torch_size": lambda content: torch.Size(_checked_integers(content)),
    "$array": _read_array,
    "$scalar": _read_scalar,
}
