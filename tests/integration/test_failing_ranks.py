"""A rank that fails, or dies: every rank raises the same error, soon, and it names that rank."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, distribute_tensor
from torch.distributed.tensor import Shard as TorchShard

import reshard
from reshard import errors
from reshard.storage.formats.native.manifest import NAME
from reshard.storage.stores.local import LocalStore
from reshard.storage.stores.testing import Call, MemoryStore, RecordingStore, failing
from tests.ranks import RankFailed, RankPool


def store_on(rank: int, folder: str, method: str) -> reshard.Store:
    """A local store that fails on one rank."""
    local = LocalStore(folder)
    return RecordingStore(local, failing(method)) if dist.get_rank() == rank else local


def state_on_ranks(value: float) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {"w": distribute_tensor(torch.full((64, 8), value), mesh, [TorchShard(0)]), "step": int(value)}


def save_and_fail(folder: str, rank: int, method: str) -> str:
    with pytest.raises(errors.CheckpointError) as caught:
        reshard.save(state_on_ranks(1), store_on(rank, folder, method))
    return f"{type(caught.value).__name__} {caught.value.rank}: {caught.value}"


@pytest.mark.parametrize("method", ["create", "write"])
def test_a_rank_that_cannot_save_is_named_on_every_rank(ranks: RankPool, tmp_path: Path, method: str) -> None:
    """(torch 2.13's own writer loses an exception that is raised in a writer thread, and reports success.)"""
    told = ranks.run(4, save_and_fail, str(tmp_path), 2, method)
    assert all(message.startswith("StoreError 2: rank 2: injected") for message in told), told
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    ranks.run(2, save_good, str(tmp_path))


def save_good(folder: str) -> None:
    reshard.save(state_on_ranks(1), folder)


def test_a_commit_that_fails_is_named_on_every_rank(ranks: RankPool, tmp_path: Path) -> None:
    told = ranks.run(3, save_and_fail, str(tmp_path), 0, "put")
    assert all(message.startswith("CommitError 0: rank 0: the manifest may or may not") for message in told), told


def load_and_fail(folder: str, rank: int) -> str:
    state = state_on_ranks(5)
    with pytest.raises(errors.CheckpointError) as caught:
        reshard.load(state, store_on(rank, folder, "read"))
    assert state["step"] == 5
    return f"{type(caught.value).__name__} {caught.value.rank}: {caught.value}"


def test_a_rank_that_cannot_load_is_named_on_every_rank(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, save_good, str(tmp_path))
    told = ranks.run(4, load_and_fail, str(tmp_path), 3)
    assert all(message.startswith("StoreError 3: rank 3: ") for message in told), told


def load_and_break(folder: str) -> str:
    state = state_on_ranks(5)
    if dist.get_rank() == 1:
        state["w"] = Breaking(a=1)
    with pytest.raises(errors.CheckpointError) as caught:
        reshard.load(state, folder)
    return f"{type(caught.value).__name__}: {caught.value}"


class Breaking(dict[str, Any]):
    def items(self) -> Any:
        raise ZeroDivisionError("a bug of the caller")


def test_an_error_that_is_not_of_reshard_reaches_every_rank(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, save_good, str(tmp_path))
    told = ranks.run(2, load_and_break, str(tmp_path))
    assert told == ["RankError: rank 1: ZeroDivisionError: a bug of the caller"] * 2


class Stubborn:
    """A Stateful that fails on one rank."""

    def state_dict(self) -> dict[str, Any]:
        if dist.get_rank() == 1:
            raise RuntimeError("no state to be had")
        return {"t": torch.zeros(2)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("never reached")


class ForeignError(errors.StoreError):
    """Somebody's own: it cannot be unpickled."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{message} ({code})")


class ForeignStore(MemoryStore):
    def read(self, name: str, start: int, stop: int) -> Any:
        raise ForeignError(7, "not today")

    def create(self, name: str) -> Any:
        raise ForeignError(7, "not today")


def fail_in_foreign_ways(folder: str) -> list[str]:
    told = []
    local = LocalStore(folder)
    calls: tuple[Callable[[], reshard.Report], ...] = (
        lambda: reshard.load({"app": Stubborn()}, folder, strict=False),
        lambda: reshard.save({"app": Stubborn()}, folder),
        lambda: reshard.load(state_on_ranks(5), ForeignStore() if dist.get_rank() == 1 else local),
        lambda: reshard.save(state_on_ranks(5), ForeignStore() if dist.get_rank() == 1 else local, overwrite=True),
    )
    for call in calls:
        with pytest.raises(errors.CheckpointError) as caught:
            call()
        told.append(f"{type(caught.value).__name__}: {caught.value}")
    return told


def test_states_and_errors_of_others_reach_every_rank(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, save_good, str(tmp_path))
    for told in ranks.run(3, fail_in_foreign_ways, str(tmp_path), timeout_s=30):
        assert told[:2] == ["RankError: rank 1: RuntimeError: no state to be had"] * 2
        assert told[2:] == ["StoreError: rank 1: not today (7)"] * 2


def lose_a_rank(folder: str, saving: bool) -> str:
    def die(call: Call) -> None:
        if dist.get_rank() == 1 and call.method == ("write" if saving else "read"):
            os.kill(os.getpid(), signal.SIGKILL)

    store = RecordingStore(LocalStore(folder), die)
    state = state_on_ranks(5)
    with pytest.raises(errors.RankError) as caught:
        _ = reshard.save(state, store, overwrite=True) if saving else reshard.load(state, store)
    raise AssertionError(f"told: {caught.value}")


@pytest.mark.parametrize("saving", [True, False])
def test_a_rank_that_dies_is_told_on_the_others(tmp_path: Path, saving: bool) -> None:
    with RankPool() as pool:
        pool.run(2, save_good, str(tmp_path))
        with pytest.raises(RankFailed) as failed:
            pool.run(3, lose_a_rank, str(tmp_path), saving, timeout_s=30)
    assert "did not answer" not in str(failed.value)
    assert str(failed.value).count("told: the process group broke, probably because a rank died; missing: rank") == 2
    assert reshard.open(tmp_path).verify() == []


def load_by_dcp_and_fail(folder: str) -> str:
    state = state_on_ranks(5)
    reader = reshard.StorageReader(store_on(1, folder, "read"))
    with pytest.raises(CheckpointException) as caught:
        dcp.load(state, storage_reader=reader)
    return str(caught.value)


def test_through_dcp_every_rank_is_told_too(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, save_good, str(tmp_path))
    for told in ranks.run(3, load_by_dcp_and_fail, str(tmp_path)):
        assert "RANK 1" in told
        assert "injected: read" in told


def partial_placement(folder: str) -> str:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    from torch.distributed.tensor import DTensor

    state = {"w": DTensor.from_local(torch.zeros(64, 8), mesh, [Partial()])}
    with pytest.raises(errors.LayoutError) as caught:
        reshard.load(state, folder)
    return str(caught.value)


def test_a_placement_that_is_no_shard_is_named(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, save_good, str(tmp_path))
    assert all("'w' has the placement" in message for message in ranks.run(2, partial_placement, str(tmp_path)))


SLOW_S = 20


def fail_while_others_are_slow(folder: str, saving: bool) -> tuple[str, float]:
    """Rank 1 is refused at once; the others' stores take long for each call."""

    def before(call: Call) -> None:
        if call.method not in ("read", "write") or call.name == NAME:
            return
        if dist.get_rank() == 1:
            raise errors.AccessDeniedError("no permission any more")
        time.sleep(SLOW_S)

    store = RecordingStore(LocalStore(folder), before)
    begin = time.monotonic()
    with pytest.raises(errors.AccessDeniedError) as caught:
        _ = reshard.save(state_on_ranks(5), store, overwrite=True) if saving else reshard.load(state_on_ranks(5), store)
    return str(caught.value), time.monotonic() - begin


@pytest.mark.parametrize("saving", [True, False])
def test_a_rank_that_fails_stops_the_others(tmp_path: Path, saving: bool) -> None:
    with RankPool() as pool:  # the threads of its own are left waiting
        pool.run(2, save_good, str(tmp_path))
        for told, seconds in pool.run(3, fail_while_others_are_slow, str(tmp_path), saving):
            assert told.startswith("rank 1: ")
            assert "no permission any more" in told
            assert seconds < SLOW_S / 2
    assert reshard.open(tmp_path).verify() == []


def save_by_different_codecs(folder: str, other: str) -> str:
    with pytest.raises(errors.ArgumentError) as caught:
        reshard.save(state_on_ranks(1), folder, codec="zstd" if dist.get_rank() == 0 else other)
    return str(caught.value)


def test_a_codec_that_one_rank_asks_for_in_vain_is_told_on_all(ranks: RankPool, tmp_path: Path) -> None:
    for told in ranks.run(2, save_by_different_codecs, str(tmp_path), "lzma", timeout_s=30):
        assert told.startswith("rank 1: codec must be one of")


def test_ranks_that_save_by_different_codecs_are_told(ranks: RankPool, tmp_path: Path) -> None:
    told = ranks.run(2, save_by_different_codecs, str(tmp_path), "none")
    assert all(message.endswith("were given different codecs: none, zstd") for message in told)
    assert list(tmp_path.iterdir()) == []


def save_to_different_places(folder: str) -> str:
    with pytest.raises(errors.ArgumentError) as caught:
        reshard.save(state_on_ranks(1), f"{folder}/{dist.get_rank()}")
    return str(caught.value)


def test_ranks_that_save_to_different_places_are_told(ranks: RankPool, tmp_path: Path) -> None:
    told = ranks.run(2, save_to_different_places, str(tmp_path))
    assert all("were given different places" in message for message in told)
    assert list(tmp_path.iterdir()) == []
