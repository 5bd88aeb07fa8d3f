"""Encode the values of chunks, and decode them: precision planes, each compressed or stored as it is.

Of the bits of a float, only the exponent compresses well. So the bytes of a chunk are split into planes with one byte
of each element: for bfloat16, the exponents, and the signs with the mantissas; for other dtypes, the bytes by
significance.

With codec "zstd", float32 values are stored as two streams that can be read separately. The head is the value rounded
to bfloat16 (to nearest even, as `.to(torch.bfloat16)` does). The tail is the 16-bit difference `bits(x) - (bits(head)
<< 16)` modulo 2**16, which is read back as a signed number. Elements that head and tail do not restore (ties that round
down, NaN payloads) are listed with their bits at the end of the tail.

The functions only turn bytes into bytes, and any thread may call them. docs/FORMAT.md describes the encoding byte by
byte. `benchmarks/codec.py` measures size and speed.
"""

from __future__ import annotations

import struct
import sys
import threading
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import zstandard

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

from ....planner.entries import ITEMSIZES, Stream
from ...errors import ArgumentError, CorruptCheckpointError
from ...tensors.dtypes import cast

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Buffer

CODECS = ("zstd", "none")
Bytes = npt.NDArray[np.uint8]

_COMPONENT_SIZES = {"complex32": 2, "complex64": 4, "complex128": 8}
_FLOAT_PREFIXES = ("float", "bfloat", "complex")
_COMPRESSED = 1 << 31
_TABLES = {count: struct.Struct(f"<{count}I") for count in (1, 2, 4, 8)}
"""The table in front of the planes, by their number: the stored bytes of each, and a bit for compressed planes."""
_SAMPLE_BYTES = 1024
"""Bytes at each position of a sample."""
_PAYS_BELOW = 0.97
"""A plane is stored compressed if its sample, and then the whole plane, shrinks below this fraction of its size."""

_LITERAL_COMPRESSION_MODE = 1002
"""ZSTD_c_literalCompressionMode of zstd.h. It has no name in Python, and python-zstandard cannot set it."""
_MOSTLY_ENTROPY_CODING: dict[int, int] = {
    # Measured with benchmarks/codec.py: exponents repeat by chance only, except long rows of zeros. The strategy "fast"
    # looks for a match once per target length. The literal compression mode makes it entropy-code blocks without a
    # match, which it would otherwise store as they are.
    zstd.CompressionParameter.strategy: zstd.Strategy.fast,
    zstd.CompressionParameter.target_length: 64,
    zstd.CompressionParameter.min_match: 7,
    _LITERAL_COMPRESSION_MODE: 1,
    zstd.CompressionParameter.window_log: 17,
    zstd.CompressionParameter.hash_log: 6,
    zstd.CompressionParameter.chain_log: 6,
}


class _Zstd(threading.local):
    """The compressors of each thread. Those of zstandard must not be shared between threads."""

    def __init__(self) -> None:
        self._entropy = zstd.ZstdCompressor(options=_MOSTLY_ENTROPY_CODING)
        self.matches = zstandard.ZstdCompressor(level=1).compress
        self.decompressor = zstandard.ZstdDecompressor()

    def entropy(self, data: memoryview) -> bytes:
        """Compress to a frame that contains its content size, mostly by zstd's entropy coding."""
        return self._entropy.compress(data, self._entropy.FLUSH_FRAME)


_zstd = _Zstd()


_WORDS, _OPERAND, _PLANES, _WIDE = range(4)
"""The slots of `_Scratch`.

_WORDS: 16-bit words that a function returns or works on: heads, elements joined from planes, the mask of ties.
_OPERAND: the other operand of such an operation: tails, signs, low bytes.
_PLANES: planes that are split off; in decoding, tails as 32-bit integers.
_WIDE: high bytes that are split off; in decoding, float32 values.
"""


class _Scratch(threading.local):
    """Memory of each thread that is reused for each chunk.

    Fresh pages cost more than filling them (`benchmarks/codec.py`). A function may return an array of a slot. It is
    valid until the next function that takes the slot.
    """

    def __init__(self) -> None:
        self._arrays: dict[int, npt.NDArray[np.uint16]] = {}

    def take(self, slot: int, numel: int) -> npt.NDArray[np.uint16]:
        """Return an array of a slot, with undefined content."""
        if len(self._arrays.get(slot, ())) < numel:
            self._arrays[slot] = np.empty(numel, np.uint16)
        return self._arrays[slot][:numel]


_scratch = _Scratch()


def streams_of(dtype: str, codec: str) -> tuple[Stream, ...]:
    """Return the streams that store values of a dtype."""
    return (Stream.HEAD, Stream.TAIL) if dtype == "float32" and codec == "zstd" else (Stream.WHOLE,)


def encode(values: Bytes, dtype: str, stream: Stream, numel: int) -> list[bytes]:
    """Encode one stream of chunks.

    Args:
        values: (nbytes,) uint8, the little-endian values of equal chunks, one chunk after another.
        numel: how many values each chunk has.

    Returns:
        The encoded bytes of each chunk.
    """
    if stream is Stream.WHOLE:
        if dtype == "bfloat16":
            return _join_planes(_split_bfloat16(values.view(np.uint16)), numel, exponents_first=True)
        itemsize = ITEMSIZES[dtype]
        width = _COMPONENT_SIZES.get(dtype, itemsize)
        n = numel * (itemsize // width)
        return _join_planes(_split_bytes(values, width), n, floats=dtype.startswith(_FLOAT_PREFIXES))
    if stream is Stream.HEAD:
        return _join_planes(_split_bfloat16(_heads(values)), numel, exponents_first=True)
    bits = values.view(np.uint32)
    tails = _scratch.take(_OPERAND, len(bits))
    np.copyto(tails, bits, casting="unsafe")  # the low 16 bits of a head are zero
    lost = _lost(values, tails)
    exceptions = np.stack([(lost % numel).astype(np.uint32), bits[lost]], axis=1).astype("<u4")
    bounds = np.searchsorted(lost, np.arange(0, len(bits) + 1, numel)).tolist()
    listed = [exceptions[begin:end].tobytes() for begin, end in pairwise(bounds)]
    return _join_planes(_split_bytes(tails.view(np.uint8), 2), numel, listed)


def _heads(values: Bytes) -> npt.NDArray[np.uint16]:
    """Return the bits of float32 values rounded to bfloat16."""
    heads = _scratch.take(_WORDS, len(values) // 4)
    cast(values, torch.float32, heads.view(np.uint8), torch.bfloat16)
    return heads


def _lost(values: Bytes, tails: npt.NDArray[np.uint16]) -> npt.NDArray[np.intp]:
    """Return the positions of float32 values that their heads and tails do not restore."""
    bits = values.view(np.uint32)
    if np.isnan(values.view(np.float32).max()) or not _rounding.to_nearest_even:  # max() is NaN if any value is
        again = _heads(values) * np.uint32(65536) + tails.view(np.int16).astype(np.uint32)
        return np.flatnonzero(again != bits)
    tied = _scratch.take(_WORDS, len(bits)).view(np.bool_)[: len(bits)]
    ties = np.flatnonzero(np.equal(tails, 32768, out=tied))
    down = (
        bits[ties] & 65536 == 0
    )  # rounded down to an even head, half a step below the value: no tail can express that
    return np.compress(down, ties)


class _Rounding(threading.local):
    """Whether casts of this thread round to nearest even. Some processors can be set to flush small values to 0."""

    def __init__(self) -> None:
        high = np.arange(1, 1 << 16, 61, dtype=np.uint32)
        high = high[high & 0x7F80 != 0x7F80]  # without infinities and NaNs
        probes = np.concatenate([high * 65536 + low for low in (32767, 32768, 32769)])
        nearest = np.concatenate([high, high + (high & 1), high + 1])
        self.to_nearest_even = np.array_equal(_heads(probes.view(np.uint8)), nearest)


_rounding = _Rounding()


def decode(chunks: Sequence[Buffer], dtype: str, numel: int) -> Bytes:
    """Decode chunks that are stored as one whole stream each.

    Args:
        chunks: the encoded bytes of each chunk.
        numel: how many values each chunk has.

    Returns:
        (nbytes,) uint8, the values of the chunks, one chunk after another. The array may be scratch memory of this
        thread: it is valid until the thread encodes or decodes again.

    Raises:
        CorruptCheckpointError: the bytes cannot be decoded.
    """
    if dtype == "bfloat16":
        return decode_heads(chunks, numel)
    itemsize = ITEMSIZES[dtype]
    width = _COMPONENT_SIZES.get(dtype, itemsize)
    n = numel * (itemsize // width)
    return _join_bytes([_whole_planes(chunk, width, n) for chunk in chunks], n)


def decode_heads(chunks: Sequence[Buffer], numel: int) -> Bytes:
    """Decode the bfloat16 values of chunks with `numel` values each, from their streams of heads. See `decode`."""
    n = numel * len(chunks)
    words, signs = _scratch.take(_WORDS, n), _scratch.take(_OPERAND, n)
    for at, chunk in enumerate(chunks):
        exponents, rest = _whole_planes(chunk, 2, numel)
        words[at * numel : (at + 1) * numel] = exponents
        signs[at * numel : (at + 1) * numel] = rest
    words *= 256
    words |= signs
    # Rotate each word right by one bit. The multiplication moves the lowest bit to the highest.
    np.multiply(words, 32768, out=signs)
    words >>= 1
    words |= signs
    return words.view(np.uint8)


def decode_heads_and_tails(heads: Sequence[Buffer], tails: Sequence[Buffer], numel: int) -> Bytes:
    """Decode the float32 values of chunks with `numel` values each, from the two streams of each. See `decode`."""
    high = _scratch.take(_WIDE, 2 * numel * len(heads)).view(np.uint32)
    np.copyto(high, decode_heads(heads, numel).view(np.uint16))
    high *= 65536
    planes, exceptions = [], []
    for at, tail in enumerate(tails):
        split, rest = _split_planes(tail, 2, numel)
        planes.append(split)
        _require(len(rest) % 8 == 0, "the list of exceptions is cut short")
        listed = np.frombuffer(rest, "<u4").reshape(-1, 2)
        if len(listed):
            _require(int(listed[:, 0].max()) < numel, "an exception is outside the chunk")
            exceptions.append((listed[:, 0] + np.uint32(at * numel), listed[:, 1]))
    low = _scratch.take(_PLANES, 2 * len(high)).view(np.uint32)
    np.copyto(low, _join_bytes(planes, numel).view(np.int16), casting="unsafe")
    high += low
    for positions, bits in exceptions:
        high[positions] = bits
    return high.view(np.uint8)


def _split_bytes(values: Bytes, width: int) -> list[Bytes]:
    """Return the bytes of elements by significance, the least significant first, in scratch memory if `width` is 2."""
    if width == 2:
        words = values.view(np.uint16)
        n = len(words)
        planes, high = _scratch.take(_PLANES, n).view(np.uint8), _scratch.take(_WIDE, n)
        np.right_shift(words, 8, out=high)
        np.copyto(planes[:n], words, casting="unsafe")
        np.copyto(planes[n:], high, casting="unsafe")
        return [planes[:n], planes[n:]]
    by_byte = values.reshape(-1, width)
    return [np.ascontiguousarray(by_byte[:, i]) for i in range(width)]


def _join_bytes(chunks: list[list[Bytes]], n: int) -> Bytes:
    """Return the bytes of elements, from the planes of chunks with `n` elements each, the least significant first.

    Words of two bytes are joined by a product, because numpy writes to every second byte one byte at a time
    (`benchmarks/codec.py`).
    """
    width = len(chunks[0])
    if width == 1:
        return chunks[0][0] if len(chunks) == 1 else np.concatenate([planes[0] for planes in chunks])
    if width == 2:
        words, low = _scratch.take(_WORDS, n * len(chunks)), _scratch.take(_OPERAND, n * len(chunks)).view(np.uint8)
        for at, planes in enumerate(chunks):
            low[at * n : (at + 1) * n] = planes[0]
            words[at * n : (at + 1) * n] = planes[1]
        words *= 256
        words |= low[: len(words)]
        return words.view(np.uint8)
    values = np.empty((len(chunks), n, width), np.uint8)
    for at, planes in enumerate(chunks):
        for i, plane in enumerate(planes):
            values[at, :, i] = plane
    return values.reshape(-1)


def _split_bfloat16(bits: npt.NDArray[np.uint16]) -> list[Bytes]:
    """Return the planes of bfloat16 values in scratch memory.

    A value that is rotated left by one bit has its exponent in the high byte, and mantissa and sign in the low byte.
    """
    n = len(bits)
    other, planes = _scratch.take(_OPERAND, n), _scratch.take(_PLANES, n).view(np.uint8)
    exponents, rest = planes[:n], planes[n:]
    signs = other.view(np.bool_)[:n]
    np.greater(bits, 32767, out=signs)
    np.copyto(rest, bits, casting="unsafe")
    rest += rest
    rest |= signs.view(np.uint8)
    np.right_shift(bits, 7, out=other)
    np.copyto(exponents, other, casting="unsafe")
    return [exponents, rest]


def _join_planes(
    planes: list[Bytes],
    n: int,
    after: Sequence[bytes] = (),
    *,
    floats: bool = True,
    exponents_first: bool = False,
) -> list[bytes]:
    """Return encoded chunks, each the table of its planes and the planes, compressed if that is worthwhile.

    A sample shows whether compressing a plane can be worthwhile. Exponents are hardly ever random, so they are always
    tried.

    Args:
        planes: (chunks * n,) uint8 each, the planes of all chunks.
        after: the bytes that follow the planes of each chunk.
        floats: whether the planes are of floating-point values, which only entropy coding makes smaller.
        exponents_first: whether the first plane has the exponents of bfloat16 values.
    """
    compress = _zstd.entropy if floats else _zstd.matches
    may_pay = [(exponents_first and at == 0) or _may_pay(plane, n, compress) for at, plane in enumerate(planes)]
    chunks = []
    for at, begin in enumerate(range(0, len(planes[0]), n)):
        heads: list[int] = []
        bodies: list[Buffer] = []
        for plane, tried in zip(planes, may_pay, strict=True):
            values = plane[begin : begin + n].data
            body: Buffer = values
            length = n
            if tried:
                compressed = compress(values)
                if len(compressed) < _PAYS_BELOW * n:
                    body, length = compressed, len(compressed) | _COMPRESSED
            heads.append(length)
            bodies.append(body)
        if after:
            bodies.append(after[at])
        chunks.append(b"".join((_TABLES[len(planes)].pack(*heads), *bodies)))
    return chunks


def _may_pay(plane: Bytes, n: int, compress: Callable[[memoryview], bytes]) -> bool:
    """Return whether a sample of a plane compresses: of four positions, or of each chunk of `n` bytes."""
    positions = max(4, len(plane) // n)
    if len(plane) <= positions * _SAMPLE_BYTES:
        return len(plane) > 0
    step = (len(plane) - _SAMPLE_BYTES) // (positions - 1)
    sample = np.concatenate([plane[i * step : i * step + _SAMPLE_BYTES] for i in range(positions)])
    return len(compress(sample.data)) < _PAYS_BELOW * len(sample)


def _split_planes(data: Buffer, count: int, n: int) -> tuple[list[Bytes], memoryview]:
    """Return the planes, `n` bytes each, and the bytes after them."""
    view = memoryview(data)
    at = 4 * count
    if len(view) < at:
        raise CorruptCheckpointError("the table of planes is cut short")
    planes = []
    for head in _TABLES[count].unpack_from(view):
        end = at + (head & ~_COMPRESSED)
        if end > len(view):
            raise CorruptCheckpointError("a plane is cut short")
        body = _decompress(view[at:end], n) if head & _COMPRESSED else view[at:end]
        if len(body) != n:
            raise CorruptCheckpointError(f"a plane has {len(body)} bytes, expected {n}")
        planes.append(np.frombuffer(body, np.uint8))
        at = end
    return planes, view[at:]


def _whole_planes(data: Buffer, count: int, n: int) -> list[Bytes]:
    """Return the planes of a stream that holds nothing else, `n` bytes each."""
    planes, rest = _split_planes(data, count, n)
    _require(len(rest) == 0, "bytes follow the last plane")
    return planes


def _decompress(body: memoryview, n: int) -> bytes:
    try:
        if zstandard.frame_content_size(body) != n:
            raise CorruptCheckpointError(f"a compressed plane does not hold {n} bytes")
        return _zstd.decompressor.decompress(body, max_output_size=n)
    except zstandard.ZstdError as error:
        raise CorruptCheckpointError(f"a plane cannot be decompressed: {error}") from error


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise CorruptCheckpointError(message)


def check_codec(codec: str) -> None:
    """Raise ArgumentError if there is no codec of this name."""
    if codec not in CODECS:
        raise ArgumentError(f"codec must be {' or '.join(map(repr, CODECS))}, got {codec!r}")
