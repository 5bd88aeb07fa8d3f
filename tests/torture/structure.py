"""Hostile structure: what the grammars generate is opened and read, under a limit of memory and of time."""

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
from reshard.storage.stores.testing import MemoryStore
from tests.torture.grammars import FORMATS, Content
from tests.torture.known import GROUPS

MEMORY_PER_BYTE = 256
"""Bytes of memory that opening and reading may take for each byte of input, at most."""
FREE_MEMORY = 192 * 1024 * 1024
"""Bytes of memory that any input may take."""
MAX_CHARS = 20_000
"""Of a message."""
SECONDS = 20.0
"""How long one input may take, on a busy machine; most take some milliseconds."""


def rounds(format: str, count: int, seed: int) -> collections.Counter[str]:
    """Read `count` inputs of a format, in processes of their own. Return how each ended.

    Raises AssertionError for a crash, a hang, an exception that is not of reshard, or too much memory; it names the
    seed of the input.
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
    assert process.returncode == 0, f"{format}, input {number}: ended by {process.returncode}: {error[-3000:]}"
    return ended


class _Watch:
    """Kills a process that says nothing for too long."""

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
        limit = 120.0  # it imports torch first
        while not self._closed:
            if not self._fed.wait(limit):
                self._process.kill()
                return
            self._fed.clear()
            limit = SECONDS


def main() -> None:
    """Read the inputs of some seeds; say how each begins and ends."""
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
            raise AssertionError(f"input {number} ended by {how}, and should by {ends}")
        print(number, how, flush=True)


def inputs(format: str, first: int, last: int) -> Iterator[tuple[str, Content, set[str]]]:
    """Yield inputs: which it is, the checkpoint, and how it may end, where that is known."""
    if format == "known":
        for make, ends in GROUPS:
            for name, content in make().items():
                yield f"{make.__name__}:{name}".replace(" ", "_"), content, ends
    else:
        for seed in range(first, last):
            yield str(seed), FORMATS[format](random.Random(f"{format} {seed}")), set()


def _peak(*, reset: bool = True) -> int:
    """The most memory that the process held since the last reset, in bytes; what it holds now, after one."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = Path("/proc/self/status").read_text().partition("VmHWM:")[2]
    return int(line.split()[0]) * 1024


def read_all(content: dict[str, bytes]) -> str:
    """Open a checkpoint and read all of it. Return "read", or the first error of reshard by its class."""
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
    """Call. Return the class of the error of reshard, empty where there was none; its message may not be long."""
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
