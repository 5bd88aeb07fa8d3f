import time

import pytest
import torch

import reshard
from reshard.storage.errors import AccessDeniedError, StoreError, UnavailableError
from reshard.storage.stores import retry
from reshard.storage.stores.memory import MemoryStore
from reshard.storage.stores.retry import RetryingStore, retried
from reshard.storage.stores.testing import Call, RecordingStore, check_store, failing


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.001)


class Flaky:
    """A hook that fails each call of some methods a number of times before the call succeeds."""

    def __init__(self, times: int, *methods: str) -> None:
        self._times = times
        self._methods = methods
        self._seen: dict[Call, int] = {}
        self.failed = 0

    def __call__(self, call: Call) -> None:
        self._seen[call] = self._seen.get(call, 0) + 1
        if call.method in self._methods and self._seen[call] <= self._times:
            self.failed += 1
            raise UnavailableError("injected: slow down")


def test_transient_failures_are_retried() -> None:
    flaky = Flaky(3, "read", "put", "list", "delete")
    check_store(RetryingStore(RecordingStore(MemoryStore(), flaky)))
    assert flaky.failed > 10


def test_a_save_and_a_load_survive_transient_failures() -> None:
    memory = MemoryStore()
    flaky = Flaky(2, "read", "put", "list", "delete")
    store = RetryingStore(RecordingStore(memory, flaky))
    values = torch.randn(300, 300)
    reshard.save({"w": values}, store)
    loaded = torch.zeros(300, 300)
    reshard.load({"w": loaded}, store)
    assert loaded.equal(values)
    assert flaky.failed >= 4


def test_an_interrupted_object_is_written_again_under_another_name() -> None:
    memory = MemoryStore()
    broken: list[str] = []

    def before(call: Call) -> None:
        if call.method == "write" and len(broken) < 2 and call.name not in broken:
            broken.append(call.name)
            raise UnavailableError("injected: reset")

    reshard.save({"w": torch.ones(10)}, RecordingStore(memory, before))
    assert len(broken) == 2
    assert not set(broken) & set(memory.content)
    assert reshard.open(memory).read("w").equal(torch.ones(10))


def test_retries_end_at_the_deadline() -> None:
    store = RecordingStore(MemoryStore(), failing("read", error=UnavailableError("injected: down")))
    with pytest.raises(UnavailableError, match="injected: down"):
        RetryingStore(store, retry_for_s=0.05).read("x", 0, 1)
    assert 3 < len(store.calls) < 30


@pytest.mark.parametrize("error", [StoreError("no"), AccessDeniedError("no")])
def test_permanent_failures_are_not_retried(error: StoreError) -> None:
    store = RecordingStore(MemoryStore(), failing("read", error=error))
    with pytest.raises(type(error)):
        RetryingStore(store).read("x", 0, 1)
    assert len(store.calls) == 1


def test_damaged_answers_are_read_again() -> None:
    memory = MemoryStore()
    values = torch.randn(300, 300)
    reshard.save({"w": values}, memory)
    whole = dict(memory.content)
    name = next(name for name in whole if name.startswith("data/"))

    def before(call: Call) -> None:
        if call.method == "read" and call.name == name:
            damaged = [other for other in store.calls if other.name == name]
            memory.content[name] = whole[name][:-9] if len(damaged) == 1 else whole[name]

    store = RecordingStore(memory, before)
    loaded = torch.zeros(300, 300)
    reshard.load({"w": loaded}, store)
    assert loaded.equal(values)


def test_the_duration_of_the_first_attempt_does_not_count() -> None:
    tries = 0

    def call() -> int:
        nonlocal tries
        tries += 1
        if tries == 1:
            time.sleep(0.3)
            raise UnavailableError("slow down")
        return tries

    assert retried(call, retry_for_s=0.25) == 2


def test_an_outage_is_logged_as_few_warnings(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(retry, "QUIET_S", 0.02)
    monkeypatch.setattr(retry, "MAX_WAIT_S", 0.001)
    monkeypatch.setattr(retry, "_warnings", retry._Warnings())
    store = RetryingStore(
        RecordingStore(MemoryStore(), failing("read", error=UnavailableError("injected"))), retry_for_s=0.1
    )
    with caplog.at_level("INFO", "reshard"):
        for _ in range(3):
            with pytest.raises(UnavailableError):
                store.read("x", 0, 1)
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    assert len(caplog.records) > 10
    monkeypatch.setattr(retry, "WARN_EVERY_S", 0.0)
    monkeypatch.setattr(retry, "_warnings", retry._Warnings())
    with pytest.raises(UnavailableError):
        store.read("x", 0, 1)
    assert [record.levelname for record in caplog.records].count("WARNING") > 2
