"""A short answer is retried if the object is longer. If the object itself is too short, it is damaged."""

from __future__ import annotations

import collections
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import reshard
from reshard.errors import CorruptCheckpointError, UnavailableError
from reshard.storage.stores import retry
from reshard.storage.stores.memory import MemoryStore
from reshard.storage.stores.retry import RetryingStore, read_whole
from reshard.storage.stores.testing import Call, RecordingStore
from tests.failing_s3 import failing_s3
from tests.torture.faults import CLIENTS, by_client

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]
STATE = {f"layers.{i}.w": torch.arange(100) + i for i in range(300)}


def native(folder: Path) -> None:
    reshard.save(STATE, folder, codec="none")


def with_dcp(folder: Path) -> None:
    dcp.save(STATE, checkpoint_id=folder, no_dist=True)


def safetensors(folder: Path) -> None:
    folder.mkdir()
    save_file(STATE, folder / "model.safetensors")


def indexed(folder: Path) -> None:
    native(folder.with_name("source"))
    reshard.convert(folder.with_name("source"), folder, format="safetensors")


def torch_file(folder: Path) -> None:
    folder.mkdir()
    torch.save(STATE, folder / "model.pt")


FORMATS = (native, with_dcp, safetensors, indexed, torch_file)


class ShortStore(MemoryStore):
    """A store that answers some reads with half of the bytes."""

    def __init__(self, folder: Path, is_short: Callable[[str, int], bool]) -> None:
        super().__init__()
        files = [path for path in folder.rglob("*") if path.is_file()]
        self.content = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
        self._is_short = is_short
        self._reads: collections.Counter[str] = collections.Counter()

    def read(self, name: str, start: int, stop: int) -> bytes:
        data = bytes(super().read(name, start, stop))
        self._reads[name] += 1
        return data[: len(data) // 2] if self._is_short(name, self._reads[name]) else data

    def size(self, name: str) -> int:
        return len(self.content[name])


@pytest.mark.parametrize("make", FORMATS)
def test_metadata_is_read_again_after_a_short_answer(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "run")
    for short in range(1, 6):
        store = RetryingStore(ShortStore(tmp_path / "run", lambda name, count, short=short: count == short))  # type: ignore[misc]
        checkpoint = reshard.open(store)
        good = reshard.open(ShortStore(tmp_path / "run", lambda name, count: False))
        assert checkpoint._source.fingerprint() == good._source.fingerprint()
        assert checkpoint.read("layers.7.w").equal(STATE["layers.7.w"])


@pytest.mark.parametrize("make", FORMATS)
def test_permanently_short_answers_raise_unavailable_error(
    make: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "RETRY_FOR_S", 0.3)
    make(tmp_path / "run")
    with pytest.raises(UnavailableError, match="the answer had"):
        reshard.open(RetryingStore(ShortStore(tmp_path / "run", lambda name, count: True)))


@pytest.mark.parametrize("make", FORMATS)
def test_truncated_object_raises_corrupt_error(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "run")
    names = ("manifest.reshard", ".metadata", "model.safetensors.index.json", "model.safetensors", "model.pt")
    for cut in (1, 20, 31, 33, 500):
        store = ShortStore(tmp_path / "run", lambda name, count: False)
        (name,) = [name for name in names if name in store.content]
        store.content[name] = store.content[name][:-cut] if cut != 500 else store.content[name][:cut]
        with pytest.raises(CorruptCheckpointError):
            reshard.open(RetryingStore(store)).read("layers.7.w")


def test_complete_answers_cost_no_extra_request(tmp_path: Path) -> None:
    for make in FORMATS:
        make(tmp_path / make.__name__)
    for make, most in ((native, 0), (with_dcp, 0), (safetensors, 1), (torch_file, 1)):
        store = RecordingStore(ShortStore(tmp_path / make.__name__, lambda name, count: False))
        reshard.open(RetryingStore(store))
        assert [call.method for call in store.calls].count("size") == most, make


def test_a_large_manifest_is_read_again_after_a_short_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reshard.storage.formats.native.manifest.FIRST_MANIFEST_READ_BYTES", 4096)
    native(tmp_path / "run")
    assert (tmp_path / "run" / "manifest.reshard").stat().st_size > 8192
    for short in range(1, 5):
        store = ShortStore(tmp_path / "run", lambda name, count, short=short: count == short)  # type: ignore[misc]
        assert len(reshard.open(RetryingStore(store)).state_dict()) == len(STATE["layers.0.w"]) * 3


def test_a_range_past_the_end_is_not_a_short_answer() -> None:
    store = MemoryStore()
    store.content["x"] = b"0123456789"
    calls: list[Call] = []
    recording = RecordingStore(store, calls.append)
    assert bytes(read_whole(recording, "x", 4, 100)) == b"456789"
    assert bytes(read_whole(recording, "x", 4, 10)) == b"456789"
    assert bytes(read_whole(recording, "x", 20, 30)) == b""
    assert [call.method for call in calls] == ["read", "size", "read", "read", "size"]


@pytest.mark.parametrize("make", FORMATS)
def test_a_short_answer_is_no_damage(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "run")
    for short in range(1, 6):
        store = ShortStore(tmp_path / "run", lambda name, count, short=short: count == short)  # type: ignore[misc]
        assert reshard.open(RetryingStore(store)).verify() == []


def test_a_conversion_reads_its_notes_again_after_a_short_answer(tmp_path: Path) -> None:
    native(tmp_path / "run")
    for short in range(1, 4):
        target = ShortStore(tmp_path / "nothing", lambda name, count, short=short: count == short)  # type: ignore[misc]
        reshard.convert(tmp_path / "run", RetryingStore(target), format="dcp")
        assert len(reshard.open(target).state_dict()) == 300


@pytest.mark.parametrize("how", ["body", "length", "range"])
@pytest.mark.parametrize("client", CLIENTS)
def test_short_answers_of_s3_are_retried(client: str, how: str, tmp_path: Path) -> None:
    native(tmp_path / "run")
    content = {
        f"run/{path.relative_to(tmp_path / 'run').as_posix()}": path.read_bytes()
        for path in (tmp_path / "run").rglob("*")
        if path.is_file()
    }
    seen: collections.Counter[str] = collections.Counter()

    def shortens(method: str, key: str) -> str:
        seen[key] += 1
        return how if key.endswith("manifest.reshard") and seen[key] <= 2 else ""

    with failing_s3(content=content, fails=lambda method, key: False, shortens=shortens) as server:
        checkpoint = reshard.open("s3://bucket/run", storage_options=by_client(client, server.options))
        assert checkpoint.read("layers.7.w").equal(STATE["layers.7.w"])
    assert seen["run/manifest.reshard"] >= 3
