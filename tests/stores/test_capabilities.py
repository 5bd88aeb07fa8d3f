"""Capabilities of stores, and how stores that wrap another one forward them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from reshard.storage.errors import ArgumentError, StoreError, UnavailableError
from reshard.storage.runtime.threads import event_loop, result_of
from reshard.storage.stores import retry
from reshard.storage.stores.base import Capabilities, Store, check_delete, close_store, top_names
from reshard.storage.stores.local import LocalStore
from reshard.storage.stores.memory import MemoryStore
from reshard.storage.stores.retry import RetryingStore
from reshard.storage.stores.testing import check_store
from reshard.storage.stores.wrapped import WrappedStore


class FullStore(MemoryStore):
    """A store with all optional methods. Each call fails twice before it succeeds."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def fail_twice(self, method: str) -> None:
        self.called.append(method)
        if self.called.count(method) < 3:
            raise UnavailableError("injected: slow down")

    def list_top(self) -> Iterable[str]:
        self.fail_twice("list_top")
        return ["a"]

    def check_delete(self, names: Iterable[str]) -> None:
        self.fail_twice("check_delete")
        raise StoreError(f"refused: {list(names)}")

    def close(self) -> None:
        self.called.append("close")

    def read_into(
        self, name: str, ranges: Sequence[tuple[int, int]], buffer: memoryview, arrived: Callable[[int], None]
    ) -> int:
        raise AssertionError("not called")


class FullReads:
    def __init__(self, store: FullStore) -> None:
        self._store = store
        self.loop = event_loop()

    async def read(self, name: str, start: int, stop: int) -> bytes:
        self._store.fail_twice("read")
        return bytes(self._store.read(name, start, stop))


def full_store() -> FullStore:
    store = FullStore()
    store.content["a"] = b"0123456789"
    store.capabilities = Capabilities(
        concurrent_reads=7,
        buffers_objects=True,
        async_reads=FullReads(store),
        read_into=store.read_into,
        will_read=lambda name, ranges: None,
        list_top=store.list_top,
        check_delete=store.check_delete,
        close=store.close,
    )
    return store


def test_the_default_capabilities_have_no_optional_methods() -> None:
    store = MemoryStore()
    store.content = {"a": b"", "b/c": b""}
    assert store.capabilities == Capabilities()
    assert top_names(store) == ["a"]
    check_delete(store, ["a"])
    close_store(store)
    assert isinstance(store, Store)


def test_an_optional_method_that_is_not_declared_is_not_called() -> None:
    store = FullStore()
    assert top_names(store) == []
    check_delete(store, ["a"])
    close_store(store)
    assert store.called == []


@pytest.mark.parametrize("count", [0, -1])
def test_concurrent_reads_must_be_positive(count: int) -> None:
    with pytest.raises(ArgumentError, match=f"concurrent_reads must be at least 1, got {count}"):
        Capabilities(concurrent_reads=count)


def test_a_wrapped_store_forwards_every_call(tmp_path: Path) -> None:
    check_store(WrappedStore(MemoryStore()))
    check_store(WrappedStore(LocalStore(tmp_path / "x")))


def test_a_wrapped_store_omits_methods_that_would_bypass_its_own() -> None:
    store = full_store()
    expected = replace(store.capabilities, async_reads=None, read_into=None, will_read=None, list_top=None)
    assert WrappedStore(store).capabilities == expected


def test_a_retrying_store_retries_the_optional_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.001)
    inner = full_store()
    store = RetryingStore(inner)
    assert (store.capabilities.concurrent_reads, store.capabilities.buffers_objects) == (7, True)
    assert store.capabilities.read_into is None
    assert store.capabilities.will_read is None
    assert top_names(store) == ["a"]
    with pytest.raises(StoreError, match=r"refused: \['x', 'y'\]"):
        check_delete(store, iter(["x", "y"]))
    reads = store.capabilities.async_reads
    assert reads is not None
    assert result_of(reads.read("a", 2, 5), reads.loop) == b"234"
    close_store(store)
    assert inner.called == [*["list_top"] * 3, *["check_delete"] * 3, *["read"] * 3, "close"]
