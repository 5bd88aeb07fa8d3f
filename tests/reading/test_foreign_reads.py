"""How the shards of other formats are read (as a whole or in part, with over-read) and verified (CRC-32)."""

from __future__ import annotations

import io
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import SerializationFormat

import reshard
from reshard.planner.box import Box
from reshard.planner.request_costs import LOCAL_COSTS, REMOTE_COSTS
from reshard.storage.formats.metadata_reader import MetadataReader
from reshard.storage.maintenance import verify
from reshard.storage.stores.local import LocalStore
from reshard.storage.stores.memory import MemoryStore
from reshard.storage.stores.testing import RecordingStore
from tests.dcp_checkpoints import put_together, rows

WEIGHTS = torch.arange(512 * 256, dtype=torch.float32).reshape(512, 256)
LAYOUT = reshard.Layout(4, {"w": "rowwise"})


@pytest.fixture
def store() -> MemoryStore:
    """A DCP checkpoint of one tensor in four shards of rows."""
    return put_together({"w": (WEIGHTS, rows(128, 512, 256))})


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make stores appear as slow as a remote store in the same region."""
    monkeypatch.setattr(MetadataReader, "costs", REMOTE_COSTS)


@pytest.mark.usefixtures("far")
def test_columns_in_a_remote_store_are_read_by_whole_shards(store: MemoryStore) -> None:
    """A request costs more than the rest of a shard, so no request is made to find the position of its values."""
    recording = RecordingStore(store)
    (loaded,) = reshard.open(recording).load_rank(LAYOUT, 1).values()
    assert loaded.equal(WEIGHTS[:, 64:128])
    slices = {(name, len(content)) for name, content in store.content.items() if name != ".metadata"}
    reads = [call for call in recording.calls if call.method == "read" and call.name.endswith(".distcp")]
    assert {(call.name, call.stop - call.start) for call in reads} == slices
    assert len(reads) == 4


def test_columns_on_a_local_disk_are_read_without_over_read(store: MemoryStore, tmp_path: Path) -> None:
    for name, content in store.content.items():
        (tmp_path / name).write_bytes(content)
    checkpoint = reshard.open(tmp_path)
    report = checkpoint.plan(LAYOUT)[1].report
    assert report.bytes_fetched == report.bytes_needed == 512 * 64 * 4
    assert report.requests == 512
    assert checkpoint.load_rank(LAYOUT, 1)["w"].equal(WEIGHTS[:, 64:128])


@pytest.mark.usefixtures("far")
def test_plan_reports_over_read_and_opaque_chunks(
    store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = reshard.open(store).plan(LAYOUT)[1].report
    assert whole.opaque_chunks == 4
    assert "4 chunks read as a whole" in str(whole)
    monkeypatch.setattr(MetadataReader, "costs", LOCAL_COSTS)
    for name, content in store.content.items():
        (tmp_path / name).write_bytes(content)
    generous = reshard.open(tmp_path).plan(LAYOUT, max_over_read=5)[1].report
    assert generous.requests == 4
    assert generous.bytes_over_read == pytest.approx(3 * generous.bytes_needed, rel=0.01)
    assert "MB in gaps of up to 4000 bytes" in str(generous)


def test_max_over_read_limits_the_over_read(store: MemoryStore, tmp_path: Path) -> None:
    for name, content in store.content.items():
        (tmp_path / name).write_bytes(content)
    state: dict[str, Any] = {"w": torch.zeros(512, 256)}
    few = reshard.load(state, tmp_path, max_over_read=0).local
    assert state["w"].equal(WEIGHTS)
    assert few.bytes_fetched < WEIGHTS.nbytes * 1.05


def test_verify_checks_crc32_of_dcp_shards(store: MemoryStore) -> None:
    assert reshard.open(store).verify() == []
    name = "__2_0.distcp"
    content = bytearray(store.content[name])
    content[len(content) // 2] ^= 1
    store.content[name] = bytes(content)
    (damage,) = reshard.open(store).verify()
    assert (damage.tensor, damage.object, damage.box) == ("w", name, Box((256, 0), (128, 256)))
    assert "'archive/data/0' does not match its CRC-32" in damage.reason
    store.content[name] = bytes(content[:1000])
    assert reshard.open(store).verify()[0].reason == "the object is cut short"
    del store.content[name]
    assert reshard.open(store).verify()[0].reason == "the object is missing"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_verify_finds_dcp_shards_in_safetensors_files(tmp_path: Path) -> None:
    writer = FileSystemWriter(tmp_path, sync_files=False, serialization_format=SerializationFormat.SAFETENSORS)
    dcp.save({"w": WEIGHTS, "step": 1}, storage_writer=writer)
    assert reshard.open(tmp_path).verify() == []
    assert reshard.open(RecordingStore(LocalStore(tmp_path))).read("w").equal(WEIGHTS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_load_rank_casts_to_another_float_dtype(dtype: torch.dtype) -> None:
    store = MemoryStore()
    weights = torch.randn(256, 256)
    reshard.save({"w": weights, "ids": torch.arange(8)}, store)
    tensors = reshard.open(store).load_rank(reshard.Layout(2, {"w": "colwise"}), 1, dtype=dtype)
    assert tensors["w"].equal(weights[128:].to(dtype))
    assert tensors["ids"].dtype == torch.int64


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def records_of(path: Path) -> dict[str, tuple[int, int]]:
    """Return where the content of each record of a zip begins, and its size."""
    found = {}
    with zipfile.ZipFile(path) as file:
        for record in file.infolist():
            with file.open(record) as opened:
                found[record.filename.partition("/")[2]] = opened._orig_compress_start, record.file_size  # type: ignore[attr-defined]
    return found


def test_verify_checks_crc32_of_torch_save_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "MAX_READ_BYTES", 1000)
    path, tied = tmp_path / "w.pt", torch.randn(512)
    torch.save({"a": torch.randn(3, 700), "tied": tied, "part": tied[5:], "step": 7}, path)
    assert reshard.open(path).verify() == []
    begin, nbytes = records_of(path)["data/1"]
    flip(path, begin + nbytes - 1)
    damaged = reshard.open(path).verify()
    assert [(chunk.tensor, chunk.start, chunk.stop) for chunk in damaged] == [
        ("tied", begin, begin + nbytes),
        ("part", begin, begin + nbytes),
    ]
    assert damaged[1].box == Box.whole((507,))
    assert all("'w/data/1' does not match its CRC-32" in chunk.reason for chunk in damaged)
    assert reshard.open(path).verify(quick=True) == []
    flip(path, begin + nbytes - 1)
    content = path.read_bytes()
    flip(path, content.index(b"K\x07", content.index(b"step")) + 1)  # the value of "step" in the pickle
    assert reshard.open(path).read_value("step") == 6
    assert {chunk.tensor for chunk in reshard.open(path).verify()} == {"a", "tied", "part", "step"}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_verify_accepts_files_without_crc32(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": WEIGHTS}, tmp_path / "w.pt")
        dcp.save({"w": WEIGHTS}, checkpoint_id=tmp_path / "dcp")
    finally:
        torch.serialization.set_crc32_options(True)
    assert reshard.open(tmp_path / "w.pt").verify() == []
    assert reshard.open(tmp_path / "dcp").verify() == []
    (tmp_path / "w.pt").write_bytes((tmp_path / "w.pt").read_bytes()[:-1000])
    with pytest.raises(reshard.errors.CorruptCheckpointError):
        reshard.open(tmp_path / "w.pt")


def test_verify_reports_records_that_only_unreadable_tensors_use(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"sparse": torch.eye(40).to_sparse(), "w": torch.ones(3)}, path)
    checkpoint = reshard.open(path)
    assert list(checkpoint.unreadable) == ["sparse"]
    assert checkpoint.verify() == []
    begin, _ = records_of(path)["data/1"]
    flip(path, begin)
    (damaged,) = reshard.open(path).verify()
    assert (damaged.tensor, damaged.start) == ("w/data/1", begin)


def test_verify_reads_parts_of_records_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "MAX_READ_BYTES", 1 << 16)
    monkeypatch.setattr(verify, "default_budget", lambda: 3 << 16)
    content = io.BytesIO()
    torch.save({f"w{i}": torch.randn(50_000)[:10] for i in range(6)}, content)
    memory = MemoryStore()
    memory.put("w.pt", content.getvalue(), overwrite=True)
    lock, reading, most = threading.Lock(), 0, 0

    class Counting(RecordingStore):
        def read(self, name: str, start: int, stop: int) -> Any:
            nonlocal reading, most
            with lock:
                reading += stop - start
                most = max(most, reading)
            time.sleep(0.001)
            try:
                return super().read(name, start, stop)
            finally:
                with lock:
                    reading -= stop - start

    checkpoint = reshard.open(Counting(memory))
    most = 0
    assert checkpoint.verify() == []
    assert 1 << 16 < most <= 3 << 16, "several at once"
