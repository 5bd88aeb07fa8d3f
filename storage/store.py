"""A store: the few things that a checkpoint needs of a place that keeps objects.

Anything that has these methods can be given where a URI is expected. Names are relative to the store's root, with
"/" between their parts. All methods may be called from several threads at once, and raise StoreError or one of its
subclasses for whatever goes wrong below them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from typing_extensions import Buffer

from .errors import ArgumentError


class ObjectWriter(Protocol):
    """One object being written."""

    def write(self, data: Buffer, /) -> object:
        """Append bytes. They may be reused by the caller once this returns."""


@runtime_checkable
class Store(Protocol):
    """Objects below one root."""

    @property
    def location(self) -> str:
        """The root, as errors should name it. Holds no secret."""

    def read(self, name: str, start: int, stop: int) -> Buffer:
        """Bytes [start, stop) of an object, 0 <= start < stop; fewer where the object ends before.

        Raises ObjectNotFoundError, AccessDeniedError, StoreError.
        """

    def create(self, name: str) -> AbstractContextManager[ObjectWriter]:
        """Write a new object. It stands, durably, once the block is left; left by an error, it need not exist."""

    def put(self, name: str, data: bytes, *, overwrite: bool) -> None:
        """Write a whole object atomically: readers see the old one or the new one.

        Raises CheckpointExistsError where an object of this name is there and `overwrite` is False.
        """

    def list(self, folder: str = "") -> Iterable[str]:
        """The names of all objects below the root, or below a folder of it; none where there is no such place."""

    def delete(self, names: Iterable[str]) -> None:
        """Remove objects; those that are not there are passed over."""


class TranslatingWriter:
    """An ObjectWriter over an open file, whose errors it translates."""

    def __init__(self, file: ObjectWriter, errors: Callable[[], AbstractContextManager[None]]) -> None:
        self._file = file
        self._errors = errors

    def write(self, data: Buffer, /) -> None:
        with self._errors():
            self._file.write(data)


def open_store(target: str | os.PathLike[str] | Store, storage_options: Mapping[str, Any] | None = None) -> Store:
    """The store at a path or URI, or `target` itself where it is one. Raises UnsupportedURIError, ArgumentError."""
    if isinstance(target, Store):
        return target
    from .fsspec_store import open_fsspec

    try:
        uri = os.fspath(target)
    except TypeError:
        raise ArgumentError(f"expected a path, a URI or a Store, got {target!r}") from None
    return open_fsspec(uri, dict(storage_options or {}))
