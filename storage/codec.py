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
import threading
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import zstandard

from ..planner.index import ITEMSIZES, Stream
from .errors import CorruptCheckpointError

if TYPE_CHECKING:
    from typing_extensions import Buffer

Bytes = npt.NDArray[np.uint8]

_COMPONENT_SIZES = {"complex32": 2, "complex64": 4, "complex128": 8}
_FLOAT_PREFIXES = ("float", "bfloat", "complex")
_COMPRESSED = 1 << 31
_SAMPLE_BYTES = 4096
_PAYS_BELOW = 0.97
"""A plane is compressed where its sample, and then the whole, shrinks below this part of its size."""


class _Zstd(threading.local):
    """Each thread's own compressors: zstandard's are not safe to share."""

    def __init__(self) -> None:
        # Settled by measurement: exponents have no repetitions worth finding, so that a search for matches only
        # costs time. These parameters leave little but zstd's entropy coding.
        entropy = zstandard.ZstdCompressionParameters(
            strategy=zstandard.STRATEGY_FAST, min_match=7, hash_log=6, chain_log=6, search_log=1, window_log=17
        )
        self.entropy = zstandard.ZstdCompressor(compression_params=entropy)
        self.matches = zstandard.ZstdCompressor(level=1)
        self.decompressor = zstandard.ZstdDecompressor()


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


def encode(values: Bytes, dtype: str, stream: Stream) -> bytes:
    """Encode one stream of a chunk's values: their bytes in memory order, little-endian."""
    if stream is Stream.WHOLE:
        if dtype == "bfloat16":
            return _join_planes(_split_bfloat16(values.view(np.uint16)), exponents_first=True)
        width = _COMPONENT_SIZES.get(dtype, ITEMSIZES[dtype])
        return _join_planes(_split_bytes(values, width), floats=dtype.startswith(_FLOAT_PREFIXES))
    bits = values.view(np.uint32)
    heads = _round_to_bfloat16(values)
    if stream is Stream.HEAD:
        return _join_planes(_split_bfloat16(heads), exponents_first=True)
    difference = _scratch.take(0, 2 * len(bits)).view(np.uint32)
    np.copyto(difference, heads)
    difference *= 65536
    np.subtract(bits, difference, out=difference)
    tails = _scratch.take(1, len(bits))
    np.copyto(tails, difference, casting="unsafe")
    difference += 32768
    lost = np.flatnonzero(difference > 65535)  # those that 16 bits with a sign do not hold
    exceptions = np.stack([lost.astype(np.uint32), bits[lost]], axis=1).astype("<u4").tobytes()
    return _join_planes(_split_bytes(tails.view(np.uint8), 2)) + exceptions


def decode(data: Buffer, dtype: str, numel: int) -> Bytes:
    """The bytes of `numel` values from their one whole stream. Raises CorruptCheckpointError."""
    if dtype == "bfloat16":
        return decode_heads(data, numel)
    itemsize = ITEMSIZES[dtype]
    width = _COMPONENT_SIZES.get(dtype, itemsize)
    n = numel * (itemsize // width)
    planes, rest = _split_planes(data, width, n)
    _check(len(rest) == 0, "bytes are left over after the last plane")
    return _join_bytes(planes)


def decode_heads(data: Buffer, numel: int) -> Bytes:
    """The bytes of `numel` bfloat16 values from a stream of heads. Raises CorruptCheckpointError."""
    (exponents, rest), left = _split_planes(data, 2, numel)
    _check(len(left) == 0, "bytes are left over after the last plane")
    padded = -(-numel // 4) * 4
    turned, signs = _scratch.take(0, padded), _scratch.take(1, numel)
    turned[:numel] = exponents
    turned[:numel] *= 256
    turned[:numel] |= rest
    # Turned back to the right by one bit. Products and words of 64 bits, since numpy shifts one element at a time.
    np.multiply(turned[:numel], 32768, out=signs)
    words = turned.view(np.uint64)
    words >>= 1
    words &= 0x7FFF7FFF7FFF7FFF
    return (turned[:numel] | signs).view(np.uint8)


def decode_heads_and_tails(heads: Buffer, tails: Buffer, numel: int) -> Bytes:
    """The bytes of `numel` float32 values from their two streams. Raises CorruptCheckpointError."""
    high = decode_heads(heads, numel).view(np.uint16).astype(np.uint32)
    high *= 65536
    planes, rest = _split_planes(tails, 2, numel)
    low = _scratch.take(2, 2 * numel).view(np.uint32)
    np.copyto(low, _join_bytes(planes).view(np.int16), casting="unsafe")
    high += low
    _check(len(rest) % 8 == 0, "the list of exceptions is cut short")
    exceptions = np.frombuffer(rest, "<u4").reshape(-1, 2)
    if len(exceptions):
        _check(int(exceptions[:, 0].max()) < numel, "an exception lies outside the chunk")
        high[exceptions[:, 0]] = exceptions[:, 1]
    return high.view(np.uint8)


def _round_to_bfloat16(values: Bytes) -> npt.NDArray[np.uint16]:
    rounded = torch.from_numpy(values).view(torch.float32).to(torch.bfloat16)
    bits: npt.NDArray[np.uint16] = rounded.view(torch.uint16).numpy()
    return bits


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


def _join_bytes(planes: list[Bytes]) -> Bytes:
    """The bytes of elements from their planes, the least significant first.

    By products, since numpy writes to every second byte one at a time.
    """
    width = len(planes)
    if width == 1:
        return planes[0]
    if width == 2:
        words = planes[1].astype(np.uint16)
        words *= 256
        words |= planes[0]
        return words.view(np.uint8)
    values = np.empty((len(planes[0]), width), np.uint8)
    for i, plane in enumerate(planes):
        values[:, i] = plane
    return values.reshape(-1)


def _split_bfloat16(bits: npt.NDArray[np.uint16]) -> list[Bytes]:
    """Turned left by one bit, a value has its exponent in the high byte, mantissa and sign in the low one.

    The planes are this thread's, until it splits again.
    """
    n = len(bits)
    turned, other = _scratch.take(0, n), _scratch.take(1, n)
    np.multiply(bits, 2, out=turned)
    np.right_shift(bits, 15, out=other)
    turned |= other
    np.right_shift(bits, 7, out=other)
    planes = _scratch.take(2, n).view(np.uint8)
    exponents, rest = planes[:n], planes[n:]
    np.copyto(exponents, other, casting="unsafe")
    np.copyto(rest, turned, casting="unsafe")
    return [exponents, rest]


def _join_planes(planes: list[Bytes], *, floats: bool = True, exponents_first: bool = False) -> bytes:
    """Planes as a table of their lengths and what each came to, compressed where it pays.

    Whether it may pay is told by a sample; of exponents, which are hardly ever random, by doing it.
    """
    compressor = _zstd.entropy if floats else _zstd.matches
    heads: list[int] = []
    bodies: list[Buffer] = []
    for at, plane in enumerate(planes):
        body: Buffer = plane.data
        length = len(plane)
        if (exponents_first and at == 0) or _may_pay(plane, compressor):
            compressed = compressor.compress(plane.data)
            if len(compressed) < _PAYS_BELOW * length:
                body, length = compressed, len(compressed) | _COMPRESSED
        heads.append(length)
        bodies.append(body)
    return b"".join((struct.pack(f"<{len(planes)}I", *heads), *bodies))


def _may_pay(plane: Bytes, compressor: zstandard.ZstdCompressor) -> bool:
    """Whether a sample of the plane, taken from four places, compresses."""
    if len(plane) <= _SAMPLE_BYTES:
        return len(plane) > 0
    piece = _SAMPLE_BYTES // 4
    step = (len(plane) - piece) // 3
    sample = np.concatenate([plane[i * step : i * step + piece] for i in range(4)])
    return len(compressor.compress(sample.data)) < _PAYS_BELOW * _SAMPLE_BYTES


def _split_planes(data: Buffer, count: int, n: int) -> tuple[list[Bytes], memoryview]:
    """The planes, `n` bytes each, and what follows them."""
    view = memoryview(data)
    at = 4 * count
    _check(len(view) >= at, "the table of planes is cut short")
    planes = []
    for head in struct.unpack_from(f"<{count}I", view):
        length = head & ~_COMPRESSED
        body = view[at : at + length]
        at += length
        _check(len(body) == length, "a plane is cut short")
        if head & _COMPRESSED:
            body = _decompress(body, n)
        _check(len(body) == n, f"a plane has {len(body)} bytes where {n} are due")
        planes.append(np.frombuffer(body, np.uint8))
    return planes, view[at:]


def _decompress(body: memoryview, n: int) -> memoryview:
    try:
        _check(zstandard.frame_content_size(body) == n, f"a compressed plane does not hold {n} bytes")
        return memoryview(_zstd.decompressor.decompress(body, max_output_size=n))
    except zstandard.ZstdError as error:
        raise CorruptCheckpointError(f"a plane cannot be decompressed: {error}") from error


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise CorruptCheckpointError(message)
