"""The metadata that a user stores with a checkpoint: plain data in the manifest, such as a step and metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..errors import ArgumentError, CorruptCheckpointError
from ..runtime.brief import brief, text_of
from ..tensors.plain_json import from_plain, to_plain
from .metadata_reader import MALFORMED_ERRORS

MAX_METADATA_BYTES = 1024 * 1024
"""The largest size of metadata as JSON. The manifest contains it, so every rank that opens the checkpoint reads it."""


def plain_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return metadata as the manifest stores it: a copy that `json.dumps` writes, without NaN and infinity.

    Raises:
        ArgumentError: The metadata is not plain data, or is too large.
    """
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping):
        raise ArgumentError(
            f"metadata must be a dict such as {{'step': 1000}}, or None, got {brief(metadata)} of {type(metadata)}"
        )
    try:
        items = _items(metadata, "metadata")
        plain: dict[str, Any] = to_plain({key: _checked(item, f"metadata[{key!r}]") for key, item in items})
        nbytes = len(json.dumps(plain, separators=(",", ":"), allow_nan=False))
    except RecursionError:
        raise ArgumentError("metadata is nested too deeply, or contains itself: pass a flat dict") from None
    except ValueError as error:
        if isinstance(error, ArgumentError):
            raise
        raise ArgumentError(f"metadata cannot be stored as JSON: {text_of(error)}") from None
    if nbytes > MAX_METADATA_BYTES:
        raise ArgumentError(
            f"metadata takes {nbytes} bytes as JSON, but may take {MAX_METADATA_BYTES}: store large data in the state "
            "dict instead"
        )
    return plain


def read_metadata(plain: Any, where: str) -> dict[str, Any]:
    """Return the metadata that a manifest contains.

    Args:
        plain: What `plain_metadata` returned.
        where: The location of the manifest, for error messages.

    Raises:
        CorruptCheckpointError: It is not metadata.
    """
    try:
        metadata = from_plain(plain)
        if not isinstance(metadata, dict):
            raise TypeError(f"it is {brief(metadata)}")
        checked: dict[str, Any] = _checked(metadata, "metadata")
        return checked
    except MALFORMED_ERRORS as error:
        raise CorruptCheckpointError(
            f"the metadata in the manifest {where} cannot be decoded: {text_of(error)}"
        ) from error


def _items(mapping: Mapping[Any, Any], where: str) -> list[tuple[str, Any]]:
    for key in mapping:
        if type(key) is not str:
            raise ArgumentError(f"{where} has the key {brief(key)} of {type(key)}: use strings as keys")
    return list(mapping.items())


def _checked(value: Any, where: str) -> Any:
    """Return a value as JSON's own types. Raise ArgumentError for any other type, since it would change."""
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, float):  # a NumPy float64 is one, too
        return float(value)
    if type(value) is list:
        return [_checked(item, f"{where}[{position}]") for position, item in enumerate(value)]
    if isinstance(value, dict):
        return {key: _checked(item, f"{where}[{key!r}]") for key, item in _items(value, where)}
    hint = "pass value.item()" if hasattr(value, "item") else "use strings, numbers, booleans, None, lists and dicts"
    raise ArgumentError(f"{where} is of {type(value)}, which metadata cannot contain: {hint}")
