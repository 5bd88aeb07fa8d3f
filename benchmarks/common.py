"""Functions that the benchmarks share: command line, alternating runs, peak memory, tables and files."""

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
    """Return a parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the rows and a description of the machine to this file")
    parser.add_argument("--plot", help="draw the rows into this PNG file (needs matplotlib)")
    return parser


def positive(text: str) -> int:
    """Parse a count on the command line."""
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {count}")
    return count


def write(arguments: argparse.Namespace, rows: list[Row], draw: Callable[[list[Row], Any], None]) -> None:
    """Write the files that the command line names. `draw` draws rows into a matplotlib figure."""
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"machine": machine(), "rows": rows}, file, indent=1)
    if arguments.plot and installed("matplotlib"):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 5), layout="constrained")
        draw(rows, figure)
        figure.savefig(arguments.plot, dpi=120)


def machine() -> dict[str, Any]:
    """Describe the machine that the figures were measured on."""
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
    """Yield (round, contender) for `repeat` rounds of all contenders. Every other round has the opposite order."""
    for at in range(repeat):
        for contender in contenders if at % 2 == 0 else reversed(contenders):
            yield at, contender


def in_a_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a new process, and return its result."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def installed(package: str, feature: str = "") -> bool:
    """Return whether a package is installed. If not, print what is skipped."""
    if importlib.util.find_spec(package) is not None:
        return True
    print(f"skipped: {feature or package} ({package} is not installed)", flush=True)
    return False


def header(*columns: str) -> None:
    """Print the header of a markdown table."""
    line(*columns)
    line(*("---" for _ in columns))


def line(*cells: object) -> None:
    """Print a line of a markdown table."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


class Peak:
    """Measure the peak memory of the process in a `with` block, minus its memory before the block."""

    nbytes = 0

    def __enter__(self) -> Peak:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # return freed memory, or its reuse in the block would not be measured
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # reset the peak
        self._before = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.nbytes = _status("VmHWM") - self._before


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def moved_by_calls() -> dict[str, int]:
    """Return the bytes and calls that this process has read and written so far, by system calls on files."""
    with open("/proc/self/io") as file:
        return {key: int(value) for key, value in (line.split(":") for line in file)}
