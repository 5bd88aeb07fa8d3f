"""Chunk runs give the same results as single chunks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.planner.entries import ITEMSIZES
from reshard.planner.grid import Grid
from reshard.storage.formats.native.chunk_runs import MAX_CHUNK_RUN_BYTES, continued_dims, group_into_runs
from reshard.storage.formats.native.codec import encode, streams_of
from tests.encoded_chunks import decode_chunks
from tests.planner.boxes import boxes_in, shapes


@given(st.data(), shapes, st.sampled_from([1, 50_000, 1_000_000]))
def test_runs_cover_all_chunks_in_order_and_form_boxes(
    data: st.DataObject, shape: tuple[int, ...], nbytes: int
) -> None:
    grid = Grid(shape, tuple(data.draw(st.integers(1, n)) for n in shape))
    _, offsets, sizes = grid.chunks(data.draw(boxes_in(shape)))
    firsts, counts, dims = group_into_runs(
        continued_dims(offsets, sizes), np.full(len(sizes), max(1, MAX_CHUNK_RUN_BYTES // nbytes))
    )
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
    assert np.array_equal(decode_chunks(streams, dtype, numel), values)
    alone = [values[i * nbytes : (i + 1) * nbytes] for i in range(count)]
    for chunks, stream in zip(streams, streams_of(dtype, "zstd"), strict=True):
        single = [encode(chunk, dtype, stream, numel)[0] for chunk in alone]
        # One sample decides for all chunks whether to compress a plane, so a single chunk may be decided differently.
        assert abs(sum(map(len, chunks)) - sum(map(len, single))) <= 0.04 * sum(map(len, single))
        if content == "one of zeros" and numel > 1000:
            assert len(chunks[3]) < nbytes / 20
