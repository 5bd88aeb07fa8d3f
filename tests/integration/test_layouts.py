"""Ranks save under one layout and load under another, for pairs of layouts in both directions."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor import Shard as TorchShard

import reshard
from reshard.errors import LayoutError, MissingTensorError
from reshard.testing import MemoryStore
from tests.conftest import STORES, Place
from tests.integration.models import build, local_values
from tests.ranks import RankFailed, RankPool

NamedLayout = tuple[str, int]
"""The name of a layout (see `models.py`), and the number of its ranks."""
PAIRS: list[tuple[NamedLayout, NamedLayout]] = [
    (("fsdp", 4), ("tp", 2)),
    (("fsdp", 3), ("tp", 5)),
    (("fsdp", 8), ("fsdp_tp", 4)),
    (("fsdp", 2), ("fsdp_tp", 6)),
    (("fsdp1", 4), ("tp", 3)),
    (("fsdp1", 2), ("fsdp", 5)),
    (("hsdp", 4), ("tp", 4)),
    (("hsdp", 6), ("fsdp_tp", 8)),
    (("plain", 1), ("fsdp", 4)),
    (("plain", 2), ("tp", 7)),
]
CASES = [case for a, b in PAIRS for case in ((a, b), (b, a))]


def save_rank(layout: str, uri: str, codec: str, options: dict[str, Any] | None = None) -> reshard.Report:
    return reshard.save({"model": build(layout, seed=0)}, uri, codec=codec, storage_options=options)


def load_rank(layout: str, uri: str, options: dict[str, Any] | None = None) -> reshard.Report:
    """Load into a model with other values, and compare with the saved model as torch shards it."""
    expected = local_values(build(layout, seed=0))
    state = build(layout, seed=1)
    before = local_values(state)
    assert any(not before[name].equal(value) for name, value in expected.items())
    report = reshard.load({"model": state}, uri, storage_options=options)
    after = local_values(state)
    assert after.keys() == expected.keys()
    for name, value in expected.items():
        assert after[name].equal(value), name
    assert report.local.bytes_needed == sum(value.nbytes for value in expected.values())
    return report


@pytest.mark.parametrize("codec", ["zstd", "none"])
@pytest.mark.parametrize(("saved", "loaded"), CASES, ids=lambda layout: f"{layout[0]}{layout[1]}")
def test_checkpoint_saved_under_one_layout_loads_under_another(
    ranks: RankPool, tmp_path: Path, saved: NamedLayout, loaded: NamedLayout, codec: str
) -> None:
    uri = str(tmp_path / "step-1")
    written = ranks.run(saved[1], save_rank, saved[0], uri, codec)
    read = ranks.run(loaded[1], load_rank, loaded[0], uri)
    assert [report.rank for report in read] == list(range(loaded[1]))
    assert all(report.ranks[0].bytes_written == written[0].ranks[0].bytes_written for report in written)
    assert all(report.total.bytes_fetched == read[0].total.bytes_fetched for report in read)


def test_replicated_tensors_are_written_once_and_distributed_over_ranks(ranks: RankPool, tmp_path: Path) -> None:
    uri = str(tmp_path / "step-1")
    report = ranks.run(4, save_rank, "plain", uri, "none")[0]
    whole = sum(value.nbytes for value in local_values(build("plain", seed=0)).values())
    assert report.total.bytes_needed == whole
    shares = [rank.bytes_written for rank in report.ranks]
    largest_tensor = 389 * 530 * 4
    assert max(shares) <= max(largest_tensor, whole / 4) * 1.1
    assert sum(share > 0 for share in shares) == 3, "two ranks write the large tensors, and rank 0 the small ones"


@pytest.mark.parametrize("store_name", [name for name in STORES if name != "memory"])  # ranks do not share memory
def test_save_and_load_through_each_store(ranks: RankPool, place: Place) -> None:
    uri, options = place
    ranks.run(3, save_rank, "fsdp", uri, "zstd", options)
    ranks.run(2, load_rank, "tp", uri, options)
    with pytest.raises(RankFailed, match="CheckpointExistsError: rank 0"):
        ranks.run(2, save_rank, "fsdp", uri, "zstd", options)


def strided(uri: str) -> None:
    """Save and load a strided shard that results from a view, without FSDP."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.arange(8.0)
    tensor = distribute_tensor(whole.reshape(2, 4), mesh, [TorchShard(1)]).view(8)
    assert isinstance(tensor, DTensor)
    assert type(tensor.placements[0]).__name__ == "_StridedShard"
    assert tensor.full_tensor().equal(whole)
    reshard.save({"w": tensor}, uri)
    assert reshard.open(uri).read("w").equal(whole)
    tensor.to_local().zero_()
    reshard.load({"w": tensor}, uri)
    assert tensor.full_tensor().equal(whole)


@pytest.mark.skipif(torch.__version__ < "2.12", reason="DTensor of torch 2.11 cannot reshape a strided shard")
def test_strided_shard_without_fsdp_is_saved_and_loaded(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, strided, str(tmp_path))


def load_tp_plan(uri: str) -> dict[str, Any]:
    state = build("tp", seed=1)
    reshard.load({"model": state}, uri)
    return local_values(state)


def test_load_rank_needs_no_process_group(ranks: RankPool, tmp_path: Path) -> None:
    """`load_rank` returns the local tensors of torch's tensor parallelism in a process without a process group."""
    uri = str(tmp_path / "step-1")
    ranks.run(3, save_rank, "fsdp", uri, "zstd")
    expected = ranks.run(4, load_tp_plan, uri)
    checkpoint = reshard.open(uri)
    layout = reshard.Layout({"tp": 4}, {"*.up": "colwise", "*.down": "rowwise"})
    plans = checkpoint.plan(layout)
    for rank in range(4):
        tensors = checkpoint.load_rank(layout, rank)
        assert tensors.keys() == {f"model.{name}" for name in expected[rank]}
        for name, value in expected[rank].items():
            assert tensors[f"model.{name}"].equal(value), name
        assert plans[rank].report.bytes_needed == sum(value.nbytes for value in expected[rank].values())


def layouts_of_device_meshes() -> tuple[reshard.layout.Mesh, str]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    layout = reshard.Layout(mesh, {"w": "colwise"})
    try:
        reshard.Layout(mesh["tp"], {"w": "colwise"})
    except reshard.errors.LayoutError as error:
        return layout.mesh, str(error)
    return layout.mesh, ""


def test_a_layout_accepts_a_device_mesh_of_all_ranks(ranks: RankPool) -> None:
    found = ranks.run(4, layouts_of_device_meshes)
    assert [mesh for mesh, _ in found] == [reshard.Mesh(("dp", "tp"), (2, 2))] * 4
    assert [bool(message) for _, message in found] == [False, False, True, True], "ranks 2 and 3 are not 0 and 1"
    assert "this mesh has the ranks [2, 3]: pass the sizes instead, as {'tp': 2}" in found[3][1]


def warnings_of_load_rank(uri: str) -> tuple[list[str], list[int]]:
    """Load a rank with a misspelt rule. Return what it logs, and the shape of the tensor that no rule matches."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign,assignment]
    logger = logging.getLogger("reshard.storage.checkpoint")
    logger.addHandler(handler)
    try:
        layout = reshard.Layout({"tp": dist.get_world_size()}, {"*.up": "colwise", "*.dwn": "rowwise"})
        tensors = reshard.open(uri).load_rank(layout, dist.get_rank())
    finally:
        logger.removeHandler(handler)
    down = next(tensor for name, tensor in tensors.items() if ".down" in name)
    return [record.getMessage() for record in records], list(down.shape)


def test_one_rank_logs_rules_that_match_no_tensor(ranks: RankPool, tmp_path: Path) -> None:
    uri = str(tmp_path / "step-1")
    ranks.run(2, save_rank, "fsdp", uri, "zstd")
    found = ranks.run(3, warnings_of_load_rank, uri)
    (message,) = found[0][0]
    assert message.startswith("rank 0: 1 of 2 patterns of the layout match no tensor of ")
    assert "'*.dwn'" in message
    assert [messages for messages, _ in found[1:]] == [[], []]
    assert len({tuple(shape) for _, shape in found}) == 1, "replicated"


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (reshard.Layout({"pp": 2}), "the layout has no stages, so every rank holds the tensors of all stages"),
        (reshard.Layout({"pp": 2}, stages={"a": 0, "c": 1}), r"1 of 2 names in the stages of the layout .*: 'c'"),
        (reshard.Layout({"pp": 2}, stages={"a": 0, "b": 1}), ""),
        (reshard.Layout({"pp": 1}), ""),
    ],
)
def test_layout_whose_stages_do_not_fit_is_logged(
    layout: reshard.Layout, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = MemoryStore()
    reshard.save({"a": torch.ones(2), "b": torch.ones(2)}, store)
    caplog.clear()
    reshard.open(store).load_rank(layout, 0)
    assert re.search(message, caplog.text) if message else not caplog.records


@pytest.mark.parametrize("method", ["load_rank", "plan"])
def test_stages_that_have_no_tensor_of_the_checkpoint_are_refused(method: str) -> None:
    store = MemoryStore()
    reshard.save({"layers.0.up": torch.ones(4, 4), "layers.1.up": torch.ones(4, 4)}, store)
    checkpoint = reshard.open(store)
    for stages in ({"layers.0": 0, "layers.1": 1}, {"layers.*": 1}):
        layout = reshard.Layout({"pp": 2}, stages=stages)
        with pytest.raises(LayoutError, match=r"none of the names in the stages .* is one of the 2 tensors"):
            checkpoint.load_rank(layout, 0) if method == "load_rank" else checkpoint.plan(layout)


def test_a_selection_may_have_no_rule_of_the_layout(caplog: pytest.LogCaptureFixture) -> None:
    """A part of a model may be loaded by itself, such as a norm."""
    store = MemoryStore()
    reshard.save({"up": torch.ones(4, 4), "norm": torch.ones(4), "head": torch.ones(4)}, store)
    checkpoint = reshard.open(store)
    layout = reshard.Layout({"tp": 2}, {"up": "colwise"})
    assert checkpoint.load_rank(layout, 0, include="norm")["norm"].equal(torch.ones(4))
    assert "no pattern of the layout matches a selected tensor, so none of them is sharded: 'norm'" in caplog.text
    assert [len(plan.reads) for plan in checkpoint.plan(layout, include=["norm", "head"])] == [2, 2]
    caplog.clear()
    assert checkpoint.load_rank(layout, 0, include=["norm", "up"])["up"].shape == (2, 4)
    assert not caplog.records
    in_stages = reshard.Layout({"pp": 2}, stages={"up": 0})
    assert checkpoint.load_rank(in_stages, 1, include="norm").keys() == {"norm"}
    with pytest.raises(LayoutError, match=r"no pattern of the layout \('wp'\) matches any of the 3 tensors"):
        checkpoint.load_rank(reshard.Layout({"tp": 2}, {"wp": "colwise"}), 0, include="norm")


def load_rank_with_a_wrong_pattern(uri: str) -> str:
    layout = reshard.Layout({"tp": dist.get_world_size()}, {"*.up": "colwise"})
    with pytest.raises(MissingTensorError) as caught:
        reshard.open(uri).load_rank(layout, dist.get_rank(), exclude="modle")
    return str(caught.value)


def test_every_rank_refuses_patterns_that_match_no_name(ranks: RankPool, tmp_path: Path) -> None:
    uri = str(tmp_path / "step-1")
    ranks.run(2, save_rank, "fsdp", uri, "zstd")
    messages = ranks.run(3, load_rank_with_a_wrong_pattern, uri)
    assert len(set(messages)) == 1
    assert "no name that matches 'modle'" in messages[0]
