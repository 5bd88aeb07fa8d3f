"""Loads into tensors of a device.

Where there is no CUDA device, host memory takes its place: then everything runs but streams and page-locked memory.
"""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

import reshard
from reshard.storage.reading import destination, executor
from reshard.storage.reading.device.device import Device, cuda_device
from reshard.storage.reading.device.frames import Decompressor, HostDecompressor, PackedFrames
from reshard.storage.reading.device.ring import MAX_SLOTS, Ring, Slot
from reshard.storage.reading.request_checksums import RequestChecksums
from reshard.storage.runtime.pinned import ByteArray
from reshard.storage.stores.buffer_pool import PAGE_BYTES

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class CountingDecompressor(HostDecompressor):
    """Counts the frames of each call."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def decompress(self, frames: PackedFrames) -> None:
        self.calls.append(len(frames.starts))
        assert all(start % 16 == 0 for start in (*frames.starts, *frames.value_starts))
        super().decompress(frames)


class Copy:
    """A copy from a slot, in the place of a CUDA event."""

    def __init__(self, device: HostDevice, source: ByteArray, to: torch.Tensor) -> None:
        self.device = device
        self.source = source
        self.to = to
        self.is_done = False

    def query(self) -> bool:
        return self.is_done

    def synchronize(self) -> None:
        self.device.copy_until(self)


class HostDevice(Device):
    """Host memory in the place of a device. Copies run as late as they may on a device, and memory has old content."""

    def __init__(self, decompressor: Decompressor | None, slot_bytes: int = 1 << 20) -> None:
        ring = Ring(slot_bytes + PAGE_BYTES, page_lock=lambda memory: False)
        super().__init__(torch.device("cpu"), ring, decompressor)
        self._waiting: list[Copy] = []
        self._copy_lock = threading.RLock()

    def copy_until(self, last: Copy | None) -> None:
        with self._copy_lock:
            while self._waiting and not (last is not None and last.is_done):
                copy = self._waiting.pop(0)
                copy.to.copy_(torch.from_numpy(copy.source))
                copy.is_done = True

    def _new(self, offset: int, nbytes: int) -> torch.Tensor:
        return super()._new(offset, nbytes).fill_(0xAB)

    def _copy(self, slot: Slot, start: int, to: torch.Tensor) -> Any:
        copy: Any = Copy(self, slot.memory[start : start + len(to)], to)
        with self._copy_lock:
            self._waiting.append(copy)
            slot.copies.append(copy)
        return copy

    @contextmanager
    def _copying(self) -> Iterator[None]:
        yield

    @contextmanager
    def working(self, copied: Iterable[Any], *, decompresses: bool = False) -> Iterator[None]:
        for copy in copied:
            if copy is not None:
                self.copy_until(copy)
        yield


def new_device(decompresses: bool, slot_bytes: int = 1 << 20) -> Device:
    return HostDevice(CountingDecompressor() if decompresses else None, slot_bytes)


NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
DEVICES = [
    "host decompresses",
    "device decompresses",
    pytest.param("cuda", marks=NEEDS_CUDA),
    pytest.param("cuda without nvCOMP", marks=NEEDS_CUDA),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Device:
    """A device that decodes for all destinations."""
    if request.param.startswith("cuda"):
        device = cuda_device(torch.device("cuda", 0))
        if request.param != "cuda":
            monkeypatch.setattr(device, "decompressor", None)
        return device
    device = new_device(request.param == "device decompresses")
    monkeypatch.setattr(destination, "device_of", lambda tensor: device)
    return device


def zeros_for(values: dict[str, torch.Tensor], device: Device) -> dict[str, torch.Tensor]:
    return {
        name: torch.zeros(tensor.shape, dtype=tensor.dtype, device=device.device) for name, tensor in values.items()
    }


def samples() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    many_zeros = torch.zeros(3000, 500)
    many_zeros[::7] = 1
    return {
        "float32": torch.randn(700, 300),
        "float32 with exceptions": torch.tensor([1.00390625, float("nan"), 3.0]).repeat(40_000),
        "bfloat16": torch.randn(2048, 512).bfloat16(),
        "float16": torch.randn(1000, 33).half(),
        "float64": torch.randn(1000, 7, dtype=torch.float64),
        "float8": torch.randn(512, 100).to(torch.float8_e4m3fn),
        "complex": torch.randn(64, 64, dtype=torch.complex64),
        "int64": torch.arange(300_000),
        "uint8": torch.arange(100_000).to(torch.uint8),
        "bool": torch.rand(300, 7) < 0.5,
        "zeros": many_zeros,
        "random bits": torch.randint(0, 2**31, (100_000,), dtype=torch.int32),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "three dims": torch.randn(20, 64, 96).bfloat16(),
        "odd": torch.randn(101, 1003),
    }


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def check_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        assert torch.equal(bits(found[name].cpu()), bits(tensor)), name


@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("budget_bytes", [None, 1 << 18])
def test_loads_restore_all_dtypes(device: Device, codec: str, budget_bytes: int | None, tmp_path: Path) -> None:
    values = samples()
    reshard.save(values, tmp_path, codec=codec)
    loaded = zeros_for(values, device)
    report = reshard.load(loaded, tmp_path, budget_bytes=budget_bytes)
    check_equal(loaded, values)
    assert device.ring.held_bytes > 0
    name = str(device.device)
    planned = reshard.open(tmp_path).plan(reshard.Layout(1))[0].report
    on_device = report.total.decoded_by.get(name, 0)
    assert on_device == planned.bytes_wanted - planned.bytes_compressed
    decoded_by = set(report.total.decoded_by)
    assert name in decoded_by  # with codec "zstd" for the scalar, which is too small to be compressed
    decoded_by -= set() if codec == "none" else {name}
    if codec == "none":
        assert decoded_by == {name}
    elif device.decompressor is None or budget_bytes is not None:
        assert decoded_by == {f"host and {name}"}
    else:
        assert decoded_by == {f"{name} with nvCOMP"}
    assert f"MB decoded by {decoded_by.pop()}" in str(report)


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_ranks_of_other_layouts_get_their_boxes(device: Device, codec: str, tmp_path: Path) -> None:
    values = {name: tensor for name, tensor in samples().items() if tensor.dim() == 2 and tensor.numel()}
    reshard.save(values, tmp_path, codec=codec)
    checkpoint = reshard.open(tmp_path)
    for style, dim in (("colwise", 0), ("rowwise", 1)):
        layout = reshard.Layout({"tp": 3}, {"*": style})
        for rank in range(3):
            found = checkpoint.load_rank(layout, rank, device=device.device)
            expected = {name: torch.chunk(tensor, 3, dim)[rank] for name, tensor in values.items()}
            check_equal(found, expected)


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_values_are_cast_and_views_are_filled(device: Device, codec: str, tmp_path: Path) -> None:
    values = {"a": torch.randn(600, 500), "b": torch.randn(600, 500).bfloat16(), "c": torch.randn(90, 80)}
    reshard.save(values, tmp_path, codec=codec)
    memory = torch.full((600, 1000), 7.0, dtype=torch.bfloat16, device=device.device)
    transposed = torch.zeros(500, 600, dtype=torch.float64, device=device.device)
    complex_values = torch.zeros(90, 80, dtype=torch.complex64, device=device.device).conj()
    reshard.load({"a": memory[:, ::2], "b": transposed.t(), "c": complex_values}, tmp_path)
    assert memory[:, ::2].cpu().equal(values["a"].bfloat16())
    assert (memory[:, 1::2] == 7).all()
    assert transposed.t().cpu().equal(values["b"].double())
    assert complex_values.cpu().equal(values["c"].to(torch.complex64))


def write_dcp(values: dict[str, torch.Tensor], folder: Path) -> None:
    dcp.save(dict(values), checkpoint_id=folder, no_dist=True)


def write_safetensors(values: dict[str, torch.Tensor], folder: Path) -> None:
    folder.mkdir()
    safetensors.torch.save_file(dict(values), folder / "model.safetensors")


def write_torch(values: dict[str, torch.Tensor], folder: Path) -> None:
    folder.mkdir()
    torch.save({name: tensor.t() if tensor.dim() == 2 else tensor for name, tensor in values.items()}, folder / "m.pt")


@pytest.mark.parametrize("write", [write_dcp, write_safetensors])
def test_other_formats_are_loaded(device: Device, write: Callable[..., None], tmp_path: Path) -> None:
    values = samples()
    write(values, tmp_path / "there")
    loaded = zeros_for(values, device)
    reshard.load(loaded, tmp_path / "there")
    check_equal(loaded, values)
    columns = reshard.open(tmp_path / "there").load_rank(
        reshard.Layout({"tp": 4}, {"bfloat16": "rowwise"}), 2, device=device.device
    )
    assert columns["bfloat16"].cpu().equal(values["bfloat16"].chunk(4, 1)[2])


def test_files_of_torch_save_with_other_strides_are_loaded(device: Device, tmp_path: Path) -> None:
    values = samples()
    write_torch(values, tmp_path / "there")
    stored = {name: tensor.t() if tensor.dim() == 2 else tensor for name, tensor in values.items()}
    loaded = zeros_for(stored, device)
    reshard.load(loaded, tmp_path / "there" / "m.pt")
    check_equal(loaded, stored)


@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("where", [0.2, 0.9])
def test_damage_leaves_the_tensor_unchanged(device: Device, codec: str, where: float, tmp_path: Path) -> None:
    values = {"w": torch.randn(4096, 512).bfloat16()}
    reshard.save(values, tmp_path, codec=codec)
    (data,) = (path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 1 << 20)
    content = bytearray(data.read_bytes())
    content[int(where * len(content))] ^= 1
    data.write_bytes(content)
    loaded = {"w": torch.full((4096, 512), 3.0, dtype=torch.bfloat16, device=device.device)}
    with pytest.raises(reshard.errors.CorruptCheckpointError, match=r"'w': chunk .* damaged"):
        reshard.load(loaded, tmp_path)
    assert (loaded["w"] == 3).all()
    assert len(device.ring._free) * device.ring.nbytes == device.ring.held_bytes, "all slots are put back"


def test_error_names_the_chunk_that_cannot_be_decoded(
    device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The bytes match their checksums, and are wrong nevertheless."""
    monkeypatch.setattr(RequestChecksums, "damaged_chunks", lambda *arguments: [])
    reshard.save({"w": torch.randn(1024, 512).bfloat16()}, tmp_path)
    chunks = reshard.open(tmp_path).plan(reshard.Layout({"tp": 1}))[0].reads[0]
    (data,) = (tmp_path / "data").iterdir()
    content = bytearray(data.read_bytes())
    start = int(chunks.starts[5, 0])
    content[start : start + 4] = bytes([255] * 4)
    data.write_bytes(content)
    where = f"chunk [{chunks.chunk_offsets[5][0]}:{chunks.chunk_offsets[5][0] + chunks.chunk_sizes[5][0]}, "
    with pytest.raises(reshard.errors.CorruptCheckpointError, match=re.escape(where)):
        reshard.load({"w": torch.zeros(1024, 512, dtype=torch.bfloat16, device=device.device)}, tmp_path)


def test_frames_of_many_tensors_are_decompressed_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    device = new_device(decompresses=True)
    monkeypatch.setattr(destination, "device_of", lambda tensor: device)
    values = {f"w{i}": torch.randn(512, 512).bfloat16() for i in range(40)}
    reshard.save(values, tmp_path)
    loaded = zeros_for(values, device)
    reshard.load(loaded, tmp_path)
    check_equal(loaded, values)
    assert isinstance(device.decompressor, CountingDecompressor)
    assert len(device.decompressor.calls) <= 2, "one call for all, or one more for the rest"
    assert sum(device.decompressor.calls) >= 40


def test_frames_are_decompressed_in_parts_that_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Zeros compress so well that one request would fill the device."""
    device = new_device(decompresses=True)
    monkeypatch.setattr(destination, "device_of", lambda tensor: device)
    monkeypatch.setattr(executor, "MIN_DECOMPRESSED_BYTES", 0)
    values = {"zeros": torch.zeros(4096, 2048, dtype=torch.int32)}
    reshard.save(values, tmp_path)
    loaded = {"zeros": torch.ones(4096, 2048, dtype=torch.int32)}  # on the host, for which the device decodes
    reshard.load(loaded, tmp_path, budget_bytes=4 << 20)
    check_equal(loaded, values)
    assert isinstance(device.decompressor, CountingDecompressor)
    assert len(device.decompressor.calls) >= 16


def test_requests_larger_than_a_slot_pass_through_the_ring(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    device = new_device(decompresses=False, slot_bytes=10_000)
    monkeypatch.setattr(destination, "device_of", lambda tensor: device)
    values = samples()
    reshard.save(values, tmp_path, codec="none")
    loaded = zeros_for(values, device)
    reshard.load(loaded, tmp_path)
    check_equal(loaded, values)


def test_host_and_device_share_requests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    device = new_device(decompresses=True)
    values = {f"w{i}": torch.randn(200, 100) for i in range(10)}
    reshard.save(values, tmp_path)
    loaded = zeros_for(values, device)
    there = {tensor.data_ptr() for tensor in list(loaded.values())[::2]}
    monkeypatch.setattr(destination, "device_of", lambda tensor: device if tensor.data_ptr() in there else None)
    reshard.load(loaded, tmp_path)
    check_equal(loaded, values)


def run_out_of_memory(*arguments: object) -> None:
    raise torch.OutOfMemoryError("no memory on the device")


def test_a_failing_device_is_named_with_the_tensor(
    device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reshard.save({"w": torch.randn(300, 300)}, tmp_path, codec="none")
    monkeypatch.setattr(device, "_new", run_out_of_memory)
    with pytest.raises(reshard.errors.RankError, match="'w': OutOfMemoryError: no memory on the device"):
        reshard.load({"w": torch.zeros(300, 300, device=device.device)}, tmp_path)
    assert len(device.ring._free) * device.ring.nbytes == device.ring.held_bytes


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_the_error_names_the_tensor_whose_values_cannot_be_written(
    device: Device, codec: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Frames of many tensors are decompressed together."""
    values = {f"w{i}": torch.randn(512, 512).bfloat16() for i in range(10)}
    reshard.save(values, tmp_path, codec=codec)
    loaded = zeros_for(values, device)
    write = destination.BlockWriter.write_tensor

    def fail(self: destination.BlockWriter, index: tuple[int | slice, ...], decoded: torch.Tensor) -> None:
        if self._tensor.data_ptr() == loaded["w7"].data_ptr():
            run_out_of_memory()
        write(self, index, decoded)

    monkeypatch.setattr(destination.BlockWriter, "write_tensor", fail)
    with pytest.raises(reshard.errors.RankError, match=r"^'w7': OutOfMemoryError: no memory on the device"):
        reshard.load(loaded, tmp_path)


def test_a_frame_that_cannot_be_decompressed_is_damage(
    device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if device.device.type == "cuda" and device.decompressor is not None:
        monkeypatch.setattr(device, "decompressor", HostDecompressor())  # nvCOMP reports no single frames
    monkeypatch.setattr(RequestChecksums, "damaged_chunks", lambda *arguments: [])
    reshard.save({"a": torch.randn(64, 64).bfloat16(), "w": torch.randn(1024, 512).bfloat16()}, tmp_path)
    (chunks,) = (
        read for read in reshard.open(tmp_path).plan(reshard.Layout({"tp": 1}))[0].reads if read.want.name == "w"
    )
    (data,) = (tmp_path / "data").iterdir()
    content, start = bytearray(data.read_bytes()), int(chunks.starts[2, 0]) + 28
    content[start : start + 40] = bytes(byte ^ 0xFF for byte in content[start : start + 40])
    data.write_bytes(content)
    where = f"chunk [{chunks.chunk_offsets[2][0]}:"
    loaded = {
        "w": torch.zeros(1024, 512, dtype=torch.bfloat16, device=device.device),
        "a": torch.zeros(64, 64, dtype=torch.bfloat16, device=device.device),
    }
    with pytest.raises(reshard.errors.CorruptCheckpointError, match=re.escape(where)):
        reshard.load(loaded, tmp_path)


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_no_memory_of_the_device_is_kept_after_an_error(
    device: Device, codec: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    values = {f"w{i}": torch.randn(512, 512).bfloat16() for i in range(20)}
    reshard.save(values, tmp_path, codec=codec)
    new, living = device._new, list[weakref.ref[torch.Tensor]]()

    def counted(offset: int, nbytes: int) -> torch.Tensor:
        found = new(offset, nbytes)
        living.append(weakref.ref(found))
        return found

    monkeypatch.setattr(device, "_new", counted)
    monkeypatch.setattr(destination.BlockWriter, "write_tensor", run_out_of_memory)
    with pytest.raises(reshard.errors.RankError, match="no memory on the device") as caught:
        reshard.load(zeros_for(values, device), tmp_path)
    assert living
    assert caught.value.__traceback__ is not None
    assert not [tensor for tensor in living if tensor() is not None], "while the error is handled"


def test_bytes_that_were_read_again_are_used(device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first read returns damaged bytes."""
    values = {"w": torch.randn(300, 300)}
    reshard.save(values, tmp_path, codec="none")

    class FirstIsDamaged(RequestChecksums):
        damaged = False

        def update(self, data: memoryview, nbytes: int) -> None:
            if not FirstIsDamaged.damaged:
                data[nbytes // 2] ^= 1
                FirstIsDamaged.damaged = True
            super().update(data, nbytes)

    monkeypatch.setattr(executor, "RequestChecksums", FirstIsDamaged)
    loaded = zeros_for(values, device)
    reshard.load(loaded, tmp_path)
    check_equal(loaded, values)
    assert FirstIsDamaged.damaged


def test_the_ring_lends_each_slot_to_one_thread() -> None:
    ring, lock, lent = Ring(1000, page_lock=lambda memory: False), threading.Lock(), set[int]()

    def use(ring: Ring) -> None:
        for _ in range(50):
            slot = ring.take()
            with lock:
                assert id(slot) not in lent
                lent.add(id(slot))
            with lock:
                lent.remove(id(slot))
            ring.put(slot)

    threads = [threading.Thread(target=use, args=(ring,)) for _ in range(2 * MAX_SLOTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 < ring.held_bytes <= MAX_SLOTS * 1000
    ring.release()
    assert ring.held_bytes == 0


def test_slots_whose_copies_run_are_used_last() -> None:
    class Copy:
        def __init__(self) -> None:
            self.done = False

        def query(self) -> bool:
            return self.done

        def synchronize(self) -> None:
            self.done = True

    ring = Ring(1000, page_lock=lambda memory: False)
    slots = [ring.take() for _ in range(MAX_SLOTS)]
    copies: list[Any] = [Copy() for _ in slots]
    for slot, copy in zip(slots, copies, strict=True):
        slot.copies.append(copy)
        ring.put(slot)
    copies[3].done = True
    assert ring.take() is slots[3]
    assert ring.take() is slots[0], "its copies were started first"
    assert copies[0].done
    assert isinstance(slots[0], Slot)
