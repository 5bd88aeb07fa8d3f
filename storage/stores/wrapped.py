"""A store that forwards its calls to another store: the base class of stores that change a few of them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import replace

from typing_extensions import Buffer

from .base import Capabilities, ObjectWriter, Store


class WrappedStore:
    """A store that forwards every call to another store.

    A subclass overrides the methods that it changes. `capabilities` omits the optional methods that would bypass an
    overridden `read` or `list`; a subclass adds those that it supports.

    Args:
        inner: the store that does the work.
    """

    def __init__(self, inner: Store) -> None:
        self._inner = inner

    @property
    def inner(self) -> Store:
        """The store that does the work."""
        return self._inner

    @property
    def location(self) -> str:
        return self._inner.location

    @property
    def capabilities(self) -> Capabilities:
        return replace(self.inner.capabilities, async_reads=None, read_into=None, will_read=None, list_top=None)

    def read(self, name: str, start: int, stop: int) -> Buffer:
        return self.inner.read(name, start, stop)

    def size(self, name: str) -> int:
        return self.inner.size(name)

    def modified(self, name: str) -> float:
        return self.inner.modified(name)

    def create(self, name: str) -> AbstractContextManager[ObjectWriter]:
        return self.inner.create(name)

    def put(self, name: str, data: bytes, *, overwrite: bool) -> None:
        self.inner.put(name, data, overwrite=overwrite)

    def list(self, folder: str = "") -> Iterable[str]:
        return self.inner.list(folder)

    def delete(self, names: Iterable[str]) -> None:
        self.inner.delete(names)
