"""Checksums that are computed while bytes arrive find the same damage as those of all bytes at once."""

from __future__ import annotations

import functools
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reshard.planner.box import Box
from reshard.planner.chunk_reads import WantedBox
from reshard.planner.entries import Kind
from reshard.planner.index import CheckpointIndex
from reshard.planner.read_plan import plan_reads
from reshard.storage.formats.detect import open_source
from reshard.storage.formats.native.manifest import MANIFEST_NAME, encode_manifest
from reshard.storage.formats.native.write_records import PackedRecords, assemble_index
from reshard.storage.reading.request_checksums import RequestChecksums, damaged_chunks
from reshard.storage.reading.tasks import Request, build_tasks
from reshard.storage.stores.memory import MemoryStore
from reshard.storage.writing.object_layout import ShardToWrite, part_of
from reshard.storage.writing.object_writer import write_objects

SHAPES = {"a": (700, 200), "b": (8, 8), "c": (512, 96), "d": (3,)}


@functools.cache
def requests_of(codec: str, part: bool) -> tuple[CheckpointIndex, list[tuple[Request, bytes]]]:
    """Return the requests for whole tensors or parts of them, with their bytes."""
    store, shards = MemoryStore(), []
    for name, shape in SHAPES.items():
        values, cuts = torch.randn(shape), [0, shape[0] // 3, shape[0] // 2, shape[0]]
        boxes = [Box((begin, *(0,) * (len(shape) - 1)), (end - begin, *shape[1:])) for begin, end in pairwise(cuts)]
        for box in boxes[1:] + boxes[:1]:  # the bytes are not in the order of the boxes
            load = functools.partial(part_of, name, values[box.slices], box, values.dtype)
            shards.append(ShardToWrite(name, Kind.TENSOR, values.dtype, shape, box, load))
    records = write_objects(store, "0", shards, codec)
    store.put(MANIFEST_NAME, encode_manifest(assemble_index([PackedRecords.of(records)]), {}, {}), overwrite=False)
    rows = {name: max(1, shape[0] // 3) if part else shape[0] for name, shape in SHAPES.items()}
    wants = [WantedBox(name, Box((0,) * len(shape), (rows[name], *shape[1:]))) for name, shape in SHAPES.items()]
    index = open_source(store).index(wants)
    _, requests = build_tasks(plan_reads(index, wants, max_request_bytes=1 << 18))
    found = [(at, bytes(store.read(index.objects[at.object][0], at.start, at.stop))) for at in requests]
    return index, found


@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("part", [False, True])
@given(st.data())
def test_damage_is_found_however_the_bytes_arrive(codec: str, part: bool, data: st.DataObject) -> None:
    index, requests = requests_of(codec, part)
    request, content = data.draw(st.sampled_from(requests))
    stored = bytearray(content)
    position = data.draw(st.none() | st.integers(0, len(stored) - 1))
    if position is not None:
        stored[position] ^= data.draw(st.integers(1, 255))
    check = RequestChecksums(request, index)
    buffer = bytearray(content)  # a buffer that is reused may contain the intact bytes of an earlier read
    for nbytes in sorted(data.draw(st.sets(st.integers(0, len(stored))))):
        buffer[:nbytes] = stored[:nbytes]
        check.update(memoryview(buffer), nbytes)
    check.update(memoryview(stored), len(stored))
    found = check.damaged_chunks(memoryview(stored))
    assert found == damaged_chunks(request, index, memoryview(stored))
    if position is None:
        assert found == []
        return
    hit = [chunk for chunk in found if chunk.start <= request.start + position < chunk.stop]
    assert hit == found
    ranges = [(int(a), int(b)) for batch, s in request.parts for a, b in ranges_of(batch.read, batch.rows, s)]
    assert len(found) == any(a <= request.start + position < b for a, b in ranges)


def ranges_of(read: object, rows: slice, stream: int) -> list[tuple[int, int]]:
    columns = (getattr(read, name)[rows, stream].tolist() for name in ("starts", "stops"))
    return list(zip(*columns, strict=True))


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_bytes_that_are_cut_off_are_missing_chunks(codec: str) -> None:
    index, requests = requests_of(codec, part=False)
    for request, content in requests:
        for kept in 0, len(content) // 2, len(content) - 1:
            found = damaged_chunks(request, index, memoryview(content)[:kept])
            assert {chunk.stop > request.start + kept for chunk in found} == {True}
            expected = sum(
                request.start + kept < stop
                for batch, stream in request.parts
                for _, stop in ranges_of(batch.read, batch.rows, stream)
            )
            assert len(found) == expected
