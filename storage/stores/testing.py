"""For those who test against stores, or write one: stores in memory, that record, fail and lag, and the contract.

`check_store(store)` is what every Store must pass; run it on your own.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from typing_extensions import Buffer

from ..errors import CheckpointExistsError, ObjectNotFoundError, StoreError
from .base import ObjectWriter, ReadsAhead, Store, check_delete, held


class MemoryStore:
    """A store in this process's memory. `content` is what it holds: change it to damage a checkpoint."""

    concurrent_reads = 16
    async_reads = None
    read_into = None
    holds_objects = False

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
        return held(lambda data: self.content.update({name: data}))

    def put(self, name: str, data: bytes, *, overwrite: bool) -> None:
        if name in self.content and not overwrite:
            raise CheckpointExistsError(f"{name} exists")
        self.content[name] = data

    def list(self, folder: str = "") -> Iterable[str]:
        below = f"{folder.rstrip('/')}/" if folder else ""
        return [name for name in self.content if name.startswith(below)]

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            self.content.pop(name, None)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a store."""

    method: str
    name: str
    start: int = 0
    stop: int = 0


class RecordingStore:
    """Another store, with its calls recorded, and a hook before each that may wait or raise.

    Args:
        store: does the work.
        before: called before each call, and before each write to an object, on the thread that makes it.
    """

    def __init__(self, store: Store, before: Callable[[Call], None] = lambda call: None) -> None:
        self._store = store
        self._before = before
        self._lock = threading.Lock()
        self.calls: list[Call] = []

    async_reads = None
    read_into = None

    @property
    def location(self) -> str:
        return self._store.location

    @property
    def concurrent_reads(self) -> int:
        return self._store.concurrent_reads

    @property
    def holds_objects(self) -> bool:
        return self._store.holds_objects

    def _note(self, call: Call) -> None:
        with self._lock:
            self.calls.append(call)
        self._before(call)

    def read(self, name: str, start: int, stop: int) -> Buffer:
        self._note(Call("read", name, start, stop))
        return self._store.read(name, start, stop)

    def size(self, name: str) -> int:
        self._note(Call("size", name))
        return self._store.size(name)

    def modified(self, name: str) -> float:
        self._note(Call("modified", name))
        return self._store.modified(name)

    def create(self, name: str) -> AbstractContextManager[ObjectWriter]:
        self._note(Call("create", name))
        return self._noting_writes(name)

    @contextmanager
    def _noting_writes(self, name: str) -> Iterator[ObjectWriter]:
        with self._store.create(name) as out:
            yield _Noting(out, lambda size: self._note(Call("write", name, 0, size)))

    def put(self, name: str, data: bytes, *, overwrite: bool) -> None:
        self._note(Call("put", name, 0, len(data)))
        self._store.put(name, data, overwrite=overwrite)

    def list(self, folder: str = "") -> Iterable[str]:
        self._note(Call("list", folder))
        return self._store.list(folder)

    def check_delete(self, names: Iterable[str]) -> None:
        check_delete(self._store, names)

    def delete(self, names: Iterable[str]) -> None:
        names = list(names)
        for name in names:
            self._note(Call("delete", name))
        self._store.delete(names)


class _Noting:
    def __init__(self, out: ObjectWriter, note: Callable[[int], None]) -> None:
        self._out = out
        self._note = note

    def write(self, data: Buffer, /) -> None:
        self._note(memoryview(data).nbytes)
        self._out.write(data)


def failing(method: str, *, after: int = 0, error: Exception | None = None) -> Callable[[Call], None]:
    """A hook that lets `after` calls of a method pass and fails all that follow."""
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
    """A hook that makes each call of a method take longer."""

    def before(call: Call) -> None:
        if call.method == method:
            time.sleep(seconds)

    return before


def check_store(store: Store) -> None:
    """The contract of a Store, on an empty one; it is left empty. Raises AssertionError."""
    assert isinstance(store, Store)
    assert store.location
    assert list(store.list()) == []
    _expect(ObjectNotFoundError, lambda: store.read("absent", 0, 1))
    _expect(ObjectNotFoundError, lambda: store.read("deep/absent", 0, 1))
    store.delete(["absent"])

    content = bytes(range(256)) * 1024
    with store.create("data/a.shard") as out:
        out.write(b"")
        out.write(bytearray(content[:1000]))
        out.write(memoryview(content)[1000:])
    assert set(store.list()) == {"data/a.shard"}
    for start, stop in ((0, 1), (1000, 1001), (5, len(content)), (len(content) - 1, len(content))):
        assert bytes(store.read("data/a.shard", start, stop)) == content[start:stop]
    assert bytes(store.read("data/a.shard", len(content) - 3, len(content) + 5)) == content[-3:]
    assert bytes(store.read("data/a.shard", len(content) + 5, len(content) + 9)) == b""

    assert store.size("data/a.shard") == len(content)
    _expect(ObjectNotFoundError, lambda: store.size("absent"))
    assert abs(store.modified("data/a.shard") - time.time()) < 3600
    _expect(ObjectNotFoundError, lambda: store.modified("absent"))
    _check_other_reads(store, content)

    store.put("manifest", b"one", overwrite=False)
    _expect(CheckpointExistsError, lambda: store.put("manifest", b"two", overwrite=False))
    assert bytes(store.read("manifest", 0, 10)) == b"one"
    store.put("manifest", b"three", overwrite=True)
    assert bytes(store.read("manifest", 0, 10)) == b"three"
    assert set(store.list()) == {"data/a.shard", "manifest"}
    assert list(store.list("data")) == ["data/a.shard"]
    assert list(store.list("nothing")) == []

    results: list[bool] = []
    threads = [
        threading.Thread(target=lambda: results.append(bytes(store.read("data/a.shard", 7, 70000)) == content[7:70000]))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 8

    store.delete(["data/a.shard", "absent", "manifest"])
    assert list(store.list()) == []
    store.delete([])
    into = store.read_into
    if into is not None:
        _expect(ObjectNotFoundError, lambda: into("data/a.shard", [(0, 1)], memoryview(bytearray(1))))
    _expect(ObjectNotFoundError, lambda: store.read("manifest", 0, 1))


def _check_other_reads(store: Store, content: bytes) -> None:
    """Reads into memory, and on an event loop, give what `read` gives of "data/a.shard"; where the store has them."""
    past = len(content) + 5
    into, reads = store.read_into, store.async_reads
    if into is not None:
        buffer = bytearray(100)
        assert into("data/a.shard", [(1000, 1060), (7, 47)], memoryview(buffer)) == 100
        assert buffer == content[1000:1060] + content[7:47]
        assert into("data/a.shard", [(len(content) - 3, len(content) + 97)], memoryview(buffer)) == 3
        assert buffer[:3] == content[-3:]
        assert into("data/a.shard", [(past, past + 100)], memoryview(buffer)) == 0
        _expect(ObjectNotFoundError, lambda: into("absent", [(0, 100)], memoryview(buffer)))
    if isinstance(store, ReadsAhead):
        store.will_read("data/a.shard", [(0, 1000), (2000, past)])
        store.will_read("absent", [(0, 1000)])
    if reads is not None:

        def read(name: str, start: int, stop: int) -> bytes:
            return bytes(asyncio.run_coroutine_threadsafe(reads.read(name, start, stop), reads.loop).result())

        assert read("data/a.shard", 1000, 70000) == content[1000:70000]
        assert read("data/a.shard", len(content) - 3, past) == content[-3:]
        assert read("data/a.shard", past, past + 4) == b""
        _expect(ObjectNotFoundError, lambda: read("absent", 0, 1))


def _expect(error: type[Exception], call: Callable[[], object]) -> None:
    try:
        call()
    except error:
        return
    raise AssertionError(f"expected {error.__name__}")
