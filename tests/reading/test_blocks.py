"""Blocks of chunks give the same results as single chunks."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from reshard.planner.box import Box
from reshard.planner.chunk_reads import WantedBox
from reshard.planner.entries import Kind
from reshard.planner.grid import Grid
from reshard.planner.read_plan import plan_reads
from reshard.storage.errors import CorruptCheckpointError
from reshard.storage.formats.detect import open_source
from reshard.storage.formats.native.manifest import MANIFEST_NAME, encode_manifest
from reshard.storage.formats.native.write_records import PackedRecords, assemble_index
from reshard.storage.reading import executor, workers
from reshard.storage.reading.blocks import Block, find_blocks, form_boxes, split_shape
from reshard.storage.reading.decode import parts_of
from reshard.storage.reading.destination import BlockWriter, Destination
from reshard.storage.reading.executor import execute
from reshard.storage.reading.tasks import build_tasks
from reshard.storage.stores.local import LocalStore
from reshard.storage.stores.memory import MemoryStore
from reshard.storage.tensors.dtypes import as_array, as_bytes
from reshard.storage.writing.object_layout import ShardToWrite, part_of
from reshard.storage.writing.object_writer import write_objects
from tests.planner.boxes import boxes_in, shapes


@st.composite
def blocks(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Block]]:
    """Draw a shape, and the blocks of a box of a tensor with that shape."""
    shape = draw(shapes)
    grid = Grid(shape, tuple(draw(st.integers(1, n)) for n in shape))
    _, offsets, sizes = grid.chunks(draw(boxes_in(shape)))
    apart = draw(st.sets(st.integers(0, max(0, len(sizes) - 2))))
    alike = np.array([at not in apart for at in range(max(0, len(sizes) - 1))], bool)
    firsts, counts, dims, block_sizes = form_boxes(offsets, sizes, alike)
    assert firsts.tolist() == [0, *np.cumsum(counts.prod(axis=1))[:-1].tolist()][: len(firsts)]
    assert counts.prod(axis=1).sum() == len(sizes)
    found = []
    for at, first in enumerate(firsts.tolist()):
        of_chunk = tuple(sizes[first].tolist())
        target = tuple(map(slice, offsets[first].tolist(), (offsets[first] + block_sizes[at]).tolist()))
        kept = counts[at] > 1
        directions = int(counts[at].prod()), tuple(counts[at][kept].tolist()), tuple(dims[at][kept].tolist())
        block = Block(first, 0, math.prod(of_chunk), of_chunk, tuple(map(slice, of_chunk)), target, *directions)
        assert not apart & set(range(first, first + block.count - 1))
        found.append(block)
    return shape, found


@given(st.data(), blocks(), st.sampled_from([torch.int64, torch.int32]))
def test_blocks_are_written_like_their_chunks(
    data: st.DataObject, drawn: tuple[tuple[int, ...], list[Block]], dtype: torch.dtype
) -> None:
    shape, found = drawn
    tensor, by_torch = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
    values = torch.arange(math.prod(shape)).reshape(shape)
    for block in found:
        region = values[block.position]
        split, axes = split_shape(block.sizes, block.counts, block.dims)
        ordered = as_bytes(as_array(region.reshape(split).permute(axes)))
        chunk_bytes, begin = block.numel * 8, 0
        most = data.draw(st.integers(1, block.count))
        for target in tensor, by_torch:
            destination = Destination(target, torch.int64)
            if target is by_torch:
                destination.array = None
            opened, begin = BlockWriter(destination, block), 0
            for index, count in zip(*parts_of(block.counts, most), strict=True):
                assert count <= most
                opened.write(index, ordered[begin : begin + count * chunk_bytes])
                begin += count * chunk_bytes
            assert begin == len(ordered)
    expected = torch.zeros(shape, dtype=dtype)
    for block in found:
        expected[block.position] = values[block.position].to(dtype)
    assert tensor.equal(expected)
    assert by_torch.equal(expected)


def test_all_chunks_of_a_regular_tensor_form_one_block() -> None:
    for shape, parts in (((64,), (8,)), ((64, 32), (8, 4)), ((32, 64), (4, 8)), ((4, 16, 32), (2, 4, 8))):
        _, offsets, sizes = Grid(shape, parts).chunks(Box.whole(shape))
        firsts, counts, _, block_sizes = form_boxes(offsets, sizes, np.ones(len(sizes) - 1, bool))
        assert len(firsts) == 1
        assert counts.prod() == math.prod(parts)
        assert block_sizes.tolist() == [list(shape)]


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
    store.put(MANIFEST_NAME, encode_manifest(assemble_index([PackedRecords.of(records)]), {}, {}), overwrite=False)
    return store, tensors


@pytest.mark.parametrize("codec", ["zstd", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("into", [torch.bfloat16, torch.float32])
def test_blocks_are_read_into_the_boxes_of_their_chunks(codec: str, dtype: torch.dtype, into: torch.dtype) -> None:
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
        assert any((found.counts > 1).any() for found in find_blocks(plan.reads, list(plan.requests_of())))
        out = [torch.full_like(values, 7) for values in expected]
        execute(plan, source.index(wants), store, out)
        assert all(a.equal(b) for a, b in zip(out, expected, strict=True))


@pytest.mark.parametrize("into", [torch.bfloat16, torch.float32])
def test_rows_of_another_format_form_one_block(into: torch.dtype, tmp_path: Path) -> None:
    values = torch.randn(4096, 1000)
    safetensors.torch.save_file({"w": values}, tmp_path / "model.safetensors")
    source = open_source(LocalStore(tmp_path))
    want = WantedBox("w", Box((1024, 0), (2048, 1000)))
    plan = plan_reads(source.index([want]), [want])
    assert len(plan.reads[0]) > 4
    (found,) = find_blocks(plan.reads, list(plan.requests_of()))
    assert len(found.counts) <= 2, "the last slab may have fewer rows"
    out = torch.zeros(2048, 1000, dtype=into)
    execute(plan, source.index([want]), LocalStore(tmp_path), [out])
    assert out.equal(values[1024:3072].to(into))


def test_batches_contain_every_chunk_once() -> None:
    store, tensors = saved("zstd", torch.float32)
    source = open_source(store)
    wants = [WantedBox(name, Box.whole(tuple(values.shape))) for name, values in tensors.items()]
    plan = plan_reads(source.index(wants), wants)
    arranged, _ = build_tasks(plan)
    for tensor, read in zip(arranged, plan.reads, strict=True):
        rows = [row for batch in tensor.batches for row in range(batch.rows.start, batch.rows.stop)]
        found = [block for batch in tensor.batches for block in batch.blocks.select(batch.block_rows)]
        assert rows == list(range(len(read)))
        assert [row for block in found for row in range(block.row, block.row + block.count)] == rows


class SlowToEnd(contextlib.nullcontext[None]):
    def __exit__(self, *error: object) -> None:
        time.sleep(0.1)


@pytest.mark.parametrize("last", [False, True])
def test_error_names_the_damaged_chunk_of_a_block(last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """This also covers the last chunk, whose worker reports the error late."""
    monkeypatch.setattr(executor, "record_function", SlowToEnd)
    monkeypatch.setattr(workers, "default_threads", lambda: 1)
    store, _ = saved("zstd", torch.bfloat16)
    source = open_source(store)
    want = WantedBox("up", Box.whole(SHAPES["up"]))
    plan = plan_reads(source.index([want]), [want])
    (read,) = plan.reads
    (found,) = find_blocks(plan.reads, list(plan.requests_of()))
    row = len(read) - 1 if last else int(found.firsts[-1]) + 2
    name = source.index([want]).objects[int(read.objects[row, 0])][0]
    content = bytearray(store.content[name])
    content[int(read.starts[row, 0]) : int(read.starts[row, 0]) + 4] = b"\xff\xff\xff\xff"
    store.content[name] = bytes(content)
    monkeypatch.setattr(
        "reshard.storage.reading.request_checksums.RequestChecksums.damaged_chunks", lambda *arguments: []
    )
    chunk = Box(tuple(read.chunk_offsets[row].tolist()), tuple(read.chunk_sizes[row].tolist()))
    with pytest.raises(
        CorruptCheckpointError, match=r"'up': chunk .* cannot be decoded: a plane is cut short"
    ) as caught:
        execute(plan, source.index([want]), store, [torch.zeros(SHAPES["up"], dtype=torch.bfloat16)])
    assert str(chunk) in str(caught.value)
