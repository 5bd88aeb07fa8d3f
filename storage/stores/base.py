"""A store: the few things that a checkpoint needs of a place that keeps objects.

Anything that has these methods can be given where a URI is expected. Names are relative to the store's root, with
"/" between their parts. All methods may be called from several threads at once, and raise StoreError or one of its
subclasses for whatever goes wrong below them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol, runtime_checkable

from typing_extensions import Buffer

from ..runtime.threads import cleaning_up

ReadInto = Callable[[str, Sequence[tuple[int, int]], memoryview], int]
"""Reads bytes [start, stop) of an object, for each of some ranges, one after another into a buffer of their size, and
tells how many bytes were there. Raises as Store.read."""


class AsyncReads(Protocol):
    """The reads of a store that needs no thread for each."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """Where they run, in a thread of its own."""

    async def read(self, name: str, start: int, stop: int) -> Buffer:
        """As Store.read."""


class ObjectWriter(Protocol):
    """One object being written."""

    def write(self, data: Buffer, /) -> object:
        """Append bytes. They must stay as they are until the object stands."""


@runtime_checkable
class Store(Protocol):
    """Objects below one root."""

    @property
    def location(self) -> str:
        """The root, as errors should name it. Holds no secret."""

    @property
    def concurrent_reads(self) -> int:
        """How many reads at once serve it best."""

    @property
    def async_reads(self) -> AsyncReads | None:
        """Reads that need no thread, where it has them."""

    @property
    def read_into(self) -> ReadInto | None:
        """A read into memory that is given, where it has one; of data objects, which never change."""

    @property
    def holds_objects(self) -> bool:
        """Whether an object is held in memory until all of it is there: then several small ones are better."""

    def read(self, name: str, start: int, stop: int) -> Buffer:
        """Bytes [start, stop) of an object, 0 <= start < stop; fewer where the object ends before.

        Raises ObjectNotFoundError, AccessDeniedError, StoreError.
        """

    def size(self, name: str) -> int:
        """Bytes of an object. Raises ObjectNotFoundError, AccessDeniedError, StoreError."""

    def modified(self, name: str) -> float:
        """When an object was written, in seconds since 1970. Raises as `size`."""

    def create(self, name: str) -> AbstractContextManager[ObjectWriter]:
        """Write a new object. It stands, durably, once the block is left; left by an error, it need not exist."""

    def put(self, name: str, data: bytes, *, overwrite: bool) -> None:
        """Write a whole object atomically: readers see the old one or the new one.

        Raises CheckpointExistsError where an object of this name is there and `overwrite` is False.
        """

    def list(self, folder: str = "") -> Iterable[str]:
        """The names of all objects below the root, or below a folder of it; none where there is no such place.

        Keys that no file could have (see `is_name`) are left out.
        """

    def delete(self, names: Iterable[str]) -> None:
        """Remove objects; those that are not there are passed over."""


@runtime_checkable
class ReadsAhead(Protocol):
    """What a store may have beside: a way to be told what will be read soon."""

    def will_read(self, name: str, ranges: Sequence[tuple[int, int]]) -> None:
        """Bytes [start, stop) of an object, for each range, will be read: begin to fetch them. Raises nothing."""


@runtime_checkable
class ChecksDeletes(Protocol):
    """What a store may have beside: a way to find out what it would refuse to delete."""

    def check_delete(self, names: Iterable[str]) -> None:
        """Raises StoreError for the first of some objects that `delete` would refuse, and changes nothing."""


def check_delete(store: object, names: Iterable[str]) -> None:
    """Check that objects can be deleted, if the store can tell. Raises StoreError."""
    if isinstance(store, ChecksDeletes):
        store.check_delete(names)


def is_name(path: str) -> bool:
    """Return whether a key of a bucket can be a name here: others, as "a//b" or the marker "a/", stand for no file."""
    return not {"", ".", ".."}.intersection(path.split("/"))


@runtime_checkable
class ListsTop(Protocol):
    """What a store may have beside: a listing that does not go into folders."""

    def list_top(self) -> Iterable[str]:
        """The names of the objects at the root; none where there is no such place. Raises as `Store.list`."""


def top_names(store: Store) -> list[str]:
    """Return the names of the objects at the root of a store, which are in no folder. Raises as `Store.list`."""
    if isinstance(store, ListsTop):
        return list(store.list_top())
    return [name for name in store.list() if "/" not in name]


HELD_BYTES = 80 * 1024 * 1024
"""An object that grows larger is sent in parts while it is written."""
PART_BYTES = 16 * 1024 * 1024


class Upload:
    """An object that is sent in parts, by a client's file.

    Args:
        file: has write and close; once it is closed, the object comes into being.
        errors: translates what the client raises.
        abort: has the client end it otherwise.
    """

    def __init__(
        self, file: Any, errors: Callable[[], AbstractContextManager[None]], abort: Callable[[], object]
    ) -> None:
        self._file = file
        self._errors = errors
        self.abort = abort

    def write(self, data: bytes) -> None:
        with self._errors():
            self._file.write(data)

    def close(self) -> None:
        with self._errors():
            self._file.close()


class _Held:
    """An ObjectWriter that holds what it is given; once that is too much, it sends it in parts."""

    def __init__(self, begin: Callable[[], Upload] | None) -> None:
        self._begin = begin
        self._nbytes = 0
        self.parts: list[Buffer] = []
        self.upload: Upload | None = None

    def write(self, data: Buffer, /) -> None:
        self.parts.append(data)
        self._nbytes += memoryview(data).nbytes
        if self.upload is None and self._begin is not None and self._nbytes > HELD_BYTES:
            self.upload = self._begin()
            self._nbytes = PART_BYTES
        if self.upload is not None and self._nbytes >= PART_BYTES:
            self.upload.write(b"".join(self.parts))
            self.parts, self._nbytes = [], 0


@contextmanager
def held(put: Callable[[bytes], None], begin: Callable[[], Upload] | None = None) -> Iterator[ObjectWriter]:
    """A `Store.create` for a store that takes an object whole: it is put once the block is left without an error.

    Args:
        put: puts a whole object.
        begin: begins one that is sent in parts, where the store can do that: what is large is.
    """
    writer = _Held(begin)
    try:
        yield writer
        rest = b"".join(writer.parts)
        if writer.upload is None:
            put(rest)
        else:
            writer.upload.write(rest)
            writer.upload.close()
    except BaseException:
        if writer.upload is not None:
            with suppress(Exception), cleaning_up():  # the first error is the one to tell
                writer.upload.abort()
        raise


def close_store(store: Store) -> None:
    """Close the files and connections that a store keeps, if it can be closed. It may open them again."""
    close = getattr(store, "close", None)
    if close is not None:
        close()
