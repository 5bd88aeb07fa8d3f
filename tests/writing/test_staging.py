"""Staging: memory that is kept between saves, and shards that are copied to it."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import reshard
from reshard.errors import ArgumentError, StoreError
from reshard.planner.box import Box
from reshard.planner.entries import Kind
from reshard.storage.runtime.arguments import check_nbytes
from reshard.storage.writing import staging
from reshard.storage.writing.object_layout import ShardToWrite
from reshard.storage.writing.staging import (
    PAGE_BYTES,
    STAGING,
    Staging,
    StagingMemory,
    default_staging_bytes,
    split_to_fit,
    staged_bytes,
)


@pytest.fixture(autouse=True)
def without_idle_memory() -> Iterator[None]:
    STAGING.release()
    yield
    STAGING.release()


def shard_of(name: str, values: torch.Tensor) -> ShardToWrite:
    whole = Box.whole(tuple(values.shape))
    return ShardToWrite(
        name, Kind.TENSOR, values.dtype, tuple(values.shape), whole, lambda box: values[box.relative_to(whole).slices]
    )


VALUES = {
    "contiguous": torch.randn(300, 70),
    "transposed": torch.randn(70, 300).t(),
    "strided": torch.randn(100, 100)[::3, 1::2],
    "expanded": torch.randn(1, 50).expand(40, 50),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "bool": torch.tensor([True, False, True]),
    "bfloat16": torch.randn(17, 3).bfloat16(),
    "float8": torch.randn(33).to(torch.float8_e4m3fn),
    "complex": torch.randn(5, dtype=torch.complex128).conj(),
    "negative": torch.randn(5, dtype=torch.complex64).conj().imag,
    "parameter": torch.nn.Parameter(torch.randn(3, 3)),
}


def bits(values: torch.Tensor) -> bytes:
    return values.detach().resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("threads", [1, 3])
def test_staged_values_do_not_change_with_the_tensors(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "default_threads", lambda: threads)
    monkeypatch.setattr(staging, "PIECE_BYTES", 1024)
    values = {name: tensor.clone() if tensor.is_contiguous() else tensor for name, tensor in VALUES.items()}
    expected = {name: bits(tensor) for name, tensor in values.items()}
    copied = Staging.begin([shard_of(name, tensor) for name, tensor in values.items()])
    copied.copy()
    for name in ("contiguous", "scalar", "bool", "parameter"):
        with torch.no_grad():
            values[name].zero_()
    shards = [staged.shard(copied.arena.bytes) for staged in copied.shards]
    assert {shard.name: bits(shard.load(shard.box)) for shard in shards} == expected
    part = next(shard for shard in shards if shard.name == "transposed")
    assert part.load(Box((10, 5), (20, 7))).equal(VALUES["transposed"][10:30, 5:12])
    STAGING.put(copied.arena)


def test_shards_without_elements_are_not_staged() -> None:
    copied = Staging.begin([shard_of("empty", torch.zeros(0, 3))])
    copied.copy()
    assert copied.shards == []
    STAGING.put(copied.arena)


def test_memory_is_reused_if_it_is_large_enough() -> None:
    memory = StagingMemory()
    first = memory.take(3 * PAGE_BYTES, pinned=False)
    second = memory.take(PAGE_BYTES, pinned=False)
    assert first.nbytes == 3 * PAGE_BYTES
    memory.put(first)
    memory.put(second)
    assert memory.held_bytes == 4 * PAGE_BYTES
    assert memory.take(PAGE_BYTES - 1, pinned=False) is second
    assert memory.take(PAGE_BYTES, pinned=False) is first
    memory.put(first)
    memory.put(first)
    assert memory.held_bytes == 3 * PAGE_BYTES, "putting it twice has no effect"
    larger = memory.take(4 * PAGE_BYTES, pinned=False)
    assert first.fd == -1, "memory that is too small is returned to the system"
    assert larger.nbytes == 4 * PAGE_BYTES
    memory.put(larger)
    memory.release()
    assert memory.held_bytes == 0


def test_released_memory_leaves_no_open_file() -> None:
    before = len(os.listdir("/proc/self/fd"))
    memory = StagingMemory()
    memory.put(memory.take(1, pinned=False))
    assert len(os.listdir("/proc/self/fd")) > before
    memory.release()
    assert len(os.listdir("/proc/self/fd")) == before


class FakeStream:
    """Records what a copy on a separate stream does."""

    calls: ClassVar[list[str]] = []

    def __init__(self, device: torch.device) -> None:
        self.calls.append("new stream")

    def wait_stream(self, other: str) -> None:
        self.calls.append(f"wait for {other}")

    def record_event(self, event: object) -> FakeStream:
        self.calls.append("record")
        return self

    def synchronize(self) -> None:
        self.calls.append("wait")


def test_memory_that_cannot_be_mapped_leaves_no_open_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no memory")

    monkeypatch.setattr(staging, "mapped", fail)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="no memory"):
        StagingMemory().take(PAGE_BYTES, pinned=False)
    assert os.listdir("/proc/self/fd") == before


def is_used_here(inode: int) -> bool:
    """Return whether this process has a memory file open or mapped."""
    links = {os.stat(f"/proc/self/fd/{fd}").st_ino for fd in os.listdir("/proc/self/fd") if is_open(int(fd))}
    mapped_files = {int(line.split()[4]) for line in Path("/proc/self/maps").read_text().splitlines()}
    return inode in links | mapped_files


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_a_forked_child_does_not_keep_the_memory() -> None:
    arena = STAGING.take(PAGE_BYTES, pinned=False)
    inode = os.fstat(arena.fd).st_ino
    assert is_used_here(inode)
    child = os.fork()
    if child == 0:
        os._exit(int(is_used_here(inode)))
    assert os.waitpid(child, 0)[1] == 0
    assert arena.bytes.size == PAGE_BYTES
    STAGING.put(arena)


@pytest.fixture
def fake_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "Event", lambda blocking: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the current stream")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(staging.DeviceCopies, "_streams", {})
    FakeStream.calls.clear()


@pytest.mark.usefixtures("fake_streams")
def test_copies_before_one_that_fails_are_waited_for() -> None:
    """Otherwise they would write to memory that another save uses."""
    copies = staging.DeviceCopies(torch.device("cpu"))
    copies.add(torch.zeros(3), torch.ones(3))
    copies.add(torch.zeros(3), torch.ones(4))
    with pytest.raises(RuntimeError, match="must match the size"):
        copies.start()
    assert FakeStream.calls[-1] == "record"
    copies.wait()
    assert FakeStream.calls[-1] == "wait"


@pytest.mark.usefixtures("fake_streams")
def test_copies_from_a_device_use_one_separate_stream() -> None:
    """Whether CUDA copies correctly is shown by `benchmarks/async_save.py --device cuda`."""
    for _ in range(2):
        copies = staging.DeviceCopies(torch.device("cpu"))
        to, values = torch.zeros(3, 2), torch.randn(2, 3).t()
        copies.add(to, values)
        copies.start()
        assert FakeStream.calls[-2:] == ["wait for the current stream", "record"]
        copies.wait()
        assert FakeStream.calls[-1] == "wait"
        assert to.equal(values)
    assert FakeStream.calls.count("new stream") == 1


def test_a_failed_copy_returns_its_memory() -> None:
    def fails(box: Box) -> torch.Tensor:
        return torch.zeros(4)  # not the shape of the shard

    whole = Box.whole((3,))
    with pytest.raises(ValueError, match="reshape"):
        Staging.begin([ShardToWrite("w", Kind.TENSOR, torch.float32, (3,), whole, fails)])
    assert STAGING.held_bytes == PAGE_BYTES


@pytest.mark.parametrize("pages", [0, 1, 2, 5, 9, 100])
def test_what_does_not_fit_is_split_off(pages: int) -> None:
    tensors = {"a": torch.randn(1024, 1024), "b": torch.arange(10), "c": torch.randn(2048, 700), "d": torch.ones(())}
    shards = [shard_of(name, tensor) for name, tensor in tensors.items()]
    at_once, later = split_to_fit(shards, pages * PAGE_BYTES, "none")
    assert staged_bytes(later) <= pages * PAGE_BYTES
    assert bool(at_once) == (pages < 5)
    assert bool(later) == (pages > 0)
    seen = {name: np.zeros(tensor.shape, np.int64) for name, tensor in tensors.items()}
    for shard in [*at_once, *later]:
        seen[shard.name][shard.box.slices] += 1
        assert shard.load(shard.box).equal(tensors[shard.name][shard.box.slices])
    assert all((count == 1).all() for count in seen.values())


def test_more_than_half_of_the_memory_that_fits_is_used() -> None:
    shards = [shard_of("w", torch.zeros(4096, 4096, dtype=torch.uint8))]
    _, later = split_to_fit(shards, 4 * PAGE_BYTES, "none")
    assert staged_bytes(later) > 2 * PAGE_BYTES


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "1", True])
def test_a_wrong_limit_is_refused(wrong: object) -> None:
    with pytest.raises(ArgumentError, match="staging_bytes must be a positive integer or None for the default, got"):
        check_nbytes(staging_bytes=wrong)


def test_the_default_limit_is_a_share_of_half_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "available_bytes", lambda: 80 * 2**30)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert default_staging_bytes() == 5 * 2**30
    monkeypatch.setattr(staging, "available_bytes", lambda: 0)
    assert default_staging_bytes() == staging.MIN_STAGING_BYTES


@pytest.mark.parametrize("background", ["thread", "process"])
def test_a_limit_of_file_sizes_is_named(background: Any, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    reshard.release_memory()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(StoreError, match=r"the memory for an asynchronous save, 4\.\d MB, .*ulimit -f"):
            reshard.async_save({"w": torch.ones(1 << 20)}, tmp_path, background=background).result()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    reshard.async_save({"w": torch.ones(1 << 20)}, tmp_path, background=background).result()
    assert reshard.open(tmp_path).read("w").eq(1).all()
