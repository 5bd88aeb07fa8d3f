"""Conversion by several ranks: they share the work, on a local disk and on object stores, and fail together."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fsspec.core import url_to_fs
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

import reshard
from benchmarks.common import Peak, in_a_fresh_process
from reshard import errors
from reshard.storage.stores import base as store_module
from reshard.storage.stores.local import LocalStore
from reshard.storage.stores.open import open_store
from reshard.storage.stores.testing import Call, RecordingStore
from tests.conftest import Place
from tests.conversion.samples import COMMITS, KIB, assert_clean, assert_converted, cut_small, names_in, save_native
from tests.integration.models import build, model
from tests.ranks import RankFailed, RankPool

pytestmark = pytest.mark.slow

FORMATS = ("reshard", "dcp", "safetensors")
MIB = 1024 * 1024
STORES = ["local", "moto", "moto by s3fs"]


def weights() -> dict[str, torch.Tensor]:
    """Return the full tensors of the model, by their names in the checkpoint."""
    return {f"model.{name}": values for name, values in model(seed=0).state_dict().items()}


def convert_rank(src: Any, dst: Any, options: dict[str, Any] | None = None, **arguments: Any) -> reshard.Report:
    with pytest.MonkeyPatch.context() as patch:
        cut_small(patch, unit=300 * KIB)
        return reshard.convert(
            src, dst, src_options=options, dst_options=options, max_file_bytes=100 * KIB, **arguments
        )


def convert_to(src: str, dst: str, format: str, options: dict[str, Any]) -> reshard.Report:
    return convert_rank(src, dst, options, format=format)


def save_by_dcp(uri: str, options: dict[str, Any]) -> None:
    state = {"model": build("fsdp", seed=0)}
    dcp.save(state, storage_writer=FsspecWriter(uri, sync_files=False, **options))


def assert_shared(reports: list[reshard.Report]) -> None:
    """Assert that each rank wrote something, and that all have the same report."""
    assert [report.rank for report in reports] == list(range(len(reports)))
    assert all(report.ranks == reports[0].ranks for report in reports)
    assert all(rank.bytes_written > 0 and rank.bytes_fetched > 0 for rank in reports[0].ranks)


@pytest.mark.parametrize("store_name", STORES)
def test_ranks_share_the_conversion_of_a_dcp_checkpoint(ranks: RankPool, place: Place) -> None:
    """Convert from a store to the same store, to every format and back."""
    uri, options = place
    ranks.run(3, save_by_dcp, f"{uri}/src", options)
    for src, dst, format in (
        ("src", "native", "reshard"),
        ("src", "hub", "safetensors"),
        ("native", "dcp", "dcp"),
        ("hub", "again", "reshard"),
    ):
        assert_shared(ranks.run(3, convert_to, f"{uri}/{src}", f"{uri}/{dst}", format, options))
        assert_converted(f"{uri}/{dst}", weights(), format, storage_options=options)
        store = open_store(f"{uri}/{dst}", options)
        assert_clean(set(store.list()), store, format)


def fail_on(src: str, dst: str, rank: int, method: str) -> str:
    def before(call: Call) -> None:
        if dist.get_rank() == rank and call.method == method and "reshard-convert" not in call.name:
            raise errors.AccessDeniedError("permission denied")

    with pytest.raises(errors.AccessDeniedError) as caught:
        convert_rank(src, RecordingStore(LocalStore(dst), before))
    return f"{caught.value.rank} {caught.value}"


@pytest.mark.parametrize("method", ["create", "write"])
def test_error_names_the_rank_on_all_ranks_and_the_next_run_continues(
    ranks: RankPool, tmp_path: Path, method: str
) -> None:
    src, dst = save_native({"model": model(seed=0).state_dict()}, tmp_path / "src"), tmp_path / "dst"
    messages = ranks.run(3, fail_on, str(src), str(dst), 1, method)
    assert messages == ["1 rank 1: permission denied"] * 3
    assert COMMITS["reshard"] not in names_in(dst)
    ranks.run(2, convert_to, str(src), str(dst), "reshard", {})
    assert_converted(dst, weights(), "reshard")
    assert_clean(names_in(dst), dst, "reshard")


def convert_slowly(src: str, dst: str) -> str:
    """Rank 1 fails immediately. The others wait for this, and write slowly."""

    def before(call: Call) -> None:
        if call.method != "create":
            return
        if dist.get_rank() == 1:
            Path(dst, "failed").touch()
            raise errors.AccessDeniedError("permission denied")
        while not Path(dst, "failed").exists():
            os.sched_yield()
        time.sleep(0.2)

    with pytest.raises(errors.AccessDeniedError) as caught:
        convert_rank(src, RecordingStore(LocalStore(dst), before), format="dcp")
    return str(caught.value)


def test_failed_rank_stops_the_others(ranks: RankPool, tmp_path: Path) -> None:
    src = save_native({str(i): torch.randn(400, 200) for i in range(60)}, tmp_path / "src")
    dst = tmp_path / "dst"
    dst.mkdir()
    messages = ranks.run(3, convert_slowly, str(src), str(dst))
    assert messages == ["rank 1: permission denied"] * 3
    assert len([name for name in names_in(dst) if name.endswith(".distcp")]) < 20


def die_on(src: str, dst: str, rank: int) -> None:
    def before(call: Call) -> None:
        if dist.get_rank() == rank and call.method == "write":
            os.kill(os.getpid(), signal.SIGKILL)

    convert_rank(src, RecordingStore(LocalStore(dst), before))


def test_another_number_of_ranks_continues_after_a_rank_died(tmp_path: Path) -> None:
    src, dst = save_native({"model": model(seed=0).state_dict()}, tmp_path / "src"), tmp_path / "dst"
    with RankPool() as pool:
        with pytest.raises(RankFailed, match="the process group broke, because rank"):
            pool.run(3, die_on, str(src), str(dst), 2)
        noted = {name for name in names_in(dst) if re.fullmatch(r"\.reshard-convert-\d+\.json", name)}
        assert noted
        reports = pool.run(2, convert_to, str(src), str(dst), "reshard", {})
    needed = sum(values.nbytes for values in weights().values())
    assert 0 < reports[0].total.bytes_needed < needed
    assert_converted(dst, weights(), "reshard")
    assert_clean(names_in(dst), dst, "reshard")


def convert_differently(src: str, folder: str, what: str) -> str:
    """Call convert with different arguments on each rank."""
    rank = dist.get_rank()
    differing: dict[str, dict[str, Any]] = {
        "codec": {"codec": ("zstd", "none")[rank]},
        "format": {"format": FORMATS[rank]},
        "include": {"include": ("*", "model")[rank]},
        "dtype": {"dtype": (None, torch.float16)[rank]},
    }
    dst = f"{folder}/dst" if what in differing else f"{folder}/dst-{rank}"
    with pytest.raises(errors.ArgumentError) as caught:
        reshard.convert(src, dst, **differing.get(what, {}))
    return str(caught.value)


@pytest.mark.parametrize("what", ["codec", "format", "include", "dtype", "destination"])
def test_different_arguments_on_ranks_raise(ranks: RankPool, tmp_path: Path, what: str) -> None:
    src = save_native({"model": {"w": torch.ones(3)}, "step": torch.tensor(1)}, tmp_path / "src")
    messages = ranks.run(2, convert_differently, str(src), str(tmp_path), what)
    assert (
        messages
        == ["the ranks passed different sources, destinations or arguments to convert: all ranks must pass the same"]
        * 2
    )
    assert {path.name for path in tmp_path.iterdir()} == {"src"}


@pytest.mark.filterwarnings("ignore:Sending a large body directly")  # from the client of GCS
@pytest.mark.parametrize("store_name", ["moto", "moto by s3fs", "seaweedfs", "gcs"])
def test_large_file_is_uploaded_in_parts(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MAX_HELD_BYTES", 6 * MIB)
    uri, options = place
    state = {"a": torch.randn(9, 1000, 1000), "b": torch.randn(7)}
    src = save_native(state, tmp_path / "src")
    reshard.convert(src, uri, format="safetensors", dst_options=options)
    assert_converted(uri, state, "safetensors", storage_options=options)
    filesystem, folder = url_to_fs(uri, **options)
    found = filesystem.info(f"{folder}/model-00001-of-00001.safetensors")
    assert found["size"] > 36_000_000
    if filesystem.protocol[0] == "s3":
        assert re.fullmatch(
            r'"[0-9a-f]{32}-[23]"', found["ETag"]
        )  # the ETag of a multipart upload ends with the number of parts


BUDGET = 32 * MIB


def make_large(folder: str, format: str) -> None:
    torch.manual_seed(0)
    state = {"large": torch.randn(5, 4096, 2048), **{str(i): torch.randn(2 * MIB) for i in range(12)}}
    reshard.save(state, f"{folder}/native", codec="none")
    if format != "reshard":
        reshard.convert(f"{folder}/native", f"{folder}/src", format=format)


def peak_of(folder: str, src: str, format: str) -> int:
    with Peak() as peak:
        reshard.convert(f"{folder}/{src}", f"{folder}/dst", format=format, budget_bytes=BUDGET)
    return peak.nbytes


@pytest.mark.parametrize(("src", "dst"), [("reshard", "safetensors"), ("dcp", "reshard")])
def test_memory_of_a_conversion_stays_near_the_budget(src: str, dst: str, tmp_path: Path) -> None:
    in_a_fresh_process(make_large, str(tmp_path), src)
    peak = in_a_fresh_process(peak_of, str(tmp_path), "native" if src == "reshard" else "src", dst)
    names = reshard.open(tmp_path / "dst").tensors
    assert sum(info.stored_bytes for info in names.values()) > 0.7 * 8 * BUDGET
    assert peak < BUDGET + 128 * MIB
