"""If a rank fails or dies, every rank soon raises the same error, which names that rank."""

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
from reshard.storage.formats.native.manifest import MANIFEST_NAME
from reshard.storage.stores.local import LocalStore
from reshard.storage.stores.memory import MemoryStore
from reshard.storage.stores.testing import Call, RecordingStore, failing
from reshard.storage.writing.checkpoint_writer import CheckpointWriter
from tests.ranks import RankFailed, RankPool

pytestmark = pytest.mark.slow


def store_on(rank: int, folder: str, method: str) -> reshard.Store:
    """Return a local store that fails on one rank."""
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
def test_every_rank_names_the_rank_that_cannot_save(ranks: RankPool, tmp_path: Path, method: str) -> None:
    """The writer of torch 2.13 loses an exception of a writer thread, and reports success."""
    messages = ranks.run(4, save_and_fail, str(tmp_path), 2, method)
    assert all(message.startswith("StoreError 2: rank 2: injected") for message in messages), messages
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    ranks.run(2, save_good, str(tmp_path))


def save_good(folder: str) -> None:
    reshard.save(state_on_ranks(1), folder)


def test_every_rank_reports_a_failed_commit(ranks: RankPool, tmp_path: Path) -> None:
    messages = ranks.run(3, save_and_fail, str(tmp_path), 0, "put")
    assert all(message.startswith("CommitError 0: rank 0: the manifest may or may not") for message in messages), (
        messages
    )


def load_and_fail(folder: str, rank: int) -> str:
    state = state_on_ranks(5)
    with pytest.raises(errors.CheckpointError) as caught:
        reshard.load(state, store_on(rank, folder, "read"))
    assert state["step"] == 5
    return f"{type(caught.value).__name__} {caught.value.rank}: {caught.value}"


def test_every_rank_names_the_rank_that_cannot_load(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, save_good, str(tmp_path))
    messages = ranks.run(4, load_and_fail, str(tmp_path), 3)
    assert all(message.startswith("StoreError 3: rank 3: ") for message in messages), messages


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


def test_an_error_of_the_caller_reaches_every_rank(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, save_good, str(tmp_path))
    messages = ranks.run(2, load_and_break, str(tmp_path))
    assert messages == ["RankError: rank 1: ZeroDivisionError: a bug of the caller"] * 2


class Stubborn:
    """A Stateful that fails on one rank."""

    def state_dict(self) -> dict[str, Any]:
        if dist.get_rank() == 1:
            raise RuntimeError("no state available")
        return {"t": torch.zeros(2)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("never reached")


class ForeignError(errors.StoreError):
    """An error of a third-party store. It cannot be unpickled."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{message} ({code})")


class ForeignStore(MemoryStore):
    def read(self, name: str, start: int, stop: int) -> Any:
        raise ForeignError(7, "not today")

    def create(self, name: str) -> Any:
        raise ForeignError(7, "not today")


def fail_in_third_party_code(folder: str) -> list[str]:
    messages = []
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
        messages.append(f"{type(caught.value).__name__}: {caught.value}")
    return messages


def test_errors_of_third_party_code_reach_every_rank(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, save_good, str(tmp_path))
    for messages in ranks.run(3, fail_in_third_party_code, str(tmp_path), timeout_s=30):
        assert messages[:2] == ["RankError: rank 1: RuntimeError: no state available"] * 2
        assert messages[2:] == ["StoreError: rank 1: not today (7)"] * 2


def lose_a_rank(folder: str, saving: bool) -> str:
    def die(call: Call) -> None:
        if dist.get_rank() == 1 and call.method == ("write" if saving else "read"):
            os.kill(os.getpid(), signal.SIGKILL)

    store = RecordingStore(LocalStore(folder), die)
    state = state_on_ranks(5)
    with pytest.raises(errors.RankError) as caught:
        _ = reshard.save(state, store, overwrite=True) if saving else reshard.load(state, store)
    raise AssertionError(f"messages: {caught.value}")


@pytest.mark.parametrize("saving", [True, False])
def test_a_rank_that_dies_is_reported_on_the_others(tmp_path: Path, saving: bool) -> None:
    with RankPool() as pool:
        pool.run(2, save_good, str(tmp_path))
        with pytest.raises(RankFailed) as failed:
            pool.run(3, lose_a_rank, str(tmp_path), saving, timeout_s=30)
    assert "did not answer" not in str(failed.value)
    assert str(failed.value).count("messages: the process group broke, because rank 1 died or left") == 2
    assert reshard.open(tmp_path).verify() == []


def load_by_dcp_and_fail(folder: str) -> str:
    state = state_on_ranks(5)
    reader = reshard.StorageReader(store_on(1, folder, "read"))
    with pytest.raises(CheckpointException) as caught:
        dcp.load(state, storage_reader=reader)
    return str(caught.value)


def test_every_rank_names_the_failed_rank_through_dcp(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, save_good, str(tmp_path))
    for messages in ranks.run(3, load_by_dcp_and_fail, str(tmp_path)):
        assert "RANK 1" in messages
        assert "injected: read" in messages


def partial_placement(folder: str) -> str:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    from torch.distributed.tensor import DTensor

    state = {"w": DTensor.from_local(torch.zeros(64, 8), mesh, [Partial()])}
    with pytest.raises(errors.LayoutError) as caught:
        reshard.load(state, folder)
    return str(caught.value)


def test_the_error_names_a_partial_placement(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, save_good, str(tmp_path))
    assert all("'w' has the placement" in message for message in ranks.run(2, partial_placement, str(tmp_path)))


SLOW_S = 20


def fail_while_others_are_slow(folder: str, saving: bool) -> tuple[str, float]:
    """Fail at once on rank 1. On the other ranks, each call of the store takes long."""

    def before(call: Call) -> None:
        if call.method not in ("read", "write") or call.name == MANIFEST_NAME:
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
def test_a_failed_rank_stops_the_others(tmp_path: Path, saving: bool) -> None:
    with RankPool() as pool:  # an own pool, since its threads keep waiting
        pool.run(2, save_good, str(tmp_path))
        for messages, seconds in pool.run(3, fail_while_others_are_slow, str(tmp_path), saving):
            assert messages.startswith("rank 1: ")
            assert "no permission any more" in messages
            assert seconds < SLOW_S / 2
    assert reshard.open(tmp_path).verify() == []


def save_with_different_codecs(folder: str, other: str) -> str:
    with pytest.raises(errors.ArgumentError) as caught:
        reshard.save(state_on_ranks(1), folder, codec="zstd" if dist.get_rank() == 0 else other)
    return str(caught.value)


def test_every_rank_reports_an_unknown_codec_of_one_rank(ranks: RankPool, tmp_path: Path) -> None:
    for messages in ranks.run(2, save_with_different_codecs, str(tmp_path), "lzma", timeout_s=30):
        assert messages.startswith("rank 1: codec must be 'zstd' or 'none'")


def test_ranks_with_different_codecs_raise_argument_error(ranks: RankPool, tmp_path: Path) -> None:
    messages = ranks.run(2, save_with_different_codecs, str(tmp_path), "none")
    assert all(message.endswith("passed different codecs: none, zstd") for message in messages)
    assert list(tmp_path.iterdir()) == []


def save_to_different_locations(folder: str) -> str:
    with pytest.raises(errors.ArgumentError) as caught:
        reshard.save(state_on_ranks(1), f"{folder}/{dist.get_rank()}")
    return str(caught.value)


def test_ranks_with_different_locations_raise_argument_error(ranks: RankPool, tmp_path: Path) -> None:
    messages = ranks.run(2, save_to_different_locations, str(tmp_path))
    assert all("passed different locations" in message for message in messages)
    assert list(tmp_path.iterdir()) == []


def save_and_die_after_the_commit(folder: str, asynchronous: bool) -> None:
    committing = CheckpointWriter.commit

    def commit_and_die(self: CheckpointWriter, *args: Any, **options: Any) -> Any:
        committing(self, *args, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    CheckpointWriter.commit = commit_and_die  # type: ignore[method-assign]
    if asynchronous:
        reshard.async_save(state_on_ranks(1), folder, background="thread").result()
    else:
        reshard.save(state_on_ranks(1), folder)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["save", "async_save"])
def test_death_of_rank_0_after_the_commit_leaves_the_checkpoint_complete(tmp_path: Path, asynchronous: bool) -> None:
    """The other ranks do not know that it has committed, so they must not remove what they wrote."""
    with RankPool() as pool, pytest.raises(RankFailed, match=r"rank 1:(.|\n)*the process group broke"):
        pool.run(3, save_and_die_after_the_commit, str(tmp_path), asynchronous)
    assert reshard.open(tmp_path).verify() == []
    assert reshard.open(tmp_path).read("w").eq(1).all()


class AllReduced:
    """A Stateful whose state_dict is collective."""

    def state_dict(self) -> dict[str, Any]:
        value = torch.ones(3)
        dist.all_reduce(value)
        return {"value": value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state["value"]


def load_collective_state(folder: str) -> list[str]:
    rank = dist.get_rank()
    reshard.save({"s": AllReduced()}, f"{folder}/c")
    calls: list[tuple[Any, Any, dict[str, Any]]] = [
        ({"s": AllReduced()}, f"{folder}/{'c' if rank != 1 else 'missing'}", {}),
        ({"s": AllReduced()}, f"{folder}/c", {"strict": 3} if rank == 1 else {}),
        (3 if rank == 1 else {"s": AllReduced()}, f"{folder}/c", {}),
        ({"s": AllReduced(), "other": 1} if rank == 1 else {"s": AllReduced()}, f"{folder}/c", {}),
    ]
    messages = []
    for state, uri, options in calls:
        with pytest.raises(errors.CheckpointError) as caught:
            reshard.load(state, uri, **options)
        messages.append(f"{type(caught.value).__name__} {caught.value.rank}")
    stateful = AllReduced()
    reshard.load({"s": stateful}, f"{folder}/c")
    assert stateful.loaded.tolist() == [3.0] * 3
    return messages


def test_a_rank_that_cannot_load_does_not_leave_the_others_in_a_collective_state_dict(
    ranks: RankPool, tmp_path: Path
) -> None:
    expected = ["CheckpointNotFoundError 1", "ArgumentError 1", "ArgumentError 1", "MissingTensorError 1"]
    assert ranks.run(3, load_collective_state, str(tmp_path)) == [expected] * 3


class FailsToLoad:
    def state_dict(self) -> dict[str, Any]:
        return {"n": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if dist.get_rank() == 1:
            raise RuntimeError("my loader broke")


def load_into_what_fails(folder: str) -> str:
    state = {"w": torch.ones(3), "loader": FailsToLoad()}
    reshard.save(state, folder)
    with pytest.raises(errors.RankError) as caught:
        reshard.load(state, folder)
    return str(caught.value)


def test_an_error_of_load_state_dict_on_one_rank_reaches_every_rank(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(3, load_into_what_fails, str(tmp_path)) == ["rank 1: RuntimeError: my loader broke"] * 3
