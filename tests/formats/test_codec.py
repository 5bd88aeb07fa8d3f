from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reshard.planner.entries import ITEMSIZES, Stream
from reshard.storage.errors import CorruptCheckpointError
from reshard.storage.formats.native import codec
from reshard.storage.formats.native.codec import encode, streams_of
from tests.encoded_chunks import decode_chunks, decode_head_chunks

Bytes = npt.NDArray[np.uint8]

SPECIAL_FLOATS = [
    0x00000000, 0x80000000, 0x3F800000, 0x3F808000, 0x3F818000, 0x3F80FFFF, 0xBF808000, 0x00000001, 0x807FFFFF,
    0x00800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F7F8000, 0x7F7F7FFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000,
    0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FA00000, 0x7F80FFFF, 0x00008000, 0x00018000, 0x80008000,
]  # fmt: skip
"""Ties that round up and down, both zeros, subnormals, the largest finite values, infinities, NaNs with payloads."""


def round_trip(values: Bytes, dtype: str) -> tuple[Bytes, int]:
    """Return the decoded values, and the encoded size."""
    numel = len(values) // ITEMSIZES[dtype]
    data = [encode(values, dtype, stream, numel)[0] for stream in streams_of(dtype, "zstd")]
    return decoded(data, dtype, numel), sum(map(len, data))


def decoded(streams: Sequence[bytes | bytearray], dtype: str, numel: int) -> Bytes:
    return decode_chunks([[stream] for stream in streams], dtype, numel)


@pytest.mark.parametrize("dtype", sorted(ITEMSIZES))
@pytest.mark.parametrize("numel", [1, 2, 3, 1000, 5000, 65536])
@pytest.mark.parametrize("content", ["random", "zeros", "normal"])
def test_values_round_trip_bit_for_bit_and_hardly_grow(dtype: str, numel: int, content: str) -> None:
    rng = np.random.default_rng(numel)
    nbytes = numel * ITEMSIZES[dtype]
    if content == "random":
        values = rng.integers(0, 256, nbytes, np.uint8)
    elif content == "zeros":
        values = np.zeros(nbytes, np.uint8)
    else:
        values = np.frombuffer(rng.normal(0, 0.02, nbytes // 8 + 1).tobytes()[:nbytes], np.uint8).copy()
    back, size = round_trip(values, dtype)
    assert np.array_equal(back, values)
    # One of 256 random float32 values is a NaN with a payload, which takes 8 additional bytes.
    assert size <= nbytes * (1.01 if dtype == "float32" else 1.005) + 4 * 16
    if content == "zeros" and nbytes > 10_000:
        assert size < nbytes / 50


@given(st.sampled_from(sorted(ITEMSIZES)), st.binary(min_size=1, max_size=400))
def test_arbitrary_bytes_round_trip(dtype: str, content: bytes) -> None:
    numel = max(1, len(content) // ITEMSIZES[dtype])
    values = np.frombuffer((content * ITEMSIZES[dtype])[: numel * ITEMSIZES[dtype]], np.uint8).copy()
    assert np.array_equal(round_trip(values, dtype)[0], values)


def test_heads_are_values_rounded_to_bfloat16() -> None:
    high = np.random.default_rng(0).integers(0, 2**32, 200_000, np.uint32)
    every_rounding = (np.arange(2**16, dtype=np.uint32) << 16) | 0x8000
    bits = np.concatenate([np.array(SPECIAL_FLOATS, np.uint32), high, every_rounding, every_rounding - 1])
    heads = decode_head_chunks(encode(bits.view(np.uint8), "float32", Stream.HEAD, len(bits)), len(bits))
    cast = torch.from_numpy(bits).view(torch.float32).to(torch.bfloat16)
    assert np.array_equal(heads.view(np.uint16), cast.view(torch.uint16).numpy())
    nan = np.isnan(bits.view(np.float32))
    assert np.array_equal(torch.from_numpy(heads).view(torch.bfloat16).isnan().numpy(), nan)
    finite = bits[~nan]
    for some in (bits, finite):
        assert np.array_equal(round_trip(some.view(np.uint8), "float32")[0].view(np.uint32), some)
    down = np.count_nonzero((finite & 0x1FFFF) == 0x8000)
    assert down > 30_000
    (tail,) = encode(finite.view(np.uint8), "float32", Stream.TAIL, len(finite))
    planes = int((np.frombuffer(tail[:8], "<u4") & 0x7FFFFFFF).sum())
    assert len(tail) == 8 + planes + 8 * down  # only values that round down to an even head are exceptions


def test_values_round_trip_if_casts_do_not_round_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """This happens on a processor that flushes subnormal values to zero."""

    def flushing(values: Bytes, dtype: torch.dtype, into: Bytes, into_dtype: torch.dtype) -> None:
        source = torch.from_numpy(values).view(dtype)
        small = source.abs() < torch.finfo(dtype).tiny
        torch.from_numpy(into).view(into_dtype).copy_(source.masked_fill(small, 0))

    assert codec._Rounding().to_nearest_even
    monkeypatch.setattr(codec, "cast", flushing)
    rounding = codec._Rounding()
    assert not rounding.to_nearest_even
    monkeypatch.setattr(codec, "_rounding", rounding)
    bits = np.arange(1, 2**32, 65521, dtype=np.uint32)
    bits = bits[~np.isnan(bits.view(np.float32))]
    assert np.array_equal(round_trip(bits.view(np.uint8), "float32")[0].view(np.uint32), bits)


def test_weights_compress_to_their_entropy() -> None:
    """N(0, 0.02²) in bf16 shrinks to 0.663 (its entropy is 0.659), in fp32 to 0.833, with 1.33 bytes for each head."""
    weights = torch.randn(1 << 19, generator=torch.Generator().manual_seed(0)) * 0.02
    as_bf16 = weights.to(torch.bfloat16).view(torch.uint8).numpy()
    as_fp32 = weights.view(torch.uint8).numpy()
    assert round_trip(as_bf16, "bfloat16")[1] / as_bf16.nbytes < 0.665
    assert round_trip(as_fp32, "float32")[1] / as_fp32.nbytes < 0.835
    assert len(encode(as_fp32, "float32", Stream.HEAD, len(weights))[0]) / len(weights) < 1.33


def test_rows_of_zeros_compress_to_almost_nothing() -> None:
    """Embeddings of unseen tokens, and their moments, are zero. Entropy coding alone needs one bit for each byte."""
    rows = torch.randn(256, 128) * 0.02
    dense = round_trip(rows.to(torch.bfloat16).view(torch.uint8).numpy().reshape(-1), "bfloat16")[1]
    rows[1::2] = 0
    half = round_trip(rows.to(torch.bfloat16).view(torch.uint8).numpy().reshape(-1), "bfloat16")[1]
    assert half < 0.55 * dense


@given(st.data(), st.sampled_from(["bfloat16", "float32", "int64", "bool", "float16"]))
def test_damaged_bytes_raise_corrupt_error_or_decode(data: st.DataObject, dtype: str) -> None:
    """Checksums are verified before decoding, but the decoder must not crash or over-allocate without them."""
    numel = 600
    values = np.tile(np.arange(256, dtype=np.uint8), numel * ITEMSIZES[dtype] // 256 + 1)[: numel * ITEMSIZES[dtype]]
    streams = [bytearray(encode(values, dtype, stream, numel)[0]) for stream in streams_of(dtype, "zstd")]
    stream = data.draw(st.sampled_from(streams))
    for _ in range(data.draw(st.integers(1, 3))):
        if data.draw(st.booleans()):
            del stream[data.draw(st.integers(0, len(stream) - 1)) :]
            stream.append(0)
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    try:
        back = decoded(streams, dtype, numel)
    except CorruptCheckpointError:
        return
    assert len(back) == len(values)


def test_zstd_bomb_raises_corrupt_error() -> None:
    bomb = bytearray(encode(np.zeros(1 << 24, np.uint8), "uint8", Stream.WHOLE, 1 << 24)[0])
    assert len(bomb) < 5000
    with pytest.raises(CorruptCheckpointError, match="does not hold 100 bytes"):
        decode_chunks([[bomb]], "uint8", 100)
