"""Stores for tests: recording, failing and slow. `check_store` checks that a store keeps its contract."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from typing_extensions import Buffer

from ..errors import CheckpointExistsError, ObjectNotFoundError, StoreError
from .base import ObjectWriter, Store, check_delete, top_names
from .wrapped import WrappedStore


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
        store: the store that does the work.
        before: called before each call, and before each write to an object, in the same thread. It may wait or raise.
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
        method: the method, as in `Call.method`.
        after: the number of calls that succeed before.
        error: the exception to raise. None is a StoreError.
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
_PUT_BYTES = 512 * 1024
_PUTS = 12


def check_store(store: Store) -> None:
    """Check that a store keeps the contract of `Store`, including the optional methods in its capabilities.

    Args:
        store: an empty store. It is empty again afterwards.

    Raises:
        AssertionError: the store breaks the contract. The message says what it did.
    """
    assert isinstance(store, Store), f"{type(store).__name__} does not have all methods of reshard.Store"
    assert store.location, "location is empty: error messages need it"
    _check_empty(store)
    _check_create_and_read(store)
    _check_size_and_time(store)
    _check_read_into(store)
    _check_reads_ahead(store)
    _check_async_reads(store)
    _check_put_and_list(store)
    _check_folders(store)
    _check_atomic_put(store)
    _check_concurrent_reads(store)
    _check_deletes(store)


def _check_empty(store: Store) -> None:
    _check_names(store.list(), [], "list() of an empty store")
    _check_names(top_names(store), [], "the names at the root of an empty store")
    _expect(ObjectNotFoundError, lambda: store.read("absent", 0, 1), "read of an object that does not exist")
    _expect(ObjectNotFoundError, lambda: store.read("deep/absent", 0, 1), "read of an object in an absent folder")
    store.delete(["absent"])


def _check_create_and_read(store: Store) -> None:
    """`_OBJECT` is what was written, and remains for the checks that follow."""
    with store.create(_OBJECT) as out:
        out.write(b"")
        out.write(bytearray(_CONTENT[:1000]))
        out.write(memoryview(_CONTENT)[1000:])
    _check_names(store.list(), [_OBJECT], "list() after create")
    _check_reads(store.read, "read")


def _check_reads(read: Callable[[str, int, int], Buffer], method: str) -> None:
    nbytes = len(_CONTENT)
    for start, stop in ((0, 1), (1000, 1001), (1000, 70000), (5, nbytes), (nbytes - 1, nbytes)):
        _check_bytes(read(_OBJECT, start, stop), _CONTENT[start:stop], f"{method} of bytes [{start}, {stop})")
    past = f"{method} past the end of an object of {nbytes} bytes"
    _check_bytes(read(_OBJECT, nbytes - 3, nbytes + 5), _CONTENT[-3:], f"{past}, of [{nbytes - 3}, {nbytes + 5}),")
    _check_bytes(read(_OBJECT, nbytes + 5, nbytes + 9), b"", f"{past}, of [{nbytes + 5}, {nbytes + 9}),")


def _check_size_and_time(store: Store) -> None:
    size = store.size(_OBJECT)
    assert size == len(_CONTENT), f"size of an object of {len(_CONTENT)} bytes returned {size}"
    _expect(ObjectNotFoundError, lambda: store.size("absent"), "size of an object that does not exist")
    age = time.time() - store.modified(_OBJECT)
    assert abs(age) < 3600, f"modified of a new object returned a time {age:.0f} s ago: seconds since 1970 are expected"
    _expect(ObjectNotFoundError, lambda: store.modified("absent"), "modified of an object that does not exist")


def _ignore(nbytes: int) -> None:
    """Ignore how many bytes have arrived."""


def _check_read_into(store: Store) -> None:
    read_into = store.capabilities.read_into
    if read_into is None:
        return
    nbytes = len(_CONTENT)
    for ranges, expected in (
        ([(1000, 1060), (7, 47)], _CONTENT[1000:1060] + _CONTENT[7:47]),
        ([(nbytes - 3, nbytes + 97)], _CONTENT[-3:]),
        ([(nbytes + 5, nbytes + 105)], b""),
    ):
        buffer = bytearray(100)
        arrived: list[int] = []
        count = read_into(_OBJECT, ranges, memoryview(buffer), arrived.append)
        what = f"read_into of the byte ranges {ranges} of an object of {nbytes} bytes"
        assert count == len(expected), f"{what} returned {count} instead of {len(expected)}"
        last = arrived[-1] if arrived else 0
        assert last == count, f"{what} reported {last} bytes as arrived, and returned {count}"
        assert arrived == sorted(arrived), f"{what} reported the bytes that have arrived as {arrived}"
        _check_bytes(buffer[:count], expected, what)
    absent = memoryview(bytearray(100))
    _expect(
        ObjectNotFoundError, lambda: read_into("absent", [(0, 100)], absent, _ignore), "read_into of an absent object"
    )


def _check_reads_ahead(store: Store) -> None:
    will_read = store.capabilities.will_read
    if will_read is not None:
        will_read(_OBJECT, [(0, 1000), (2000, len(_CONTENT) + 5)])
        will_read("absent", [(0, 1000)])


def _check_async_reads(store: Store) -> None:
    reads = store.capabilities.async_reads
    if reads is None:
        return

    def read(name: str, start: int, stop: int) -> Buffer:
        return asyncio.run_coroutine_threadsafe(reads.read(name, start, stop), reads.loop).result()

    _check_reads(read, "async_reads.read")
    _expect(ObjectNotFoundError, lambda: read("absent", 0, 1), "async_reads.read of an absent object")


def _check_put_and_list(store: Store) -> None:
    """An object "manifest" remains for the checks that follow."""
    store.put("manifest", b"one", overwrite=False)
    _expect(
        CheckpointExistsError,
        lambda: store.put("manifest", b"two", overwrite=False),
        "put with overwrite=False of an object that exists",
    )
    _check_bytes(store.read("manifest", 0, 10), b"one", "read after a put that had to fail")
    store.put("manifest", b"three", overwrite=True)
    _check_bytes(store.read("manifest", 0, 10), b"three", "read after put with overwrite=True")
    _check_names(store.list(), [_OBJECT, "manifest"], "list()")
    _check_names(store.list("nothing"), [], "list of a folder that does not exist")
    _check_names(top_names(store), ["manifest"], "the names at the root")


def _check_folders(store: Store) -> None:
    """A folder is not a prefix: "data" does not contain "database/b"."""
    others = ["database/b", "data.txt", "a/data/c"]
    for name in others:
        store.put(name, b"x", overwrite=False)
    _check_names(store.list(), [_OBJECT, "manifest", *others], "list()")
    _check_names(store.list("data"), [_OBJECT], f"list('data'), beside {others},")
    _check_names(store.list("a/data"), ["a/data/c"], "list('a/data')")
    _check_names(store.list("dat"), [], "list('dat'), which is only a prefix of a folder,")
    _check_names(top_names(store), ["manifest", "data.txt"], "the names at the root")
    store.delete(others)
    _check_names(store.list(), [_OBJECT, "manifest"], "list() after delete")


def _check_atomic_put(store: Store) -> None:
    """Overwrite an object while a thread reads it. The thread must see one of the contents, as a whole."""
    contents = [bytes([letter]) * nbytes for letter, nbytes in ((97, _PUT_BYTES), (98, _PUT_BYTES // 2))]
    store.put("atomic", contents[0], overwrite=False)
    wrong: list[str] = []
    begun, done = threading.Event(), threading.Event()

    def read() -> None:
        while not (wrong or done.is_set()):
            try:
                seen = bytes(store.read("atomic", 0, _PUT_BYTES))
            except Exception as error:  # the thread that checks reports it
                wrong.append(f"{type(error).__name__}: {error}")
            else:
                if seen not in contents:
                    wrong.append(f"{len(seen)} bytes that are neither the old nor the new object")
            begun.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    begun.wait()
    try:
        for at in range(_PUTS):
            if not wrong:
                store.put("atomic", contents[1 - at % 2], overwrite=True)
    finally:
        done.set()
        reader.join()
    assert not wrong, f"put is not atomic: a read while an object was overwritten found {wrong[0]}"
    store.delete(["atomic"])


def _check_concurrent_reads(store: Store) -> None:
    wrong: list[str] = []

    def read() -> None:
        try:
            _check_bytes(store.read(_OBJECT, 7, 70000), _CONTENT[7:70000], "read in one of 8 threads")
        except Exception as error:  # the thread that checks reports it
            wrong.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, f"{len(wrong)} of 8 concurrent reads failed: {wrong[0]}"


def _check_deletes(store: Store) -> None:
    check_delete(store, [_OBJECT, "absent", "manifest"])
    _check_names(store.list(), [_OBJECT, "manifest"], "list() after check_delete, which changes nothing,")
    store.delete([_OBJECT, "absent", "manifest"])
    _check_names(store.list(), [], "list() after delete")
    store.delete([])
    read_into = store.capabilities.read_into
    if read_into is not None:
        buffer = memoryview(bytearray(1))
        _expect(
            ObjectNotFoundError, lambda: read_into(_OBJECT, [(0, 1)], buffer, _ignore), "read_into of a deleted object"
        )
    _expect(ObjectNotFoundError, lambda: store.read("manifest", 0, 1), "read of a deleted object")


def _check_names(found: Iterable[str], expected: Sequence[str], what: str) -> None:
    names = sorted(found)
    assert names == sorted(expected), f"{what} returned {names} instead of {sorted(expected)}"


def _check_bytes(found: Buffer, expected: bytes, what: str) -> None:
    data = bytes(found)
    assert len(data) == len(expected), f"{what} returned {len(data)} bytes instead of {len(expected)}"
    assert data == expected, f"{what} returned other bytes than were written"


def _expect(error: type[Exception], call: Callable[[], object], what: str) -> None:
    try:
        result = call()
    except error:
        return
    except Exception as other:
        raise AssertionError(f"{what} raised {other!r} instead of {error.__name__}") from other
    raise AssertionError(f"{what} returned {result!r} instead of raising {error.__name__}")
