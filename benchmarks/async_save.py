"""How long asynchronous saves stop training, how much they slow it down, and how much memory they take.

    python -m benchmarks.async_save [--contenders NAME ...] [--device cuda] [--rounds N] [--saves N] [--folder FOLDER]

4 FSDP ranks (gloo) hold the MLP of `fsdp_to_tp` in bf16 (537 MB). With `--device cuda`, one process without a process
group holds it on the device. The contenders take turns in the same processes, and every other round has the opposite
order. In each round a contender saves to a new folder while the ranks train another, small model, until the save has
ended on all ranks. The training step is a forward and backward pass of many small layers, an all-reduce of the
gradients, and an optimizer step, so it also needs the interpreter.

- first stop: seconds until the call returns on all ranks, in the first save of the processes
- stop: the same, median of the rounds
- plan: seconds of the stop in which the ranks agree on what each writes, median of the rounds; not for DCP
- slowdown: time per step while the save runs, divided by the time per step without a save, median of the rounds
- save s: seconds from the call until the checkpoint exists
- memory: of the process of a rank and of its writer process, in addition to that before the contender's first save,
  after 2 saves and after `--saves` more
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

import reshard
from benchmarks.common import Row, alternate, arguments_of, header, line, median, positive, write
from benchmarks.models import mlp, under
from tests.ranks import RankPool

RANKS = 4
LAYERS = 32
COLUMNS = (
    *("contender", "first stop s", "stop s", "of dcp-thread", "plan s", "slowdown", "save s"),
    *("MB after 2 saves", "MB after more saves"),
)
State = dict[str, Any]


class Running(Protocol):
    """A save that is running."""

    def done(self) -> bool: ...

    def result(self) -> object: ...


class Contender(Protocol):
    def save(self, state: State, folder: str) -> Running: ...

    def close(self) -> None: ...


class Reshard:
    def __init__(self, background: Any, codec: str, staging: Any = "blocking") -> None:
        self._options: dict[str, Any] = {"background": background, "codec": codec, "staging": staging}

    def save(self, state: State, folder: str) -> Running:
        return reshard.async_save(state, folder, **self._options)

    def close(self) -> None:
        reshard.release_memory()


class Dcp:
    """DCP with FileSystemWriter. By default it has a new stager for every save, as `dcp.async_save` creates it.

    It has a process group of its own, because its background thread would disturb the collectives of the training.
    """

    def __init__(self, kind: AsyncCheckpointerType, options: StagingOptions | None = None) -> None:
        self._kind = kind
        self._stager = DefaultStager(options) if options else None
        self._group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None

    def save(self, state: State, folder: str) -> Running:
        found = dcp.async_save(
            state,
            storage_writer=dcp.FileSystemWriter(folder),
            async_checkpointer_type=self._kind,
            async_stager=self._stager,
            process_group=self._group,
            no_dist=not dist.is_initialized(),
        )
        if isinstance(found, AsyncSaveResponse):
            found.staging_completion.result()
            return found.upload_completion
        assert isinstance(found, Future)
        return found

    def close(self) -> None:
        if self._stager is not None:
            self._stager.close()


CONTENDERS: dict[str, Callable[[bool], Contender]] = {
    "dcp-thread": lambda pinned: Dcp(AsyncCheckpointerType.THREAD),
    "dcp-process": lambda pinned: Dcp(AsyncCheckpointerType.PROCESS),
    "dcp-kept-stager": lambda pinned: Dcp(AsyncCheckpointerType.THREAD, StagingOptions(pinned, True, False, False)),
    "reshard-thread-none": lambda pinned: Reshard("thread", "none"),
    "reshard-process-none": lambda pinned: Reshard("process", "none"),
    "reshard-thread-zstd": lambda pinned: Reshard("thread", "zstd"),
    "reshard-process-zstd": lambda pinned: Reshard("process", "zstd"),
    "reshard-overlapped-zstd": lambda pinned: Reshard("process", "zstd", "overlapped"),
}


class Training:
    """Steps of a small model."""

    def __init__(self, device: str, layers: int = 24, dim: int = 192) -> None:
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU()) for _ in range(layers)]
        self._model = nn.Sequential(*blocks).to(device)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), foreach=False)
        self._batch = torch.randn(64, dim, device=device)
        self._on_device = device != "cpu"

    def step(self) -> None:
        self._optimizer.zero_grad()
        self._model(self._batch).square().mean().backward()
        if dist.is_initialized():
            gradients = torch.cat([p.grad.flatten() for p in self._model.parameters() if p.grad is not None])
            dist.all_reduce(gradients)
        self._optimizer.step()
        if self._on_device:
            torch.cuda.synchronize()

    def steps(self, seconds: float) -> float:
        """Train for some seconds, and return the seconds per step. All ranks make the same number of steps."""
        return self.while_running(lambda begin: time.perf_counter() - begin < seconds)[0]

    def while_running(self, goes_on: Callable[[float], bool]) -> tuple[float, int]:
        """Train while rank 0 or another rank wants to, and return the seconds per step and the number of steps."""
        begin = time.perf_counter()
        for count in itertools.count(1):
            self.step()
            if not _any(goes_on(begin)):
                return (time.perf_counter() - begin) / count, count
        raise AssertionError


def _any(value: bool) -> bool:
    if not dist.is_initialized():
        return value
    found = torch.tensor(int(value))
    dist.all_reduce(found)
    return bool(found)


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _max(value: float) -> float:
    if not dist.is_initialized():
        return value
    found = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def _resident() -> int:
    """Return the resident bytes of this process and its children, each page counted for one of the processes."""
    nbytes = 0
    for pid in (os.getpid(), *_children(os.getpid())):
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            nbytes += next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))
    return nbytes


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class Session:
    """The saves of one rank."""

    def __init__(self, folder: str, device: str, layers: int) -> None:
        self._folder = folder
        self._numbers = itertools.count()
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        model = mlp(seed=0, layers=layers).to(device)
        self._state: State = dict((under("fsdp", model) if dist.is_initialized() else model).state_dict())
        self._training = Training(device)
        self._training.steps(1.0)

    def time(self, contender: Contender) -> Row:
        """Save while training."""
        gc.collect()
        alone = self._training.steps(1.0)
        with self._new_folder() as to:
            begin = time.perf_counter()
            running = contender.save(self._state, to)
            stop_s = _max(time.perf_counter() - begin)
            during, _ = self._training.while_running(lambda _: not running.done())
            report = running.result()
            plan_s = report.local.seconds["plan"] if isinstance(report, reshard.Report) else 0.0
            save_s = _max(time.perf_counter() - begin)
            return {"stop": stop_s, "plan": plan_s, "slowdown": during / alone, "save_s": save_s}

    def save(self, contender: Contender) -> None:
        """Save without training."""
        with self._new_folder() as to:
            contender.save(self._state, to).result()

    @contextlib.contextmanager
    def _new_folder(self) -> Iterator[str]:
        folder = f"{self._folder}/{next(self._numbers)}"
        _barrier()
        yield folder
        _barrier()
        if self._rank == 0:
            shutil.rmtree(folder)


def run_rank(folder: str, names: list[str], device: str, layers: int, rounds: int, saves: int) -> list[Row]:
    """Return one row per contender."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        session = Session(folder, device, layers)
        contenders: dict[str, Contender] = {}
        rows: dict[str, Row] = {}
        for name in names:
            gc.collect()
            before = _resident()
            contenders[name] = CONTENDERS[name](device == "cuda")
            first = session.time(contenders[name])
            session.time(contenders[name])
            memory = _resident() - before
            for _ in range(saves):
                session.save(contenders[name])
            rows[name] = {"contender": name, "first_stop": first["stop"], "memory": memory}
            rows[name]["memory_later"] = _resident() - before
        timed: dict[str, list[Row]] = {name: [] for name in names}
        for _, name in alternate(names, rounds):
            timed[name].append(session.time(contenders[name]))
        for contender in contenders.values():
            contender.close()
    for name, row in rows.items():
        for key in ("stop", "plan", "slowdown", "save_s"):
            row[f"{key}_all"] = [one[key] for one in timed[name]]
            row[key] = median(row[f"{key}_all"])
    return list(rows.values())


def run(folder: str, names: list[str], device: str, layers: int, rounds: int, saves: int) -> list[Row]:
    """Return one row per contender."""
    header(*COLUMNS)
    arguments = folder, names, device, layers, rounds, saves
    if device == "cpu":
        with RankPool() as pool:
            rows: list[Row] = pool.run(RANKS, run_rank, *arguments, timeout_s=4 * 3600)[0]
    else:
        rows = run_rank(*arguments)
    base = next((row["stop"] for row in rows if row["contender"] == "dcp-thread"), None)
    for row in rows:
        line(
            *(row["contender"], f"{row['first_stop']:.3f}", f"{row['stop']:.3f}"),
            *(f"{row['stop'] / base:.2f}" if base else "", f"{row['plan']:.3f}" if row["plan"] else ""),
            *(f"{row['slowdown']:.2f}", f"{row['save_s']:.2f}"),
            *(f"{row['memory'] / 1e6:.0f}", f"{row['memory_later'] / 1e6:.0f}"),
        )
    return rows


def draw(rows: list[Row], figure: Any) -> None:
    """Draw bars of the stops and of the slowdowns."""
    for axes, key, label in zip(
        figure.subplots(1, 2, sharey=True), ("stop", "slowdown"), ("training stops, seconds", "time per step, times"),
        strict=True,
    ):  # fmt: skip
        colors = ["tab:green" if row["contender"].startswith("reshard") else "tab:gray" for row in rows]
        bars = axes.barh([row["contender"] for row in rows], [row[key] for row in rows], color=colors)
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        axes.margins(x=0.2)
        axes.set_xlabel(label, fontsize=8)
        axes.tick_params(labelsize=8)
    figure.axes[0].invert_yaxis()


def main(argv: list[str] | None = None) -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layers", type=positive, default=LAYERS, help="of 16.8 MB each (default: %(default)s)")
    parser.add_argument("--rounds", type=positive, default=5, help="timed saves (default: %(default)s)")
    parser.add_argument(
        "--saves", type=int, default=0, help="more saves, to see if memory grows (default: %(default)s)"
    )
    parser.add_argument("--folder", help="where the checkpoints are written (default: the system's temporary folder)")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rows = run(folder, arguments.contenders, arguments.device, arguments.layers, arguments.rounds, arguments.saves)
    write(arguments, rows, draw)


if __name__ == "__main__":
    main()
