"""Encode values, which are not tensors, as bytes, and decode them: JSON for plain data (`plain_json`), else torch.save.

Bytes of torch.save are read with weights_only=True, unless the caller allows pickle.
"""

from __future__ import annotations

import io
import json
import pickle
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from ...planner.entries import Kind
from ..errors import CorruptCheckpointError, DestinationError, UnsafeValueError, UnsupportedValueError
from ..runtime.brief import reason
from ..runtime.process_group import is_distributed
from ..tensors.plain_json import NotPlainError, from_plain, to_plain
from ..tensors.tensor_classes import is_whole
from .torch_save.safe_load import ZSTD_MAGIC, decompress, load_checked, refusal_of
from .tree_size import is_repetitive

MAX_VALUE_BYTES = 2**31
"""The largest size of an encoded value."""


def encode_value(value: Any) -> tuple[Kind, bytes]:
    """Encode a value.

    A value that holds the same containers many times is pickled, because it could become arbitrarily large as JSON.

    Returns:
        The kind of the encoding, and the bytes.

    Raises:
        UnsupportedValueError: the encoded value has more than MAX_VALUE_BYTES bytes, or contains a tensor that is
            sharded over ranks.
        Exception: whatever pickle raises.
    """
    kind, data = Kind.TORCH_SAVE, b""
    if not is_repetitive(value):
        with suppress(NotPlainError, RecursionError, UnicodeEncodeError):
            plain = json.dumps(to_plain(value), separators=(",", ":"), allow_nan=False)
            kind, data = Kind.JSON, plain.encode()
    if kind is Kind.TORCH_SAVE:
        data = torch_save(value)
    if len(data) > MAX_VALUE_BYTES:
        raise UnsupportedValueError(
            f"a {type(value).__name__} takes {len(data)} bytes, but a value may take {MAX_VALUE_BYTES}: store its "
            "large parts as tensors"
        )
    return kind, data


def needs_pickle(name: str, kind: Kind, data: bytes) -> bool:
    """Return whether an encoded value can only be read with `allow_pickle=True`.

    Raises:
        UnsupportedValueError: it cannot be read at all.
    """
    try:
        decode_value(name, kind, data)
    except UnsafeValueError:
        return True
    except CorruptCheckpointError as error:
        raise UnsupportedValueError(f"{name!r} cannot be stored, because it could not be read: {error}") from error
    return False


def decode_value(name: str, kind: Kind, data: bytes, *, allow_pickle: bool = False) -> Any:
    """Decode a value.

    Args:
        name: the name of the value, for error messages.
        kind: the kind of the encoding.
        data: the bytes.
        allow_pickle: whether to unpickle values that weights_only=True refuses. This can run code from the checkpoint.

    Raises:
        UnsafeValueError: weights_only=True refuses the value, and `allow_pickle` is False.
        CorruptCheckpointError: the bytes are not an encoded value of this kind.
    """
    try:
        if kind is Kind.JSON:
            return from_plain(json.loads(data))
        if data.startswith(ZSTD_MAGIC):  # written by DCP's zstd extension
            data = decompress(data, MAX_VALUE_BYTES)
        if allow_pickle:
            return torch.load(io.BytesIO(data), weights_only=False, map_location="cpu")
        return load_checked(data)
    except Exception as error:
        refused = None if kind is Kind.JSON or allow_pickle else refusal_of(error)
        if refused is None:
            raise CorruptCheckpointError(f"the value {name!r} cannot be decoded: {reason(error)}") from error
        raise UnsafeValueError(
            f"the value {name!r} needs more of pickle than torch.load(weights_only=True) allows, which could run code: "
            f"{refused}. If you trust the author of this checkpoint, load it with allow_pickle=True"
        ) from error


def torch_save(value: Any) -> bytes:
    """Return the bytes that torch.save writes for a value. Raises what `encode_value` raises."""
    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_module=_PickleModule)
    return buffer.getvalue()


def check_no_shard(name: str, value: Any) -> None:
    """Check that a value that is to be replaced contains no DTensor or ShardedTensor.

    Raises:
        DestinationError: it does.
    """
    if not is_distributed() or isinstance(value, (int, float, str, bytes, torch.Tensor, type(None))):
        return
    try:
        _Visitor(_Nowhere()).dump(value)
    except UnsupportedValueError as error:
        raise DestinationError(f"{name!r} cannot be loaded: {error}") from error
    except Exception:
        return  # it cannot be pickled, so it is not what was saved


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and not is_whole(value):
            raise UnsupportedValueError(
                f"it contains a {type(value).__name__} in a tuple or another object, which is one value for all "
                "ranks: put the tensor into a list or a dict, so that each rank has its part of it"
            )
        return NotImplemented


class _Visitor(_Pickler):
    """Visits what a pickler visits, without the content of arrays."""

    def reducer_override(self, value: Any) -> Any:
        found = super().reducer_override(value)
        return (int, ()) if isinstance(value, (torch.Tensor, np.ndarray)) else found


class _Nowhere:
    def write(self, data: object) -> None:
        """Discard what a pickler writes."""


class _PickleModule:
    """What torch.save needs of the module `pickle`."""

    __name__ = "pickle"
    Pickler = _Pickler
