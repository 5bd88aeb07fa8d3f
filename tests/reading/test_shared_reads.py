"""Ranks that share a read load the same values as ranks that read by themselves, and read each byte once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor, zeros

import reshard
from reshard.errors import ArgumentError, CorruptCheckpointError, RankError, StoreError
from reshard.planner.rank_plans import RankPlans
from reshard.planner.request_costs import RequestCosts
from reshard.planner.shared_reads import Unit, UnitPart
from reshard.storage.reading.shared_fetcher import SharedFetcher
from reshard.storage.stores.base import Capabilities
from reshard.storage.stores.local import LocalStore
from reshard.storage.stores.memory import MemoryStore
from reshard.storage.stores.testing import Call, RecordingStore
from tests.conftest import Place
from tests.ranks import RankFailed, RankPool

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
SIZE = 512
LAYOUTS = ["dp", "hsdp", "tp", "dp_tp", "columns"]
FORMATS = ["zstd", "none", "dcp", "safetensors"]


class RemoteStore(RecordingStore):
    """A store that is read with `read`, like one behind a network."""

    change_next: Callable[[bytes], bytes] | None = None
    """Changes the next answer."""

    def read(self, name: str, start: int, stop: int) -> bytes:
        data = bytes(super().read(name, start, stop))
        change, self.change_next = self.change_next, None
        return change(data) if change else data

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(concurrent_reads=8)


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"up": (SIZE, SIZE), "down": (SIZE, SIZE), "odd": (67, 301), "norm": (SIZE,)}
    state = {
        f"{i}.{name}": torch.randn(shape, generator=generator).bfloat16()
        for i in range(3)
        for name, shape in shapes.items()
    }
    return {**state, "wide": torch.randn(300, 300, generator=generator), "scale": torch.tensor(2.0)}


def state_of(layout: str, *, value: float = 0) -> dict[str, Any]:
    world = dist.get_world_size()
    if layout in ("hsdp", "dp_tp"):
        mesh = init_device_mesh("cpu", (2, world // 2))
    else:
        mesh = init_device_mesh("cpu", (world,))

    def placements(name: str) -> list[Any]:
        inner: Any = Replicate()
        if layout == "hsdp":
            inner = Shard(0)
        elif layout in ("tp", "dp_tp", "columns") and name.endswith(("up", "down", "odd", "wide")):
            inner = Shard(1) if layout == "columns" or name.endswith("down") else Shard(0)
        if layout == "hsdp" and name == "scale":
            inner = Replicate()
        return [Replicate(), inner] if mesh.ndim == 2 else [inner]

    made = {}
    for name, tensor in tensors().items():
        made[name] = zeros(tensor.shape, device_mesh=mesh, placements=placements(name), dtype=tensor.dtype)
        made[name]._local_tensor.fill_(value)
    return {**made, "step": 0}


def check(state: dict[str, Any]) -> None:
    for name, tensor in tensors().items():
        mesh, placements = state[name].device_mesh, state[name].placements
        expected = distribute_tensor(tensor, mesh, placements, src_data_rank=None)
        assert torch.equal(state[name].to_local(), expected.to_local()), name
    assert state.get("step", 7) == 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("formats")
    for codec in ("zstd", "none"):
        reshard.save({**tensors(), "step": 7}, made / codec, codec=codec)
    state = {**tensors(), "step": 7}
    dcp.save(state, storage_writer=FileSystemWriter(made / "dcp", sync_files=False), no_dist=True)
    (made / "safetensors").mkdir()
    save_file(tensors(), made / "safetensors" / "model.safetensors")
    return made


def load_shared(
    uri: str, layout: str, options: dict[str, Any]
) -> tuple[reshard.RankReport, reshard.RankReport, reshard.RankReport]:
    """Load with and without sharing. Return the total of the shared and of the separate load, and the local report."""
    state = state_of(layout)
    if "safetensors" in uri:
        del state["step"]  # the format has only tensors
    separate = reshard.load(state, uri, cooperative=False, **options).total
    check(state)
    for tensor in state.values():
        if isinstance(tensor, torch.Tensor):
            cast("DTensor", tensor).to_local().zero_()
    report = reshard.load(state, uri, cooperative=True, **options)
    check(state)
    return report.total, separate, report.local


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("format", FORMATS)
def test_shared_loads_have_the_same_values(ranks: RankPool, folder: Path, format: str, layout: str) -> None:
    stored = sum(path.stat().st_size for path in (folder / format).rglob("*") if path.is_file())
    for budget_bytes in (None, 300_000):
        for total, separate, _ in ranks.run(
            4, load_shared, str(folder / format), layout, {"budget_bytes": budget_bytes}
        ):
            assert total.bytes_needed == separate.bytes_needed
            assert total.bytes_sent == total.bytes_received
            metadata = 4 * 100_000  # every rank opens the checkpoint; small tensors are read by all
            assert total.bytes_fetched <= 1.05 * stored + metadata
            if layout in ("dp", "hsdp"):
                assert total.bytes_received > 0


RULES = {
    "dp": reshard.Layout({"dp": 4}),
    "dp_tp": reshard.Layout(
        {"dp": 2, "tp": 2}, dict.fromkeys(("*up", "*odd", "wide"), "colwise") | {"*down": "rowwise"}
    ),
    "columns": reshard.Layout({"tp": 4}, dict.fromkeys(("*up", "*odd", "wide", "*down"), "rowwise")),
}


def load_tensors(folder: str, layout: str) -> reshard.RankReport:
    state = state_of(layout)
    del state["step"]
    return reshard.load(state, folder, cooperative=True).local


@pytest.mark.parametrize("layout", RULES)
@pytest.mark.parametrize("format", ["zstd", "dcp"])
def test_the_plan_shows_what_a_load_sends_and_receives(ranks: RankPool, folder: Path, format: str, layout: str) -> None:
    checkpoint = reshard.open(folder / format)
    plans = checkpoint.plan(RULES[layout], cooperative=True)
    found = ranks.run(4, load_tensors, str(folder / format), layout)
    for plan, local in zip(plans, found, strict=True):
        assert (plan.report.bytes_sent, plan.report.bytes_received) == (local.bytes_sent, local.bytes_received)
        assert plan.report.bytes_fetched <= local.bytes_fetched <= plan.report.bytes_fetched + 100_000  # metadata
    assert sum(plan.report.bytes_received for plan in plans) > 0
    assert RankPlans.from_json(plans.to_json()) == plans
    separate = checkpoint.plan(RULES[layout])
    if layout != "columns":  # from a local disk, a rank reads only its columns
        fetched = [sum(plan.report.bytes_fetched for plan in of) for of in (plans, separate)]
        assert fetched[0] < 0.8 * fetched[1]
    shared = [plan.exchange for plan in plans if plan.exchange is not None]
    ranges = {
        (at, start) for one in shared for at, start in zip(one.objects.tolist(), one.starts.tolist(), strict=True)
    }
    assert len(ranges) == sum(len(one.objects) for one in shared) > 0  # no two ranks read the same
    assert all(plan.fetched.byte_ranges == plan.report.requests for plan in plans)
    assert all(plan.exchange is None for plan in (*separate, *checkpoint.plan(RULES[layout], cooperative="auto")))


def test_a_plan_for_a_distant_store_shares_if_it_pays(folder: Path) -> None:
    costs = RequestCosts(0.02, 50e6, 32, 1e9)
    with reshard.open(folder / "none") as checkpoint:
        alike = checkpoint.plan(RULES["dp"], costs=costs, cooperative="auto")
        assert all(plan.report.bytes_received > 0 for plan in alike)
        alone = checkpoint.plan(reshard.Layout({"tp": 1}), costs=costs, cooperative=True)
        assert [plan.exchange for plan in alone] == [None]
        with pytest.raises(ArgumentError, match='cooperative must be True, False or "auto", got 1'):
            checkpoint.plan(RULES["dp"], cooperative=1)  # type: ignore[arg-type]


def test_shared_loads_from_s3(ranks: RankPool, s3: Place) -> None:
    uri, options = s3
    reshard.save({**tensors(), "step": 7}, uri, storage_options=options)
    for total, separate, local in ranks.run(4, load_shared, uri, "dp", {"storage_options": options}):
        assert total.bytes_fetched < 0.4 * separate.bytes_fetched
        assert local.bytes_received > 0


def load_auto(folder: str, placement: Placement) -> tuple[int, int]:
    received = []
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for store in (LocalStore(folder), RemoteStore(LocalStore(folder))):
        state = {"w": zeros((4096, 2048), device_mesh=mesh, placements=[placement])}
        received.append(reshard.load(state, store).local.bytes_received)
        expected = distribute_tensor(torch.arange(4096.0)[:, None].expand(4096, 2048), mesh, [placement])
        assert state["w"].to_local().equal(expected.to_local())
    return received[0], received[1]


def test_auto_shares_if_it_pays(ranks: RankPool, tmp_path: Path) -> None:
    reshard.save({"w": torch.arange(4096.0)[:, None].expand(4096, 2048)}, tmp_path, codec="none")
    for local, remote in ranks.run(4, load_auto, str(tmp_path), Replicate()):
        assert local == 0
        assert remote > 0
    for found in ranks.run(4, load_auto, str(tmp_path), Shard(0)):
        assert found == (0, 0)


def pass_other_modes(folder: str) -> str:
    with pytest.raises(ArgumentError) as caught:
        reshard.load(state_of("dp"), folder, cooperative=dist.get_rank() != 1)
    return str(caught.value)


def test_ranks_must_pass_the_same_value(ranks: RankPool, folder: Path) -> None:
    for message in ranks.run(3, pass_other_modes, str(folder / "zstd")):
        assert "rank 0 passed cooperative=True, and rank 1 did not" in message


@pytest.mark.parametrize("value", ["yes", 1, None, "AUTO"])
def test_a_wrong_value_is_refused(folder: Path, value: Any) -> None:
    with pytest.raises(ArgumentError, match="cooperative must be"):
        reshard.load({"0.up": torch.zeros(SIZE, SIZE)}, folder / "zstd", cooperative=value)


def load_in_subgroups(folder: str) -> int:
    """Two groups of two ranks load at the same time, each other tensors in each rank."""
    rank = dist.get_rank()
    groups: list[Any] = [dist.new_group([0, 2]), dist.new_group([3, 1])]
    group = groups[rank % 2]
    expected = tensors()
    names = [name for name in expected if name != ("0.up" if rank < 2 else "1.down")]
    state = {name: torch.zeros_like(expected[name]) for name in names}
    received = 0
    for _ in range(2):
        report = reshard.load(state, folder, cooperative=True, process_group=group)
        assert all(torch.equal(state[name], expected[name]) for name in names)
        received += report.total.bytes_received
    return received


def test_subgroups_share_among_themselves(ranks: RankPool, folder: Path) -> None:
    assert all(received > 0 for received in ranks.run(4, load_in_subgroups, str(folder / "zstd")))


def load_nothing_on_one_rank(folder: str) -> None:
    expected = tensors()
    state = {} if dist.get_rank() == 1 else {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    reshard.load(state, folder, cooperative=True)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


def test_a_rank_may_need_nothing(ranks: RankPool, folder: Path) -> None:
    ranks.run(3, load_nothing_on_one_rank, str(folder / "none"))
    ranks.run(1, load_nothing_on_one_rank, str(folder / "none"))


# Faults


def load_with_fault(folder: str, at: int, action: str) -> tuple[str, str]:
    """Load while rank 1 fails at its n-th read of data. Then load again without a fault."""
    count = 0

    def before(call: Call) -> None:
        nonlocal count
        if dist.get_rank() == 1 and call.method == "read" and call.name != "manifest":
            count += 1
            if count == at:
                if action == "fail":
                    raise StoreError("injected")
                if action == "interrupt":
                    raise MemoryError("injected")
                if action == "cut":
                    store.change_next = lambda data: data[:-1]
                if action == "flip":
                    store.change_next = lambda data: data[:-1] + bytes([data[-1] ^ 1])
                time.sleep(0.2)

    store = RemoteStore(LocalStore(folder), before)
    state = state_of("hsdp")
    outcome = "loaded"
    try:
        reshard.load(state, store, cooperative=True)
        check(state)
    except reshard.errors.CheckpointError as error:
        outcome = f"{type(error).__name__} {error.rank} {'injected' in str(error)}"
    again = state_of("hsdp")
    reshard.load(again, folder, cooperative=True)
    check(again)
    return outcome, "fault" if count >= at else "none"


@pytest.mark.parametrize("action", ["fail", "interrupt", "wait", "cut", "flip"])
def test_a_fault_at_any_read_becomes_the_error_of_all_ranks(ranks: RankPool, folder: Path, action: str) -> None:
    for at in range(1, 30):
        found = ranks.run(4, load_with_fault, str(folder / "zstd"), at, action)
        outcomes = {outcome for outcome, _ in found}
        assert len(outcomes) == 1, outcomes
        if found[1][1] == "none":
            assert outcomes == {"loaded"}
            assert at > 2
            return
        expected = {"fail": "StoreError 1 True", "interrupt": "RankError 1 True"}
        assert outcomes == {expected.get(action, "loaded")}
    raise AssertionError("there were more reads than expected")


def load_damaged(folder: str) -> str:
    state = state_of("dp", value=3)
    with pytest.raises(CorruptCheckpointError) as caught:
        reshard.load(state, folder, cooperative=True)
    damaged = str(caught.value).split("'")[1]
    assert bool((state[damaged].to_local() == 3).all())
    return str(caught.value)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_an_error_on_all_ranks(ranks: RankPool, tmp_path: Path, damage: str) -> None:
    reshard.save({**tensors(), "step": 7}, tmp_path / "c")
    largest = max(
        (path for path in (tmp_path / "c").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    data = bytearray(largest.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        largest.write_bytes(data)
    elif damage == "cut":
        os.truncate(largest, len(data) - 1000)
    else:
        largest.unlink()
    messages = set(ranks.run(3, load_damaged, str(tmp_path / "c")))
    assert len(messages) == 1, messages


def load_and_die(folder: str) -> str:
    def before(call: Call) -> None:
        if dist.get_rank() == 1 and call.method == "read" and call.name != "manifest":
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RankError) as caught:
        reshard.load(state_of("dp"), RemoteStore(LocalStore(folder), before), cooperative=True)
    return str(caught.value)


def test_the_death_of_a_rank_ends_the_others(folder: Path) -> None:
    with RankPool() as pool, pytest.raises(RankFailed, match="the process died") as caught:
        pool.run(3, load_and_die, str(folder / "zstd"), timeout_s=60)
    assert "did not answer" not in str(caught.value)


def load_in_order(folder: str, layout: str) -> None:
    """Load while each rank is slow at other reads."""
    rank = dist.get_rank()
    count = 0

    def before(call: Call) -> None:
        nonlocal count
        if call.method == "read":
            count += 1
            time.sleep(0.05 if (count + rank) % 4 == 0 else 0)

    state = state_of(layout)
    reshard.load(state, RemoteStore(LocalStore(folder), before), cooperative=True, budget_bytes=200_000)
    check(state)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_slow_ranks_and_small_budgets_do_not_block(ranks: RankPool, folder: Path, layout: str) -> None:
    for format in ("zstd", "dcp"):
        ranks.run(4, load_in_order, str(folder / format), layout)


class NoPeers:
    """The other ranks, which wait."""

    rank = 0

    def send(self, *_: Any) -> Any:
        return lambda: None

    def abort(self) -> None:
        pass


def test_an_object_that_is_cut_short_behind_the_own_piece_is_an_error() -> None:
    """Nothing else would end the wait of the other ranks, since this rank has what it needs."""
    store = MemoryStore()
    store.content = {"a": bytes(150), "b": bytes(200)}
    own, others = UnitPart(0, 1, 100, 100), UnitPart(100, 1, 100, 100)
    units = [Unit(at, 0, name, 0, 200, 0, {0: (own,), 1: (others,)}) for at, name in enumerate("ab")]
    with pytest.raises(StoreError, match="object 'a' in memory was cut short: it ends before byte 200"):
        read_units(SharedFetcher(store, units, cast(Any, NoPeers()), 250))


def read_units(fetcher: SharedFetcher) -> None:
    with fetcher:
        for name in "ab":
            fetcher.start((name, [(0, 100)]), lambda _: None)
        for _ in range(1000):
            fetcher.check()
            time.sleep(0.01)
