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
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress as chosen
from itertools import pairwise
from typing import TYPE_CHECKING, Any

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
    from collections.abc import Callable, Iterable, Iterator, Sequence

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

MAX_JOINED_NUMEL = 256 * 1024
"""The most elements that are joined from their planes at once: the arrays take six times as many bytes, and should fit
the cache of a core."""

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
            return _encode_planes(_split_bfloat16(values.view(np.uint16)), numel, exponents_first=True)
        itemsize = ITEMSIZES[dtype]
        width = _COMPONENT_SIZES.get(dtype, itemsize)
        n = numel * (itemsize // width)
        return _encode_planes(_split_bytes(values, width), n, floats=dtype.startswith(_FLOAT_PREFIXES))
    if stream is Stream.HEAD:
        return _encode_planes(_split_bfloat16(_heads(values)), numel, exponents_first=True)
    bits = values.view(np.uint32)
    tails = _scratch.take(_OPERAND, len(bits))
    np.copyto(tails, bits, casting="unsafe")  # the low 16 bits of a head are zero
    lost = _lost(values, tails)
    listed = [b""] * (len(bits) // numel)
    if len(lost):
        exceptions = np.stack([(lost % numel).astype(np.uint32), bits[lost]], axis=1).astype("<u4")
        bounds = np.searchsorted(lost, np.arange(0, len(bits) + 1, numel)).tolist()
        listed = [exceptions[begin:end].tobytes() for begin, end in pairwise(bounds)]
    return _encode_planes(_split_bytes(tails.view(np.uint8), 2), numel, listed)


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
    if not len(ties):
        return ties
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


@dataclass(frozen=True, slots=True, eq=False)
class Planes:
    """Where the planes of equal chunks are stored: one row per chunk, one column per plane."""

    data: memoryview
    """The bytes that contain the chunks."""
    numel: int
    """The number of elements, and so of bytes, of each plane."""
    starts: npt.NDArray[np.int64]
    stops: npt.NDArray[np.int64]
    """(chunks, planes) the byte range of each plane in `data`."""
    compressed: npt.NDArray[np.bool_]

    @classmethod
    def find(
        cls,
        data: memoryview,
        begins: npt.NDArray[np.int64],
        ends: npt.NDArray[np.int64],
        count: int,
        numel: int,
        *,
        whole: bool = True,
    ) -> Planes:
        """Read the tables in front of the planes.

        Args:
            data: the bytes that contain the chunks.
            begins, ends: (chunks,) the byte range of each chunk in `data`.
            count: the number of planes of each chunk.
            numel: the number of elements of each plane.
            whole: whether the chunks contain nothing after the last plane.

        Raises:
            CorruptCheckpointError: a table is not valid.
        """
        firsts = begins + 4 * count
        _require(bool((firsts <= ends).all()), "the table of planes is cut short")
        if len(begins) == 1:  # without indexing, which would hand the interpreter to another thread
            tables = np.frombuffer(data, "<u4", count, int(begins[0]))[None]
        else:
            tables = np.frombuffer(data, np.uint8)[begins[:, None] + np.arange(4 * count)].view("<u4")
        lengths = (tables & ~np.uint32(_COMPRESSED)).astype(np.int64)
        compressed = tables >= _COMPRESSED
        stops = firsts[:, None] + np.cumsum(lengths, axis=1)
        _require(bool((stops[:, -1] <= ends).all()), "a plane is cut short")
        wrong = ~compressed & (lengths != numel)
        if bool(wrong.any()):
            raise CorruptCheckpointError(f"a plane has {lengths[wrong][0]} bytes, expected {numel}")
        _require(not whole or bool((stops[:, -1] == ends).all()), "bytes follow the last plane")
        return cls(data, numel, stops - lengths, stops, compressed)

    def parts(self, plane: int) -> Iterator[memoryview]:
        """Return an iterator over the bytes of one plane of each chunk.

        Raises:
            CorruptCheckpointError: a plane does not declare `numel` bytes. The iterator also raises it if a plane
                cannot be decompressed.
        """
        stored = self._stored(plane)
        compressed = self.compressed[:, plane]
        if not bool(compressed.any()):
            return iter(stored)
        frames = stored if bool(compressed.all()) else list(chosen(stored, compressed))
        _check_sizes(frames, self.numel)
        decompressed = _decompressed(frames)
        if len(frames) == len(stored):
            return decompressed
        return (next(decompressed) if packed else part for packed, part in zip(compressed, stored, strict=True))

    def check_frames(self) -> None:
        """Check what compressed planes declare. Raises what `parts` raises."""
        for plane in range(self.starts.shape[1]):
            compressed = self.compressed[:, plane]
            if bool(compressed.any()):
                _check_sizes(chosen(self._stored(plane), compressed), self.numel)

    def _stored(self, plane: int) -> list[memoryview]:
        slices = map(slice, self.starts[:, plane].tolist(), self.stops[:, plane].tolist())
        return list(map(self.data.__getitem__, slices))


def _decompressed(frames: Iterable[memoryview]) -> Iterator[memoryview]:
    with _decompressing():
        for frame in frames:
            yield memoryview(_zstd.decompressor.decompress(frame))


@contextmanager
def _decompressing() -> Iterator[None]:
    """Translate the errors of zstd."""
    try:
        yield
    except zstandard.ZstdError as error:
        raise CorruptCheckpointError(f"a plane cannot be decompressed: {error}") from error


def _check_sizes(frames: Iterable[memoryview], numel: int) -> None:
    """Check that frames declare `numel` bytes: the decompressor allocates as many bytes as a frame declares."""
    with _decompressing():
        sizes = set(map(zstandard.frame_content_size, frames))
    if sizes != {numel}:
        raise CorruptCheckpointError(f"a compressed plane does not hold {numel} bytes")


def plane_shape(dtype: str, numel: int) -> tuple[int, int]:
    """Return the number of planes of a chunk that is one whole stream, and the number of bytes of each."""
    itemsize = ITEMSIZES[dtype]
    width = _COMPONENT_SIZES.get(dtype, itemsize)
    return width, numel * (itemsize // width)


def decode(planes: Planes, counts: Iterable[int], dtype: str) -> Iterator[npt.NDArray[Any]]:
    """Decode chunks that are stored as one whole stream each.

    Args:
        planes: the planes of the chunks.
        counts: the number of chunks to decode in each step.
        dtype: the dtype of the values.

    Yields:
        For each of `counts`, the values of the next chunks, one chunk after another, as bytes or as unsigned integers.
        The array may be scratch memory of this thread, which is valid until the next step.

    Raises:
        CorruptCheckpointError: the bytes cannot be decoded.
    """
    return decode_heads(planes, counts) if dtype == "bfloat16" else _join_bytes(planes, counts)


def decode_heads(planes: Planes, counts: Iterable[int]) -> Iterator[npt.NDArray[np.uint16]]:
    """Decode the bfloat16 values of chunks from their streams of heads. See `decode`."""
    return _join_words(planes, counts, high=0, rotated=True)


def decode_heads_and_tails(
    heads: Planes, tails: Planes, ends: npt.NDArray[np.int64], counts: Sequence[int]
) -> Iterator[npt.NDArray[np.uint32]]:
    """Decode the float32 values of chunks from their two streams. See `decode`.

    Args:
        heads, tails: the planes of each stream.
        ends: (chunks,) the end of each chunk's tails. The exceptions are before it.
        counts: see `decode`.
    """
    numel = heads.numel
    head_words, tail_words = decode_heads(heads, counts), _join_bytes(tails, counts)
    listed = exceptions_of(tails, ends)
    first = 0
    for count in counts:
        low = _scratch.take(_PLANES, 2 * count * numel).view(np.uint32)
        np.copyto(low, next(tail_words).view(np.int16), casting="unsafe")
        high = _scratch.take(_WIDE, 2 * count * numel).view(np.uint32)
        np.copyto(high, next(head_words).view(np.uint16))
        high *= 65536
        high += low
        for at in listed.keys() & range(first, first + count):
            positions, bits = listed[at]
            high[(at - first) * numel + positions] = bits
        first += count
        yield high


def exceptions_of(
    tails: Planes, ends: npt.NDArray[np.int64]
) -> dict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]]:
    """Return the elements of float32 chunks that heads and tails do not restore.

    Args:
        tails: the planes of the tails.
        ends: (chunks,) the end of each chunk's tails. The exceptions are before it.

    Returns:
        For each chunk that has some: their positions in the chunk, and their bits.
    """
    begins = tails.stops[:, -1]
    found = {}
    for at in np.flatnonzero(ends > begins).tolist():
        rest = tails.data[int(begins[at]) : int(ends[at])]
        _require(len(rest) % 8 == 0, "the list of exceptions is cut short")
        listed = np.frombuffer(rest, "<u4").reshape(-1, 2)
        _require(int(listed[:, 0].max()) < tails.numel, "an exception is outside the chunk")
        found[at] = listed[:, 0].astype(np.int64), listed[:, 1].copy()  # `data` may be overwritten later
    return found


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


def _join_bytes(planes: Planes, counts: Iterable[int]) -> Iterator[npt.NDArray[Any]]:
    """Join planes with one byte of each element, the least significant first. See `decode`."""
    numel, width = planes.numel, planes.starts.shape[1]
    if width == 2:
        yield from _join_words(planes, counts, high=1)
        return
    chunks = zip(*(planes.parts(plane) for plane in range(width)), strict=True)
    for count in counts:
        values = np.empty((count, numel, width), np.uint8)
        for chunk, parts in zip(values, chunks, strict=False):
            for plane, part in enumerate(parts):
                chunk[:, plane] = part
        yield values.reshape(-1)


def _join_words(
    planes: Planes, counts: Iterable[int], high: int, *, rotated: bool = False
) -> Iterator[npt.NDArray[np.uint16]]:
    """Join two planes to words of two bytes. See `decode`.

    They are joined by a product, because numpy writes to every second byte one byte at a time (`benchmarks/codec.py`).

    Args:
        high: the plane of the high bytes.
        rotated: whether each word is rotated right by one bit.
    """
    numel = planes.numel
    together = max(1, MAX_JOINED_NUMEL // numel) * numel
    chunks = zip(planes.parts(high), planes.parts(1 - high), strict=True)
    for count in counts:
        words = _scratch.take(_WORDS, count * numel)
        for first in range(0, len(words), together):
            joined = words[first : first + together]
            low = _scratch.take(_OPERAND, len(joined))
            for begin, (upper, lower) in zip(range(0, len(joined), numel), chunks, strict=False):
                joined[begin : begin + numel] = upper
                low[begin : begin + numel] = lower
            for begin in range(0, len(joined), MAX_JOINED_NUMEL):
                part = slice(begin, begin + MAX_JOINED_NUMEL)
                _join(joined[part], low[part], rotated=rotated)
        yield words


def _join(words: npt.NDArray[np.uint16], low: npt.NDArray[np.uint16], *, rotated: bool) -> None:
    """Join high bytes, in `words`, with low bytes, which are overwritten."""
    words *= 256
    words |= low
    if rotated:
        np.multiply(words, 32768, out=low)  # moves the lowest bit to the highest
        words >>= 1
        words |= low


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


def _encode_planes(
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


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise CorruptCheckpointError(message)


def check_codec(codec: str) -> None:
    """Raise ArgumentError if there is no codec of this name."""
    if codec not in CODECS:
        raise ArgumentError(f"codec must be {' or '.join(map(repr, CODECS))}, got {codec!r}")
