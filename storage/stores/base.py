"""What a checkpoint needs from a store: the `Store` protocol, the `Capabilities` of a store, and `buffered_writer`.

An instance of any class that has the methods of `Store` can be passed where a URI is expected.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from typing_extensions import Buffer

from ..errors import ArgumentError, ObjectNotFoundError
from ..runtime.threads import cleaning_up

ReadInto = Callable[[str, Sequence[tuple[int, int]], memoryview, Callable[[int], None]], int]
"""Reads byte ranges [start, stop) of the named object, one after another, into a buffer of their total size.

While the bytes arrive, it calls the last argument several times, with the number of bytes in the buffer. Returns the
number of bytes that were read, which is smaller if the object ends early. Raises like `Store.read`."""


class AsyncReads(Protocol):
    """Reads on an event loop, for a client that does not need a thread per request."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop that runs the reads. It runs in another thread."""

    async def read(self, name: str, start: int, stop: int) -> Buffer:
        """Do what `Store.read` does."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """How a store is best used, and which optional methods it has.

    The defaults are right for a store that has only the methods of `Store`. An optional method is called only if it is
    set here.
    """

    concurrent_reads: int = 16
    """The number of concurrent reads that serves the store best."""
    buffers_objects: bool = False
    """Whether the store holds an object in memory until it is complete. If so, a save writes several small objects
    instead of one large object."""
    async_reads: AsyncReads | None = None
    """Reads on an event loop. If set, they replace `Store.read` for bulk data."""
    read_into: ReadInto | None = None
    """Reads into memory of the caller. If set, it replaces `Store.read` for data objects, which never change, and the
    store is local."""
    will_read: Callable[[str, Sequence[tuple[int, int]]], None] | None = None
    """Starts to fetch byte ranges [start, stop) of the named object, which will be read soon. Raises nothing."""
    list_top: Callable[[], Iterable[str]] | None = None
    """Lists the objects at the root without those in folders. Raises what `Store.list` raises."""
    check_delete: Callable[[Iterable[str]], None] | None = None
    """Raises StoreError for the first object that `Store.delete` would refuse to delete. Changes nothing."""
    is_shared: bool = True
    """Whether all ranks see the same objects. If so, rank 0 reads the metadata of a load for all ranks, unless the
    store is local. If not, rank 0 commits a checkpoint without checking that it sees what the other ranks wrote."""
    close: Callable[[], None] | None = None
    """Closes files and connections. The store may open them again when it is used."""

    @property
    def is_local(self) -> bool:
        """Whether the store is treated as a local disk: requests are cheap, and the threads that decode also read."""
        return self.read_into is not None

    def __post_init__(self) -> None:
        if self.concurrent_reads < 1:
            raise ArgumentError(f"concurrent_reads must be at least 1, got {self.concurrent_reads}")


class ObjectWriter(Protocol):
    """An object that is being written."""

    def write(self, data: Buffer, /) -> object:
        """Append bytes. The caller must not change them before the object is complete."""


@runtime_checkable
class Store(Protocol):
    """Objects below one root.

    The name of an object is relative to the root, with "/" between its parts. All methods may be called from several
    threads at once. For every failure they raise StoreError or one of its subclasses, except that `put` raises
    CheckpointExistsError if the object exists.
    """

    @property
    def location(self) -> str:
        """The root, as error messages show it. It must contain no secret."""

    @property
    def capabilities(self) -> Capabilities:
        """How the store is best used. `Capabilities()` is right for a simple store."""

    def read(self, name: str, start: int, stop: int) -> Buffer:
        """Return the bytes [start, stop) of an object, or fewer if the object ends before `stop`.

        Args:
            name: the object.
            start: the first byte, at least 0. It may be past the end of the object.
            stop: the byte after the last one, greater than `start`.

        Raises:
            ObjectNotFoundError: there is no such object.
            AccessDeniedError: the store refuses the request.
            StoreError: the read fails for any other reason.
        """

    def size(self, name: str) -> int:
        """Return the size of an object in bytes. Raises what `read` raises."""

    def modified(self, name: str) -> float:
        """Return when an object was last written, in seconds since 1970. Raises what `read` raises."""

    def create(self, name: str) -> AbstractContextManager[ObjectWriter]:
        """Return a context manager that writes a new object.

        The object is complete and durable when the block ends. If the block raises, the object may or may not exist.
        """

    def put(self, name: str, data: bytes, *, overwrite: bool) -> None:
        """Write a whole object atomically: a reader sees either the old object or the new one.

        Raises:
            CheckpointExistsError: `overwrite` is False and an object of this name exists.
        """

    def list(self, folder: str = "") -> Iterable[str]:
        """Return the names of all objects below the root, or below one of its folders.

        The result is empty if the folder does not exist. Keys for which `is_name` is False are omitted.
        """

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects. Names of objects that do not exist are ignored."""


def is_name(path: str) -> bool:
    """Return whether a key of a bucket can be the name of an object.

    Keys such as "a//b" and "a/" (a marker of an empty folder) correspond to no file and are not names.
    """
    return not {"", ".", ".."}.intersection(path.split("/"))


def top_names(store: Store) -> list[str]:
    """Return the names of the objects at the root of a store, without those in folders.

    Raises what `Store.list` raises.
    """
    list_top = store.capabilities.list_top
    if list_top is not None:
        return list(list_top())
    return [name for name in store.list() if "/" not in name]


def exists(store: Store, name: str) -> bool:
    """Return whether a store has an object."""
    try:
        store.size(name)
    except ObjectNotFoundError:
        return False
    return True


def check_delete(store: Store, names: Iterable[str]) -> None:
    """Raise StoreError if a store knows in advance that it would refuse to delete one of these objects."""
    check = store.capabilities.check_delete
    if check is not None:
        check(names)


def close_store(store: Store) -> None:
    """Close the files and connections of a store. The store may open them again when it is used."""
    close = store.capabilities.close
    if close is not None:
        close()


MAX_HELD_BYTES = 80 * 1024 * 1024
"""An object that grows larger than this is uploaded in parts while it is written."""
PART_BYTES = 16 * 1024 * 1024


class MultipartUpload:
    """An object that a client's file uploads in parts.

    Args:
        file: a file of the client, with the methods `write` and `close`. `close` completes the object.
        errors: returns a context manager that translates the client's exceptions.
        abort: cancels the upload.
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


class _HoldingWriter:
    """An ObjectWriter that holds the bytes in memory, and uploads them in parts if they are many."""

    def __init__(self, begin_upload: Callable[[], MultipartUpload] | None) -> None:
        self._begin_upload = begin_upload
        self._nbytes = 0
        self.held: list[Buffer] = []
        self.upload: MultipartUpload | None = None

    def write(self, data: Buffer, /) -> None:
        self.held.append(data)
        self._nbytes += memoryview(data).nbytes
        if self.upload is None and self._begin_upload is not None and self._nbytes > MAX_HELD_BYTES:
            self.upload = self._begin_upload()
            self._nbytes = PART_BYTES
        if self.upload is not None and self._nbytes >= PART_BYTES:
            self.upload.write(b"".join(self.held))
            self.held, self._nbytes = [], 0


@contextmanager
def buffered_writer(
    put: Callable[[bytes], None], begin_upload: Callable[[], MultipartUpload] | None = None
) -> Iterator[ObjectWriter]:
    """Implement `Store.create` for a client that accepts only whole objects.

    The object is kept in memory and written when the block ends without an error. If it exceeds MAX_HELD_BYTES and
    `begin_upload` is given, it is uploaded in parts.

    Args:
        put: puts a whole object.
        begin_upload: begins an upload in parts, for objects larger than MAX_HELD_BYTES. If None, every object is held
            as a whole.
    """
    writer = _HoldingWriter(begin_upload)
    try:
        yield writer
        rest = b"".join(writer.held)
        if writer.upload is None:
            put(rest)
        else:
            writer.upload.write(rest)
            writer.upload.close()
    except BaseException:
        if writer.upload is not None:
            with suppress(Exception), cleaning_up():  # the caller needs the first error, not one of the clean-up
                writer.upload.abort()
        raise
