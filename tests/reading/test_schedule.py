"""The schedule of a read, in all orders of events."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reshard.planner.box import Box
from reshard.planner.chunk_reads import WantedBox
from reshard.planner.entries import Kind
from reshard.planner.read_plan import ReadPlan, plan_reads
from reshard.storage.formats.detect import open_source
from reshard.storage.formats.native.manifest import MANIFEST_NAME, encode_manifest
from reshard.storage.formats.native.write_records import PackedRecords, assemble_index
from reshard.storage.reading.schedule import Fetch, Place, Schedule, Verify
from reshard.storage.reading.tasks import Request, build_tasks
from reshard.storage.stores.memory import MemoryStore
from reshard.storage.writing.object_layout import ShardToWrite, part_of
from reshard.storage.writing.object_writer import write_objects

SHAPES = {"a": (512, 64), "b": (8, 8), "c": (1024, 96), "d": (3,)}
BYTES = b"bytes"


@functools.cache
def plan_of(codec: str, max_request_bytes: int) -> ReadPlan:
    """Return a plan for float32 tensors: with codec "zstd", each chunk needs two requests."""
    store, shards = MemoryStore(), []
    for name, shape in SHAPES.items():
        values, box = torch.randn(shape), Box.whole(shape)
        load = functools.partial(part_of, name, values, box, values.dtype)
        shards.append(ShardToWrite(name, Kind.TENSOR, values.dtype, shape, box, load))
    records = write_objects(store, "0", shards, codec)
    store.put(MANIFEST_NAME, encode_manifest(assemble_index([PackedRecords.of(records)]), {}, {}), overwrite=False)
    wants = [WantedBox(name, Box.whole(shape)) for name, shape in SHAPES.items()]
    return plan_reads(open_source(store).index(wants), wants, max_request_bytes=max_request_bytes)


@dataclass
class Driver:
    """Performs the steps of a schedule in any order, and checks each of them."""

    plan: ReadPlan
    budget_bytes: int
    group_bytes: int
    max_fetches: int
    verifies_here: bool
    """Whether fetches also verify, as those of a local disk do. Only these have several requests."""
    min_frames: int = 0
    """If it is not 0, a device decompresses the frames of every other batch, so many at once."""
    running: list[Fetch | Verify | Place] = field(default_factory=list)
    placed: list[int] = field(default_factory=list)
    fetched: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tensors, self.requests = build_tasks(self.plan)
        self.schedule = Schedule(
            self.tensors,
            self.requests,
            budget_bytes=self.budget_bytes,
            group_bytes=self.group_bytes,
            max_fetches=self.max_fetches,
            min_frames=self.min_frames,
        )
        batches = [batch for tensor in self.tensors for batch in tensor.batches]
        for batch in batches[::2] if self.min_frames else ():
            batch.frames = 2

    def begin(self, fetch: bool) -> bool:
        """Begin a step. Return whether there was one."""
        step = self.schedule.fetch() if fetch else self.schedule.work()
        if step is None:
            return False
        if isinstance(step, Fetch):
            assert sum(isinstance(other, Fetch) for other in self.running) < self.max_fetches
            assert not set(map(id, step.requests)) & set(map(id, self.fetched))
            self.fetched += step.requests
            held = sum(request.nbytes for request in self.fetched if request.unplaced)
            assert held == self.schedule.held_bytes
            if held > self.budget_bytes:  # then nothing else could free memory
                assert not self.running
                assert all(batch.queued or not batch.has_arrived for t in self.tensors for batch in t.batches)
        elif isinstance(step, Place):
            frames = [batch.frames for batch in step.batches]
            assert frames == [0] or all(frames)
            if sum(frames) < self.min_frames and all(frames):
                assert not any(isinstance(other, (Fetch, Verify)) for other in self.running), "more may come"
            for batch in step.batches:
                assert batch.has_arrived
                assert batch.tensor.piecemeal or all(other.has_arrived for other in batch.tensor.batches)
        self.running.append(step)
        return True

    def end(self, at: int) -> None:
        """End one of the running steps."""
        step = self.running.pop(at)
        if isinstance(step, Fetch):
            if self.verifies_here:
                self.verify(step.requests)
                self.schedule.fetched(step)
            else:
                self.schedule.fetched(step, BYTES)
            return
        if isinstance(step, Verify):
            assert step.found == BYTES
            self.verify([step.request])
        else:
            self.placed += map(id, step.batches)
        for request in self.schedule.ended(step):
            assert all(id(batch) in self.placed for batch, _ in request.parts)

    def verify(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.schedule.verified(request, memoryview(BYTES))


@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("max_request_bytes", [1 << 14, 1 << 17, 1 << 24])
@given(
    st.data(),
    st.sampled_from([1, 1 << 16, 1 << 18, 1 << 30]),
    st.sampled_from([0, 1 << 15, 1 << 30]),
    st.sampled_from([1, 3, 100]),
    st.booleans(),
    st.sampled_from([0, 1, 5, 1000]),
)
def test_every_batch_is_placed_once_within_the_budget(
    codec: str,
    max_request_bytes: int,
    data: st.DataObject,
    budget_bytes: int,
    group_bytes: int,
    max_fetches: int,
    verifies_here: bool,
    min_frames: int,
) -> None:
    driver = Driver(
        plan_of(codec, max_request_bytes),
        budget_bytes,
        group_bytes if verifies_here else 0,
        max_fetches,
        verifies_here,
        min_frames,
    )
    choices = data.draw(st.lists(st.integers(0, 5), max_size=60))
    while not driver.schedule.done:
        choice = choices.pop() if choices else 0
        if choice == 0 or not driver.running:
            begun = driver.begin(fetch=True) or driver.begin(fetch=False)
            assert begun or driver.running, "the schedule has stopped"
        if choice == 1:
            driver.begin(fetch=False)
        if driver.running and (choice > 1 or not choices):
            driver.end(choice % len(driver.running))
    assert not driver.running
    assert sorted(driver.placed) == sorted(id(batch) for tensor in driver.tensors for batch in tensor.batches)
    assert len(driver.fetched) == len(driver.requests)
    assert driver.schedule.held_bytes == 0


def test_tensors_are_written_as_a_whole_if_they_fit_the_budget() -> None:
    driver = Driver(plan_of("none", 1 << 14), 1 << 30, 0, 1, verifies_here=True)
    while driver.begin(fetch=True):
        driver.end(0)
        while driver.begin(fetch=False):
            driver.end(0)
    assert driver.schedule.done
    assert not any(tensor.piecemeal for tensor in driver.tensors)


def test_each_group_is_announced_once_and_before_it_is_fetched() -> None:
    driver = Driver(plan_of("none", 1 << 14), 1 << 30, 0, 1, verifies_here=True)
    announced: list[int] = []
    while (step := driver.schedule.fetch()) is not None:
        announced += map(id, driver.schedule.announcements())
        assert {id(request) for request in step.requests} <= set(announced)
        driver.verify(step.requests)
        driver.schedule.fetched(step)
    assert sorted(announced) == sorted(map(id, driver.requests))
