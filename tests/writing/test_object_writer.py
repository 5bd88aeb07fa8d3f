import itertools
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import reshard
from reshard.planner.box import Box
from reshard.planner.chunk_reads import WantedBox
from reshard.planner.entries import Encoding, Kind
from reshard.planner.errors import ShapeMismatchError
from reshard.planner.read_plan import plan_reads
from reshard.storage.errors import ArgumentError, DtypeError, StoreError, UnavailableError
from reshard.storage.formats.native.write_records import ObjectRecord, PackedRecords, assemble_index
from reshard.storage.reading.executor import execute
from reshard.storage.stores import retry
from reshard.storage.stores.base import Capabilities
from reshard.storage.stores.memory import MemoryStore
from reshard.storage.stores.retry import RetryingStore
from reshard.storage.stores.testing import Call, RecordingStore, failing
from reshard.storage.writing import object_layout, object_writer
from reshard.storage.writing.object_layout import ShardToWrite, part_of
from reshard.storage.writing.object_writer import write_objects


def shard(name: str, values: torch.Tensor) -> ShardToWrite:
    shape = tuple(values.shape)
    return ShardToWrite(name, Kind.TENSOR, values.dtype, shape, Box.whole(shape), lambda box: values[box.slices])


def test_rank_writes_one_object_and_the_index_describes_it() -> None:
    store = MemoryStore()
    shards = [shard("a", torch.randn(64, 64)), shard("b", torch.arange(10)), shard("none", torch.empty(0, 3))]
    (record,) = write_objects(store, "00003", shards, "zstd")
    assert list(store.content) == [record.name]
    assert re.fullmatch(r"data/[0-9a-f]{32}-00003\.shard", record.name)
    assert record.nbytes == len(store.content[record.name])
    assert record.bytes_needed == 64 * 64 * 4 + 80
    index = assemble_index([PackedRecords.of([record])], {"none": ("float32", (0, 3))})
    assert [entry.name for entry in index.entries] == ["a", "b", "none"]
    assert int(index.lengths.sum()) + 8 == record.nbytes


class SlowStore(MemoryStore):
    """Its first object fails when a second one has begun. The others end when `may_end` is set."""

    capabilities = Capabilities(buffers_objects=True)

    def __init__(self) -> None:
        super().__init__()
        self.may_end = threading.Event()
        self.begun: list[str] = []
        self.ended = threading.Semaphore(0)
        self._lock = threading.Lock()

    @contextmanager
    def create(self, name: str) -> Iterator[Any]:
        with self._lock:
            self.begun.append(name)
            is_first = len(self.begun) == 1
        if is_first:
            while len(self.begun) < 2:
                time.sleep(0.01)
            raise StoreError("injected")
        try:
            with super().create(name) as out:
                yield out
                assert self.may_end.wait(60)
        finally:
            self.ended.release()


def test_objects_that_outlast_a_failed_save_are_removed_and_no_others_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_layout, "MIN_OBJECT_BYTES", 1 << 12)
    monkeypatch.setattr(object_writer, "LET_END_S", 0.05)
    store = SlowStore()
    shards = [shard(f"t{at}", torch.randn(64, 64)) for at in range(16)]
    with pytest.raises(StoreError, match="injected"):
        write_objects(store, "0", shards, "none", budget_bytes=1 << 18)
    begun = len(store.begun)
    store.may_end.set()
    for _ in range(begun - 1):
        assert store.ended.acquire(timeout=60)
    deadline = time.monotonic() + 60
    while store.content and time.monotonic() < deadline:
        time.sleep(0.01)
    assert store.content == {}
    assert len(store.begun) == begun < 16


def test_codec_determines_the_grid_and_ranks_must_use_the_same_codec() -> None:
    store, values = MemoryStore(), torch.randn(1024, 1024)
    encoded, raw = (write_objects(store, "00000", [shard("t", values)], codec) for codec in ("zstd", "none"))
    assert assemble_index([PackedRecords.of(encoded)]).entry("t").grid.parts == (8, 8)
    assert assemble_index([PackedRecords.of(raw)]).entry("t").grid.parts == (8, 4)
    with pytest.raises(ArgumentError, match=r"one rank divided 't' into \(8, 8\) parts, another into \(8, 4\)"):
        assemble_index([PackedRecords.of(encoded), PackedRecords.of(raw)])


def encodings(records: list[ObjectRecord], name: str) -> set[int]:
    """Return the encodings of the segments of a tensor."""
    shards = [shard for record in records for shard in record.shards if shard.name == name]
    return {Encoding(segment.encoding) for shard in shards for segment in shard.segments}


def test_tensors_whose_shards_are_all_smaller_than_1_kib_are_stored_raw() -> None:
    store = MemoryStore()
    values = {"scalar": torch.tensor(3.5), "small": torch.randn(255), "large": torch.randn(256)}
    records = write_objects(store, "00000", [shard(name, tensor) for name, tensor in values.items()], "zstd")
    assert {name: encodings(records, name) for name in values} == {
        "scalar": {Encoding.RAW},
        "small": {Encoding.RAW},
        "large": {Encoding.PLANES},
    }


@pytest.mark.parametrize(("largest", "encoding"), [(255, Encoding.RAW), (256, Encoding.PLANES)])
def test_every_rank_stores_a_tensor_in_the_same_encoding(largest: int, encoding: Encoding) -> None:
    """The ranks hold shards of different sizes; the largest shard decides."""
    store, values = MemoryStore(), torch.randn(5 + largest)
    records = []
    for box in (Box((0,), (5,)), Box((5,), (largest,))):
        part = replace(shard("t", values), box=box, largest_sizes=(largest,))
        records += write_objects(store, "00000", [part], "zstd")
    assert encodings(records, "t") == {encoding}


@pytest.mark.parametrize("codec", ["zstd", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tp_rank_reads_its_part_of_grouped_shards_with_one_request_per_stream(
    codec: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two FSDP ranks wrote the shards. The index still reports whole shards as saved."""
    monkeypatch.setattr(object_layout, "MIN_OBJECT_BYTES", 1 << 24)
    store = MemoryStore()
    store.capabilities = Capabilities(buffers_objects=True)
    values = {name: torch.randn(512, 4096).to(dtype) for name in ("down 0", "down 1", "down 2")}
    held = [Box((0, 0), (256, 4096)), Box((256, 0), (256, 4096))]
    records = []
    for box in held:
        shards = [replace(shard(name, tensor), box=box) for name, tensor in values.items()]
        records += write_objects(store, "00000", shards, codec)
    index = assemble_index([PackedRecords.of(records)])
    assert [index.shards_of(position) for position in range(3)] == [held] * 3
    for tp in (2, 4, 8):
        box = Box((0, 4096 // tp), (512, 4096 // tp))
        plan = plan_reads(index, [WantedBox(name, box) for name in values])
        assert len(plan.requests) == 2 * (2 if dtype is torch.float32 and codec == "zstd" else 1)
        loaded = [torch.zeros(box.sizes, dtype=dtype) for _ in values]
        execute(plan, index, store, loaded)
        assert all(a.equal(b[box.slices]) for a, b in zip(loaded, values.values(), strict=True))


def test_empty_shards_write_no_object() -> None:
    store = MemoryStore()
    assert write_objects(store, "00000", [shard("none", torch.empty(0))], "zstd") == []
    assert store.content == {}


def test_object_names_are_unique() -> None:
    store = MemoryStore()
    names = {write_objects(store, "00000", [shard("a", torch.zeros(1))], "none")[0].name for _ in range(3)}
    assert len(names) == 3


@pytest.mark.parametrize(("method", "after"), [("create", 0), ("write", 0), ("write", 3)])
def test_failed_write_raises_and_removes_its_objects(method: str, after: int) -> None:
    memory = MemoryStore()
    store = RecordingStore(memory, failing(method, after=after))
    with pytest.raises(StoreError, match=f"injected: {method}"):
        write_objects(store, "00000", [shard("a", torch.randn(1000, 1000))], "none")
    assert memory.content == {}
    assert [call.method for call in store.calls][-1] == "delete"


def test_unsupported_dtype_error_names_the_tensor() -> None:
    values = torch.zeros(4, dtype=torch.uint8).view(torch.bits8)
    with pytest.raises(DtypeError, match=r"'q' has dtype torch\.bits8"):
        write_objects(MemoryStore(), "00000", [shard("q", values)], "zstd")


def test_shard_of_the_wrong_shape_raises_shape_mismatch_error() -> None:
    box = Box((0, 0), (4, 2))

    def load(part: Box) -> torch.Tensor:
        return part_of("w", torch.zeros(3, 2), box, torch.float32, part)

    wrong = ShardToWrite("w", Kind.TENSOR, torch.float32, (8, 2), box, load)
    with pytest.raises(ShapeMismatchError, match=r"'w' should hold \[0:4, 0:2\].*\(3, 2\)"):
        write_objects(MemoryStore(), "00000", [wrong], "zstd")


def test_slow_store_slows_down_the_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 3: the values encoded ahead of the store are at most a window."""
    window = 1 << 22
    monkeypatch.setattr(object_writer, "MAX_WINDOW_BYTES", window)
    encode = object_writer._encode_runs
    lock = threading.Lock()
    encoded = written = ahead = 0

    def counting(*arguments: Any) -> Any:
        nonlocal encoded, ahead
        result = encode(*arguments)
        with lock:
            encoded += sum(sum(lengths) for _, lengths, _ in result)
            ahead = max(ahead, encoded - written)
        return result

    def before(call: Call) -> None:
        nonlocal written
        if call.method == "write":
            for _ in range(5000):  # the store is slow
                if ahead > window / 2:
                    break
                time.sleep(0.001)
            with lock:
                written += call.stop

    monkeypatch.setattr(object_writer, "_encode_runs", counting)
    write_objects(RecordingStore(MemoryStore(), before), "00000", [shard("a", torch.zeros(1 << 22))], "none")
    assert encoded == 1 << 24
    assert window / 2 < ahead <= window + 8 + object_writer.MIN_TASK_BYTES


@pytest.mark.parametrize("codec", ["zstd", "none"])
def test_small_shards_are_encoded_in_few_tasks(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    encode = object_writer._EncodingTask.encode

    def counting(task: Any) -> Any:
        sizes.append(len(task.inputs))
        return encode(task)

    monkeypatch.setattr(object_writer._EncodingTask, "encode", counting)
    state = {f"{i}": torch.randn(1 + i % 7, 5) for i in range(2000)} | {"large": torch.randn(600, 600)}
    store, done = MemoryStore(), list[int]()
    report = reshard.save(state, store, codec=codec, progress=lambda progress: done.append(progress.done_bytes))
    assert len(sizes) < 20
    assert sum(sizes) >= 2001
    assert done[-1] == report.local.bytes_needed == sum(tensor.nbytes for tensor in state.values())
    found = reshard.open(store).state_dict()
    assert all(found[name].equal(tensor) for name, tensor in state.items())


def test_several_objects_are_written_concurrently_if_the_store_holds_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tensors are cut along the grid, small ones share an object, and no object exceeds its share."""
    monkeypatch.setattr(object_layout, "MIN_OBJECT_BYTES", 1 << 18)
    barrier, calls = threading.Barrier(3), itertools.count()

    def before(call: Call) -> None:
        if call.method == "create" and next(calls) < 3:
            barrier.wait(timeout=20)

    memory = MemoryStore()
    memory.capabilities = Capabilities(buffers_objects=True)
    values = {"large": torch.randn(1024, 512), **{f"small{i}": torch.randn(64, 64) for i in range(63)}}
    records = write_objects(
        RecordingStore(memory, before), "00000", [shard(name, tensor) for name, tensor in values.items()], "none"
    )
    assert 8 <= len(records) <= 12
    assert sorted(memory.content) == sorted(record.name for record in records)
    assert max(record.bytes_needed for record in records) <= sum(record.bytes_needed for record in records) // 8
    index = assemble_index([PackedRecords.of(records)])
    assert len(index.shards_of(index.position("large"))) == 8
    plan = plan_reads(index, [WantedBox(name, Box.whole(tuple(tensor.shape))) for name, tensor in values.items()])
    loaded = [torch.zeros_like(tensor) for tensor in values.values()]
    execute(plan, index, memory, loaded)
    assert all(a.equal(b) for a, b in zip(loaded, values.values(), strict=True))


def test_failed_save_does_not_wait_for_objects_that_have_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_layout, "MIN_OBJECT_BYTES", 1 << 12)
    monkeypatch.setattr(object_writer, "LET_END_S", 60.0)
    memory = MemoryStore()
    memory.capabilities = Capabilities(buffers_objects=True)
    shards = [shard(f"t{i}", torch.randn(64, 64)) for i in range(200)]
    begin = time.monotonic()
    with pytest.raises(StoreError, match="injected"):
        write_objects(RecordingStore(memory, failing("create", after=2)), "00000", shards, "none", budget_bytes=1 << 18)
    assert time.monotonic() - begin < 30
    assert memory.content == {}


def test_objects_removed_by_another_program_stop_the_commit() -> None:
    store = MemoryStore()
    removing = RecordingStore(
        store, lambda call: store.delete([n for n in store.list() if "data/" in n]) if call.method == "list" else None
    )
    with pytest.raises(StoreError, match="something else removes objects there"):
        reshard.save({"w": torch.ones(1000)}, removing)
    assert list(store.list()) == []


def test_cleanup_after_an_error_is_not_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "RETRY_FOR_S", 1.0)
    error = UnavailableError("injected")

    def down(call: Call) -> None:
        if call.method in ("create", "write", "delete"):
            raise error

    store = RecordingStore(MemoryStore(), down)
    with pytest.raises(UnavailableError):
        reshard.save({"w": torch.ones(1000)}, RetryingStore(store))
    methods = [call.method for call in store.calls]
    assert methods.count("delete") <= methods.count("create") + 2
    assert methods.count("create") > 2


@pytest.mark.parametrize(("threads", "objects"), [(1, 1), (4, 1), (8, 2), (64, 4)])
def test_many_cores_write_several_files(
    threads: int, objects: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("reshard.storage.writing.object_writer.default_threads", lambda: threads)
    values = {f"w{i}": torch.randn(1024, 1024) for i in range(9)}
    reshard.save(values, tmp_path, codec="none")
    assert len(list((tmp_path / "data").iterdir())) == objects
    loaded = {name: torch.zeros_like(tensor) for name, tensor in values.items()}
    reshard.load(loaded, tmp_path)
    assert all(loaded[name].equal(tensor) for name, tensor in values.items())
