import functools
import gc
import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import reshard
from reshard.planner.box import Box
from reshard.planner.chunk_reads import WantedBox
from reshard.planner.entries import Kind
from reshard.planner.read_plan import plan_reads
from reshard.storage.errors import CorruptCheckpointError, RankError, StoreError
from reshard.storage.formats.detect import open_source
from reshard.storage.formats.native.manifest import MANIFEST_NAME, encode_manifest
from reshard.storage.formats.native.write_records import PackedRecords, assemble_index
from reshard.storage.formats.source import Source
from reshard.storage.reading import workers as workers_module
from reshard.storage.reading.decode import place_chunk_batch
from reshard.storage.reading.device import placing
from reshard.storage.reading.executor import execute
from reshard.storage.reading.fetcher import Fetcher
from reshard.storage.reading.schedule import Fetch, Schedule
from reshard.storage.reading.tasks import ChunkBatch, TensorProgress
from reshard.storage.reading.workers import Workers
from reshard.storage.runtime.threads import Pool
from reshard.storage.stores.base import Capabilities, Store
from reshard.storage.stores.buffer_pool import read_buffers
from reshard.storage.stores.memory import MemoryStore
from reshard.storage.stores.testing import Call, RecordingStore, failing, slow
from reshard.storage.writing.object_layout import ShardToWrite
from reshard.storage.writing.object_writer import write_objects


def part_of(values: torch.Tensor, box: Box) -> torch.Tensor:
    return values[box.slices]


def saved(codec: str, tensors: dict[str, torch.Tensor], ranks: int = 2) -> tuple[MemoryStore, Source]:
    """Return a checkpoint of tensors whose rows are spread over the ranks."""
    store = MemoryStore()
    records = []
    for rank in range(ranks):
        shards = []
        for name, values in tensors.items():
            rows = len(values) // ranks
            box = Box((rank * rows, *(0 for _ in values.shape[1:])), (rows, *values.shape[1:]))
            load = functools.partial(part_of, values)
            shards.append(ShardToWrite(name, Kind.TENSOR, values.dtype, tuple(values.shape), box, load))
        records += write_objects(store, f"{rank:05}", shards, codec)
    store.put(MANIFEST_NAME, encode_manifest(assemble_index([PackedRecords.of(records)]), {}, {}), overwrite=False)
    return store, open_source(store)


def read(
    store: Store, manifest: Source, wants: list[WantedBox], out: list[torch.Tensor], budget: int = 1 << 30
) -> None:
    execute(plan_reads(manifest.index(), wants), manifest.index(), store, out, budget_bytes=budget)


TENSORS = {
    "w": torch.randn(512, 256),
    "h": torch.randn(512, 300).to(torch.bfloat16),
    "i": torch.arange(4096 * 8).reshape(4096, 8),
}


@pytest.mark.parametrize("codec", ["zstd", "none"])
@pytest.mark.parametrize("budget_bytes", [1 << 30, 1 << 16, 1])
def test_boxes_are_read_under_any_budget(codec: str, budget_bytes: int) -> None:
    store, manifest = saved(codec, TENSORS)
    for slices in ((slice(None), slice(None)), (slice(100, 400), slice(3, 8)), (slice(0, 1), slice(0, 1))):
        expected = {name: values[slices] for name, values in TENSORS.items()}
        boxes = {
            name: Box(tuple(s.start or 0 for s in slices), tuple(values.shape)) for name, values in expected.items()
        }
        out = [torch.zeros_like(values) for values in expected.values()]
        read(store, manifest, [WantedBox(name, box) for name, box in boxes.items()], out, budget_bytes)
        assert all(a.equal(b) for a, b in zip(out, expected.values(), strict=True))


@pytest.mark.parametrize("codec", ["zstd", "none"])
def test_fetched_bytes_stay_within_the_budget(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 3 holds for bytes that have been requested and not been placed, however slow placing is."""
    values = torch.randn(4096, 256).to(torch.bfloat16)
    store, manifest = saved(codec, {f"t{i}": values for i in range(4)})
    wants = [WantedBox(f"t{i}", Box.whole((4096, 256))) for i in range(4)]
    plan = plan_reads(manifest.index(), wants, max_request_bytes=1 << 17)
    budget = 1 << 19
    largest = int((plan.requests.stops - plan.requests.starts).max())
    assert plan.requests.nbytes > 4 * budget

    held: list[int] = []
    fetch = Schedule.fetch

    def watching(self: Schedule) -> Fetch | None:
        step = fetch(self)
        held.append(self.held_bytes)
        return step

    monkeypatch.setattr(Schedule, "fetch", watching)
    out = [torch.zeros_like(values) for _ in wants]
    execute(plan, manifest.index(), store, out, budget_bytes=budget)
    assert all(tensor.equal(values) for tensor in out)
    assert budget / 4 < max(held) <= budget + largest


def test_requests_run_concurrently() -> None:
    store, manifest = saved("none", {"w": torch.randn(2048, 1024)})
    concurrent = store.capabilities.concurrent_reads
    barrier = threading.Barrier(concurrent)

    def before(call: Call) -> None:
        barrier.wait(timeout=20)

    plan = plan_reads(manifest.index(), [WantedBox("w", Box.whole((2048, 1024)))], max_request_bytes=1 << 19)
    assert len(plan.requests) == concurrent
    execute(plan, manifest.index(), RecordingStore(store, before), [torch.empty(2048, 1024)])


def damaged(store: MemoryStore, change: Callable[[bytes], bytes]) -> str:
    """Change the first data object, and return its name."""
    name = next(name for name in store.content if name != MANIFEST_NAME)
    store.content[name] = change(store.content[name])
    return name


@pytest.mark.parametrize("codec", ["zstd", "none"])
@pytest.mark.parametrize(
    ("change", "message", "harmed"),
    [
        (lambda data: data[:-1000], "the object was cut short", "i"),
        (lambda data: data[:100], "the object was cut short", "whi"),
        (lambda data: b"", "the object was cut short", "whi"),
        (lambda data: data[:-500] + bytes([data[-500] ^ 1]) + data[-499:], "does not match its checksum", "i"),
    ],
)
def test_corrupt_error_names_tensor_and_object_and_tensor_is_unchanged(
    codec: str, change: Callable[[bytes], bytes], message: str, harmed: str
) -> None:
    store, manifest = saved(codec, TENSORS)
    name = damaged(store, change)
    for tensor, values in TENSORS.items():
        out = torch.full_like(values, 7)
        wants = [WantedBox(tensor, Box.whole(tuple(values.shape)))]
        if tensor in harmed:
            with pytest.raises(CorruptCheckpointError, match=f"^'{tensor}': .*{message}") as caught:
                read(store, manifest, wants, [out])
            assert name in str(caught.value)
            assert "overwritten" not in str(caught.value)
            assert (out == 7).all()
        else:
            read(store, manifest, wants, [out])
            assert out.equal(values)


def test_missing_object_raises_corrupt_error() -> None:
    store, manifest = saved("zstd", TENSORS)
    name = next(name for name in store.content if name != MANIFEST_NAME)
    del store.content[name]
    with pytest.raises(CorruptCheckpointError, match=f"'w': object '{name}' is missing"):
        read(store, manifest, [WantedBox("w", Box.whole((512, 256)))], [torch.empty(512, 256)])


def test_corrupt_error_says_if_part_of_a_large_tensor_was_overwritten() -> None:
    values = torch.randn(2048, 1024)
    store, manifest = saved("none", {"w": values})
    name = list(store.content)[1]
    store.content[name] = store.content[name][:-1] + bytes([store.content[name][-1] ^ 1])
    plan = plan_reads(manifest.index(), [WantedBox("w", Box.whole((2048, 1024)))], max_request_bytes=1 << 18)
    with pytest.raises(CorruptCheckpointError, match="a part of the tensor was overwritten"):
        execute(plan, manifest.index(), store, [torch.zeros(2048, 1024)], budget_bytes=1 << 19)


def test_corrupt_error_waits_for_chunks_that_are_being_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk cannot be decoded, although its checksum is right, while other chunks of the tensor are written."""
    monkeypatch.setattr("reshard.storage.reading.workers.default_threads", lambda: 2)
    monkeypatch.setattr(
        "reshard.storage.reading.request_checksums.RequestChecksums.damaged_chunks", lambda *arguments: []
    )
    store, manifest = saved("zstd", {"w": torch.randn(4096, 1024)})
    want = WantedBox("w", Box.whole((4096, 1024)))
    plan = plan_reads(manifest.index(), [want])
    first = manifest.index().objects[int(plan.reads[0].objects[0, 0])][0]
    content, start = store.content[first], int(plan.reads[0].starts[0, 0])
    store.content[first] = content[:start] + bytes([255] * 4) + content[start + 4 :]
    others, failed = threading.Event(), threading.Event()

    def place(batch: ChunkBatch, damage: Callable[[TensorProgress, str], Exception]) -> None:
        if batch.rows.start == 0:
            try:
                assert others.wait(20)
                place_chunk_batch(batch, damage)
            finally:
                failed.set()
        else:
            others.set()
            assert failed.wait(20)
            place_chunk_batch(batch, damage)

    monkeypatch.setattr(placing, "place_chunk_batch", place)
    with pytest.raises(CorruptCheckpointError, match=r"cannot be decoded.*a part of the tensor was overwritten"):
        execute(plan, manifest.index(), store, [torch.zeros(4096, 1024)])


def test_interrupt_does_not_wait_for_a_repeated_read() -> None:
    store, manifest = saved("none", {"w": torch.randn(512, 256)})
    name = manifest.index().objects[0][0]
    store.content[name] = bytes(len(store.content[name]))
    again, answered = threading.Event(), threading.Event()
    waited: list[Call] = []

    def before(call: Call) -> None:
        if threading.current_thread().name.startswith("reshard-read"):
            again.set()
            answered.wait(20)
            waited.append(call)

    def interrupt() -> None:
        if again.is_set():
            raise StoreError("interrupted by the test")

    plan = plan_reads(manifest.index(), [WantedBox("w", Box.whole((512, 256)))])
    with pytest.raises(StoreError, match="interrupted by the test"):
        execute(plan, manifest.index(), RecordingStore(store, before), [torch.zeros(512, 256)], interrupt=interrupt)
    assert not waited
    answered.set()


def test_failed_load_releases_its_buffers(tmp_path: Path) -> None:
    reshard.save({"w": torch.randn(4096, 1024)}, tmp_path / "x", codec="none")
    source = open_source(tmp_path / "x")
    want = WantedBox("w", Box.whole((4096, 1024)))
    plan = plan_reads(source.index([want]), [want], max_request_bytes=1 << 18)
    name = source.index([want]).objects[0][0]
    os.truncate(tmp_path / "x" / name, 1 << 20)
    read_buffers.clear()
    read_buffers._lent.clear()  # of reads that other tests have stopped
    with Workers(source.store) as workers:
        with pytest.raises(CorruptCheckpointError, match="cut short"):
            execute(plan, source.index([want]), source.store, [torch.zeros(4096, 1024)], workers=workers)
        workers.pool.shutdown()
        assert not list(read_buffers._lent.values())


def test_store_error_names_tensor_object_and_byte_range() -> None:
    store, manifest = saved("zstd", TENSORS)
    failed = RecordingStore(store, failing("read"))
    with pytest.raises(StoreError, match=r"'w': bytes \[8, \d+\) of object 'data/.*-0000\d\.shard'.*injected"):
        read(failed, manifest, [WantedBox("w", Box.whole((512, 256)))], [torch.empty(512, 256)])


def test_error_stops_requests_that_have_not_started() -> None:
    store, manifest = saved("none", {"w": torch.randn(4096, 1024)})
    plan = plan_reads(manifest.index(), [WantedBox("w", Box.whole((4096, 1024)))], max_request_bytes=1 << 16)
    slowly, fails = slow("read", 0.01), failing("read", after=3)
    failed = RecordingStore(store, lambda call: (slowly(call), fails(call))[0])
    with pytest.raises(StoreError, match="injected"):
        execute(plan, manifest.index(), failed, [torch.empty(4096, 1024)])
    assert len(failed.calls) < 4 * store.capabilities.concurrent_reads < len(plan.requests)


def test_plans_that_share_workers_do_not_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan whose store does not answer delays neither the values nor the error of another plan."""
    monkeypatch.setattr("reshard.storage.reading.workers.default_threads", lambda: 1)
    store, manifest = saved("zstd", TENSORS)
    name = manifest.index().objects[0][0]
    plan = plan_reads(manifest.index(), [WantedBox("w", Box.whole((512, 256)))])
    answered, asked = threading.Event(), threading.Event()

    class Answering(MemoryStore):
        def read(self, name: str, start: int, stop: int) -> bytes:
            if threading.current_thread().name.startswith("reshard-fetch") and not asked.is_set():
                asked.set()
                answered.wait(20)
            return bytes(store.read(name, start, stop))

    shared = Answering()
    out = [torch.zeros(512, 256) for _ in range(3)]
    with Workers(shared) as workers:
        waiting = threading.Thread(target=lambda: execute(plan, manifest.index(), shared, out[:1], workers=workers))
        waiting.start()
        assert asked.wait(20)
        execute(plan, manifest.index(), shared, out[1:2], workers=workers)
        assert out[1].equal(TENSORS["w"])
        content = store.content.pop(name)
        with pytest.raises(CorruptCheckpointError, match="is missing"):
            execute(plan, manifest.index(), shared, out[2:], workers=workers)
        store.content[name] = content
        answered.set()
        waiting.join(20)
    assert not waiting.is_alive()
    assert out[0].equal(TENSORS["w"])


def test_execute_raises_if_its_workers_are_stopped(tmp_path: Path) -> None:
    values = torch.randn(2048, 1024)
    reshard.save({"w": values}, tmp_path / "x", codec="none")
    source = open_source(tmp_path / "x")
    want = WantedBox("w", Box.whole((2048, 1024)))
    plan = plan_reads(source.index([want]), [want])
    workers = Workers(source.store)
    workers.stopped = True
    with pytest.raises(StoreError, match="stopped"):
        execute(plan, source.index([want]), source.store, [torch.zeros(2048, 1024)], workers=workers)
    with workers:
        pass


@pytest.mark.parametrize(
    "concurrent_reads", [1, 16], ids=["some requests have not started", "all requests have started"]
)
def test_execute_that_waits_for_the_store_ends_when_its_workers_are_stopped(
    concurrent_reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MemoryStore, "capabilities", Capabilities(concurrent_reads=concurrent_reads))
    monkeypatch.setattr(Fetcher, "max_requests", 16)
    store, manifest = saved("zstd", TENSORS)
    plan = plan_reads(manifest.index(), [WantedBox("w", Box.whole((512, 256)))])
    assert len(plan.requests) > 1
    asked, answered = threading.Event(), threading.Event()

    def before(call: Call) -> None:
        asked.set()
        answered.wait(20)

    errors: list[BaseException] = []

    def run() -> None:
        try:
            execute(plan, manifest.index(), recording, [torch.zeros(512, 256)], workers=workers)
        except StoreError as error:
            errors.append(error)

    recording = RecordingStore(store, before)
    with Workers(recording) as workers:
        waiting = threading.Thread(target=run)
        waiting.start()
        assert asked.wait(20)
    waiting.join(10)
    answered.set()
    assert "stopped" in str(errors)


def test_loaded_tensor_is_not_kept_in_memory() -> None:
    store, manifest = saved("zstd", TENSORS)
    memory = np.zeros((512, 256), np.float32)
    held = weakref.ref(memory)
    gc.collect()
    gc.disable()  # reference cycles would stay in memory until the garbage collector runs
    try:
        read(store, manifest, [WantedBox("w", Box.whole((512, 256)))], [torch.from_numpy(memory)])
        assert np.array_equal(memory, TENSORS["w"].numpy())
        del memory
        end = time.monotonic() + 30
        while held() is not None and time.monotonic() < end:  # a worker may still be finishing its last task
            time.sleep(0.01)
        assert held() is None
    finally:
        gc.enable()


def test_execute_raises_if_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    store, manifest = saved("none", {"w": torch.randn(512, 256)})
    submit = Pool.submit

    def refusing(self: Pool, task: Callable[..., Any], *arguments: Any) -> Any:
        if self._name == "reshard-read":
            raise RuntimeError("can't start new thread")
        return submit(self, task, *arguments)

    monkeypatch.setattr(Pool, "submit", refusing)
    plan = plan_reads(manifest.index(), [WantedBox("w", Box.whole((512, 256)))])
    with pytest.raises(RuntimeError, match="new thread"):
        execute(plan, manifest.index(), store, [torch.zeros(512, 256)])


def test_a_read_ends_whenever_a_thread_cannot_be_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(workers_module, "default_threads", lambda: 4)
    saved = {f"t{at}": torch.randn(40, 64) for at in range(300)}
    reshard.save(saved, tmp_path / "c", codec="none")
    submit, left = Pool.submit, [0]

    def refusing(self: Pool, task: Callable[..., Any], *arguments: Any) -> Any:
        if self._name == "reshard-read":
            left[0] -= 1
            if left[0] == 0:
                raise RuntimeError("can't start new thread")
        return submit(self, task, *arguments)

    monkeypatch.setattr(Pool, "submit", refusing)
    refused = 0
    for left[0] in range(1, 20):
        try:
            assert reshard.open(tmp_path / "c").state_dict().keys() == saved.keys()
        except RuntimeError as error:
            refused += "new thread" in str(error)
    assert refused > 0


@pytest.mark.parametrize(
    "error", [ValueError("boom"), KeyError("boom"), OSError("boom"), RuntimeError("boom")], ids=repr
)
@pytest.mark.parametrize("how", ["read", "load", "convert", "state_dict"])
def test_error_of_a_custom_store_names_the_tensor(how: str, error: Exception, tmp_path: Path) -> None:
    memory = MemoryStore()
    reshard.save({"model": {"w": torch.ones(40, 30)}}, memory)

    def fail(call: Call) -> None:
        if call.name.startswith("data/"):
            raise error

    store = RecordingStore(memory, fail)
    calls: dict[str, Callable[[], object]] = {
        "read": lambda: reshard.open(store).read("model.w"),
        "load": lambda: reshard.load({"model": {"w": torch.zeros(40, 30)}}, store),
        "convert": lambda: reshard.convert(store, tmp_path / "dst", format="safetensors"),
        "state_dict": lambda: reshard.open(store).state_dict(),
    }
    with pytest.raises(StoreError, match=rf"^'model\.w': bytes .* of object 'data/.*: {type(error).__name__}: .*boom"):
        calls[how]()


def test_an_error_of_the_progress_is_raised() -> None:
    _, manifest = saved("none", {"w": TENSORS["w"]})
    plan = plan_reads(manifest.index(), [WantedBox("w", Box.whole((512, 256)))])

    def fail(nbytes: int) -> None:
        raise ValueError(f"injected after {nbytes}")

    with pytest.raises(ValueError, match="injected"):
        execute(plan, manifest.index(), manifest.store, [torch.zeros(512, 256)], placed=fail)


def test_error_of_torch_during_placing_names_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = MemoryStore()
    reshard.save({"w": torch.ones(40, 30)}, memory)

    def fail(*arguments: Any) -> None:
        raise RuntimeError("no device")

    monkeypatch.setattr(placing, "place_chunk_batch", fail)
    with pytest.raises(RankError, match=r"^'w': RuntimeError: no device"):
        reshard.load({"w": torch.zeros(40, 30)}, memory)
