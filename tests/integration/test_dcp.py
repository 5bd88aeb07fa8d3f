"""reshard's StorageWriter and StorageReader, used with all features of DCP."""

from __future__ import annotations

import dataclasses
import io
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import reshard
from reshard.errors import BusyError, CorruptCheckpointError, UnsupportedValueError
from reshard.storage.formats.native.manifest import MANIFEST_NAME
from reshard.storage.stores.local import LocalStore
from reshard.storage.stores.memory import MemoryStore
from reshard.storage.stores.testing import Call, RecordingStore
from tests.integration.models import Mlp, build, local_values
from tests.ranks import RankPool
from tests.samples import Custom


def full(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the full tensors, on every rank."""
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def convert_fsdp_to_tp(uri: str) -> None:
    """Run the conversion test of PyTorch's own test suite with reshard's writer and reader."""
    world = dist.get_world_size()
    torch.manual_seed(0)
    fsdp = FullyShardedDataParallel(Mlp(8, 16), use_orig_params=True, device_id=torch.device("cpu"))
    with FullyShardedDataParallel.state_dict_type(fsdp, StateDictType.SHARDED_STATE_DICT):
        saved = fsdp.state_dict()
    dcp.save(saved, storage_writer=reshard.StorageWriter(uri))
    with FullyShardedDataParallel.summon_full_params(fsdp):
        expected = {name: value.clone() for name, value in fsdp.named_parameters()}

    torch.manual_seed(1)
    tp = parallelize_module(
        Mlp(8, 16), init_device_mesh("cpu", (world,)), {"up": ColwiseParallel(), "down": RowwiseParallel()}
    )
    state = tp.state_dict()
    before = full(state)
    assert all(not before[name].equal(value) for name, value in expected.items())
    dcp.load(state, storage_reader=reshard.StorageReader(uri))
    tp.load_state_dict(state)
    after = full(dict(tp.named_parameters()))
    assert all(after[name].equal(value) for name, value in expected.items())


def test_conversion_test_of_pytorch(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, convert_fsdp_to_tp, str(tmp_path / "x"))
    ranks.run(4, convert_fsdp_to_tp, str(tmp_path / "x"))


def save_by_dcp(layout: str, uri: str) -> None:
    dcp.save({"model": build(layout, seed=0)}, storage_writer=reshard.StorageWriter(uri))


def load_by_dcp(layout: str, uri: str) -> None:
    expected = local_values(build(layout, seed=0))
    state = build(layout, seed=1)
    reader = reshard.StorageReader(uri)
    dcp.load({"model": state}, storage_reader=reader)
    after = local_values(state)
    assert all(after[name].equal(value) for name, value in expected.items())
    assert reader.report is not None
    assert reader.report.bytes_fetched > 0
    assert reader.report.rank == dist.get_rank()


@pytest.mark.parametrize(
    ("saved", "loaded"), [(("fsdp", 3), ("tp", 5)), (("tp", 2), ("fsdp", 4)), (("hsdp", 4), ("fsdp1", 2))]
)
def test_dcp_saves_and_loads_under_different_layouts(
    ranks: RankPool, tmp_path: Path, saved: tuple[str, int], loaded: tuple[str, int]
) -> None:
    uri = str(tmp_path)
    ranks.run(saved[1], save_by_dcp, saved[0], uri)
    ranks.run(loaded[1], load_by_dcp, loaded[0], uri)


def refuse_by_dcp(uri: str) -> None:
    with pytest.raises(CheckpointException, match=r"split unevenly by FSDP over TP.*Use reshard\.load"):
        dcp.load({"model": build("fsdp_tp", seed=1)}, storage_reader=reshard.StorageReader(uri))
    with pytest.raises(CheckpointException):
        dcp.save({"model": build("fsdp_tp", seed=1)}, storage_writer=reshard.StorageWriter(f"{uri}-2"))


def test_layout_that_dcps_planner_gets_wrong_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    """With 13 rows under FSDP 3 x TP 2, the planner assigns rows to ranks that do not hold them."""
    ranks.run(2, save_by_dcp, "fsdp", str(tmp_path / "x"))
    ranks.run(6, refuse_by_dcp, str(tmp_path / "x"))
    assert not (tmp_path / "x-2" / MANIFEST_NAME).exists()
    ranks.run(4, load_by_dcp, "fsdp_tp", str(tmp_path / "x"))


class App:
    """A Stateful: a sharded model and its optimizer, which uses DCP's get_state_dict and set_state_dict."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = Mlp(6, 10)
        fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01 * (seed + 1), amsgrad=True)
        self.step = 0

    def train(self) -> None:
        self.model(torch.randn(4, 6)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.step = state["step"]


def save_app(uri: str, by_dcp: bool) -> dict[str, Any]:
    app = App(seed=0)
    for _ in range(3):
        app.train()
    if by_dcp:
        dcp.save({"app": app}, storage_writer=reshard.StorageWriter(uri))
    else:
        reshard.save({"app": app}, uri)
    return whole(app)


def load_app(uri: str, by_dcp: bool, warm: bool) -> dict[str, Any]:
    app = App(seed=1)
    if warm:
        app.train()
    if by_dcp:
        dcp.load({"app": app}, storage_reader=reshard.StorageReader(uri))
    else:
        reshard.load({"app": app}, uri)
    return whole(app)


def whole(app: App) -> dict[str, Any]:
    model, optimizer = get_state_dict(app.model, app.optimizer)
    moments = {
        f"{name}.{key}": value.full_tensor() if isinstance(value, DTensor) else value
        for name, values in cast(dict[str, Any], optimizer["state"]).items()
        for key, value in values.items()
    }
    return {"step": app.step, "lr": cast(Any, optimizer["param_groups"])[0]["lr"], **full(model), **moments}


@pytest.mark.parametrize("by_dcp", [True, False])
@pytest.mark.parametrize("warm", [True, False])
def test_stateful_with_optimizer_is_loaded_on_another_world_size(
    ranks: RankPool, tmp_path: Path, by_dcp: bool, warm: bool
) -> None:
    uri = str(tmp_path)
    saved = ranks.run(3, save_app, uri, by_dcp)[0]
    loaded = ranks.run(2, load_app, uri, by_dcp, warm)[0]
    assert saved.keys() == loaded.keys()
    assert saved["step"] == loaded["step"] == 3
    for name, value in saved.items():
        assert torch.equal(torch.as_tensor(loaded[name]), torch.as_tensor(value)), name


def save_async(uri: str) -> None:
    state: dict[str, Any] = {"model": build("fsdp", seed=0), "step": 5}
    expected = local_values(state["model"])
    kind = AsyncCheckpointerType.THREAD
    response = dcp.async_save(state, storage_writer=reshard.StorageWriter(uri), async_checkpointer_type=kind)
    for value in state["model"].values():
        (value.to_local() if isinstance(value, DTensor) else value).zero_()
    assert isinstance(response, Future)
    response.result()
    loaded: dict[str, Any] = {"model": build("fsdp", seed=1), "step": 0}
    reshard.load(loaded, uri)
    after = local_values(loaded["model"])
    assert all(after[name].equal(value) for name, value in expected.items())
    assert loaded["step"] == 5


def test_async_save_stores_the_values_at_the_time_of_the_call(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, save_async, str(tmp_path))


def save_async_in_a_process(uri: str) -> None:
    state = {"w": torch.arange(1000.0), "step": 5}
    kind = AsyncCheckpointerType.PROCESS
    response = dcp.async_save(state, storage_writer=reshard.StorageWriter(uri), async_checkpointer_type=kind)
    assert isinstance(response, Future)
    response.result()
    loaded: dict[str, Any] = {"w": torch.zeros(1000), "step": 0}
    reshard.load(loaded, uri)
    assert loaded["w"].equal(state["w"])


def test_async_save_in_another_process(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, save_async_in_a_process, str(tmp_path))


def step_by_step(folder: str) -> list[float]:
    """Save each step to a new location, with a cached plan and the same writer."""
    state = build("fsdp", seed=0)
    writer = reshard.StorageWriter(f"{folder}/0")
    for step in range(3):
        for value in local_values(state):
            tensor = state[value]
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).fill_(step)
        planner = DefaultSavePlanner(enable_plan_caching=True)
        dcp.save(state, checkpoint_id=f"{folder}/{step}", storage_writer=writer, planner=planner)
    SavePlanner._cached_save_plan.clear()
    SavePlanner._cached_all_plans.clear()
    SavePlanner._cached_global_plan.clear()
    SavePlanner._cached_metadata.clear()
    SavePlanner._cached_final_save_plan.clear()
    means = []
    reader = reshard.StorageReader(f"{folder}/0")
    for step in range(3):
        dcp.load(state, checkpoint_id=f"{folder}/{step}", storage_reader=reader)
        values = local_values(state)
        assert all((value == step).all() for value in values.values())
        means.append(float(values["scale"]))
    return means


def test_writer_is_reused_with_cached_plans_and_new_checkpoint_ids(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(2, step_by_step, str(tmp_path)) == [[0.0, 1.0, 2.0]] * 2


def save_balanced(uri: str) -> list[int]:
    """Save many replicas of the same size, as plain tensors and as replicated DTensors."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state: dict[str, Any] = {f"plain.{i}": torch.full((64, 64), float(i)) for i in range(16)}
    state |= {f"dtensor.{i}": distribute_tensor(torch.full((64, 64), float(i)), mesh) for i in range(16)}
    metadata = dcp.save(state, storage_writer=reshard.StorageWriter(uri, codec="none"))
    return [rank["bytes_needed"] for rank in metadata.storage_data]


def test_replicas_are_written_once_and_balanced(ranks: RankPool, tmp_path: Path) -> None:
    shares = ranks.run(4, save_balanced, str(tmp_path))[0]
    assert shares == [8 * 64 * 64 * 4] * 4


def test_partial_load_without_process_group() -> None:
    store = MemoryStore()
    state: dict[str, Any] = {"a": torch.arange(6.0), "n": {"step": 3, "names": ["x", "y"], "when": (1, None)}}
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.save(state, storage_writer=reshard.StorageWriter(store), no_dist=True)
    more: dict[str, Any] = {"a": torch.zeros(6), "new": torch.ones(2), "n": {"step": 0, "names": [], "when": None}}
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.load(
            more,
            storage_reader=reshard.StorageReader(store),
            planner=DefaultLoadPlanner(allow_partial_load=True),
            no_dist=True,
        )
    assert more["a"].equal(state["a"])
    assert more["new"].equal(torch.ones(2))
    assert more["n"] == state["n"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_reshard_and_dcp_load_each_others_checkpoints() -> None:
    store = MemoryStore()
    state: dict[str, Any] = {"t": torch.randn(3, 4), "o": {"lr": 0.1, "betas": (0.9, 0.95), "blob": b"\0\xff"}}
    empty: dict[str, Any] = {"t": torch.zeros(3, 4), "o": {"lr": 0, "betas": None, "blob": b""}}
    reshard.save(state, store)
    dcp.load(empty, storage_reader=reshard.StorageReader(store))
    assert empty["t"].equal(state["t"])
    assert empty["o"] == state["o"]

    dcp.save(state, storage_writer=reshard.StorageWriter(store))
    empty = {"t": torch.zeros(3, 4), "o": {"lr": 0, "betas": None, "blob": b""}}
    reshard.load(empty, store)
    assert empty["t"].equal(state["t"])
    assert empty["o"] == state["o"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_unsafe_pickle_does_not_reach_dcps_unpickler() -> None:
    store = MemoryStore()
    state: dict[str, Any] = {"when": Custom(1), "t": torch.zeros(2)}
    dcp.save(state, storage_writer=reshard.StorageWriter(store))
    loaded: dict[str, Any] = {"when": None, "t": torch.ones(2)}
    with pytest.raises(CheckpointException, match=r"UnsafeValueError: .*'when'.*allow_pickle=True"):
        dcp.load(loaded, storage_reader=reshard.StorageReader(store))
    assert loaded["when"] is None
    dcp.load(loaded, storage_reader=reshard.StorageReader(store, allow_pickle=True))
    assert loaded["when"] == state["when"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_dcp_overwrites_and_old_objects_are_removed() -> None:
    store = MemoryStore()
    for value in (1.0, 2.0):
        dcp.save({"t": torch.full((4,), value)}, storage_writer=reshard.StorageWriter(store))
    assert reshard.open(store).read("t").equal(torch.full((4,), 2.0))
    assert len(store.content) == 2
    with pytest.raises(CheckpointException, match=r"CheckpointExistsError: .*overwrite=True"):
        dcp.save({"t": torch.zeros(4)}, storage_writer=reshard.StorageWriter(store, overwrite=False))
    assert reshard.open(store).read("t").equal(torch.full((4,), 2.0))


def test_model_of_meta_tensors_is_materialised(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, save_by_dcp, "fsdp", str(tmp_path))
    ranks.run(2, load_meta, str(tmp_path))


def load_meta(uri: str) -> None:
    """DCP allocates memory for meta tensors, and reshard's reader fills it."""
    with torch.device("meta"):
        small: nn.Module = Mlp(3, 13)
    fully_shard(small)
    state = {"model": {f"small.{name}": value for name, value in small.state_dict().items()}}
    dcp.load(state, storage_reader=reshard.StorageReader(uri))
    expected = local_values(build("fsdp", seed=0))
    after = local_values(state["model"])
    assert all(value.equal(expected[name]) for name, value in after.items())


def test_validate_checkpoint_id_checks_if_the_uri_can_be_opened() -> None:
    assert reshard.StorageWriter.validate_checkpoint_id("memory://x")
    assert not reshard.StorageReader.validate_checkpoint_id("nosuch://x")
    with pytest.raises(ValueError, match="codec must be 'zstd' or 'none'"):
        reshard.StorageWriter("memory://x", codec="lzma")


def save_without_collectives(uri: str) -> None:
    with pytest.raises(reshard.errors.ArgumentError, match="use_collectives=True"):
        dcp.save({"t": torch.zeros(1)}, storage_writer=reshard.StorageWriter(uri), use_collectives=False)


def test_save_without_collectives_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, save_without_collectives, str(tmp_path))
    assert not (tmp_path / MANIFEST_NAME).exists()


class ChangingPlanner(DefaultSavePlanner):
    """A planner that passes on other objects than those of the state dict, and data of its own."""

    def __init__(self, change: Callable[[WriteItem, Any], Any] = lambda item, value: value) -> None:
        super().__init__()
        self._change = change

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        return self._change(write_item, super().transform_object(write_item, object))

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = super().create_global_plan(all_plans)
        return plans, dataclasses.replace(metadata, planner_data={**metadata.planner_data, "mine": "hello"})


def raw_bytes(item: WriteItem, value: Any) -> Any:
    return io.BytesIO(b"raw") if item.type is WriteItemType.BYTE_IO else value


def no_tensor(item: WriteItem, value: Any) -> Any:
    return value if item.type is WriteItemType.BYTE_IO else [1.0]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (raw_bytes, "'n' cannot be stored: the planner's resolve_data returned BytesIO instead of an io.BytesIO with"),
        (no_tensor, "'t' cannot be stored: the planner's resolve_data returned list instead of a tensor"),
    ],
)
def test_what_a_planner_returns_is_checked(change: Any, message: str, tmp_path: Path) -> None:
    state = {"t": torch.ones(2), "n": 5}
    with pytest.raises(CheckpointException) as caught:
        dcp.save(state, storage_writer=reshard.StorageWriter(tmp_path / "c"), planner=ChangingPlanner(change))
    (error,) = caught.value.failures.values()
    assert isinstance(error[0], UnsupportedValueError)
    assert message in str(error[0])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_data_of_a_planner_that_is_not_saved_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dcp.save({"n": {"a": 5}}, storage_writer=reshard.StorageWriter(tmp_path), planner=ChangingPlanner())
    assert "the planner's data 'mine' is not saved" in caplog.text
    assert reshard.StorageReader(tmp_path).read_metadata().planner_data == {"n.a": ("n", "a")}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_deep_nesting_is_refused_by_name(tmp_path: Path) -> None:
    state: dict[str, Any] = {"t": torch.ones(2)}
    for _ in range(120):
        state = {"x": state}
    with pytest.raises(CheckpointException, match=r"more than 100 dicts and lists are nested at 'x\.x\.x'"):
        dcp.save(state, storage_writer=reshard.StorageWriter(tmp_path))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_writer_that_still_writes_refuses_another_save(tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def wait(call: Call) -> None:
        if call.method == "write":
            begun.set()
            go_on.wait(60)

    writer = reshard.StorageWriter(RecordingStore(LocalStore(tmp_path / "first"), wait))
    first = dcp.async_save({"t": torch.ones(2)}, storage_writer=writer, no_dist=True)
    assert isinstance(first, Future)
    assert begun.wait(60)
    second = dcp.async_save(
        {"t": torch.zeros(2)}, storage_writer=writer, checkpoint_id=tmp_path / "second", no_dist=True
    )
    assert isinstance(second, Future)
    with pytest.raises(BusyError, match=f"still writes the checkpoint at {tmp_path}/first: wait for the future"):
        second.result()
    go_on.set()
    first.result()
    dcp.save({"t": torch.zeros(2)}, storage_writer=writer, checkpoint_id=tmp_path / "second", no_dist=True)
    assert reshard.open(tmp_path / "first").read("t").equal(torch.ones(2))
    assert reshard.open(tmp_path / "second").read("t").equal(torch.zeros(2))


def cast_to(dtype: torch.dtype) -> Any:
    return lambda item, value: value if item.type is WriteItemType.BYTE_IO else value.to(dtype)


class Subclass(torch.Tensor):
    pass


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_shards_that_a_planner_has_cast(stored: torch.dtype, tmp_path: Path) -> None:
    """DCP's metadata has the dtype of the state dict. A shard of another dtype is read if no value changes."""
    values = torch.tensor([0.1, -3.5, 1e5, float("inf")])
    dcp.save({"t": values}, checkpoint_id=tmp_path / "dcp", planner=ChangingPlanner(cast_to(stored)))
    by_dcp, by_reshard = {"t": torch.zeros(4)}, {"t": torch.zeros(4)}
    dcp.load(by_dcp, checkpoint_id=tmp_path / "dcp")
    if stored in (torch.float16, torch.bfloat16):
        reshard.load(by_reshard, tmp_path / "dcp")
        assert by_reshard["t"].equal(by_dcp["t"])
        reshard.convert(tmp_path / "dcp", tmp_path / "converted")
        assert reshard.open(tmp_path / "converted").read("t").equal(by_dcp["t"])
    else:
        with pytest.raises(CorruptCheckpointError, match=f"got a tensor of {stored} .* a planner has cast it"):
            reshard.load(by_reshard, tmp_path / "dcp")
    writer = reshard.StorageWriter(tmp_path / "native")
    with pytest.raises(CheckpointException, match=f"returned {stored}, but its plan has torch.float32"):
        dcp.save({"t": values}, storage_writer=writer, planner=ChangingPlanner(cast_to(stored)))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_shard_of_a_tensor_subclass_is_refused_by_name(tmp_path: Path) -> None:
    dcp.save({"t": torch.ones(2).as_subclass(Subclass)}, checkpoint_id=tmp_path)
    with pytest.raises(CorruptCheckpointError, match=r"^'t': .*torch\.load\(weights_only=True\) refuses: .*Subclass"):
        reshard.load({"t": torch.zeros(2)}, tmp_path)
    with torch.serialization.safe_globals([Subclass]):
        state = {"t": torch.zeros(2)}
        reshard.load(state, tmp_path)
        assert state["t"].equal(torch.ones(2))


def save_twice(uri: str) -> tuple[list[str], list[float], int]:
    """Save with one writer, once with an error, without passing a location to DCP."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    writer = reshard.StorageWriter(uri)

    def state(value: float, name: str, **others: Any) -> dict[str, Any]:
        return {name: distribute_tensor(torch.full((6, 4), value), mesh, [Shard(0)]), "n": value, **others}

    dcp.save(state(1.0, "old"), storage_writer=writer)
    with pytest.raises(CheckpointException):
        dcp.save(state(2.0, "failed", **({"bad": lambda: None} if rank == 1 else {})), storage_writer=writer)
    dcp.save(state(3.0, "w"), storage_writer=writer)
    cast("Future[Metadata]", dcp.async_save(state(4.0, "w"), storage_writer=writer)).result()
    checkpoint = reshard.open(uri)
    return sorted(checkpoint), checkpoint.read("w")[:, 0].tolist(), checkpoint.read_value("n")


def test_writer_that_is_used_again_writes_only_the_new_values(ranks: RankPool, tmp_path: Path) -> None:
    for found in ranks.run(2, save_twice, str(tmp_path)):
        assert found == (["n", "w"], [4.0] * 6, 4.0)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:Detected an existing checkpoint")
@pytest.mark.parametrize("format", ["reshard", "dcp"])
def test_reader_that_is_used_again_reads_the_new_checkpoint(format: str, tmp_path: Path) -> None:
    reader = reshard.StorageReader(tmp_path)
    for value in (1.0, 2.0, 3.0):
        state: dict[str, Any] = {"w": torch.full((3000,), value), "n": value}
        if format == "reshard":
            reshard.save(state, tmp_path, overwrite=True)
        else:
            dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
        loaded: dict[str, Any] = {"w": torch.zeros(3000), "n": 0.0}
        dcp.load(loaded, storage_reader=reader, no_dist=True)
        assert loaded["w"].eq(value).all()
        assert loaded["n"] == value
        with pytest.raises(CheckpointException, match="missing"):
            dcp.load({"missing": torch.zeros(1)}, storage_reader=reader, no_dist=True)
