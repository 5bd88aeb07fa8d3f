import itertools
import re
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

import reshard
from reshard.planner.box import Box
from reshard.planner.errors import ShapeMismatchError
from reshard.planner.index import Kind
from reshard.planner.read_plan import Want, plan_reads
from reshard.storage.errors import ArgumentError, DtypeError, StoreError, UnavailableError
from reshard.storage.formats.native.write_records import assemble_index
from reshard.storage.reading.executor import execute
from reshard.storage.stores import retry
from reshard.storage.stores.retry import RetryingStore
from reshard.storage.stores.testing import Call, MemoryStore, RecordingStore, failing
from reshard.storage.writing import object_layout as to_write
from reshard.storage.writing import object_writer
from reshard.storage.writing.object_layout import ShardToWrite, part_of
from reshard.storage.writing.object_writer import write_objects


def shard(name: str, values: torch.Tensor) -> ShardToWrite:
    shape = tuple(values.shape)
    return ShardToWrite(name, Kind.TENSOR, values.dtype, shape, Box.whole(shape), lambda box: values[box.slices])


def test_a_rank_writes_one_object_that_the_index_describes() -> None:
    store = MemoryStore()
    shards = [shard("a", torch.randn(64, 64)), shard("b", torch.arange(10)), shard("none", torch.empty(0, 3))]
    (record,) = write_objects(store, "00003", shards, "zstd")
    assert list(store.content) == [record.name]
    assert re.fullmatch(r"data/[0-9a-f]{32}-00003\.shard", record.name)
    assert record.nbytes == len(store.content[record.name])
    assert record.bytes_needed == 64 * 64 * 4 + 80
    index = assemble_index([record], {"none": ("float32", (0, 3))})
    assert [entry.name for entry in index.entries] == ["a", "b", "none"]
    assert int(index.lengths.sum()) + 8 == record.nbytes


def test_raw_chunks_are_larger_and_one_tensor_is_not_cut_in_two_ways() -> None:
    store, values = MemoryStore(), torch.randn(1024, 1024)
    encoded, raw = (write_objects(store, "00000", [shard("t", values)], codec) for codec in ("zstd", "none"))
    assert assemble_index(encoded).entry("t").grid.parts == (8, 8)
    assert assemble_index(raw).entry("t").grid.parts == (8, 4)
    with pytest.raises(ArgumentError, match=r"one rank divided 't' into \(8, 4\) parts, another into \(8, 8\)"):
        assemble_index([*encoded, *raw])


@pytest.mark.parametrize("codec", ["zstd", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_a_tp_rank_needs_of_shards_that_lie_together_is_one_run_a_stream(
    codec: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks of FSDP wrote them; what is saved is told as whole shards all the same."""
    monkeypatch.setattr(to_write, "MIN_OBJECT_BYTES", 1 << 24)
    store = MemoryStore()
    store.holds_objects = True
    values = {name: torch.randn(512, 4096).to(dtype) for name in ("down 0", "down 1", "down 2")}
    held = [Box((0, 0), (256, 4096)), Box((256, 0), (256, 4096))]
    records = []
    for box in held:
        shards = [replace(shard(name, tensor), box=box) for name, tensor in values.items()]
        records += write_objects(store, "00000", shards, codec)
    index = assemble_index(records)
    assert [index.shards_of(position) for position in range(3)] == [held] * 3
    for tp in (2, 4, 8):
        box = Box((0, 4096 // tp), (512, 4096 // tp))
        plan = plan_reads(index, [Want(name, box) for name in values])
        assert len(plan.requests) == 2 * (2 if dtype is torch.float32 and codec == "zstd" else 1)
        loaded = [torch.zeros(box.sizes, dtype=dtype) for _ in values]
        execute(plan, index, store, loaded)
        assert all(a.equal(b[box.slices]) for a, b in zip(loaded, values.values(), strict=True))


def test_nothing_to_write_makes_no_object() -> None:
    store = MemoryStore()
    assert write_objects(store, "00000", [shard("none", torch.empty(0))], "zstd") == []
    assert store.content == {}


def test_names_are_never_used_twice() -> None:
    store = MemoryStore()
    names = {write_objects(store, "00000", [shard("a", torch.zeros(1))], "none")[0].name for _ in range(3)}
    assert len(names) == 3


@pytest.mark.parametrize(("method", "after"), [("create", 0), ("write", 0), ("write", 3)])
def test_a_store_that_fails_stops_the_save_and_leaves_nothing(method: str, after: int) -> None:
    memory = MemoryStore()
    store = RecordingStore(memory, failing(method, after=after))
    with pytest.raises(StoreError, match=f"injected: {method}"):
        write_objects(store, "00000", [shard("a", torch.randn(1000, 1000))], "none")
    assert memory.content == {}
    assert [call.method for call in store.calls][-1] == "delete"


def test_what_cannot_be_stored_is_named() -> None:
    values = torch.zeros(4, dtype=torch.uint8).view(torch.bits8)
    with pytest.raises(DtypeError, match=r"'q' has dtype torch\.bits8"):
        write_objects(MemoryStore(), "00000", [shard("q", values)], "zstd")


def test_a_shard_that_is_not_its_box_is_named() -> None:
    box = Box((0, 0), (4, 2))

    def load(part: Box) -> torch.Tensor:
        return part_of("w", torch.zeros(3, 2), box, torch.float32, part)

    wrong = ShardToWrite("w", Kind.TENSOR, torch.float32, (8, 2), box, load)
    with pytest.raises(ShapeMismatchError, match=r"'w' should hold \[0:4, 0:2\].*\(3, 2\)"):
        write_objects(MemoryStore(), "00000", [wrong], "zstd")


def test_a_slow_store_holds_the_encoders_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 3: at most a window of values is encoded ahead of what the store has taken."""
    window = 1 << 22
    monkeypatch.setattr(object_writer, "WINDOW_BYTES", window)
    encode = object_writer._encode
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
            with lock:
                written += call.stop

    monkeypatch.setattr(object_writer, "_encode", counting)
    write_objects(RecordingStore(MemoryStore(), before), "00000", [shard("a", torch.zeros(1 << 22))], "none")
    assert encoded == 1 << 24
    assert window / 2 < ahead <= window + 8 + object_writer.TASK_BYTES


def test_a_store_that_holds_objects_gets_several_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are cut between chunks, small ones are put together, and no object is larger than its share."""
    monkeypatch.setattr(to_write, "MIN_OBJECT_BYTES", 1 << 18)
    together, calls = threading.Barrier(3), itertools.count()

    def before(call: Call) -> None:
        if call.method == "create" and next(calls) < 3:
            together.wait(timeout=20)

    memory = MemoryStore()
    memory.holds_objects = True
    values = {"large": torch.randn(1024, 512), **{f"small{i}": torch.randn(64, 64) for i in range(63)}}
    records = write_objects(
        RecordingStore(memory, before), "00000", [shard(name, tensor) for name, tensor in values.items()], "none"
    )
    assert 8 <= len(records) <= 12
    assert sorted(memory.content) == sorted(record.name for record in records)
    assert max(record.bytes_needed for record in records) <= sum(record.bytes_needed for record in records) // 8
    index = assemble_index(records)
    assert len(index.shards_of(index.position("large"))) == 8
    plan = plan_reads(index, [Want(name, Box.whole(tuple(tensor.shape))) for name, tensor in values.items()])
    loaded = [torch.zeros_like(tensor) for tensor in values.values()]
    execute(plan, index, memory, loaded)
    assert all(a.equal(b) for a, b in zip(loaded, values.values(), strict=True))


def test_a_save_that_fails_waits_for_nothing_that_has_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_write, "MIN_OBJECT_BYTES", 1 << 12)
    monkeypatch.setattr(object_writer, "LET_END_S", 60.0)
    memory = MemoryStore()
    memory.holds_objects = True
    shards = [shard(f"t{i}", torch.randn(64, 64)) for i in range(200)]
    begin = time.monotonic()
    with pytest.raises(StoreError, match="injected"):
        write_objects(RecordingStore(memory, failing("create", after=2)), "00000", shards, "none", budget_bytes=1 << 18)
    assert time.monotonic() - begin < 30
    assert memory.content == {}


def test_objects_that_something_else_removes_are_missed_before_the_commit() -> None:
    store = MemoryStore()
    removing = RecordingStore(
        store, lambda call: store.delete([n for n in store.list() if "data/" in n]) if call.method == "list" else None
    )
    with pytest.raises(StoreError, match="something else removes objects there"):
        reshard.save({"w": torch.ones(1000)}, removing)
    assert list(store.list()) == []


def test_to_tidy_up_takes_no_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "RETRY_FOR_S", 1.0)
    error = UnavailableError("nobody there")

    def down(call: Call) -> None:
        if call.method in ("create", "write", "delete"):
            raise error

    store = RecordingStore(MemoryStore(), down)
    with pytest.raises(UnavailableError):
        reshard.save({"w": torch.ones(1000)}, RetryingStore(store))
    methods = [call.method for call in store.calls]
    assert methods.count("delete") <= methods.count("create") + 2
    assert methods.count("create") > 2
