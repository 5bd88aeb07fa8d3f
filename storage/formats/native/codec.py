"""Values to encoded chunks and back: precision planes, each entropy-coded or stored as it is, by what pays.

The bits of a float compress only in its exponent. So the bytes of a chunk are split into planes, one byte an element
each: of bfloat16, the exponents and the sign-and-mantissa bits; of other types, their bytes by significance.

float32 values are stored as two streams that can be read apart. The head is the bfloat16 rounding of the value (to
nearest even, what `.to(torch.bfloat16)` gives). The tail is the 16-bit difference `bits(x) - (bits(head) << 16)`
modulo 2**16, read back with its sign; elements that this does not give back (ties that round down, NaN payloads) are
listed at the end of the tail with their bits.

Pure: bytes in, bytes out; any thread may call. docs/FORMAT.md has the encoding byte by byte.
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

CODECS = ("zstd", "none")

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Buffer

Bytes = npt.NDArray[np.uint8]

_COMPONENT_SIZES = {"complex32": 2, "complex64": 4, "complex128": 8}
_FLOAT_PREFIXES = ("float", "bfloat", "complex")
_COMPRESSED = 1 << 31
_TABLES = {count: struct.Struct(f"<{count}I") for count in (1, 2, 4, 8)}
"""What stands before the planes, by their number: the stored bytes of each, and whether they are compressed."""
_SAMPLE_BYTES = 1024
"""At each place of a sample."""
_PAYS_BELOW = 0.97
"""A plane is compressed where its sample, and then the whole, shrinks below this part of its size."""


_LITERAL_COMPRESSION_MODE = 1002
"""Of zstd.h: ZSTD_c_literalCompressionMode, which has no name in Python, and which python-zstandard cannot set."""
_LITTLE_BUT_ENTROPY: dict[int, int] = {
    # Settled by measurement: exponents repeat by chance alone, but for rows of zeros, which are long. The strategy
    # "fast" looks for a match once in as many bytes as its target length. What has none it would then leave as it is,
    # were it not told to code it.
    zstd.CompressionParameter.strategy: zstd.Strategy.fast,
    zstd.CompressionParameter.target_length: 64,
    zstd.CompressionParameter.min_match: 7,
    _LITERAL_COMPRESSION_MODE: 1,
    zstd.CompressionParameter.window_log: 17,
    zstd.CompressionParameter.hash_log: 6,
    zstd.CompressionParameter.chain_log: 6,
}


class _Zstd(threading.local):
    """Each thread's own compressors: zstandard's are not safe to share."""

    def __init__(self) -> None:
        self._entropy = zstd.ZstdCompressor(options=_LITTLE_BUT_ENTROPY)
        self.matches = zstandard.ZstdCompressor(level=1).compress
        self.decompressor = zstandard.ZstdDecompressor()

    def entropy(self, data: memoryview) -> bytes:
        """A frame with its content size, by little but zstd's entropy coding."""
        return self._entropy.compress(data, self._entropy.FLUSH_FRAME)


_zstd = _Zstd()


class _Scratch(threading.local):
    """Memory of each thread's own that is used again for each chunk: fresh pages cost more than filling them."""

    def __init__(self) -> None:
        self._arrays: dict[int, npt.NDArray[np.uint16]] = {}

    def take(self, which: int, numel: int) -> npt.NDArray[np.uint16]:
        """The first elements of one of the arrays, whatever they hold."""
        if len(self._arrays.get(which, ())) < numel:
            self._arrays[which] = np.empty(numel, np.uint16)
        return self._arrays[which][:numel]


_scratch = _Scratch()


def streams_of(dtype: str, codec: str) -> tuple[Stream, ...]:
    """The streams that values of a dtype are stored in."""
    return (Stream.HEAD, Stream.TAIL) if dtype == "float32" and codec == "zstd" else (Stream.WHOLE,)


def encode(values: Bytes, dtype: str, stream: Stream, numel: int) -> list[bytes]:
    """Encode one stream of chunks.

    Args:
        values: the bytes of their values in memory order, little-endian, one chunk after another.
        numel: values of each chunk.
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
    tails = _scratch.take(1, len(bits))
    np.copyto(tails, bits, casting="unsafe")  # a head has 16 zeros there
    lost = _lost(values, tails)
    exceptions = np.stack([(lost % numel).astype(np.uint32), bits[lost]], axis=1).astype("<u4")
    bounds = np.searchsorted(lost, np.arange(0, len(bits) + 1, numel)).tolist()
    listed = [exceptions[begin:end].tobytes() for begin, end in pairwise(bounds)]
    return _join_planes(_split_bytes(tails.view(np.uint8), 2), numel, listed)


def _heads(values: Bytes) -> npt.NDArray[np.uint16]:
    """The bits of float32 values rounded to bfloat16."""
    heads = _scratch.take(0, len(values) // 4)
    cast(values, torch.float32, heads.view(np.uint8), torch.bfloat16)
    return heads


def _lost(values: Bytes, tails: npt.NDArray[np.uint16]) -> npt.NDArray[np.intp]:
    """Where float32 values are not what their heads and tails give back."""
    bits = values.view(np.uint32)
    if np.isnan(values.view(np.float32).max()) or not _rounding.to_nearest_even:  # the largest with a NaN is NaN
        again = _heads(values) * np.uint32(65536) + tails.view(np.int16).astype(np.uint32)
        return np.flatnonzero(again != bits)
    tied = _scratch.take(0, len(bits)).view(np.bool_)[: len(bits)]
    ties = np.flatnonzero(np.equal(tails, 32768, out=tied))
    down = bits[ties] & 65536 == 0  # to an even head: the value is half a step above it, which is no tail
    return np.compress(down, ties)


class _Rounding(threading.local):
    """Whether casts round to nearest even: by how a processor is made or set up, they might flush small values to 0."""

    def __init__(self) -> None:
        high = np.arange(1, 1 << 16, 61, dtype=np.uint32)
        high = high[high & 0x7F80 != 0x7F80]  # those are infinite, or NaNs
        probes = np.concatenate([high * 65536 + low for low in (32767, 32768, 32769)])
        nearest = np.concatenate([high, high + (high & 1), high + 1])
        self.to_nearest_even = np.array_equal(_heads(probes.view(np.uint8)), nearest)


_rounding = _Rounding()


def decode(chunks: Sequence[Buffer], dtype: str, numel: int) -> Bytes:
    """The bytes of the values of chunks, one after another, from the one whole stream of each.

    They may lie in memory of this thread's own, until it decodes or encodes again, as those of the functions below.

    Args:
        numel: values of each chunk.

    Raises CorruptCheckpointError, as all here.
    """
    if dtype == "bfloat16":
        return decode_heads(chunks, numel)
    itemsize = ITEMSIZES[dtype]
    width = _COMPONENT_SIZES.get(dtype, itemsize)
    n = numel * (itemsize // width)
    return _join_bytes([_whole_planes(chunk, width, n) for chunk in chunks], n)


def decode_heads(chunks: Sequence[Buffer], numel: int) -> Bytes:
    """The bytes of the bfloat16 values of chunks of `numel` each, one after another, from their streams of heads."""
    n = numel * len(chunks)
    turned, other = _scratch.take(0, n), _scratch.take(1, n)
    for at, chunk in enumerate(chunks):
        exponents, rest = _whole_planes(chunk, 2, numel)
        turned[at * numel : (at + 1) * numel] = exponents
        other[at * numel : (at + 1) * numel] = rest
    turned *= 256
    turned |= other
    # Turned back to the right by one bit.
    np.multiply(turned, 32768, out=other)
    turned >>= 1
    turned |= other
    return turned.view(np.uint8)


def decode_heads_and_tails(heads: Sequence[Buffer], tails: Sequence[Buffer], numel: int) -> Bytes:
    """The bytes of the float32 values of chunks of `numel` each, one after another, from the two streams of each."""
    high = _scratch.take(3, 2 * numel * len(heads)).view(np.uint32)
    np.copyto(high, decode_heads(heads, numel).view(np.uint16))
    high *= 65536
    planes, exceptions = [], []
    for at, tail in enumerate(tails):
        split, rest = _split_planes(tail, 2, numel)
        planes.append(split)
        _require(len(rest) % 8 == 0, "the list of exceptions is cut short")
        listed = np.frombuffer(rest, "<u4").reshape(-1, 2)
        if len(listed):
            _require(int(listed[:, 0].max()) < numel, "an exception lies outside the chunk")
            exceptions.append((listed[:, 0] + np.uint32(at * numel), listed[:, 1]))
    low = _scratch.take(2, 2 * len(high)).view(np.uint32)
    np.copyto(low, _join_bytes(planes, numel).view(np.int16), casting="unsafe")
    high += low
    for places, bits in exceptions:
        high[places] = bits
    return high.view(np.uint8)


def _split_bytes(values: Bytes, width: int) -> list[Bytes]:
    """The bytes of elements of `width` bytes by their significance, the least first: this thread's, as below."""
    if width == 2:
        words = values.view(np.uint16)
        n = len(words)
        planes, high = _scratch.take(2, n).view(np.uint8), _scratch.take(3, n)
        np.right_shift(words, 8, out=high)
        np.copyto(planes[:n], words, casting="unsafe")
        np.copyto(planes[n:], high, casting="unsafe")
        return [planes[:n], planes[n:]]
    by_byte = values.reshape(-1, width)
    return [np.ascontiguousarray(by_byte[:, i]) for i in range(width)]


def _join_bytes(chunks: list[list[Bytes]], n: int) -> Bytes:
    """The bytes of elements from the planes of chunks of `n` each, the least significant first.

    By products, since numpy writes to every second byte one at a time.
    """
    width = len(chunks[0])
    if width == 1:
        return chunks[0][0] if len(chunks) == 1 else np.concatenate([planes[0] for planes in chunks])
    if width == 2:
        words, low = _scratch.take(0, n * len(chunks)), _scratch.take(1, n * len(chunks)).view(np.uint8)
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
    """Turned left by one bit, a value has its exponent in the high byte, mantissa and sign in the low one.

    The planes are this thread's, until it splits again.
    """
    n = len(bits)
    other, planes = _scratch.take(1, n), _scratch.take(2, n).view(np.uint8)
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
    """Chunks, each the table of its planes and what each came to, compressed where it pays.

    Whether it may pay is told by a sample; of exponents, which are hardly ever random, by doing it.

    Args:
        planes: of all chunks, which have `n` bytes of each.
        after: what follows the planes of each chunk.
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
    """Whether a sample of the plane, of four places or of each of its chunks of `n` bytes, compresses."""
    pieces = max(4, len(plane) // n)
    if len(plane) <= pieces * _SAMPLE_BYTES:
        return len(plane) > 0
    step = (len(plane) - _SAMPLE_BYTES) // (pieces - 1)
    sample = np.concatenate([plane[i * step : i * step + _SAMPLE_BYTES] for i in range(pieces)])
    return len(compress(sample.data)) < _PAYS_BELOW * len(sample)


def _split_planes(data: Buffer, count: int, n: int) -> tuple[list[Bytes], memoryview]:
    """The planes, `n` bytes each, and what follows them."""
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
            raise CorruptCheckpointError(f"a plane has {len(body)} bytes where {n} are due")
        planes.append(np.frombuffer(body, np.uint8))
        at = end
    return planes, view[at:]


def _whole_planes(data: Buffer, count: int, n: int) -> list[Bytes]:
    """The planes of a stream that holds nothing else, `n` bytes each."""
    planes, rest = _split_planes(data, count, n)
    _require(len(rest) == 0, "bytes are left over after the last plane")
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
    """Raises ArgumentError where there is no such codec."""
    if codec not in CODECS:
        raise ArgumentError(f"codec must be one of {CODECS}, got {codec!r}")
