"""Chunk runs give the same results as single chunks."""

from __future__ import annotations

import contextlib
import functools
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reshard.planner.box import Box
from reshard.planner.chunk_reads import WantedBox
from reshard.planner.entries import ITEMSIZES, Kind
from reshard.planner.grid import Grid
from reshard.planner.read_plan import plan_reads
from reshard.storage.errors import CorruptCheckpointError
from reshard.storage.formats.detect import open_source
from reshard.storage.formats.native.chunk_runs import (
    MAX_CHUNK_RUN_BYTES,
    continued_dims,
    find_chunk_runs,
    group_into_runs,
)
from reshard.storage.formats.native.codec import decode, decode_heads_and_tails, encode, streams_of
from reshard.storage.formats.native.manifest import MANIFEST_NAME, encode_manifest
from reshard.storage.formats.native.write_records import assemble_index
from reshard.storage.reading import executor, workers
from reshard.storage.reading.executor import execute
from reshard.storage.reading.tasks import arrange
from reshard.storage.stores.testing import MemoryStore
from reshard.storage.writing.object_layout import ShardToWrite, part_of
from reshard.storage.writing.object_writer import write_objects
from tests.planner.boxes import boxes_in, shapes


@given(st.data(), shapes, st.sampled_from([1, 50_000, 1_000_000]))
def test_runs_cover_all_chunks_in_order_and_form_boxes(
    data: st.DataObject, shape: tuple[int, ...], nbytes: int
) -> None:
    grid = Grid(shape, tuple(data.draw(st.integers(1, n)) for n in shape))
    _, offsets, sizes = grid.chunks(data.draw(boxes_in(shape)))
    firsts, counts, dims = group_into_runs(continued_dims(offsets, sizes), np.full(len(sizes), nbytes))
    assert firsts.tolist() == [0, *np.cumsum(counts)[:-1].tolist()][: len(firsts)]
    assert counts.sum() == len(sizes)
    for first, count, dim in zip(firsts.tolist(), counts.tolist(), dims.tolist(), strict=True):
        assert count == 1 or count * nbytes <= MAX_CHUNK_RUN_BYTES
        for i in range(1, count):
            step = np.zeros(len(shape), np.int64)
            step[dim] = i * sizes[first][dim]
            assert np.array_equal(offsets[first + i], offsets[first] + step)
            assert np.array_equal(sizes[first + i], sizes[first])


@pytest.mark.parametrize("dtype", sorted(ITEMSIZES))
@pytest.mark.parametrize("content", ["random", "normal", "one of zeros"])
@pytest.mark.parametrize("numel", [5, 6000])
def test_encoding_chunks_together_equals_encoding_each_alone(dtype: str, content: str, numel: int) -> None:
    rng = np.random.default_rng(1)
    nbytes, count = numel * ITEMSIZES[dtype], 7
    if content == "normal":
        values = rng.normal(0, 0.02, nbytes * count // 4 + 1).astype(np.float32).view(np.uint8)[: nbytes * count].copy()
    else:
        values = rng.integers(0, 256, nbytes * count, np.uint8)
    if content == "one of zeros":
        values[3 * nbytes : 4 * nbytes] = 0
    streams = [encode(values, dtype, stream, numel) for stream in streams_of(dtype, "zstd")]
    if len(streams) == 2:
        back = decode_heads_and_tails(streams[0], streams[1], numel).copy()
    else:
        back = decode(streams[0], dtype, numel).copy()
    assert np.array_equal(back, values)
    alone = [values[i * nbytes : (i + 1) * nbytes] for i in range(count)]
    for chunks, stream in zip(streams, streams_of(dtype, "zstd"), strict=True):
        single = [encode(chunk, dtype, stream, numel)[0] for chunk in alone]
        # One sample decides for all chunks whether to compress a plane, so a single chunk may be decided differently.
        assert abs(sum(map(len, chunks)) - sum(map(len, single))) <= 0.04 * sum(map(len, single))
        if content == "one of zeros" and numel > 1000:
            assert len(chunks[3]) < nbytes / 20


SHAPES = {"up": (2048, 512), "down": (512, 2048), "cube": (4, 512, 256), "row": (300_000,), "uneven": (1030, 517)}


def saved(codec: str, dtype: torch.dtype, ranks: int = 2) -> tuple[MemoryStore, dict[str, torch.Tensor]]:
    """Return a store with tensors that two ranks saved in rows."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    store, records = MemoryStore(), []
    for rank in range(ranks):
        shards = []
        for name, values in tensors.items():
            rows = len(values) // ranks
            box = Box((rank * rows, *(0 for _ in values.shape[1:])), (rows, *values.shape[1:]))
            load = functools.partial(part_of, name, values[box.slices], box, values.dtype)
            shards.append(ShardToWrite(name, Kind.TENSOR, values.dtype, tuple(values.shape), box, load))
        records += write_objects(store, f"{rank:05}", shards, codec)
    store.put(MANIFEST_NAME, encode_manifest(assemble_index(records), {}, {}), overwrite=False)
    return store, tensors


@pytest.mark.parametrize("codec", ["zstd", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("into", [torch.bfloat16, torch.float32])
def test_runs_are_written_to_the_boxes_of_their_chunks(codec: str, dtype: torch.dtype, into: torch.dtype) -> None:
    store, tensors = saved(codec, dtype)
    source = open_source(store)
    for parts in (1, 3, 4):
        wants, expected = [], []
        for name, values in tensors.items():
            dim = max(range(values.ndim), key=lambda d: values.shape[d])
            n = values.shape[dim] // parts
            offsets, sizes = [0] * values.ndim, list(values.shape)
            offsets[dim], sizes[dim] = (parts - 1) * n, n
            box = Box(tuple(offsets), tuple(sizes))
            wants.append(WantedBox(name, box, heads_only=into is torch.bfloat16))
            expected.append(values[box.slices].to(into))
        plan = plan_reads(source.index(wants), wants)
        assert any((runs.counts > 1).any() for runs in find_chunk_runs(plan.reads, list(plan.requests_of())))
        out = [torch.full_like(values, 7) for values in expected]
        execute(plan, source.index(wants), store, out)
        assert all(a.equal(b) for a, b in zip(out, expected, strict=True))


def test_batches_contain_every_chunk_once() -> None:
    store, tensors = saved("zstd", torch.float32)
    source = open_source(store)
    wants = [WantedBox(name, Box.whole(tuple(values.shape))) for name, values in tensors.items()]
    plan = plan_reads(source.index(wants), wants)
    arranged, _ = arrange(plan)
    for tensor, read in zip(arranged, plan.reads, strict=True):
        rows = [row for batch in tensor.batches for row in range(batch.rows.start, batch.rows.stop)]
        runs = [run for batch in tensor.batches for run in batch.chunk_runs.select(batch.run_rows)]
        assert rows == list(range(len(read)))
        assert [row for run in runs for row in range(run.row, run.row + run.count)] == rows


class SlowToEnd(contextlib.nullcontext[None]):
    def __exit__(self, *error: object) -> None:
        time.sleep(0.1)


@pytest.mark.parametrize("last", [False, True])
def test_error_names_the_damaged_chunk_of_a_run(last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """This also covers the last chunk, whose worker reports the error late."""
    monkeypatch.setattr(executor, "record_function", SlowToEnd)
    monkeypatch.setattr(workers, "default_threads", lambda: 1)
    store, _ = saved("zstd", torch.bfloat16)
    source = open_source(store)
    want = WantedBox("up", Box.whole(SHAPES["up"]))
    plan = plan_reads(source.index([want]), [want])
    (read,) = plan.reads
    (runs,) = find_chunk_runs(plan.reads, list(plan.requests_of()))
    row = len(read) - 1 if last else int(runs.firsts[1]) + 2
    name = source.index([want]).objects[int(read.objects[row, 0])][0]
    content = bytearray(store.content[name])
    content[int(read.starts[row, 0]) : int(read.starts[row, 0]) + 4] = b"\xff\xff\xff\xff"
    store.content[name] = bytes(content)
    monkeypatch.setattr("reshard.storage.reading.tasks.ChunkBatch.damages", lambda *arguments: [])
    chunk = Box(tuple(read.chunk_offsets[row].tolist()), tuple(read.chunk_sizes[row].tolist()))
    with pytest.raises(
        CorruptCheckpointError, match=r"'up': chunk .* cannot be decoded: a plane is cut short"
    ) as caught:
        execute(plan, source.index([want]), store, [torch.zeros(SHAPES["up"], dtype=torch.bfloat16)])
    assert str(chunk) in str(caught.value)
