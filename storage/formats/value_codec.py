"""Values that are not tensors, as bytes: JSON for plain data (`plain_json`), torch.save for anything else.

What torch.save wrote is read with weights_only=True, unless the caller allows pickle.
"""

from __future__ import annotations

import io
import json
import re
from contextlib import suppress
from typing import Any

import torch

from ...planner.entries import Kind
from ..errors import CorruptCheckpointError, UnsafeValueError, UnsupportedValueError
from ..runtime.brief import reason
from ..tensors.plain_json import NotPlainError, from_plain, to_plain
from .torch_save.safe_load import ZSTD_MAGIC, decompress, load_checked
from .tree_size import is_repetitive

MAX_VALUE_BYTES = 2**31
"""How many bytes an object may have, encoded by JSON or torch.save."""
_REFUSAL_MESSAGE = re.compile(
    r"Unsupported global|unsupported GLOBAL|Unsupported class|unrecognized function|Can only build"
)


class EncodedValue(io.BytesIO):
    """An object as bytes, with the way to read them; what a SavePlanner of reshard resolves objects to."""

    def __init__(self, kind: Kind, data: bytes) -> None:
        super().__init__(data)
        self.kind = kind


def encode_value(value: Any) -> tuple[Kind, bytes]:
    """Encode a value. One that holds the same containers again and again is pickled: as JSON it could be of any size.

    Returns: how the bytes are to be read, and the bytes.

    Raises UnsupportedValueError where there are more than MAX_VALUE_BYTES.
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
            f"a {type(value).__name__} takes {len(data)} bytes, and an object may have {MAX_VALUE_BYTES}: store what "
            "is large in it as tensors"
        )
    return kind, data


def needs_pickle(kind: Kind, data: bytes) -> bool:
    """Whether an encoded object can only be read with `allow_pickle=True`."""
    try:
        decode_value("", kind, data)
    except UnsafeValueError:
        return True
    return False


def decode_value(name: str, kind: Kind, data: bytes, *, allow_pickle: bool = False) -> Any:
    """The value that was encoded.

    Raises:
        UnsafeValueError: it is pickled in a way that weights_only=True refuses, and `allow_pickle` is False.
        CorruptCheckpointError: the bytes are no such encoding.
    """
    try:
        if kind is Kind.JSON:
            return from_plain(json.loads(data))
        if data.startswith(ZSTD_MAGIC):  # as DCP's extension leaves it
            data = decompress(data, MAX_VALUE_BYTES)
        if allow_pickle:
            return torch.load(io.BytesIO(data), weights_only=False, map_location="cpu")
        return load_checked(data)
    except Exception as error:
        refused = None if kind is Kind.JSON or allow_pickle else _refusal(str(error))
        if refused is None:
            raise CorruptCheckpointError(
                f"object {name!r} is not what its encoding should be: {reason(error)}"
            ) from error
        raise UnsafeValueError(
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
    return next((line for line in lines if _REFUSAL_MESSAGE.search(line)), None)
