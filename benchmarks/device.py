"""Save from and load into the memory of one device, next to the other libraries that are installed.

    python -m benchmarks.device --folder /dev/shm/reshard [--device cuda] [--layers 8] [--rounds 4] [--cases NAME ...]

One process holds a bf16 model with Llama's shapes: 4.5 GB with 8 layers. The files are in the page cache if the folder
is on tmpfs. All cases run once per round, in turns, and loaded values are compared with the saved ones. With
`--device cpu`, the same cases load to the host: run it with `taskset` for different numbers of cores.

- s: seconds, median of the rounds. The first round is not counted: it page-locks memory.
- GB/s: bytes of the values (of one rank for "rank of TP 4") divided by seconds
- of peer: GB/s divided by that of fastsafetensors (loads), or of DCP with 16 threads (saves)
- page-locked MB: what reshard has page-locked
- device MB: the most memory of the device in use, beyond what was in use before and the loaded tensors. It is sampled
  every 2 ms, and includes what nvCOMP allocates. No other process must use the device.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

import reshard
from benchmarks.common import Row, alternate, arguments_of, header, installed, line, median, positive, write
from benchmarks.shapes import TP_PLAN, transformer
from reshard.storage.reading.device.device import cuda_device
from reshard.storage.reading.device.ring import RING
from reshard.storage.runtime.devices import synchronize
from reshard.storage.runtime.pinned import save_buffers

COLUMNS = ("case", "s", "GB/s", "of peer", "page-locked MB", "device MB")
State = dict[str, torch.Tensor]
LOAD_PEER, SAVE_PEER = "load fastsafetensors", "save dcp, 16 threads"
TARGETS = {"save reshard, none": "none", "save reshard, zstd": "zstd", "save dcp": "dcp", SAVE_PEER: "dcp-16"}
"""The folders that saves write."""


class Bench:
    """The cases, and the model and the files that they use.

    Args:
        folder: where the checkpoints are written.
        device: where the tensors are.
        shapes: the names and shapes of the model's tensors.
    """

    def __init__(self, folder: Path, device: torch.device, shapes: dict[str, tuple[int, ...]]) -> None:
        self.folder = folder
        self.device = device
        generator = torch.Generator(device).manual_seed(0)
        self.state = {
            name: (torch.randn(shape, device=device, generator=generator) * 0.02).bfloat16()
            for name, shape in shapes.items()
        }
        self.layout = reshard.Layout({"tp": 4}, TP_PLAN)
        self.cases: dict[str, Callable[[], Any]] = {
            "save reshard, none": lambda: self._save("none"),
            "save reshard, zstd": lambda: self._save("zstd"),
            "save dcp": lambda: self._save_dcp("dcp", 1),
            SAVE_PEER: lambda: self._save_dcp("dcp-16", 16),
            "load reshard, none": lambda: self._load("none"),
            "load reshard, zstd": lambda: self._load("zstd"),
            "load reshard, zstd without nvCOMP": self._load_without_nvcomp,
            "load reshard, safetensors": lambda: self._load("model.safetensors"),
            "load reshard, dcp": lambda: self._load("dcp"),
            "rank of TP 4, none": lambda: self._rank("none"),
            "rank of TP 4, zstd": lambda: self._rank("zstd"),
            "rank of TP 4, safetensors": lambda: self._rank("model.safetensors"),
            "load dcp": self._load_dcp,
            "load safetensors": self._load_safetensors,
            LOAD_PEER: self._load_fastsafetensors,
            "load runai-model-streamer": self._load_runai,
        }
        if device.type != "cuda" or cuda_device(device).decompressor is None:
            del self.cases["load reshard, zstd without nvCOMP"]
        if not installed("fastsafetensors"):
            del self.cases[LOAD_PEER]
        if not installed("runai_model_streamer"):
            del self.cases["load runai-model-streamer"]

    def write_files(self) -> None:
        """Write what the loads read."""
        safetensors.torch.save_file(self.state, self.folder / "model.safetensors")
        for codec in ("none", "zstd"):
            self._save(codec)
        self._save_dcp("dcp", 1)
        self._save_dcp("dcp-16", 16)

    def run(self, name: str) -> Row:
        """Run one case, and compare what it loaded."""
        if name in TARGETS:
            shutil.rmtree(self.folder / TARGETS[name])
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        before = self._memory_in_use()
        with self._peak_memory() as peaks:
            begin = time.perf_counter()
            found = self.cases[name]()
            synchronize(self.device)
            seconds = time.perf_counter() - begin
        peak = max(peaks)
        loaded = sum(tensor.nbytes for tensor in (found or self.state).values())
        if found is not None:
            self._check(name, found)
        extra = max(0, peak - before - (0 if found is None else loaded))
        pinned = RING.held_bytes + save_buffers.held_bytes if "reshard" in name or "rank" in name else 0
        return {"case": name, "seconds": seconds, "nbytes": loaded, "pinned": pinned, "device_bytes": extra}

    def _check(self, name: str, found: State) -> None:
        expected = self.state
        if name.startswith("rank"):
            parts = {key: self.layout.local(key, tensor.shape, 1) for key, tensor in self.state.items()}
            expected = {key: self.state[key][part.boxes[0].slices] for key, part in parts.items()}
        for key, tensor in expected.items():
            if not torch.equal(found[key].to(self.device), tensor):
                raise AssertionError(f"{name} loaded other values for {key!r}")

    def _memory_in_use(self) -> int:
        if self.device.type != "cuda":
            return 0
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free

    @contextlib.contextmanager
    def _peak_memory(self) -> Iterator[list[int]]:
        """Sample the memory in use while the block runs."""
        samples, stopped = [self._memory_in_use()], threading.Event()

        def sample() -> None:
            while not stopped.wait(0.002):
                samples.append(self._memory_in_use())

        thread = threading.Thread(target=sample)
        if self.device.type == "cuda":
            thread.start()
        try:
            yield samples
        finally:
            stopped.set()
            if thread.ident is not None:
                thread.join()
            samples.append(self._memory_in_use())

    def _fresh(self) -> State:
        return {name: torch.empty_like(tensor) for name, tensor in self.state.items()}

    def _save(self, codec: str) -> None:
        reshard.save(self.state, self.folder / codec, codec=codec)

    def _save_dcp(self, name: str, threads: int) -> None:
        writer = dcp.FileSystemWriter(self.folder / name, thread_count=threads, single_file_per_rank=threads == 1)
        with _quietly():
            dcp.save(self.state, storage_writer=writer, no_dist=True)

    def _load(self, name: str) -> State:
        loaded = self._fresh()
        reshard.load(loaded, self.folder / name)
        return loaded

    def _load_without_nvcomp(self) -> State:
        with mock.patch.object(cuda_device(self.device), "decompressor", None):
            return self._load("zstd")

    def _rank(self, name: str) -> State:
        return reshard.open(self.folder / name).load_rank(self.layout, 1, device=self.device)

    def _load_dcp(self) -> State:
        loaded = self._fresh()
        with _quietly():
            dcp.load(loaded, storage_reader=dcp.FileSystemReader(self.folder / "dcp"), no_dist=True)
        return loaded

    def _load_safetensors(self) -> State:
        found = safetensors.torch.load_file(self.folder / "model.safetensors", device=str(self.device))
        if self.device.type == "cpu":  # the tensors are parts of the file, which has not been read
            return {name: tensor.clone() for name, tensor in found.items()}
        return found

    def _load_fastsafetensors(self) -> State:
        library = importlib.import_module("fastsafetensors")
        loader = library.SafeTensorsFileLoader(library.SingleGroup(), self.device, nogds=True)
        loader.add_filenames({0: [str(self.folder / "model.safetensors")]})
        files = loader.copy_files_to_device()
        try:
            return {name: files.get_tensor(name).clone() for name in files.key_to_rank_lidx}
        finally:
            files.close()
            loader.close()

    def _load_runai(self) -> State:
        with importlib.import_module("runai_model_streamer").SafetensorsStreamer() as streamer:
            streamer.stream_files([str(self.folder / "model.safetensors")], device="cpu")
            return {name: tensor.to(self.device, copy=True) for name, tensor in streamer.get_tensors()}


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Ignore DCP's warnings that there is no process group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def summary(rows: list[Row]) -> list[Row]:
    """Return the medians of each case, with the ratio to its peer."""
    by_case: dict[str, list[Row]] = {}
    for row in rows:
        by_case.setdefault(row["case"], []).append(row)
    found = []
    for runs in by_case.values():
        counted = runs[1:] or runs
        seconds = median([run["seconds"] for run in counted])
        last = max(counted, key=lambda run: run["device_bytes"])
        found.append({**last, "seconds": seconds, "gb_per_s": last["nbytes"] / seconds / 1e9})
    speeds = {row["case"]: row["gb_per_s"] for row in found}
    for row in found:
        peer = speeds.get(SAVE_PEER if row["case"].startswith("save") else LOAD_PEER)
        row["of_peer"] = row["gb_per_s"] / peer if peer else None
    return found


def draw(rows: list[Row], figure: Any) -> None:
    axes = figure.subplots()
    axes.barh([row["case"] for row in rows], [row["gb_per_s"] for row in rows])
    axes.set_xlabel("GB/s")
    axes.invert_yaxis()


def main(argv: list[str] | None = None) -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder, on tmpfs for a warm cache")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=positive, default=8)
    parser.add_argument("--dim", type=positive, default=4096)
    parser.add_argument("--rounds", type=positive, default=4, help="the first one is not counted")
    parser.add_argument("--cases", nargs="+", help="only these")
    arguments = parser.parse_args(argv)
    folder: Path = arguments.folder / "device"
    folder.mkdir(parents=True)
    try:
        rows = summary(_rows(folder, arguments))
    finally:
        shutil.rmtree(folder)
    header(*COLUMNS)
    for row in rows:
        ratio = "" if row["of_peer"] is None else f"{row['of_peer']:.2f}"
        sizes = (f"{row[key] / 1e6:.0f}" for key in ("pinned", "device_bytes"))
        line(row["case"], f"{row['seconds']:.3f}", f"{row['gb_per_s']:.2f}", ratio, *sizes)
    write(arguments, rows, draw)


def _rows(folder: Path, arguments: argparse.Namespace) -> list[Row]:
    dim = arguments.dim
    shapes = transformer(dim, 7 * dim // 2, dim // 4, arguments.layers, 31 * dim)
    device = torch.device(arguments.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    bench = Bench(folder, device, shapes)
    bench.write_files()
    cases = arguments.cases or list(bench.cases)
    return [bench.run(case) for _, case in alternate(cases, arguments.rounds)]


if __name__ == "__main__":
    main()
