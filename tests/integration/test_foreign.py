"""Checkpoints of other formats, saved by real ranks with one layout and loaded by reshard with another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fsspec.core import url_to_fs
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

import reshard
from tests.conftest import Place
from tests.dcp_checkpoints import OfRank
from tests.integration.models import build, local_values, model
from tests.integration.test_layouts import load_rank
from tests.ranks import RankPool

Layout = tuple[str, int]
WRITERS: dict[str, Callable[[str], FileSystemWriter]] = {
    "torch.save": lambda uri: FileSystemWriter(uri, sync_files=False),
    "threads": lambda uri: FileSystemWriter(uri, sync_files=False, thread_count=3),
    "files": lambda uri: FileSystemWriter(uri, sync_files=False, single_file_per_rank=False),
    "zstd": lambda uri: FileSystemWriter(uri, sync_files=False, _extensions=[ZStandard()]),
    "safetensors": lambda uri: FileSystemWriter(
        uri, sync_files=False, serialization_format=SerializationFormat.SAFETENSORS
    ),
    "hugging face": lambda uri: HuggingFaceStorageWriter(uri, save_distributed=True),
}


def save_by_dcp(layout: str, uri: str, writer: str) -> None:
    dcp.save({"model": build(layout, seed=0)}, storage_writer=WRITERS[writer](uri))


def save_without_collectives(layout: str, uri: str) -> None:
    writer = OfRank(uri, dist.get_rank())
    dcp.save({"model": build(layout, seed=0)}, storage_writer=writer, use_collectives=False)


def save_to_store(layout: str, uri: str, options: dict[str, Any]) -> None:
    dcp.save({"model": build(layout, seed=0)}, storage_writer=FsspecWriter(uri, sync_files=False, **options))


def load_by_dcp(layout: str, uri: str) -> None:
    """Load with DCP's own planner, and compare with torch's sharding."""
    expected = local_values(build(layout, seed=0))
    state = build(layout, seed=1)
    before = local_values(state)
    assert any(not before[name].equal(value) for name, value in expected.items())
    dcp.load({"model": state}, storage_reader=reshard.StorageReader(uri))
    after = local_values(state)
    assert after.keys() == expected.keys()
    assert all(after[name].equal(value) for name, value in expected.items())


def named(layout: Layout) -> str:
    return f"{layout[0]}{layout[1]}"


@pytest.mark.parametrize("saved", [("fsdp", 4), ("fsdp_tp", 4), ("hsdp", 4)], ids=named)
def test_dcp_checkpoint_is_loaded_by_ranks(ranks: RankPool, tmp_path: Path, saved: Layout) -> None:
    uri = str(tmp_path / "step-1")
    ranks.run(saved[1], save_by_dcp, saved[0], uri, "torch.save")
    assert reshard.open(uri).info["files"] == 4
    for layout, count in (("tp", 2), ("tp", 3), ("fsdp_tp", 4), ("fsdp", 3)):
        reports = ranks.run(count, load_rank, layout, uri)
        assert [report.rank for report in reports] == list(range(count))
        ranks.run(count, load_by_dcp, layout, uri)


@pytest.mark.parametrize("writer", [writer for writer in WRITERS if writer != "torch.save"])
def test_every_option_of_the_dcp_writer_is_read(ranks: RankPool, tmp_path: Path, writer: str) -> None:
    uri = str(tmp_path / "step-1")
    ranks.run(4, save_by_dcp, "fsdp", uri, writer)
    ranks.run(3, load_rank, "tp", uri)
    ranks.run(4, load_rank, "fsdp_tp", uri)


def test_dcp_checkpoint_saved_without_collectives_is_loaded(ranks: RankPool, tmp_path: Path) -> None:
    uri = str(tmp_path / "step-1")
    ranks.run(4, save_without_collectives, "fsdp", uri)
    assert {path.name for path in Path(uri).iterdir() if path.suffix == ".metadata"} == {
        f"__{rank}.metadata" for rank in range(4)
    }
    ranks.run(3, load_rank, "tp", uri)
    ranks.run(4, load_by_dcp, "fsdp_tp", uri)


def test_rank_reads_little_more_than_its_own_rows(ranks: RankPool, tmp_path: Path) -> None:
    """The shards may also be split along the other dimension: the rows of tp are then columns of the shards."""
    uri = str(tmp_path / "step-1")
    ranks.run(4, save_by_dcp, "fsdp", uri, "torch.save")
    slices = 4 * len(reshard.open(uri).tensors) * 1024
    metadata = (Path(uri) / ".metadata").stat().st_size
    for report in ranks.run(2, load_rank, "tp", uri):
        local = report.local
        assert local.bytes_needed <= local.bytes_fetched
        assert local.bytes_fetched <= 1.25 * local.bytes_needed + slices + metadata


@pytest.mark.parametrize("store_name", ["moto", "moto by s3fs", "seaweedfs", "gcs", "azurite"])
def test_dcp_checkpoint_in_a_store_is_loaded(ranks: RankPool, place: Place) -> None:
    uri, options = place
    ranks.run(4, save_to_store, "fsdp", uri, options)
    ranks.run(2, load_rank, "tp", uri, options)
    ranks.run(4, load_rank, "fsdp_tp", uri, options)


def upload(path: Path, place: Place, name: str) -> str:
    uri, options = place
    filesystem, folder = url_to_fs(uri, **options)
    filesystem.put_file(str(path), f"{folder}/{name}")
    return f"{uri}/{name}"


def whole_model() -> dict[str, torch.Tensor]:
    return {f"model.{name}": values for name, values in model(seed=0).state_dict().items()}


@pytest.mark.filterwarnings("ignore:Sending a large body directly")  # raised by the client that uploads
@pytest.mark.parametrize("store_name", ["local", "moto", "moto by s3fs", "seaweedfs", "gcs", "azurite"])
def test_single_files_in_a_store_are_loaded(ranks: RankPool, place: Place, store_name: str, tmp_path: Path) -> None:
    uri, options = place
    if store_name == "local":
        Path(uri).mkdir()
    save_file(whole_model(), tmp_path / "model")
    torch.save({"model": model(seed=0).state_dict()}, tmp_path / "state")
    files = [
        upload(tmp_path / "model", place, "model.safetensors"),
        upload(tmp_path / "state", place, "state.pt"),
        upload(tmp_path / "state", place, "bare"),
    ]
    for file in files:
        assert set(reshard.open(file, storage_options=options).tensors) == set(whole_model())
        ranks.run(2, load_rank, "tp", file, options)
    ranks.run(3, load_rank, "tp", uri, options)  # the folder has a safetensors file
