"""Open the store at a path or URI."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ...planner.masking import remember_secrets
from ..errors import ArgumentError
from .base import Store
from .fsspec import open_fsspec
from .options import checked_options


def open_store(target: str | os.PathLike[str] | Store, storage_options: Mapping[str, Any] | None = None) -> Store:
    """Open the store at a path or URI, or return `target` itself where it is one.

    Raises UnsupportedURIError, ArgumentError where there are options for a local path or a Store, StoreError.
    """
    options = checked_options(storage_options)
    if isinstance(target, Store):
        if options:
            raise ArgumentError(
                f"{', '.join(map(repr, options))} were given as storage options of {target.location}, which is open "
                "already: leave them out"
            )
        return target
    try:
        uri = os.fspath(target)
    except TypeError:
        uri = None
    if not isinstance(uri, str):
        raise ArgumentError(f"expected a path, a URI or a Store, got {target!r}")
    if not uri:
        raise ArgumentError('the path or URI is empty; "." is the current folder')
    remember_secrets(uri, options)
    return open_fsspec(uri, options)


def open_found_store(uri: str, storage_options: Mapping[str, Any] | None = None) -> Store:
    """Open the store at a URI that was found in a listing: its words are nobody's secrets. Raises as `open_store`."""
    options = checked_options(storage_options)
    remember_secrets("", options)
    return open_fsspec(uri, options)
