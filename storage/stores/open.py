"""Open the store at a path or URI."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ...planner.errors import CheckpointError
from ...planner.masking import remember_secrets
from ..errors import ArgumentError
from .base import Store
from .fsspec import open_fsspec
from .options import checked_options
from .uris import check_names, is_local


def open_store(location: str | os.PathLike[str] | Store, storage_options: Mapping[str, Any] | None = None) -> Store:
    """Open the store at a path or URI. A Store is returned as it is.

    Raises:
        UnsupportedURIError: no store for this URI is installed, or the URI is malformed.
        ArgumentError: storage options were passed for a local path or for a Store, or `location` is none of these.
        StoreError: the store cannot be opened.
    """
    options = checked_options(storage_options)
    if not isinstance(location, str) and isinstance(location, Store):
        if options:
            raise ArgumentError(
                f"storage_options {', '.join(map(repr, options))} were passed for {location.location}, which is an "
                "open Store: omit them"
            )
        return location
    try:
        uri = os.fspath(location)
    except TypeError:
        uri = None
    if not isinstance(uri, str):
        raise ArgumentError(f"expected a path, a URI or a Store, got {location!r}")
    if not uri:
        raise ArgumentError('the path or URI is empty; "." is the current folder')
    if "\0" in uri:
        raise ArgumentError(f"a path or URI cannot contain a NUL character, got {uri!r}")
    remember_secrets(uri, options)
    check_names(uri)
    return open_fsspec(uri, options)


def absolute_location(location: str) -> str:
    """Return a local path or URI as an absolute path, which `os.chdir` does not move. Other URIs are unchanged."""
    return open_store(location).location if is_local(location) else location


def open_found_store(uri: str, storage_options: Mapping[str, Any] | None = None) -> Store:
    """Open the store at a URI from a listing, whose path is not masked as a secret. Raises what `open_store` raises."""
    options = checked_options(storage_options)
    remember_secrets("", options)
    return open_fsspec(uri, options)


def can_open_store(location: str | os.PathLike[str] | Store) -> bool:
    """Return whether `open_store` accepts a path, a URI or a Store."""
    try:
        open_store(location)
    except CheckpointError:
        return False
    return True
