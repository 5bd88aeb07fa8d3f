"""Ranks that disagree about the checkpoint they open, about a name, or about replicated values."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, ShardOrderEntry, TensorMeta
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

import reshard
from reshard import errors
from reshard.storage.writing import save_plan
from tests.ranks import RankPool


def sharded(values: torch.Tensor) -> DTensor:
    return distribute_tensor(values, init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(0)])


# Ranks that open different checkpoints


def write(format: str, location: Path, value: float) -> str:
    """Write a checkpoint whose elements all have one value, and return its location."""
    state = {"x": torch.full((8, 4), value)}
    if format == "reshard":
        reshard.save(state, location)
    elif format == "torch":
        torch.save(state, f"{location}.pt")
        return f"{location}.pt"
    elif format == "dcp":
        dcp.save(state, checkpoint_id=location, no_dist=True)
    else:
        reshard.save(state, f"{location}-native")
        reshard.convert(f"{location}-native", location, format="safetensors")
    return str(location)


def load_own(locations: list[str]) -> tuple[str, float]:
    rank = dist.get_rank()
    x = sharded(torch.zeros(8, 4))
    try:
        reshard.load({"x": x}, locations[rank])
        return "", 0.0
    except errors.CheckpointError as error:
        own = f"{type(error).__name__}: {error}"
    with pytest.raises(CheckpointException, match=r"the ranks opened 2 different checkpoints"):
        dcp.load({"x": x}, storage_reader=reshard.StorageReader(locations[rank]))
    return own, float(x.to_local().abs().sum())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("format", ["reshard", "dcp", "safetensors", "torch"])
def test_ranks_that_open_different_checkpoints_raise(format: str, ranks: RankPool, tmp_path: Path) -> None:
    a, b = (write(format, tmp_path / name, value) for name, value in (("a", 0.0), ("b", 100.0)))
    for found, changed in ranks.run(3, load_own, [a, b, a]):
        assert found.startswith("ArgumentError: the ranks opened 2 different checkpoints: ranks 0, 2: ")
        assert a in found
        assert "; rank 1: " in found
        assert b in found
        assert changed == 0


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("format", ["reshard", "dcp", "safetensors", "torch"])
def test_ranks_may_open_copies_of_one_checkpoint(format: str, ranks: RankPool, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    a = Path(write(format, tmp_path / "one" / "c", 3.0))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    b = tmp_path / "two" / a.name
    assert ranks.run(2, load_own, [str(a), str(b)]) == [("", 0.0)] * 2


# Ranks that disagree about a name


def values_by_rank(kind: str) -> Any:
    rank = dist.get_rank()
    by_kind: dict[str, Callable[[], tuple[Any, Any]]] = {
        "dtypes of shards": lambda: (sharded(torch.ones(4, 2).bfloat16()), sharded(torch.ones(4, 2).half())),
        "shapes": lambda: (torch.ones(3), torch.ones(4)),
        "dtypes": lambda: (torch.ones(3), torch.ones(3, dtype=torch.float64)),
        "tensor and value": lambda: (torch.ones(3), 3),
        "value and dict": lambda: (5, {"k": 1}),
        "dict and value": lambda: ({"k": torch.ones(1)}, torch.ones(1)),
        "list and dict": lambda: ([torch.ones(1)], {"k": torch.ones(1)}),
        "position and key": lambda: ([torch.ones(1)], {0: torch.ones(1)}),
        "types of keys": lambda: ({1: torch.ones(1)}, {"1": torch.ones(1)}),
        "empty dict and value": lambda: ({}, 5),
        "plain and sharded": lambda: (torch.ones(4, 2), sharded(torch.ones(4, 2))),
        "equal keys": lambda: ({True: {"a": 1}}, {1: {"b": 1}}),
        "equal float keys": lambda: ({1.0: {"a": 1}}, {1: {"b": 1}}),
        "global shapes": lambda: (sharded(torch.ones(4, 2)), sharded(torch.ones(6, 2))),
    }
    pair = by_kind[kind]()
    return pair[rank % 2]


KINDS = [
    "dtypes of shards", "shapes", "dtypes", "tensor and value", "value and dict", "dict and value", "list and dict",
    "position and key", "types of keys", "empty dict and value", "plain and sharded", "equal keys",
    "equal float keys", "global shapes",
]  # fmt: skip


def save_differently(kinds: list[str], folder: str) -> list[str]:
    messages = []
    for kind in kinds:
        value = values_by_rank(kind)
        with pytest.raises(errors.ArgumentError) as caught:
            reshard.save({"a": torch.ones(1), "x": value}, f"{folder}/{kind}")
        messages.append(str(caught.value))
    return messages


def test_ranks_that_disagree_about_a_name_raise(ranks: RankPool, tmp_path: Path) -> None:
    found = ranks.run(2, save_differently, KINDS, str(tmp_path))
    assert found[0] == found[1]
    for kind, message in zip(KINDS, found[0], strict=True):
        assert "the ranks disagree about 'x" in message, (kind, message)
        assert "rank 0 has" in message, (kind, message)
        assert "rank 1 has" in message, (kind, message)
        assert not list(tmp_path.rglob("*.shard")), kind


def by_dcp(kinds: list[str], folder: str) -> list[str]:
    messages = []
    for kind in kinds:
        value = values_by_rank(kind)
        with pytest.raises(CheckpointException) as caught:
            dcp.save({"a": torch.ones(1), "x": value}, storage_writer=reshard.StorageWriter(f"{folder}/{kind}"))
        messages.append(str(caught.value))
    return messages


def test_storage_writer_raises_if_ranks_disagree(ranks: RankPool, tmp_path: Path) -> None:
    """Cases at which DCP's own planner fails are excluded, and those that it drops: types of keys, and empty dicts."""
    lost = {"types of keys", "equal keys", "equal float keys", "empty dict and value"}
    kinds = [kind for kind in KINDS if kind not in {"tensor and value", "plain and sharded", "global shapes", *lost}]
    for kind, message in zip(kinds, ranks.run(2, by_dcp, kinds, str(tmp_path))[0], strict=True):
        assert "the ranks disagree about 'x" in message, (kind, message)
    assert not list(tmp_path.rglob("*.shard"))


def save_by_dcp(uri: str) -> str:
    local = torch.ones(2, 2).to(torch.bfloat16 if dist.get_rank() == 0 else torch.float16)
    mesh = init_device_mesh("cpu", (2,))
    x = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
    with pytest.raises(CheckpointException) as caught:
        dcp.save({"x": x}, storage_writer=reshard.StorageWriter(uri))
    return str(caught.value)


def test_storage_writer_raises_if_ranks_disagree_about_a_dtype(ranks: RankPool, tmp_path: Path) -> None:
    for message in ranks.run(2, save_by_dcp, str(tmp_path / "c")):
        assert "the ranks disagree about 'x': rank 0 has a sharded tensor of bfloat16" in message
    assert not (tmp_path / "c" / "manifest.reshard").exists()


def save_other_placements(uri: str) -> str:
    mesh = init_device_mesh("cpu", (2,))
    x = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])
    if dist.get_rank() == 1:
        x = DTensor.from_local(torch.ones(4, 2), mesh, [Shard(1)], run_check=False)
    with pytest.raises(errors.CheckpointError) as caught:
        reshard.save({"x": x}, uri)
    return str(caught.value)


def test_different_placements_of_one_tensor_raise(ranks: RankPool, tmp_path: Path) -> None:
    for message in ranks.run(2, save_other_placements, str(tmp_path / "c")):
        assert "'x', which has 16: its shards overlap or leave gaps" in message
    assert not list(tmp_path.rglob("*.shard"))
    with pytest.raises(errors.CheckpointNotFoundError):
        reshard.open(tmp_path / "c")


def save_stages(uri: str) -> tuple[tuple[str, ...], Any]:
    """Pipeline ranks hold different names, and the state of an optimizer may be empty on one rank."""
    rank = dist.get_rank()
    state = {
        f"stage{rank}": {"w": torch.full((2,), float(rank))},
        "optimizer": {"state": {} if rank == 0 else {0: {"step": torch.tensor(1.0)}}, "groups": [{"lr": 0.1}]},
    }
    report = reshard.save(state, uri)
    return report.differing, str(reshard.open(uri).state_dict()) if rank == 0 else ""


def test_ranks_may_hold_different_names(ranks: RankPool, tmp_path: Path) -> None:
    differing, found = ranks.run(2, save_stages, str(tmp_path / "c"))[0]
    assert differing == ()
    expected = {
        "optimizer": {"groups": [{"lr": 0.1}], "state": {0: {"step": torch.tensor(1.0)}}},
        "stage0": {"w": torch.zeros(2)},
        "stage1": {"w": torch.ones(2)},
    }
    assert found == str(expected)


def save_lists(uri: str) -> list[list[str]]:
    rank = dist.get_rank()
    one, many = [torch.ones(1)], [torch.ones(1)] * 3
    states: tuple[dict[str, Any], ...] = (
        {"a": {"history": many if rank else one}, "same": many},
        {"a": {"b": [{"x": 1}, {"x": 1}] if rank else [{"x": 1}]}},
        {"a": {f"rank{rank}": many if rank else one}},
        {"a": many} if rank else {"b": one},
    )
    logged: list[list[str]] = []
    with patch.object(save_plan.logger, "warning", lambda text, *values: logged[-1].append(text % values)):
        for state in states:
            logged.append([])
            assert reshard.save(state, uri, overwrite=True).differing == ()
    return logged


def test_lists_of_different_lengths_are_reported(ranks: RankPool, tmp_path: Path) -> None:
    found, of_rank_1 = ranks.run(2, save_lists, str(tmp_path / "c"))
    assert of_rank_1 == [[]] * 4
    for messages, name in zip(found[:2], ("a.history", "a.b"), strict=True):
        assert messages[0].startswith("1 lists have different lengths on different ranks, and a load returns the longe")
        assert repr(name) in messages[0]
    assert found[2:] == [[], []]


# State that belongs together


def random_state(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    return {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": np.random.get_state()}


def save_states(uri: str) -> tuple[str, ...]:
    rank = dist.get_rank()
    norm = nn.BatchNorm1d(8)
    norm(torch.full((4, 8), float(rank)) + torch.arange(4.0)[:, None])
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    replica = DTensor.from_local(torch.full((4,), float(rank)), mesh, [Replicate()], run_check=False)
    state = {
        "random": random_state(rank),
        "norm": norm.state_dict(),
        "many": {str(i): torch.full((100,), float(rank)) for i in range(20)},
        "dtensor": {str(i): replica for i in range(4)},
        "same": torch.ones(3),
        "large": torch.ones(100_000),
        "diverged": torch.full((300, 200), float(rank)).bfloat16(),
        "columns": (torch.arange(60_000.0) + rank).reshape(200, 300).T,
        "sharded": sharded(torch.arange(8.0).reshape(4, 2)),
        "loader": {"epoch": rank, "position": [rank, rank]},
    }
    return reshard.save(state, uri).differing


def test_state_that_belongs_together_comes_from_one_rank(ranks: RankPool, tmp_path: Path) -> None:
    differing = ranks.run(4, save_states, str(tmp_path / "c"))
    assert len(set(differing)) == 1
    expected = {"random.torch", "random.python", "random.numpy", "norm.running_mean", "loader.epoch", "loader.position"}
    expected |= {"diverged", "columns"}
    assert expected <= {*differing[0]}
    assert not {"same", "large", "sharded", "norm.weight", "norm.num_batches_tracked"} & {*differing[0]}
    found = reshard.open(tmp_path / "c").state_dict()
    own = random_state(0)
    assert found["random"]["torch"].equal(own["torch"])
    assert found["random"]["python"] == own["python"]
    assert found["random"]["numpy"][1].tolist() == own["numpy"][1].tolist()
    norm = nn.BatchNorm1d(8)
    norm(torch.zeros(4, 8) + torch.arange(4.0)[:, None])
    for name, tensor in norm.state_dict().items():
        assert found["norm"][name].equal(tensor), name
    assert all(tensor.eq(0).all() for part in ("many", "dtensor") for tensor in found[part].values())
    assert found["loader"] == {"epoch": 0, "position": [0, 0]}


def warned(uri: str) -> list[str]:
    import logging

    messages: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger = logging.getLogger("reshard")
    listener = Listener(logging.WARNING)
    logger.addHandler(listener)
    try:
        reshard.save({"seed": dist.get_rank(), "same": 1, "w": torch.full((2,), float(dist.get_rank()))}, uri)
    finally:
        logger.removeHandler(listener)
    return messages


def test_differing_values_are_logged_once_with_their_names(ranks: RankPool, tmp_path: Path) -> None:
    first, *others = ranks.run(3, warned, str(tmp_path / "c"))
    assert len(first) == 1
    assert "2 values differ between ranks" in first[0]
    assert "'seed'" in first[0]
    assert "'w'" in first[0]
    assert others == [[], []]


# DTensors with a shard order, or with several local shards


def ordered(full: torch.Tensor, mesh: DeviceMesh, order: tuple[int, ...], dim: int) -> DTensor:
    """Return a DTensor that several mesh dimensions split along one dimension, in a given order."""
    local = full
    for mesh_dim in order:
        local = local.chunk(mesh.size(mesh_dim), dim)[mesh.get_local_rank(mesh_dim)]
    meta = TensorMeta(full.shape, full.stride(), full.dtype)
    spec: Any = DTensorSpec(mesh, (Shard(dim),) * mesh.ndim, meta, shard_order=(ShardOrderEntry(dim, order),))
    return DTensor(local.clone(), spec, requires_grad=False)


def save_and_load_ordered(folder: str) -> list[list[float]]:
    mesh = init_device_mesh("cpu", (2, 2))
    found = []
    for number, (shape, dim) in enumerate((((8,), 0), ((12, 3), 0), ((3, 8), 1))):
        full = torch.arange(float(np.prod(shape))).reshape(shape)
        for order in ((1, 0), (0, 1)):
            x = ordered(full, mesh, order, dim)
            assert x.full_tensor().equal(full)
            uri = f"{folder}/{number}-{order[0]}"
            reshard.save({"x": x}, uri)
            assert reshard.open(uri).read("x").equal(full)
            for other in ((1, 0), (0, 1)):
                destination = ordered(torch.zeros_like(full), mesh, other, dim)
                reshard.load({"x": destination}, uri)
                assert destination.to_local().equal(ordered(full, mesh, other, dim).to_local())
            found.append(x.to_local().flatten().tolist())
    x = ordered(torch.arange(8.0), mesh, (1, 0), 0)
    calls: list[Callable[[], Any]] = [
        lambda: dcp.save({"x": x}, storage_writer=reshard.StorageWriter(f"{folder}/dcp")),
        lambda: dcp.load({"x": x}, storage_reader=reshard.StorageReader(f"{folder}/0-0")),
    ]
    for call in calls:
        with pytest.raises(CheckpointException, match=r"'x' is split .*Use reshard\.load and reshard\.save"):
            call()
    return found


def test_dtensors_with_a_shard_order(ranks: RankPool, tmp_path: Path) -> None:
    found = ranks.run(4, save_and_load_ordered, str(tmp_path))
    assert [rank[0] for rank in found] == [[0, 1], [4, 5], [2, 3], [6, 7]]


def partial(uri: str) -> list[str]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.ones(4)
    reshard.save({"m": {"x": whole}}, uri)
    x = DTensor.from_local(whole, mesh, [Partial()], run_check=False)
    messages = []
    calls: list[Callable[[], Any]] = [
        lambda: reshard.save({"m": {"x": x}}, f"{uri}-2"),
        lambda: reshard.load({"m": {"x": x}}, uri),
    ]
    for call in calls:
        with pytest.raises(errors.LayoutError) as caught:
            call()
        messages.append(str(caught.value))
    return messages


def test_partial_placements_are_refused_by_name(ranks: RankPool, tmp_path: Path) -> None:
    for messages in ranks.run(2, partial, str(tmp_path / "c")):
        assert ["'m.x' has the placement Partial" in message for message in messages] == [True, True], messages


def wrapped(values: torch.Tensor) -> DTensor:
    """Return a DTensor. Each rank holds two shards of columns, in a LocalShardsWrapper."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    columns = values.shape[1] // (2 * world)
    begins = [(2 * rank + i) * columns for i in range(2)]
    local = LocalShardsWrapper([values[:, b : b + columns].clone() for b in begins], [(0, b) for b in begins])
    meta = TensorMeta(values.shape, values.stride(), values.dtype)
    return DTensor(local, DTensorSpec(mesh, (Shard(1),), meta), requires_grad=False)


def save_and_load_wrapped(uri: str) -> None:
    values = torch.arange(48.0).reshape(6, 8)
    reshard.save({"x": wrapped(values)}, f"{uri}-a")
    dcp.save({"x": wrapped(values)}, storage_writer=reshard.StorageWriter(f"{uri}-b"))
    for name in "ab":
        assert reshard.open(f"{uri}-{name}").read("x").equal(values)
        for load in (
            lambda state, name=name: reshard.load(state, f"{uri}-{name}"),
            lambda state, name=name: dcp.load(state, storage_reader=reshard.StorageReader(f"{uri}-{name}")),
        ):
            destination = wrapped(torch.zeros(6, 8))
            load({"x": destination})
            expected: Any = wrapped(values)._local_tensor
            found: Any = destination._local_tensor
            for one, other in zip(found.local_shards(), expected.local_shards(), strict=True):
                assert one.equal(other)


def test_local_shards_wrapper_is_saved_and_loaded(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, save_and_load_wrapped, str(tmp_path / "c"))


def save_on_submeshes(folder: str) -> dict[str, tuple[str, ...]]:
    """Save tensors whose names mean different tensors on two pipeline stages, each sharded over its own ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "dp"))
    own = mesh["dp"]
    stage = mesh.get_local_rank("stage")
    found = {}
    for case, value in (("different", float(stage)), ("same", 1.0)):
        for size in (30, 40_000):
            state = {
                "sharded": distribute_tensor(torch.full((size,), value), own, [Shard(0)]),
                f"own.{stage}": distribute_tensor(torch.full((size,), value), own, [Shard(0)]),
                "everywhere": sharded(torch.ones(size)),
            }
            saved = reshard.save(state, f"{folder}/{case}-{size}")
            again = reshard.async_save(state, f"{folder}/async-{case}-{size}").result()
            assert saved.differing == again.differing
            found[f"{case} {size}"] = saved.differing
    return found


def test_sharded_tensors_that_differ_between_submeshes_are_reported(ranks: RankPool, tmp_path: Path) -> None:
    for found in ranks.run(4, save_on_submeshes, str(tmp_path)):
        for case, differing in found.items():
            assert differing == (("sharded",) if case.startswith("different") else ()), case


def load_own_stage(uri: str) -> tuple[list[str], list[str]]:
    """Load a pipeline stage. Return its unexpected keys, and what rank 0 logs about them."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("reshard.storage.load")
    logger.addHandler(handler)
    try:
        rank = dist.get_rank()
        state: dict[str, Any] = {"model": {f"s{rank}": {"w": torch.ones(3)}}}
        if rank == 0:
            state["optimizer"] = {"a": torch.ones(1), "late": torch.ones(1), "stage1": {}}
        reshard.save({**state, "optimizer": state.get("optimizer", {"stage1": {"m": torch.ones(1)}})}, uri)
        if rank == 0:
            del state["optimizer"]["late"]
        report = reshard.load(state, uri)
        return list(report.unexpected_keys), messages
    finally:
        logger.removeHandler(handler)


def test_names_of_other_pipeline_stages_are_not_unexpected(ranks: RankPool, tmp_path: Path) -> None:
    found = ranks.run(3, load_own_stage, str(tmp_path))
    for keys, _ in found:
        assert keys == ["optimizer.late", "optimizer.stage1.m"]
    [message] = found[0][1]
    assert message.startswith("rank 0: 2 names of the checkpoint are not in the state dict: 'optimizer.late'")
    assert [messages for _, messages in found[1:]] == [[], []]
