"""Stores for tests: in memory, recording, failing and slow. `check_store` checks that a store keeps its contract."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from typing_extensions import Buffer

from ..errors import CheckpointExistsError, ObjectNotFoundError, StoreError
from .base import Capabilities, ObjectWriter, Store, buffered_writer, check_delete, top_names
from .wrapped import WrappedStore


class MemoryStore:
    """A store in the memory of this process.

    Attributes:
        content: The objects by name. Change it to damage a checkpoint.
        capabilities: May be replaced, also on an instance.
    """

    capabilities = Capabilities()

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}

    @property
    def location(self) -> str:
        return "memory"

    def read(self, name: str, start: int, stop: int) -> Buffer:
        try:
            return self.content[name][start:stop]
        except KeyError:
            raise ObjectNotFoundError(f"memory has no object {name!r}") from None

    def size(self, name: str) -> int:
        return memoryview(self.read(name, 0, 2**60)).nbytes

    def modified(self, name: str) -> float:
        self.size(name)
        return time.time()

    def create(self, name: str) -> AbstractContextManager[ObjectWriter]:
        return buffered_writer(lambda data: self.content.update({name: data}))

    def put(self, name: str, data: bytes, *, overwrite: bool) -> None:
        if name in self.content and not overwrite:
            raise CheckpointExistsError(f"{name} exists")
        self.content[name] = data

    def list(self, folder: str = "") -> Iterable[str]:
        prefix = f"{folder.rstrip('/')}/" if folder else ""
        return [name for name in self.content if name.startswith(prefix)]

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            self.content.pop(name, None)


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a method of a store, or one write to an object ("write"). The bytes are [start, stop)."""

    method: str
    name: str
    start: int = 0
    stop: int = 0


class RecordingStore(WrappedStore):
    """Another store whose calls are recorded, with a hook before each call.

    Args:
        store: The store that does the work.
        before: Called before each call, and before each write to an object, in the same thread. It may wait or raise.
    """

    def __init__(self, store: Store, before: Callable[[Call], None] = lambda call: None) -> None:
        super().__init__(store)
        self._before = before
        self._lock = threading.Lock()
        self.calls: list[Call] = []

    def __reduce__(self) -> tuple[type[RecordingStore], tuple[Store, Callable[[Call], None]]]:
        """Pickle without the calls: those in another process are not recorded here."""
        return type(self), (self.inner, self._before)

    def _record(self, call: Call) -> None:
        with self._lock:
            self.calls.append(call)
        self._before(call)

    def read(self, name: str, start: int, stop: int) -> Buffer:
        self._record(Call("read", name, start, stop))
        return super().read(name, start, stop)

    def size(self, name: str) -> int:
        self._record(Call("size", name))
        return super().size(name)

    def modified(self, name: str) -> float:
        self._record(Call("modified", name))
        return super().modified(name)

    def create(self, name: str) -> AbstractContextManager[ObjectWriter]:
        self._record(Call("create", name))
        return self._recording_writes(name)

    @contextmanager
    def _recording_writes(self, name: str) -> Iterator[ObjectWriter]:
        with super().create(name) as out:
            yield _RecordingWriter(out, lambda size: self._record(Call("write", name, 0, size)))

    def put(self, name: str, data: bytes, *, overwrite: bool) -> None:
        self._record(Call("put", name, 0, len(data)))
        super().put(name, data, overwrite=overwrite)

    def list(self, folder: str = "") -> Iterable[str]:
        self._record(Call("list", folder))
        return super().list(folder)

    def delete(self, names: Iterable[str]) -> None:
        names = list(names)
        for name in names:
            self._record(Call("delete", name))
        super().delete(names)


class _RecordingWriter:
    def __init__(self, out: ObjectWriter, record: Callable[[int], None]) -> None:
        self._out = out
        self._record = record

    def write(self, data: Buffer, /) -> None:
        self._record(memoryview(data).nbytes)
        self._out.write(data)


def failing(method: str, *, after: int = 0, error: Exception | None = None) -> Callable[[Call], None]:
    """Return a hook that fails the calls of a method.

    Args:
        method: The method, as in `Call.method`.
        after: The number of calls that succeed before.
        error: The exception to raise. None is a StoreError.
    """
    lock = threading.Lock()
    left = after

    def before(call: Call) -> None:
        nonlocal left
        if call.method != method:
            return
        with lock:
            left -= 1
            if left < 0:
                raise error or StoreError(f"injected: {call.method} of {call.name!r} fails")

    return before


def slow(method: str, seconds: float) -> Callable[[Call], None]:
    """Return a hook that delays each call of a method."""

    def before(call: Call) -> None:
        if call.method == method:
            time.sleep(seconds)

    return before


_OBJECT = "data/a.shard"
_CONTENT = bytes(range(256)) * 1024


def check_store(store: Store) -> None:
    """Check that a store keeps the contract of `Store`, including the optional methods in its capabilities.

    Args:
        store: An empty store. It is empty again afterwards.

    Raises:
        AssertionError: The store breaks the contract.
    """
    assert isinstance(store, Store)
    assert store.location
    _check_empty(store)
    _check_create_and_read(store)
    _check_size_and_time(store)
    _check_read_into(store)
    _check_reads_ahead(store)
    _check_async_reads(store)
    _check_put_and_list(store)
    _check_concurrent_reads(store)
    _check_deletes(store)


def _check_empty(store: Store) -> None:
    assert list(store.list()) == []
    assert top_names(store) == []
    _expect(ObjectNotFoundError, lambda: store.read("absent", 0, 1))
    _expect(ObjectNotFoundError, lambda: store.read("deep/absent", 0, 1))
    store.delete(["absent"])


def _check_create_and_read(store: Store) -> None:
    """`_OBJECT` is what was written, and remains for the checks that follow."""
    with store.create(_OBJECT) as out:
        out.write(b"")
        out.write(bytearray(_CONTENT[:1000]))
        out.write(memoryview(_CONTENT)[1000:])
    assert set(store.list()) == {_OBJECT}
    nbytes = len(_CONTENT)
    for start, stop in ((0, 1), (1000, 1001), (5, nbytes), (nbytes - 1, nbytes)):
        assert bytes(store.read(_OBJECT, start, stop)) == _CONTENT[start:stop]
    assert bytes(store.read(_OBJECT, nbytes - 3, nbytes + 5)) == _CONTENT[-3:]
    assert bytes(store.read(_OBJECT, nbytes + 5, nbytes + 9)) == b""


def _check_size_and_time(store: Store) -> None:
    assert store.size(_OBJECT) == len(_CONTENT)
    _expect(ObjectNotFoundError, lambda: store.size("absent"))
    assert abs(store.modified(_OBJECT) - time.time()) < 3600
    _expect(ObjectNotFoundError, lambda: store.modified("absent"))


def _check_read_into(store: Store) -> None:
    read_into = store.capabilities.read_into
    if read_into is None:
        return
    nbytes, buffer = len(_CONTENT), bytearray(100)
    assert read_into(_OBJECT, [(1000, 1060), (7, 47)], memoryview(buffer)) == 100
    assert buffer == _CONTENT[1000:1060] + _CONTENT[7:47]
    assert read_into(_OBJECT, [(nbytes - 3, nbytes + 97)], memoryview(buffer)) == 3
    assert buffer[:3] == _CONTENT[-3:]
    assert read_into(_OBJECT, [(nbytes + 5, nbytes + 105)], memoryview(buffer)) == 0
    _expect(ObjectNotFoundError, lambda: read_into("absent", [(0, 100)], memoryview(buffer)))


def _check_reads_ahead(store: Store) -> None:
    will_read = store.capabilities.will_read
    if will_read is not None:
        will_read(_OBJECT, [(0, 1000), (2000, len(_CONTENT) + 5)])
        will_read("absent", [(0, 1000)])


def _check_async_reads(store: Store) -> None:
    reads = store.capabilities.async_reads
    if reads is None:
        return

    def read(name: str, start: int, stop: int) -> bytes:
        return bytes(asyncio.run_coroutine_threadsafe(reads.read(name, start, stop), reads.loop).result())

    nbytes = len(_CONTENT)
    assert read(_OBJECT, 1000, 70000) == _CONTENT[1000:70000]
    assert read(_OBJECT, nbytes - 3, nbytes + 5) == _CONTENT[-3:]
    assert read(_OBJECT, nbytes + 5, nbytes + 9) == b""
    _expect(ObjectNotFoundError, lambda: read("absent", 0, 1))


def _check_put_and_list(store: Store) -> None:
    """An object "manifest" remains for the checks that follow."""
    store.put("manifest", b"one", overwrite=False)
    _expect(CheckpointExistsError, lambda: store.put("manifest", b"two", overwrite=False))
    assert bytes(store.read("manifest", 0, 10)) == b"one"
    store.put("manifest", b"three", overwrite=True)
    assert bytes(store.read("manifest", 0, 10)) == b"three"
    assert set(store.list()) == {_OBJECT, "manifest"}
    assert list(store.list("data")) == [_OBJECT]
    assert list(store.list("nothing")) == []
    assert top_names(store) == ["manifest"]


def _check_concurrent_reads(store: Store) -> None:
    results: list[bool] = []
    threads = [
        threading.Thread(target=lambda: results.append(bytes(store.read(_OBJECT, 7, 70000)) == _CONTENT[7:70000]))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 8


def _check_deletes(store: Store) -> None:
    check_delete(store, [_OBJECT, "absent", "manifest"])
    assert set(store.list()) == {_OBJECT, "manifest"}
    store.delete([_OBJECT, "absent", "manifest"])
    assert list(store.list()) == []
    store.delete([])
    read_into = store.capabilities.read_into
    if read_into is not None:
        _expect(ObjectNotFoundError, lambda: read_into(_OBJECT, [(0, 1)], memoryview(bytearray(1))))
    _expect(ObjectNotFoundError, lambda: store.read("manifest", 0, 1))


def _expect(error: type[Exception], call: Callable[[], object]) -> None:
    try:
        call()
    except error:
        return
    raise AssertionError(f"expected {error.__name__}")
