"""How long it takes to save and load many small tensors, and what they take in the store.

    python -m benchmarks.small_tensors [--tensors N] [--bytes 48 256 ...] [--repeat N] [--folder PATH]

One process saves float32 tensors of one size with codec "zstd", and loads them. For comparison, reshard compresses all
of them (it stores tensors below `MIN_COMPRESSED_BYTES` raw), and `torch.distributed.checkpoint` and `torch.save` write
them as well. The contenders take turns. The seconds are medians.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed.checkpoint as dcp

import reshard
from benchmarks.common import Row, alternate, arguments_of, header, line, median, positive, write
from reshard.storage.writing import object_layout

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class SmallTensorContender:
    name: str
    save: Callable[[Tensors, Path], object]
    load: Callable[[Tensors, Path], object]


def save_compressed(state: Tensors, path: Path) -> None:
    with patch.object(object_layout, "MIN_COMPRESSED_BYTES", 0):
        reshard.save(state, path)


def dcp_save(state: Tensors, path: Path) -> None:
    dcp.save(state, checkpoint_id=path, no_dist=True)


def dcp_load(state: Tensors, path: Path) -> None:
    dcp.load(state, checkpoint_id=path, no_dist=True)


CONTENDERS = (
    SmallTensorContender("reshard", reshard.save, reshard.load),
    SmallTensorContender("reshard, all compressed", save_compressed, reshard.load),
    SmallTensorContender("dcp", dcp_save, dcp_load),
    SmallTensorContender("torch.save", torch.save, lambda state, path: torch.load(path)),
)


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())


def run(tensors: int, sizes: list[int], repeat: int, folder: str | None) -> list[Row]:
    """Return one row per size and contender."""
    header("bytes", "contender", "save, s", "load, s", "MB stored")
    rows: list[Row] = []
    for nbytes in sizes:
        state = {f"layers.{i}.weight": torch.randn(nbytes // 4) * 0.02 for i in range(tensors)}
        loaded = {name: torch.zeros_like(values) for name, values in state.items()}
        found: dict[str, list[tuple[float, float, int]]] = {contender.name: [] for contender in CONTENDERS}
        for _, contender in alternate(CONTENDERS, repeat):
            with tempfile.TemporaryDirectory(dir=folder) as parent:
                path = Path(parent, "saved")
                save_s = seconds(lambda: contender.save(state, path))  # noqa: B023
                load_s = seconds(lambda: contender.load(loaded, path))  # noqa: B023
                found[contender.name].append((save_s, load_s, size_of(path)))
                if contender.name != "torch.save":  # torch.load returns new tensors
                    assert all(loaded[name].equal(values) for name, values in state.items())
        for name, runs in found.items():
            save_s, load_s, stored = map(median, zip(*runs, strict=True))
            row: Row = {"bytes": nbytes, "tensors": tensors, "contender": name}
            row |= {"save_s": save_s, "load_s": load_s, "stored": stored}
            rows.append(row)
            line(nbytes, name, f"{row['save_s']:.2f}", f"{row['load_s']:.2f}", f"{row['stored'] / 1e6:.2f}")
    return rows


def draw(rows: list[Row], figure: Any) -> None:
    """Draw the seconds of a save and a load by the size of the tensors."""
    for axes, key in zip(figure.subplots(1, 2, sharey=True), ("save_s", "load_s"), strict=True):
        for name in dict.fromkeys(row["contender"] for row in rows):
            mine = [row for row in rows if row["contender"] == name]
            axes.plot([row["bytes"] for row in mine], [row[key] for row in mine], marker="o", label=name)
        axes.set_xscale("log")
        axes.set_xlabel("bytes of each tensor")
        axes.set_title(key.removesuffix("_s"))
        axes.set_ylim(bottom=0)
    figure.axes[0].set_ylabel(f"seconds for {rows[0]['tensors']} tensors")
    figure.axes[0].legend()


def main(argv: list[str] | None = None) -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--tensors", type=positive, default=10_000, help="(default: %(default)s)")
    parser.add_argument("--bytes", type=positive, nargs="+", default=[48, 512, 1020], help="of each tensor")
    parser.add_argument("--repeat", type=positive, default=3, help="(default: %(default)s)")
    parser.add_argument("--folder", help="where to write, such as /dev/shm (default: the folder of temporary files)")
    arguments = parser.parse_args(argv)
    warnings.filterwarnings("ignore", "torch.distributed is disabled")
    write(arguments, run(arguments.tensors, arguments.bytes, arguments.repeat, arguments.folder), draw)


if __name__ == "__main__":
    main()
