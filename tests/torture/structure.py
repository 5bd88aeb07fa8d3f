"""Open and read the hostile inputs of the grammars, with limits on memory and time."""

from __future__ import annotations

import argparse
import collections
import logging
import random
import resource
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import reshard
from reshard.errors import CheckpointError, RankError
from reshard.storage.stores.memory import MemoryStore
from tests.torture.grammars import FORMATS, Content
from tests.torture.known import GROUPS

MEMORY_PER_BYTE = 256
"""The maximum memory that opening and reading may take, per byte of input."""
FREE_MEMORY = 192 * 1024 * 1024
"""The memory in bytes that every input may take in addition."""
MAX_CHARS = 20_000
"""The maximum length of an error message."""
MAX_S = 20.0
"""The time limit of one input, on a busy machine. Most inputs take a few milliseconds."""


def rounds(format: str, count: int, seed: int) -> collections.Counter[str]:
    """Read `count` inputs of a format in a separate process, and count how they ended.

    Raises:
        AssertionError: An input crashes or hangs the process, takes too much memory, or raises an exception that is
            not one of reshard's. The message has the seed of the input.
    """
    ended: collections.Counter[str] = collections.Counter()
    command = [sys.executable, "-m", "tests.torture.structure", format, str(seed), str(seed + count)]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        number = "none"
        watch = _Watch(process)
        for line in process.stdout:
            watch.fed()
            number, _, how = line.strip().partition(" ")
            if how:
                ended[how] += 1
        watch.close()
        process.wait()
        errors.seek(0)
        error = errors.read()
    assert process.returncode == 0, f"{format}, input {number}: exit status {process.returncode}: {error[-3000:]}"
    return ended


class _Watch:
    """Kills a process that prints nothing for too long."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._fed = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def fed(self) -> None:
        self._fed.set()

    def close(self) -> None:
        self._closed = True
        self._fed.set()
        self._thread.join()

    def _run(self) -> None:
        limit = 120.0  # the process imports torch first
        while not self._closed:
            if not self._fed.wait(limit):
                self._process.kill()
                return
            self._fed.clear()
            limit = MAX_S


def main() -> None:
    """Read the inputs of some seeds, and print the start and the end of each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("format")
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable()
    limit = 8 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number, content, ends in inputs(arguments.format, arguments.first, arguments.last):
        print(number, flush=True)
        before = _peak()
        how = read_all(content)
        taken, nbytes = _peak(reset=False) - before, sum(map(len, content.values()))
        if taken > FREE_MEMORY + MEMORY_PER_BYTE * nbytes:
            raise AssertionError(f"input {number} of {nbytes} bytes took {taken} bytes of memory")
        if ends and how not in ends:
            raise AssertionError(f"input {number} ended with {how}, expected {ends}")
        print(number, how, flush=True)


def inputs(format: str, first: int, last: int) -> Iterator[tuple[str, Content, set[str]]]:
    """Yield the name of each input, its checkpoint, and the set of allowed ends, which is empty if any is allowed."""
    if format == "known":
        for make, ends in GROUPS:
            for name, content in make().items():
                yield f"{make.__name__}:{name}".replace(" ", "_"), content, ends
    else:
        for seed in range(first, last):
            yield str(seed), FORMATS[format](random.Random(f"{format} {seed}")), set()


def _peak(*, reset: bool = True) -> int:
    """Return the peak memory of the process since the last reset, in bytes; with `reset`, reset it to now first."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = Path("/proc/self/status").read_text().partition("VmHWM:")[2]
    return int(line.split()[0]) * 1024


def read_all(content: dict[str, bytes]) -> str:
    """Open a checkpoint and read all of it. Return "read", or the class name of the last error of reshard."""
    store = MemoryStore()
    store.content = content
    opened: list[Any] = []
    how = _tried(lambda: opened.append(reshard.open(store)))
    for checkpoint in opened:
        small = sum(map(len, content.values())) * 16 + 2**20
        tensors = [name for name in checkpoint.tensors if _nbytes(checkpoint, name) <= small]
        calls = [checkpoint.verify]
        calls += [partial(checkpoint.read, name) for name in tensors]
        calls += [partial(checkpoint.read_value, name) for name in checkpoint.value_names]
        for call in calls[:200]:
            how = _tried(call) or how
    return how or "read"


def _tried(call: Callable[[], object]) -> str:
    """Make a call. Return the class name of its error, or "". Raise AssertionError for a long message."""
    try:
        call()
    except RankError:
        raise
    except CheckpointError as error:
        if len(str(error)) > MAX_CHARS:
            raise AssertionError(f"a message of {len(str(error))} characters") from None
        return type(error).__name__
    return ""


def _nbytes(checkpoint: Any, name: str) -> int:
    entry = checkpoint._source.entry(name)
    return int(entry.numel * entry.itemsize)


if __name__ == "__main__":
    main()
