"""What the benchmarks share: command line, alternating runs, the machine in words, peak memory, tables and files."""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

Row = dict[str, Any]
T = TypeVar("T")
median = statistics.median


def arguments_of(doc: str | None) -> argparse.ArgumentParser:
    """The command line that all benchmarks have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write machine and rows to this file")
    parser.add_argument("--plot", help="draw them into this PNG (needs matplotlib)")
    return parser


def positive(text: str) -> int:
    """A count on the command line."""
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {count}")
    return count


def write(arguments: argparse.Namespace, rows: list[Row], draw: Callable[[list[Row], Any], None]) -> None:
    """Write what the command line asks for. `draw` draws rows into a figure of matplotlib."""
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"machine": machine(), "rows": rows}, file, indent=1)
    if arguments.plot and installed("matplotlib"):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 5), layout="constrained")
        draw(rows, figure)
        figure.savefig(arguments.plot, dpi=120)


def machine() -> dict[str, Any]:
    """What figures depend on."""
    import torch

    with open("/proc/meminfo") as file:
        memory_kib = int(file.readline().split()[1])
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory_kib * 1024 / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu() -> str:
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def alternate(contenders: Sequence[T], repeat: int) -> Iterable[tuple[int, T]]:
    """(round, contender) for `repeat` rounds of all of them; every other round in the opposite order."""
    for at in range(repeat):
        for contender in contenders if at % 2 == 0 else reversed(contenders):
            yield at, contender


def in_a_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """What a function gives in a process that has done nothing else."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def installed(package: str, why: str = "") -> bool:
    """Whether a package is there; if not, says what is left out."""
    if importlib.util.find_spec(package) is not None:
        return True
    print(f"left out: {why or package} ({package} is not installed)", flush=True)
    return False


def header(*columns: str) -> None:
    """Print the head of a markdown table."""
    line(*columns)
    line(*("---" for _ in columns))


def line(*cells: object) -> None:
    """Print a line of a markdown table."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


class Peak:
    """A block, and the most memory that the process held while in it, above what it held before."""

    nbytes = 0

    def __enter__(self) -> Peak:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not be there to be used again, unseen
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak begins anew
        self._before = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.nbytes = _status("VmHWM") - self._before


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def moved_by_calls() -> dict[str, int]:
    """What this process has read and written by system calls on files, in bytes and calls."""
    with open("/proc/self/io") as file:
        return {key: int(value) for key, value in (line.split(":") for line in file)}
