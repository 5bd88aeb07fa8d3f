"""`dcp.load` with our StorageReader: the ranks of the default process group share the read."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.api import CheckpointException

import reshard
from reshard.errors import ArgumentError, StoreError
from reshard.storage.formats.native.manifest import MANIFEST_NAME
from reshard.storage.stores.local import LocalStore
from reshard.storage.stores.testing import Call
from tests.conftest import Place
from tests.ranks import RankFailed, RankPool
from tests.reading.test_shared_reads import RemoteStore, check, state_of, tensors

LAYOUTS = ["dp", "hsdp", "dp_tp", "columns"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("formats")
    for codec in ("zstd", "none"):
        reshard.save({**tensors(), "step": 7}, made / codec, codec=codec)
    return made


class OtherPlanner(DefaultLoadPlanner):
    """Reads into tensors of its own, and copies them."""

    def resolve_tensor(self, read_item: Any) -> torch.Tensor:
        self.target = super().resolve_tensor(read_item)
        return torch.empty_like(self.target)

    def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
        super().resolve_tensor(read_item).copy_(tensor)


def load_through_dcp(uri: str, layout: str, planner: Any, options: dict[str, Any]) -> tuple[int, int, int]:
    """Return the bytes that this rank reads without and with sharing, and the bytes that it receives."""
    found = []
    for cooperative in (False, True):
        state = state_of(layout)
        reader = reshard.StorageReader(uri, cooperative=cooperative, **options)
        for _ in range(2):
            dcp.load(state, storage_reader=reader, planner=planner and planner())
            check(state)
        assert reader.report is not None
        found.append(reader.report)
    return found[0].bytes_fetched, found[1].bytes_fetched, found[1].bytes_received


@pytest.mark.parametrize(("format", "planner"), [("zstd", None), ("none", OtherPlanner)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dcp_loads_share_the_read(ranks: RankPool, folder: Path, format: str, layout: str, planner: Any) -> None:
    found = ranks.run(4, load_through_dcp, str(folder / format), layout, planner, {})
    separate, shared, received = (sum(column) for column in zip(*found, strict=True))
    if layout != "columns":
        assert shared < 0.8 * separate
        assert received > 0


def test_dcp_loads_from_s3_share_the_read(ranks: RankPool, s3: Place) -> None:
    uri, options = s3
    reshard.save({**tensors(), "step": 7}, uri, storage_options=options)
    found = ranks.run(4, load_through_dcp, uri, "dp", None, {"storage_options": options})
    separate, shared, _ = (sum(column) for column in zip(*found, strict=True))
    assert shared < 0.5 * separate


def load_automatically(folder: str) -> tuple[int, int]:
    received = []
    for store in (LocalStore(folder), RemoteStore(LocalStore(folder))):
        state = state_of("dp")
        reader = reshard.StorageReader(store)
        dcp.load(state, storage_reader=reader)
        check(state)
        assert reader.report is not None
        received.append(reader.report.bytes_received)
    return received[0], received[1]


def test_auto_shares_reads_of_object_stores(ranks: RankPool, folder: Path) -> None:
    for local, remote in ranks.run(4, load_automatically, str(folder / "zstd")):
        assert local == 0
        assert remote > 0


def load_in_a_subgroup(folder: str) -> str:
    groups: list[Any] = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    expected = tensors()
    state = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    reader = reshard.StorageReader(RemoteStore(LocalStore(folder)))
    dcp.load(state, storage_reader=reader, process_group=groups[dist.get_rank() % 2])
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert reader.report is not None
    assert reader.report.bytes_received == 0
    with pytest.raises(CheckpointException) as caught:
        dcp.load(
            state,
            storage_reader=reshard.StorageReader(folder, cooperative=True),
            process_group=groups[dist.get_rank() % 2],
        )
    return str(caught.value)


def test_a_subgroup_does_not_share(ranks: RankPool, folder: Path) -> None:
    for message in ranks.run(4, load_in_a_subgroup, str(folder / "zstd")):
        assert "cooperative=True, but 2 of the 4 ranks" in message


def load_with_fault(folder: str, at: int) -> tuple[str, bool]:
    """Load while rank 1 fails at its n-th read of data. Then load again without a fault."""
    count = 0

    def before(call: Call) -> None:
        nonlocal count
        if dist.get_rank() == 1 and call.method == "read" and call.name != MANIFEST_NAME:
            count += 1
            if count == at:
                raise StoreError("injected")

    state = state_of("hsdp")
    outcome = "loaded"
    try:
        dcp.load(state, storage_reader=reshard.StorageReader(RemoteStore(LocalStore(folder), before), cooperative=True))
        check(state)
    except CheckpointException as error:
        outcome = f"failed: {'injected' in str(error)}"
    again = state_of("hsdp")
    dcp.load(again, storage_reader=reshard.StorageReader(folder, cooperative=True))
    check(again)
    return outcome, count >= at


def test_a_fault_becomes_the_error_of_all_ranks(ranks: RankPool, folder: Path) -> None:
    for at in range(1, 30):
        found = ranks.run(4, load_with_fault, str(folder / "zstd"), at)
        has_failed = found[1][1]
        assert {outcome for outcome, _ in found} == {"failed: True" if has_failed else "loaded"}
        if not has_failed:
            assert at > 2
            return
    raise AssertionError("there were more reads than expected")


def open_with_fault(folder: str) -> str:
    """Rank 1 cannot read the metadata in its first attempt."""
    failed = False

    def before(call: Call) -> None:
        nonlocal failed
        if dist.get_rank() == 1 and not failed:
            failed = True
            raise StoreError("injected")

    reader = reshard.StorageReader(RemoteStore(LocalStore(folder), before))
    with pytest.raises(CheckpointException) as caught:
        dcp.load(state_of("dp"), storage_reader=reader)
    return str(caught.value)


def test_a_rank_that_cannot_open_the_checkpoint_does_not_load_alone(ranks: RankPool, folder: Path) -> None:
    for message in ranks.run(4, open_with_fault, str(folder / "zstd"), timeout_s=60):
        assert "injected" in message


class FailingPlanner(DefaultLoadPlanner):
    """Has no tensor for one item on one rank."""

    def lookup_tensor(self, index: Any) -> torch.Tensor:
        if dist.get_rank() == 2 and index.fqn == "1.up":
            raise ValueError("injected")
        return super().lookup_tensor(index)


class FailingFinish(DefaultLoadPlanner):
    """Fails on one rank after the ranks have planned, and before they read."""

    def finish_plan(self, new_plan: Any) -> Any:
        if dist.get_rank() == 2:
            raise ValueError("injected")
        return super().finish_plan(new_plan)


def load_with_failing_planner(folder: str, planner: Any) -> str:
    state = state_of("dp")
    reader = reshard.StorageReader(folder, cooperative=True)
    with pytest.raises(CheckpointException) as caught:
        dcp.load(state, storage_reader=reader, planner=planner())
    dcp.load(state, storage_reader=reader)
    check(state)
    return str(caught.value)


@pytest.mark.parametrize("planner", [FailingPlanner, FailingFinish])
def test_a_planner_that_fails_on_one_rank_does_not_block_the_others(
    ranks: RankPool, folder: Path, planner: Any
) -> None:
    for message in ranks.run(4, load_with_failing_planner, str(folder / "zstd"), planner, timeout_s=30):
        assert "injected" in message


def stop_a_rank(folder: str) -> str:
    """Rank 1 stops while it reads. Its connections stay open."""
    pids: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())

    def before(call: Call) -> None:
        if dist.get_rank() == 1 and call.method == "read" and call.name != MANIFEST_NAME:
            time.sleep(3)  # so that the rank has shown a pulse
            os.kill(os.getpid(), signal.SIGSTOP)

    reader = reshard.StorageReader(RemoteStore(LocalStore(folder), before), cooperative=True)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("reshard").addHandler(handler)
    with pytest.raises((RuntimeError, CheckpointException)):
        dcp.load(state_of("dp"), storage_reader=reader)
    with contextlib.suppress(ProcessLookupError):  # another rank was faster
        os.kill(pids[1], signal.SIGKILL)
    raise AssertionError(f"found: {messages}")


@pytest.mark.slow
def test_a_rank_that_stops_is_named(folder: Path) -> None:
    with RankPool() as pool, pytest.raises(RankFailed) as failed:
        pool.run(3, stop_a_rank, str(folder / "zstd"), timeout_s=60)
    assert str(failed.value).count("because rank 1 did not respond for 8 s") >= 2, str(failed.value)


def test_a_wrong_value_is_refused(folder: Path) -> None:
    with pytest.raises(ArgumentError, match="cooperative must be"):
        reshard.StorageReader(folder / "zstd", cooperative="yes")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_process_alone_reads_by_itself(folder: Path) -> None:
    expected = tensors()
    state = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    dcp.load(state, storage_reader=reshard.StorageReader(folder / "zstd", cooperative=True), no_dist=True)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
