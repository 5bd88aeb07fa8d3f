"""Each benchmark runs on little data and writes its rows and its picture. Speed is not tested."""

from __future__ import annotations

import json
import time
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest

from benchmarks import (
    async_save,
    coalescing,
    codec,
    cooperative,
    coordinator,
    device,
    foreign,
    fsdp_to_tp,
    lazy_weights,
    manager_calls,
    many_ranks,
    memory,
    overhead,
    small_tensors,
)
from tests.proxy import Link, linked, traffic
from tests.ranks import RankPool
from tests.servers import Server

pytestmark = pytest.mark.slow


@pytest.fixture
def pools(ranks: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the benchmarks use the ranks of the tests, which are running already, without ending them."""

    class SharedPool:
        def __enter__(self) -> RankPool:
            return ranks

        def __exit__(self, *_: object) -> None: ...

    for module in (async_save, foreign, fsdp_to_tp, manager_calls, overhead):
        monkeypatch.setattr(module, "RankPool", SharedPool)


def rows_of(benchmark: Any, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Run a benchmark, check that it writes a picture, and return the rows that it writes."""
    written, picture = folder / "rows.json", folder / "plot.png"
    benchmark.main([*arguments, "--json", str(written), "--plot", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(written.read_text())
    assert found["machine"]["cores"] >= 1
    rows: list[dict[str, Any]] = found["rows"]
    return rows


@pytest.mark.usefixtures("pools")
def test_fsdp_to_tp(tmp_path: Path) -> None:
    few = ("--contenders", "dcp", "reshard-none", "reshard-zstd", "--layers", "1", "--repeat", "1")
    by = {row["contender"]: row for row in rows_of(fsdp_to_tp, tmp_path, "--stores", "local", *few)}
    assert by["reshard-zstd"]["load_read"] < by["reshard-none"]["load_read"] < by["dcp"]["load_read"]


@pytest.mark.usefixtures("pools")
def test_cooperative(tmp_path: Path) -> None:
    few = ("--layers", "1", "--repeat", "1", "--folder", str(tmp_path))
    rows = rows_of(cooperative, tmp_path, "--cases", "hsdp", "local", *few)
    by = {(row["case"], row["mode"]): row for row in rows}
    assert by["hsdp", "True"]["bytes"] < 0.7 * by["hsdp", "False"]["bytes"]
    assert ("local", "auto") in by


@pytest.mark.usefixtures("pools")
def test_many_ranks(tmp_path: Path) -> None:
    few = ("--ranks", "2", "4", "--tensors", "3", "--repeat", "1", "--folder", str(tmp_path))
    rows = rows_of(many_ranks, tmp_path, *few)
    assert len(rows) == 2 * len(many_ranks.CALLS) * len(many_ranks.NAMES)
    assert all(row["bytes"] > 0 for row in rows)


def test_coordinator(tmp_path: Path) -> None:
    rows = rows_of(coordinator, tmp_path, "--ranks", "4", "64", "--tensors", "3", "--folder", str(tmp_path))
    assert [row["ranks"] for row in rows] == [4, 64, 4, 4, 64, 64]
    assert rows[1]["manifest"] > 4 * rows[0]["manifest"]


@pytest.mark.usefixtures("pools")
def test_async_save(tmp_path: Path) -> None:
    names = "dcp-thread", "reshard-thread-none", "reshard-process-zstd"
    few = ("--layers", "1", "--rounds", "1", "--saves", "1", "--folder", str(tmp_path))
    by = {row["contender"]: row for row in rows_of(async_save, tmp_path, "--contenders", *names, *few)}
    assert list(by) == list(names)
    assert all(row["stop"] <= row["save_s"] for row in by.values())
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.mark.usefixtures("pools")
def test_device(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    arguments = ["--device", "cpu", "--layers", "1", "--dim", "128", "--rounds", "1", "--folder", str(folder)]
    found = rows_of(device, tmp_path, *arguments)
    cases = {row["case"] for row in found}
    assert {"save reshard, zstd", "load reshard, none", "rank of TP 4, safetensors", "load dcp"} <= cases
    assert all(row["gb_per_s"] > 0 for row in found)
    assert not list(folder.iterdir())


def test_foreign(tmp_path: Path) -> None:
    few = ("--tables", "seconds", "--stores", "local", "--layers", "1", "--repeat", "1")
    (row,) = rows_of(foreign, tmp_path, *few)
    assert len(row["dcp_all"]) == len(row["reshard_all"]) == 1


def test_codec(tmp_path: Path) -> None:
    few = ("--codecs", "reshard zstd", "zstd-1")
    rows = rows_of(codec, tmp_path, "--mb", "1", "--repeat", "1", "--samples", "normal", "tokens", *few)
    ratios = {(row["values"], row["dtype"], row["codec"]): row["ratio"] for row in rows}
    assert ratios["N(0, 0.02²)", "bfloat16", "reshard zstd"] < ratios["N(0, 0.02²)", "bfloat16", "zstd-1"] < 1


def test_coalescing(tmp_path: Path) -> None:
    rows = rows_of(coalescing, tmp_path, "--cases", "0.3B, fsdp 8 → tp 4")
    assert [row["over_read"] for row in rows if row["max_gap_bytes"] == 0] == [0]
    assert min(row["requests"] for row in rows) < rows[0]["requests"]


def test_lazy_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"DIM": 1024, "HIDDEN": 2048, "VOCABULARY": 1024, "EXPERT_HIDDEN": 1024}.items():
        monkeypatch.setattr(lazy_weights, name, size)
    rows = rows_of(lazy_weights, tmp_path, "--layers", "1")
    ratios = {(row["model"], row["saved_as"]): row["ratio"] for row in rows if row["table"] == "bytes"}
    assert ratios["dense, TP 4", "reshard zstd"] <= 0.70
    assert ratios["dense, TP 4", "safetensors"] <= 1.05
    shares = [row["share"] for row in rows if row["table"] == "bytes" and row["model"] == "8 experts, EP 4"]
    assert len(shares) == 3
    assert max(shares) <= 0.26
    assert [row["tensors"] for row in rows if row["table"] == "recording"] == [1002]


def test_memory(tmp_path: Path) -> None:
    few = ("--mb", "8", "--budgets-mb", "4", "--tensors", "1", "--contenders", "reshard-none")
    (row,) = rows_of(memory, tmp_path, "--stores", "local", *few)
    assert row["load_peak"] >= 0


@pytest.mark.usefixtures("pools")
def test_overhead(tmp_path: Path) -> None:
    few = ("--ranks", "2", "--layers", "1", "--matrices", "1", "--repeat", "1")
    rows = rows_of(overhead, tmp_path, "--stores", "local", *few)
    bare = {"preadv", "preadv, kept", "preadv, kept, verified", "preadv, verified, copied"}
    assert {row["contender"] for row in rows} == {*bare, "reshard none", "bare loop", "reshard, one process"}


@pytest.mark.usefixtures("pools")
def test_manager_calls(tmp_path: Path) -> None:
    (row,) = rows_of(manager_calls, tmp_path, "--ranks", "2", "--calls", "20", "--requests", "1")
    assert row["steps"] >= 1


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_small_tensors(tmp_path: Path) -> None:
    few = ("--tensors", "100", "--bytes", "48", "--repeat", "1", "--folder", str(tmp_path))
    stored = {row["contender"]: row["stored"] for row in rows_of(small_tensors, tmp_path, *few)}
    assert stored["reshard"] < stored["reshard, all compressed"] < stored["dcp"]


def test_link_has_the_given_latency_and_bandwidth_and_counts_traffic(seaweedfs: Server) -> None:
    place = seaweedfs.place(uuid.uuid4().hex)
    with linked(seaweedfs.endpoint, Link(round_trip_s=0.05, bytes_per_s=1e6)) as (endpoint, counts):
        filesystem = fsspec.filesystem("s3", **seaweedfs.through(endpoint).options)
        filesystem.pipe_file(f"{place}/warm", b"x")
        before, begin = traffic(counts), time.monotonic()
        filesystem.pipe_file(f"{place}/data", b"x" * 300_000)
        seen, took = traffic(counts) - before, time.monotonic() - begin
    assert took > 0.05 + 0.25
    assert seen.requests == 1
    assert seen.sent > 300_000 > seen.received > 0
