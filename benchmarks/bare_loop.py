"""The processor time of a load, compared with a bare loop that does the same work in one process.

The checkpoint has bfloat16 matrices of 14336 x 4096 on a disk or in /dev/shm, and is warm. The bare loop reads 32
chunks at a time into one buffer that it reuses, computes one checksum for each chunk, for codec "zstd" decompresses and
joins each chunk, and writes the 32 chunks with one strided copy. Unlike a load, it may overwrite a tensor before all
chunks of the tensor are verified.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard

import reshard
from benchmarks.common import Row, alternate, header, line, median
from reshard.storage.runtime.checksums import checksum

SHAPE = (14336, 4096)
CHUNKS = (16, 16)
"""The chunks of a matrix in each dimension."""
ROWS, COLUMNS = SHAPE[0] // CHUNKS[0], SHAPE[1] // CHUNKS[1]
TOGETHER = 32
"""The chunks of one read of the bare loop."""


def processor_s() -> float:
    """Return the processor time of this process so far, user and system."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class BareLoop:
    """Reads, verifies, decodes and writes the chunks of all matrices, one after another."""

    def __init__(self, uri: Path, codec: str, destinations: dict[str, torch.Tensor]) -> None:
        plan = reshard.open(uri).plan(reshard.Layout(1))[0]
        self._bounds = {
            read.want.name: np.concatenate([read.starts[:, 0], read.stops[-1:, 0]]).tolist() for read in plan.reads
        }
        self._codec = codec
        self._targets = {
            name: tensor.view(torch.uint16).numpy().reshape(CHUNKS[0], ROWS, CHUNKS[1], COLUMNS)
            for name, tensor in destinations.items()
        }
        largest = max(b[at + TOGETHER] - b[at] for b in self._bounds.values() for at in range(0, len(b) - 1, TOGETHER))
        self._buffer = memoryview(bytearray(largest))
        self._words, self._other = (np.empty(ROWS * COLUMNS, np.uint16) for _ in range(2))
        self._decompress = zstandard.ZstdDecompressor().decompress
        (self._path,) = (uri / "data").iterdir()

    def __call__(self) -> None:
        descriptor = os.open(self._path, os.O_RDONLY)
        for name, bounds in self._bounds.items():
            for first in range(0, len(bounds) - 1, TOGETHER):
                start = bounds[first]
                data, done = self._buffer[: bounds[first + TOGETHER] - start], 0
                while done < len(data):
                    done += os.preadv(descriptor, [data[done:]], start + done)
                chunks = [data[bounds[at] - start : bounds[at + 1] - start] for at in range(first, first + TOGETHER)]
                for chunk in chunks:
                    checksum(chunk)
                self._place(self._targets[name], first, data, chunks)
        os.close(descriptor)

    def _place(self, target: np.ndarray[Any, Any], first: int, data: memoryview, chunks: list[memoryview]) -> None:
        rows = slice(first // CHUNKS[1], (first + TOGETHER) // CHUNKS[1])
        if self._codec == "none":
            values = np.frombuffer(data, np.uint16).reshape(-1, CHUNKS[1], ROWS, COLUMNS)
            target[rows].transpose(0, 2, 1, 3)[...] = values
            return
        words, other = self._words, self._other
        for at, chunk in enumerate(chunks, first):
            end = 8 + (int.from_bytes(chunk[:4], "little") & 0x7FFFFFFF)
            words[...] = np.frombuffer(self._decompress(chunk[8:end]), np.uint8)
            words *= 256
            words |= np.frombuffer(chunk[end:], np.uint8)
            np.multiply(words, 32768, out=other)
            words >>= 1
            words |= other
            target[at // CHUNKS[1], :, at % CHUNKS[1]] = words.reshape(ROWS, COLUMNS)


def calls_of(function: Callable[[], object]) -> int:
    """Return how many functions the interpreter calls, in all threads, in Python and in C."""
    calls = [0]

    def count(frame: object, event: str, argument: object) -> None:
        calls[0] += event in ("call", "c_call")

    threading.setprofile(count)
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return calls[0]


def run_codec(uri: Path, codec: str, matrices: int, repeat: int) -> list[Row]:
    """Return one row per contender."""
    state = {
        f"w{at}": (torch.randn(SHAPE, generator=torch.Generator().manual_seed(at)) * 0.02).bfloat16()
        for at in range(matrices)
    }
    reshard.save(state, uri, codec=codec)
    loaded = {name: torch.zeros_like(values) for name, values in state.items()}
    contenders: dict[str, Callable[[], object]] = {
        "bare loop": BareLoop(uri, codec, loaded),
        "reshard, one process": lambda: reshard.load(loaded, uri),
    }
    used: dict[str, list[float]] = {name: [] for name in contenders}
    gigabytes = sum(values.nbytes for values in state.values()) / 1e9
    for at, name in alternate(list(contenders), repeat + 1):
        begin = processor_s()
        contenders[name]()
        if at > 0:
            used[name].append((processor_s() - begin) / gigabytes)
        assert all(loaded[key].equal(values) for key, values in state.items())
        for tensor in loaded.values():
            tensor.zero_()
    rows: list[Row] = []
    for name, contender in contenders.items():
        calls = calls_of(contender) / (matrices * CHUNKS[0] * CHUNKS[1] / TOGETHER)
        row: Row = {"codec": codec, "contender": name, "seconds": median(used[name]), "all": used[name]}
        row |= {"of_bare": median(used[name]) / median(used["bare loop"]), "calls": calls}
        rows.append(row)
        line(codec, name, f"{row['seconds']:.3f}", f"{row['of_bare']:.2f}", f"{calls:.0f}")
    return rows


def run(folder: Path, matrices: int, repeat: int) -> list[Row]:
    """Return one row per codec and contender."""
    header("codec", "contender", "CPU s / GB", "of the bare loop", "calls per 32 chunks")
    rows: list[Row] = []
    for codec in "none", "zstd":
        rows += run_codec(folder / f"matrices-{codec}", codec, matrices, repeat)
    return rows
