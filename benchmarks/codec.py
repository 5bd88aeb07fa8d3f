"""Size and speed of the codec, compared with zstd, ZipNN and blosc2, on one thread and on all cores.

    python -m benchmarks.codec [--mb N] [--repeat N] [--samples NAME ...] [--codecs NAME ...]

Values are compressed in chunks of 1 MiB, as reshard stores them. The figures of reshard include its checksums, which
are computed when a chunk is stored and compared when it is read. On all cores, a pool of threads processes the chunks;
ZipNN gets all chunks as one buffer and uses its own threads. The contenders take turns, and the table shows medians.
The decompressed values are compared with the original ones. GB/s refer to decompressed bytes.
"""

from __future__ import annotations

import importlib
import itertools
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import zstandard

from benchmarks.common import Row, alternate, arguments_of, header, installed, line, median, positive, write
from benchmarks.samples import SAMPLES
from reshard.storage.formats.native.codec import Bytes, encode, streams_of
from reshard.storage.runtime.checksums import checksum, raw_checksums
from reshard.storage.tensors.dtypes import as_array, as_bytes, dtype_name
from tests.encoded_chunks import decode_chunks

CHUNK_BYTES = 1 << 20
PAGE_BYTES = CHUNK_BYTES // 16


@dataclass(frozen=True)
class Coder:
    """The functions of one codec for chunks of one dtype."""

    compress: Callable[[Any], Any]
    decompress: Callable[[Any, int], Any]
    """Takes the result of `compress` and the number of bytes before compression."""
    stored: Callable[[Any], int] = len
    """Returns the number of bytes of the result of `compress`."""
    own_threads: bool = False
    """Whether it splits one buffer over its own threads."""
    copies: bool = False
    """Whether `compress` changes its argument, so that it needs a copy."""


def reshard_zstd(dtype: str, threads: int) -> Coder:
    """Return reshard's codec: the streams of a chunk, each with a checksum. Decoded values are copied, as into a
    tensor."""
    streams = streams_of(dtype, "zstd")
    itemsize = getattr(torch, dtype).itemsize

    def compress(chunk: Bytes) -> list[tuple[bytes, int]]:
        encoded = [encode(chunk, dtype, stream, len(chunk) // itemsize)[0] for stream in streams]
        return [(data, checksum(data)) for data in encoded]

    def decompress(stored: list[tuple[bytes, int]], nbytes: int) -> Bytes:
        for data, expected in stored:
            assert checksum(data) == expected
        return decode_chunks([[data] for data, _ in stored], dtype, nbytes // itemsize)

    return Coder(compress, decompress, lambda stored: sum(len(data) for data, _ in stored))


def reshard_none(dtype: str, threads: int) -> Coder:
    """Return a codec that only copies. It has a checksum for each page and one for the whole, which reads compare."""

    def decompress(stored: tuple[bytes, list[int]], nbytes: int) -> Bytes:
        assert checksum(stored[0]) == stored[1][-1]
        return np.frombuffer(stored[0], np.uint8).copy()

    return Coder(
        lambda chunk: (chunk.tobytes(), raw_checksums(chunk.data, PAGE_BYTES)),
        decompress,
        lambda stored: len(stored[0]),
    )


def zstd(level: int) -> Callable[[str, int], Coder]:
    """Return plain zstd, which compresses the values unchanged."""

    class PerThread(threading.local):
        """The compressor and the decompressor of each thread."""

        def __init__(self) -> None:
            self.compressor = zstandard.ZstdCompressor(level=level)
            self.decompressor = zstandard.ZstdDecompressor()

    per_thread = PerThread()
    return lambda dtype, threads: Coder(
        lambda chunk: per_thread.compressor.compress(chunk.data),
        lambda stored, nbytes: per_thread.decompressor.decompress(stored),
    )


def zipnn(dtype: str, threads: int) -> Coder | None:
    """Return ZipNN, or None if it does not support the dtype or is not installed."""
    if dtype not in ("bfloat16", "float16", "float32", "float8_e4m3fn") or not installed("zipnn"):
        return None
    coder = importlib.import_module("zipnn").ZipNN(input_format="byte", bytearray_dtype=dtype, threads=threads)
    return Coder(
        coder.compress,
        lambda stored, nbytes: coder.decompress(stored),
        own_threads=True,
        copies=True,
    )


def blosc2(shuffle: str) -> Callable[[str, int], Coder | None]:
    """Return blosc2 with zstd, level 1, after a shuffle of bytes or bits; None if it is not installed."""

    def coder(dtype: str, threads: int) -> Coder | None:
        if not installed("blosc2"):
            return None
        blosc2 = importlib.import_module("blosc2")
        blosc2.set_releasegil(True)
        settings = {
            "codec": blosc2.Codec.ZSTD,
            "clevel": 1,
            "typesize": getattr(torch, dtype).itemsize,
            "filters": [blosc2.Filter[shuffle]],
            "nthreads": 1,
        }
        return Coder(
            lambda chunk: blosc2.compress2(chunk, **settings),
            lambda stored, nbytes: blosc2.decompress2(stored, nthreads=1),
        )

    return coder


CODECS: dict[str, Callable[[str, int], Coder | None]] = {
    "reshard zstd": reshard_zstd,
    "reshard none": reshard_none,
    "zstd-1": zstd(1),
    "zstd-3": zstd(3),
    "zipnn": zipnn,
    "blosc2 shuffle": blosc2("SHUFFLE"),
    "blosc2 bitshuffle": blosc2("BITSHUFFLE"),
}


def measure(values: torch.Tensor, coder: Coder, threads: int) -> Row:
    """Measure the seconds to compress and to decompress all values, and the bytes stored.

    Raises:
        AssertionError: the decompressed values are wrong.
    """
    raw = as_bytes(as_array(values))
    size = len(raw) if coder.own_threads and threads > 1 else CHUNK_BYTES
    chunks: list[Bytes] = [raw[at : at + size] for at in range(0, len(raw), size)]
    given = [bytearray(chunk) for chunk in chunks] if coder.copies else chunks
    with ThreadPoolExecutor(threads) as pool:
        spread: Any = map if threads == 1 or coder.own_threads else pool.map
        list(pool.map(time.sleep, [0.001] * threads))  # start the threads
        begin = time.perf_counter()
        stored = list(spread(coder.compress, given))
        compressed = time.perf_counter()
        back = list(spread(coder.decompress, stored, map(len, chunks)))
        decompressed = time.perf_counter()
    for chunk, found in zip(chunks, back, strict=True):
        if not np.array_equal(np.frombuffer(found, np.uint8), chunk):
            raise AssertionError("the decompressed values differ from the original ones")
    return {
        "stored": sum(map(coder.stored, stored)),
        "compress_s": compressed - begin,
        "decompress_s": decompressed - compressed,
    }


def run(nbytes: int, kinds: list[str], names: list[str], repeat: int) -> list[Row]:
    """Return one row per sample and codec."""
    cores = len(os.sched_getaffinity(0))
    columns = [
        f"{stage} GB/s, {threads}"
        for threads in ("1 thread", f"{cores} threads")
        for stage in ("compress", "decompress")
    ]
    header("values", "dtype", "MB", "codec", "ratio", *columns)
    rows: list[Row] = []
    for what, values in itertools.chain.from_iterable(SAMPLES[kind](nbytes) for kind in kinds):
        dtype = dtype_name(what, values.dtype)
        coders = {
            (name, threads): coder
            for name in names
            for threads in (1, cores)
            if (coder := CODECS[name](dtype, threads)) is not None
        }
        runs: dict[tuple[str, int], list[Row]] = {key: [] for key in coders}
        for _, key in alternate(list(coders), repeat + 1):
            runs[key].append(measure(values, coders[key], key[1]))
        for name in dict.fromkeys(name for name, _ in coders):
            row: Row = {"values": what, "dtype": dtype, "nbytes": values.nbytes, "codec": name, "cores": cores}
            row["ratio"] = runs[name, 1][0]["stored"] / values.nbytes
            for threads in (1, cores):
                for stage in ("compress", "decompress"):
                    seconds = [found[f"{stage}_s"] for found in runs[name, threads][1:]]
                    row[f"{stage}_{threads}"] = values.nbytes / 1e9 / median(seconds)
            rows.append(row)
            speeds = [
                f"{row[f'{stage}_{threads}']:.2f}" for threads in (1, cores) for stage in ("compress", "decompress")
            ]
            line(what, dtype, f"{values.nbytes / 1e6:.0f}", name, f"{row['ratio']:.3f}", *speeds)
    return rows


def draw(rows: list[Row], figure: Any) -> None:
    """Draw one plot per sample: ratio against speed on one thread. Circles compress, triangles decompress."""
    kinds = list(dict.fromkeys((row["values"], row["dtype"]) for row in rows))
    across = 4
    down = -(-len(kinds) // across)
    figure.set_size_inches(12, 2.6 * down + 0.6)
    plots = figure.subplots(down, across, squeeze=False).flat
    colors = {name: f"C{at}" for at, name in enumerate(CODECS)}
    for kind, axes in zip(kinds, plots, strict=False):
        for row in rows:
            if (row["values"], row["dtype"]) == kind and row["codec"] != "reshard none":
                label = row["codec"] if kind == kinds[0] else None
                color = colors[row["codec"]]
                axes.scatter(row["compress_1"], row["ratio"], color=color, marker="o", label=label)
                axes.scatter(row["decompress_1"], row["ratio"], color=color, marker="^")
        axes.set_title(", ".join(kind), fontsize=9)
        axes.set_xlim(0)
        axes.tick_params(labelsize=8)
        axes.ticklabel_format(useOffset=False)
    for axes in list(plots):  # remove unused plots
        axes.remove()
    figure.supxlabel("GB/s on one thread: ● compress, ▲ decompress", fontsize=9)
    figure.supylabel("stored bytes / original bytes", fontsize=9)
    figure.legend(loc="outside upper center", ncols=6, fontsize=8)


def main(argv: list[str] | None = None) -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--mb", type=positive, default=32, help="the size of each sample in MiB (default: %(default)s)")
    parser.add_argument("--samples", nargs="+", choices=list(SAMPLES), default=list(SAMPLES))
    parser.add_argument("--codecs", nargs="+", choices=list(CODECS), default=list(CODECS))
    parser.add_argument("--repeat", type=positive, default=5, help="timed runs of each codec (default: %(default)s)")
    arguments = parser.parse_args(argv)
    write(arguments, run(arguments.mb << 20, arguments.samples, arguments.codecs, arguments.repeat), draw)


if __name__ == "__main__":
    main()
