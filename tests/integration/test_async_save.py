"""`reshard.async_save`: values, errors, busy ranks, staging in parts, interrupts, the end of processes."""

from __future__ import annotations

import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import reshard
from reshard import errors
from reshard.storage.stores.local import LocalStore
from reshard.storage.stores.testing import Call, RecordingStore
from reshard.storage.writing.staging import PAGE_BYTES, STAGING
from reshard.storage.writing.writer_process import writer_process
from reshard.testing import MemoryStore
from tests.integration.models import build, local_values
from tests.ranks import RankFailed, RankPool

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

ROOT = Path(__file__).parents[2]
BACKGROUNDS = ["thread", "process"]


@pytest.fixture(autouse=True, scope="module")
def end_of_the_writer_process() -> Iterator[None]:
    yield
    reshard.release_memory()


@dataclass
class Waits:
    """Waits in the calls of one method of a store while a file exists, and then raises if it is to."""

    folder: str
    method: str
    fails: bool = False

    def __call__(self, call: Call) -> None:
        if call.method == self.method:
            Path(self.folder, f"reached-{call.method}").touch()
            while Path(self.folder, "hold").exists():
                time.sleep(0.02)
            if self.fails:
                raise errors.AccessDeniedError("injected")


def waiting(folder: Path, method: str = "write", *, fails: bool = False, hold: bool = True) -> RecordingStore:
    """Return a store whose calls wait until `let_go` is called."""
    folder.mkdir(exist_ok=True)
    if hold:
        (folder / "hold").touch()
    return RecordingStore(LocalStore(folder / "c"), Waits(str(folder), method, fails))


def let_go(folder: Path) -> None:
    (folder / "hold").unlink()


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Values


def change(state: dict[str, Any]) -> None:
    with torch.no_grad():
        for value in state.values():
            if isinstance(value, ShardedTensor):
                for shard in value.local_shards():
                    shard.tensor.fill_(7)
            else:
                (value.to_local() if isinstance(value, DTensor) else value).fill_(7)


def save_and_change(folder: str, layout: str, background: Any, staging: Any) -> dict[str, int]:
    model = build(layout, seed=0)
    expected = local_values(model)
    numbers = [1, 2]
    state: dict[str, Any] = {"model": model, "step": 5, "numbers": numbers}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    reports = []
    for number in range(2):
        uri = f"{folder}/{number}"
        model.update(build(layout, seed=0))
        numbers[0] = 1
        handle = reshard.async_save(state, uri, background=background, staging=staging, metadata={"step": number})
        if staging == "overlapped":
            handle.before(optimizer)
            optimizer.step()
        change(model)
        numbers[0] = 100
        reports.append(handle.result())
        assert handle.done()
        assert handle.exception() is None
        assert not handle.skipped
        assert handle.progress.done_bytes == handle.progress.total_bytes == reports[-1].local.bytes_needed
        loaded: dict[str, Any] = {"model": build(layout, seed=1), "step": 0, "numbers": [0, 0]}
        reshard.load(loaded, uri)
        after = local_values(loaded["model"])
        assert all(after[name].equal(value) for name, value in expected.items())
        assert loaded["step"] == 5
        assert loaded["numbers"] == [1, 2]
        checkpoint = reshard.open(uri)
        assert checkpoint.verify() == []
        assert checkpoint.metadata == {"step": number}
    model.update(build(layout, seed=0))
    numbers[0] = 1
    by_save = reshard.save(state, f"{folder}/save")
    for report in reports:
        assert [rank.bytes_needed for rank in report.ranks] == [rank.bytes_needed for rank in by_save.ranks]
        assert [rank.chunks for rank in report.ranks] == [rank.chunks for rank in by_save.ranks]
        assert list(report.local.seconds) == ["plan", "stage", "encode", "write", "commit", "total"]
        assert all(seconds >= 0 for seconds in report.local.seconds.values())
    return {"staged": STAGING.held_bytes, "needed": by_save.local.bytes_needed}


@pytest.mark.parametrize("layout", ["fsdp", "hsdp", "fsdp_tp", "tp", "fsdp1", "plain"])
def test_the_values_at_the_time_of_the_call_are_saved(layout: str, ranks: RankPool, tmp_path: Path) -> None:
    for found in ranks.run(4, save_and_change, str(tmp_path), layout, "thread", "blocking"):
        assert found["staged"] <= max(1, -(-found["needed"] // PAGE_BYTES) + 1) * PAGE_BYTES


@pytest.mark.parametrize(("background", "staging"), [("process", "blocking"), ("process", "overlapped"),
                                                     ("thread", "overlapped")])  # fmt: skip
def test_the_values_are_saved_in_other_modes(background: str, staging: str, ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(4, save_and_change, str(tmp_path), "fsdp", background, staging)


def stage_replicas() -> list[int]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    values = {f"w{i}": distribute_tensor(torch.full((512, 1024), float(i)), mesh, [Replicate()]) for i in range(8)}
    store = f"/tmp/{os.getppid()}"
    handle = reshard.async_save({**values, "same": torch.ones(512, 1024)}, store, overwrite=True, background="thread")
    report = handle.result()
    if dist.get_rank() == 0:
        reshard.remove(store)
    return [rank.bytes_needed for rank in report.ranks]


def test_a_replica_is_staged_by_one_rank(ranks: RankPool) -> None:
    found = ranks.run(3, stage_replicas)[0]
    assert sum(found) == 9 * 2 * 2**20
    assert max(found) == 3 * 2 * 2**20


ODD: dict[str, Any] = {
    "nothing": {},
    "only values": {"a": 1, "b": {"c": "x", "d": {}}, "e": [1, [2.5, None]]},
    "empty tensors": {"a": torch.zeros(0), "b": torch.zeros(3, 0)},
    "scalar": {"a": torch.tensor(3.0)},
    "pickled": {"a": signal.SIGINT, "w": torch.ones(3)},
}


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("case", ODD)
def test_unusual_state_dicts_are_saved(case: str, background: Any, tmp_path: Path) -> None:
    report = reshard.async_save(ODD[case], tmp_path / "c", background=background).result()
    assert report.pickled == (("a",) if case == "pickled" else ())
    loaded = reshard.open(tmp_path / "c").state_dict(allow_pickle=True)
    assert str(loaded) == str(ODD[case])


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_tensors_that_share_memory_and_views_are_saved(background: Any, tmp_path: Path) -> None:
    base = torch.randn(400, 300)
    state = {"a": base, "tied": base, "rows": base[3:50], "transposed": base.t(), "strided": base[::3, ::2]}
    expected = {name: value.clone() for name, value in state.items()}
    handle = reshard.async_save(state, tmp_path / "c", background=background)
    base.zero_()
    handle.result()
    checkpoint = reshard.open(tmp_path / "c")
    assert all(checkpoint.read(name).equal(value) for name, value in expected.items())


def test_a_relative_path_is_relative_to_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        reshard.async_save({"w": torch.ones(3)}, "c", background="process").result()
        assert reshard.open(tmp_path / name / "c").read("w").tolist() == [1.0] * 3


def test_an_existing_checkpoint_is_replaced_only_with_overwrite(tmp_path: Path) -> None:
    reshard.async_save({"w": torch.ones(3)}, tmp_path / "c").result()
    with pytest.raises(errors.CheckpointExistsError, match="pass overwrite=True"):
        reshard.async_save({"w": torch.zeros(3)}, tmp_path / "c")
    reshard.async_save({"w": torch.zeros(3)}, tmp_path / "c", overwrite=True).result()
    assert reshard.open(tmp_path / "c").read("w").tolist() == [0.0] * 3


# Staging in parts


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("staging_bytes", [1, 2 * PAGE_BYTES, 4 * PAGE_BYTES])
def test_what_does_not_fit_is_written_before_the_call_returns(
    staging_bytes: int, background: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reshard.release_memory()
    state = {"a": torch.randn(2048, 1024), "b": torch.randn(64, 4096), "n": 3}
    expected = {name: state[name].clone() for name in ("a", "b")}  # type: ignore[attr-defined]
    seen: list[reshard.Progress] = []
    with caplog.at_level(logging.WARNING, "reshard"):
        handle = reshard.async_save(
            state, tmp_path / "c", background=background, staging_bytes=staging_bytes, progress=seen.append
        )
    at_once = handle.progress.done_bytes
    for name in expected:
        state[name].zero_()  # type: ignore[attr-defined]
    report = handle.result()
    checkpoint = reshard.open(tmp_path / "c")
    assert all(checkpoint.read(name).equal(value) for name, value in expected.items())
    assert checkpoint.read_value("n") == 3
    assert checkpoint.verify() == []
    assert STAGING.held_bytes <= max(staging_bytes, PAGE_BYTES)
    assert report.local.bytes_needed >= at_once >= report.local.bytes_needed - staging_bytes
    assert f"but staging_bytes is {staging_bytes}: {at_once} bytes are written before async_save" in caplog.text
    assert seen[-1].done_bytes == seen[-1].total_bytes == report.local.bytes_needed


# Errors


class Collective:
    """A Stateful whose state_dict is collective, as that of FSDP with a full state dict is."""

    def state_dict(self) -> dict[str, Any]:
        values = torch.ones(1)
        dist.all_reduce(values)
        return {"values": values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("never reached")


def fail_on_one_rank(folder: str, background: Any) -> list[str]:
    local = LocalStore(Path(folder, "c"))
    bad = RecordingStore(local, Waits(folder, "write", fails=True)) if dist.get_rank() == 1 else local
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = {"w": distribute_tensor(torch.ones(64, 8), mesh, [Shard(0)]), "step": 1, "all": Collective()}
    messages = []
    handle = reshard.async_save(state, bad, background=background)
    with pytest.raises(errors.AccessDeniedError) as caught:
        handle.result()
    messages.append(str(caught.value))
    assert handle.exception() is caught.value
    handle = reshard.async_save(state, bad, background=background)
    if dist.get_rank() == 0:
        handle.exception()
    with pytest.raises(errors.AccessDeniedError) as caught:
        reshard.async_save(state, local, background=background)
    messages.append(str(caught.value))
    reshard.async_save(state, local, background=background).result()
    return messages


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_every_rank_reports_the_error_of_one(background: str, ranks: RankPool, tmp_path: Path) -> None:
    earlier = f"the last async_save, to {tmp_path / 'c'}, failed, and nothing was saved now: rank 1: injected"
    for first, second in ranks.run(3, fail_on_one_rank, str(tmp_path), background):
        assert first == "rank 1: injected"
        assert second.endswith(earlier)
    checkpoint = reshard.open(tmp_path / "c")
    assert checkpoint.verify() == []
    assert {path.name for path in (tmp_path / "c" / "data").iterdir()} == {
        name.removeprefix("data/") for name, _ in checkpoint._source.objects
    }, "failed saves leave nothing"


def find_errors_while_planning(folder: str) -> list[str]:
    rank = dist.get_rank()
    location = f"{folder}/{rank}"
    calls: list[tuple[dict[str, Any], Any, dict[str, Any]]] = [
        ({"w": torch.ones(3)}, folder, {"codec": "lzma" if rank == 1 else "zstd"}),
        ({"w": torch.ones(3)}, folder, {"staging": "never" if rank == 1 else "blocking"}),
        ({"w": torch.ones(3)}, folder, {"busy": "skip" if rank == 1 else "wait"}),
        ({"w": torch.ones(3)}, folder, {"staging_bytes": 0 if rank == 1 else None}),
        ({"w": torch.ones(3, device="meta") if rank == 1 else torch.ones(3)}, folder, {}),
        ({"w": torch.ones(3)}, location, {}),
        ({"w": torch.ones(3 + rank)}, folder, {}),
        ({"w": torch.ones(3)}, folder, {"metadata": {"rank": rank}}),
        ({"w": lambda: 3} if rank == 1 else {"w": 3}, folder, {}),
        ({"w": torch.ones(3)}, "nothing://x" if rank == 1 else folder, {}),
    ]
    messages = []
    for state, uri, options in calls:
        with pytest.raises(errors.CheckpointError) as caught:
            reshard.async_save(state, uri, **{"background": "thread", **options})
        messages.append(f"{type(caught.value).__name__}: {caught.value}")
    return messages


def test_errors_of_planning_are_raised_at_once_on_every_rank(ranks: RankPool, tmp_path: Path) -> None:
    expected = [
        "ArgumentError: rank 1: codec must be ",
        "ArgumentError: rank 1: staging must be one of 'blocking', 'overlapped', got 'never'",
        "ArgumentError: rank 0: the ranks of one async_save passed different options",
        "ArgumentError: rank 1: staging_bytes must be a positive integer",
        "UnsupportedValueError: rank 1: 'w' cannot be stored: it is on the meta device",
        "ArgumentError: rank 0: the ranks of one save passed different locations",
        "ArgumentError: rank 0: the ranks disagree about 'w'",
        "ArgumentError: rank 0: the ranks of one save passed different metadata",
        "UnsupportedValueError: rank 1: 'w', of <class 'function'>, cannot be stored",
        "UnsupportedURIError: rank 1: ",
    ]
    for messages in ranks.run(3, find_errors_while_planning, str(tmp_path)):
        assert [got for got, start in zip(messages, expected, strict=True) if not got.startswith(start)] == []
    assert list(tmp_path.iterdir()) == []


UNSUITABLE: dict[str, tuple[Any, str]] = {
    "memory": ("memory://a/b", "memory://a/b is in the memory of this process, so background='process' cannot write"),
    "store in memory": (MemoryStore(), "memory is in the memory of this process, so"),
    "lambda": (
        RecordingStore(LocalStore("/tmp/x"), lambda call: None),
        "needs to pickle the store .* Pass a URI with plain options, or",
    ),
}


@pytest.mark.parametrize("case", UNSUITABLE)
def test_a_store_that_a_process_cannot_open_is_refused(case: str) -> None:
    location, message = UNSUITABLE[case]
    with pytest.raises(errors.ArgumentError, match=message):
        reshard.async_save({"w": torch.ones(3)}, location, background="process")


WRONG_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "progress": ({"progress": 3}, "progress must be True, False or a function, got 3"),
    "overwrite": ({"overwrite": "no"}, "overwrite must be True or False, got 'no'"),
    "allow_pickle": ({"allow_pickle": None}, "allow_pickle must be True or False, got None"),
    "process_group": ({"process_group": 3}, r"process_group must be .* got 3; .* is mesh\.get_group\(\)"),
}


@pytest.mark.parametrize("call", [reshard.async_save, reshard.save])
@pytest.mark.parametrize("case", WRONG_ARGUMENTS)
def test_arguments_of_a_wrong_type_are_refused(case: str, call: Any, tmp_path: Path) -> None:
    arguments, message = WRONG_ARGUMENTS[case]
    with pytest.raises(errors.ArgumentError, match=message):
        call({"w": torch.ones(3)}, tmp_path / "c", **arguments)
    assert not (tmp_path / "c").exists()


def refuse_arguments_of_one_rank(folder: str) -> list[str]:
    wrong = dist.get_rank() == 1
    found = []
    for name, value in (("progress", 3), ("overwrite", "no"), ("allow_pickle", None)):
        arguments: dict[str, Any] = {name: value} if wrong else {}
        with pytest.raises(errors.ArgumentError) as caught:
            reshard.async_save({"w": torch.ones(3)}, f"{folder}/c", **arguments)
        found.append(str(caught.value))
    return found


def test_every_rank_refuses_the_wrong_argument_of_one(ranks: RankPool, tmp_path: Path) -> None:
    for found in ranks.run(2, refuse_arguments_of_one_rank, str(tmp_path)):
        assert len(found) == 3
        for message, name in zip(found, ("progress", "overwrite", "allow_pickle"), strict=True):
            assert f"{name} must be True" in message


@pytest.mark.parametrize("timeout", ["x", True, float("nan"), float("inf"), [1]], ids=repr)
def test_a_timeout_that_is_no_number_is_refused(timeout: Any, tmp_path: Path) -> None:
    handle = reshard.async_save({"w": torch.ones(3)}, tmp_path / "c", background="thread")
    for wait in (handle.result, handle.exception, handle.wait_staged):
        with pytest.raises(errors.ArgumentError, match="timeout must be a number of seconds"):
            wait(timeout)
    assert handle.result(60).total.bytes_needed > 0


def test_a_store_in_memory_that_can_be_pickled_needs_a_thread() -> None:
    store = RecordingStore(MemoryStore(), do_nothing)
    handle = reshard.async_save({"w": torch.ones(3)}, store, background="process")
    with pytest.raises(errors.StoreError, match=r"are gone from memory, .* then pass background='thread'; the check"):
        handle.result()
    reshard.async_save({"w": torch.ones(3)}, store, background="thread").result()
    assert reshard.open(store).verify() == []


def do_nothing(call: Call) -> None:
    """Stay picklable, unlike the default hook."""


def test_objects_that_a_thread_wrote_and_that_are_gone_do_not_suggest_a_thread() -> None:
    store = Forgets()
    with pytest.raises(errors.StoreError, match="something else removes objects there; the checkpoint was not"):
        reshard.async_save({"w": torch.ones(3)}, store, background="thread").result()


class Forgets(MemoryStore):
    def list(self, folder: str = "") -> list[str]:
        return []


def test_an_unpickled_store_that_fails_is_an_error(tmp_path: Path) -> None:
    store = FailsToUnpickle(tmp_path / "c")
    handle = reshard.async_save({"w": torch.ones(3)}, store, background="process")
    with pytest.raises(errors.ArgumentError, match=r"the writer process cannot unpickle the store: ZeroDivisionError"):
        handle.result()


class FailsToUnpickle(LocalStore):
    def __reduce__(self) -> Any:
        return divmod, (1, 0)


def test_a_writer_process_that_is_killed_is_replaced(tmp_path: Path) -> None:
    store = waiting(tmp_path)
    handle = reshard.async_save({"w": torch.ones(3)}, store, background="process")
    wait_for(tmp_path / "reached-write")
    pid = writer_process().pid
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(errors.RankError, match=rf"the writer process {pid} ended while it wrote, with exit code -9"):
        handle.result()
    let_go(tmp_path)
    reshard.async_save({"w": torch.ones(3)}, store, background="process").result()
    assert writer_process().pid != pid
    assert reshard.open(tmp_path / "c").verify() == []


def stop_others(folder: str, background: Any) -> tuple[str, list[str]]:
    """Rank 1 fails while the others wait in their store."""
    rank = dist.get_rank()
    own = Path(folder, str(rank))
    own.mkdir()
    if rank != 1:
        (own / "hold").touch()
    store = RecordingStore(LocalStore(Path(folder, "c")), Waits(str(own), "write", fails=rank == 1))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = {"w": distribute_tensor(torch.ones(64, 8), mesh, [Shard(0)])}
    handle = reshard.async_save(state, store, background=background)
    error = handle.exception()
    return str(error), sorted(path.name for path in own.iterdir())


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_a_rank_that_fails_stops_the_others(background: str, tmp_path: Path) -> None:
    with RankPool() as pool:  # an own pool, since its threads keep waiting
        for rank, (message, files) in enumerate(pool.run(3, stop_others, str(tmp_path), background)):
            assert message == "rank 1: injected"
            assert ("hold" in files) == (rank != 1), "the other ranks were still waiting"


# Busy ranks


def call_while_busy(folder: str, background: Any) -> list[str]:
    rank = dist.get_rank()
    state: dict[str, Any] = {"w": torch.full((1000,), 1.0), "step": 1}
    own = Path(folder, "hold-of-rank-1")
    store = RecordingStore(LocalStore(Path(folder, "first")), Waits(str(own), "write"))
    if rank == 0:
        own.mkdir()
        (own / "hold").touch()
    dist.barrier()
    first = reshard.async_save(state, store, background=background)
    found = []
    state["all"] = Collective()
    skipped = reshard.async_save(state, f"{folder}/skipped", busy="skip", background=background)
    report = skipped.result()
    assert skipped.skipped
    assert skipped.done()
    assert report.total.bytes_needed == 0
    assert len(report.ranks) == dist.get_world_size()
    found.append(repr(skipped))
    with pytest.raises(errors.BusyError) as caught:
        reshard.async_save(state, f"{folder}/refused", busy="refuse", background=background)
    found.append(str(caught.value))
    with pytest.raises(TimeoutError, match="has not ended after"):
        first.result(timeout=0.01)
    dist.barrier()
    if rank == 0:
        threading.Timer(0.3, (own / "hold").unlink).start()
    state["w"].fill_(2)
    second = reshard.async_save(state, f"{folder}/second", background=background)
    assert first.done()
    first.result()
    second.result()
    again = reshard.async_save(state, f"{folder}/third", busy="refuse", background=background)
    again.result()
    return found


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_a_call_while_a_save_runs_waits_refuses_or_skips(background: str, ranks: RankPool, tmp_path: Path) -> None:
    for skipped, refused in ranks.run(3, call_while_busy, str(tmp_path), background):
        assert skipped == f"AsyncSave('{tmp_path / 'skipped'}', skipped)"
        assert refused.startswith("rank 0: the last async_save of these ranks is still running: wait for its result()")
    assert reshard.open(tmp_path / "first").read("w").unique().tolist() == [1.0]
    for name in ("second", "third"):
        assert reshard.open(tmp_path / name).read("w").unique().tolist() == [2.0]
    assert not (tmp_path / "skipped").exists()
    assert not (tmp_path / "refused").exists()


# Process groups


def save_in_groups(folder: str) -> str:
    rank = dist.get_rank()
    pairs: list[Any] = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    own = pairs[rank // 2]
    handles = [
        reshard.async_save({"w": torch.full((3,), float(rank // 2))}, f"{folder}/{rank // 2}", process_group=own),
        reshard.async_save({"w": torch.full((3,), 9.0)}, f"{folder}/all"),
    ]
    for handle in handles:
        handle.result()
    if rank < 2:
        return ""
    with pytest.raises(errors.ArgumentError) as caught:
        reshard.async_save({"w": torch.ones(3)}, f"{folder}/x", process_group=pairs[0])
    return str(caught.value)


@pytest.mark.filterwarnings("ignore:Running")
def test_groups_save_independently(ranks: RankPool, tmp_path: Path) -> None:
    messages = ranks.run(4, save_in_groups, str(tmp_path))
    for name, value in (("0", 0.0), ("1", 1.0), ("all", 9.0)):
        assert reshard.open(tmp_path / name).read("w").tolist() == [value] * 3
    assert "rank 3 is not in the process group that was passed" in messages[3]


def save_and_destroy_the_group(folder: str) -> None:
    own = Path(folder, str(dist.get_rank()))
    own.mkdir()
    (own / "hold").touch()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = {"w": distribute_tensor(torch.arange(64.0), mesh, [Shard(0)])}
    store = RecordingStore(LocalStore(Path(folder, "c")), Waits(str(own), "write"))
    handle = reshard.async_save(state, store, background="thread")
    dist.destroy_process_group()
    (own / "hold").unlink()
    handle.result()
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)  # the pool destroys it


def test_a_save_survives_the_process_group(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(3, save_and_destroy_the_group, str(tmp_path))
    assert reshard.open(tmp_path / "c").read("w").equal(torch.arange(64.0))


def lose_a_rank(folder: str) -> str:
    store = LocalStore(Path(folder, "c"))
    state = {"w": distribute_tensor(torch.ones(64, 8), init_device_mesh("cpu", (3,)), [Shard(0)])}
    reshard.async_save(state, store, background="thread").result()
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    handle = reshard.async_save(state, store, background="thread", overwrite=True)
    return str(handle.exception())


def test_a_rank_that_dies_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    with RankPool() as pool, pytest.raises(RankFailed, match="the process died"):
        pool.run(3, lose_a_rank, str(tmp_path), timeout_s=30)
    assert reshard.open(tmp_path / "c").verify() == []


# The end of processes

SCRIPT = """
import logging, os, sys, time, torch, reshard
from pathlib import Path
from tests.integration.test_async_save import waiting

if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)
    folder, background = Path(sys.argv[1]), sys.argv[2]
    state = {"w": torch.full((1000,), 1.0)}
    reshard.save(state, folder / "c")
    state["w"].fill_(2)
    handle = reshard.async_save(
        state, waiting(folder, fails=FAILS), background=background, overwrite=True, codec="none"
    )
    state["w"].fill_(3)
    if background == "process":
        from reshard.storage.writing.writer_process import writer_process
        print(writer_process().pid, flush=True)
    else:
        print(os.getpid(), flush=True)
    END
"""


def trainer(folder: Path, background: str, end: str, *, fails: bool = False) -> subprocess.Popen[str]:
    """Start a process that begins a save, which waits in its store."""
    script = folder / "script.py"
    script.write_text(SCRIPT.replace("END", end).replace("FAILS", str(fails)))
    return subprocess.Popen(
        [sys.executable, str(script), str(folder), background],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def is_running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_until_ended(pid: int) -> None:
    deadline = time.monotonic() + 30
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.05)


def saved_value(folder: Path) -> float:
    checkpoint = reshard.open(folder / "c")
    assert checkpoint.verify() == []
    [value] = checkpoint.read("w").unique().tolist()
    return float(value)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_the_interpreter_waits_for_a_dropped_save(background: str, tmp_path: Path) -> None:
    with trainer(tmp_path, background, "del handle") as process:
        wait_for(tmp_path / "reached-write")
        time.sleep(0.5)
        assert process.poll() is None
        let_go(tmp_path)
        out, messages = process.communicate(timeout=60)
        assert process.returncode == 0, messages
    assert saved_value(tmp_path) == 2.0
    wait_until_ended(int(out))


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_the_error_of_a_dropped_save_is_logged(background: str, tmp_path: Path) -> None:
    with trainer(tmp_path, background, "", fails=True) as process:
        wait_for(tmp_path / "reached-write")
        let_go(tmp_path)
        _, messages = process.communicate(timeout=60)
    assert f"the save to {tmp_path / 'c'} failed: injected" in messages
    assert saved_value(tmp_path) == 1.0


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_a_killed_trainer_leaves_the_old_checkpoint_and_no_process(background: str, tmp_path: Path) -> None:
    with trainer(tmp_path, background, "time.sleep(600)") as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        wait_for(tmp_path / "reached-write")
        assert is_running(pid)
        process.kill()
    wait_until_ended(pid)
    assert saved_value(tmp_path) == 1.0
    let_go(tmp_path)
    reshard.async_save({"w": torch.full((1000,), 4.0)}, tmp_path / "c", overwrite=True).result()
    assert saved_value(tmp_path) == 4.0


def test_a_killed_trainer_with_a_forked_child_leaves_no_writer_process(tmp_path: Path) -> None:
    """The child keeps the trainer's end of the connection open."""
    end = "child = os.fork()\n    time.sleep(600 if child else 20)"
    with trainer(tmp_path, "process", end) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        wait_for(tmp_path / "reached-write")
        process.kill()
        wait_until_ended(pid)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_ctrl_c_ends_the_wait_but_not_the_save(background: str, tmp_path: Path) -> None:
    end = "\n    ".join(
        [
            "try:",
            "    handle.result()",
            "except KeyboardInterrupt:",
            "    print('interrupted', flush=True)",
            "(folder / 'hold').unlink()",
            "print(handle.result().total.bytes_needed)",
        ]
    )
    with trainer(tmp_path, background, end) as process:
        wait_for(tmp_path / "reached-write")
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, messages = process.communicate(timeout=60)
    assert out.split()[1:] == ["interrupted", "4000"], messages
    assert saved_value(tmp_path) == 2.0


def test_ctrl_c_ends_the_wait_at_exit(tmp_path: Path) -> None:
    with trainer(tmp_path, "thread", "") as process:
        wait_for(tmp_path / "reached-write")
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert saved_value(tmp_path) == 1.0


def test_a_forked_child_does_not_wait_for_the_save_of_its_parent(tmp_path: Path) -> None:
    end = "\n    ".join(
        [
            "if os.fork() == 0:",
            "    try:",
            "        handle.result()",
            "    except reshard.errors.ArgumentError as error:",
            "        print(error, flush=True)",
            "        reshard.async_save(state, folder / 'child', background='thread').result()",
            "        sys.exit(0)",
            "os.wait()",
            "(folder / 'hold').unlink()",
        ]
    )
    with trainer(tmp_path, "thread", end) as process:
        out, messages = process.communicate(timeout=60)
        assert process.returncode == 0, messages
    assert "a forked child cannot wait for it" in out
    assert saved_value(tmp_path) == 2.0
    assert reshard.open(tmp_path / "child").read("w").unique().tolist() == [3.0]


# Memory


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_memory_and_files_do_not_grow(background: Any, tmp_path: Path) -> None:
    state = {"w": torch.randn(1024, 1024), "v": [torch.randn(100) for _ in range(20)], "n": 3}

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    reshard.release_memory()
    measured = []
    for step in range(50):
        reshard.async_save(state, tmp_path / "c", background=background, overwrite=True).result()
        if step in (9, 49):
            measured.append((resident(), len(os.listdir("/proc/self/fd")), threading.active_count()))
    (before, files, threads), (after, files_later, threads_later) = measured
    assert after < before + 20 * 2**20, "an eighth of what 40 copies of the state would take"
    assert files_later <= files
    assert threads_later <= threads
    assert STAGING.held_bytes == 3 * PAGE_BYTES


def test_release_memory_ends_the_writer_process(tmp_path: Path) -> None:
    reshard.async_save({"w": torch.ones(3)}, tmp_path / "c", background="process").result()
    pid = writer_process().pid
    reshard.release_memory()
    wait_until_ended(pid)
    assert STAGING.held_bytes == 0
    reshard.release_memory()
    reshard.async_save({"w": torch.ones(3)}, tmp_path / "d", background="process").result()


def test_a_finished_handle_does_not_keep_the_tensors(tmp_path: Path) -> None:
    import weakref

    reshard.async_save({"w": torch.ones(3)}, tmp_path / "first", background="thread").result()  # torch imports modules
    tensor = torch.ones(1000)
    freed = weakref.ref(tensor)
    handle = reshard.async_save({"w": tensor}, tmp_path / "c", background="thread")
    handle.wait_staged()
    del tensor
    assert freed() is None
    handle.result()


def test_a_handle_refuses_what_is_no_optimizer(tmp_path: Path) -> None:
    handle = reshard.async_save({"w": torch.ones(3)}, tmp_path / "c", background="thread")
    with pytest.raises(errors.ArgumentError, match=r"before\(\) takes a torch\.optim\.Optimizer, got <class 'int'>"):
        handle.before(3)
    handle.result()


def test_wait_staged_has_a_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reshard.storage.writing.staging import Staging

    go_on = threading.Event()
    copy = Staging.copy

    def slowly(self: Staging) -> None:
        go_on.wait(60)
        copy(self)

    monkeypatch.setattr(Staging, "copy", slowly)
    handle = reshard.async_save({"w": torch.ones(3)}, tmp_path / "c", background="thread", staging="overlapped")
    with pytest.raises(TimeoutError, match=r"has not copied the tensors after 0\.05 s"):
        handle.wait_staged(timeout=0.05)
    go_on.set()
    handle.wait_staged()
    handle.result()


def test_an_interrupted_copy_ends_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reshard.storage.writing.staging import Staging

    def interrupted(self: Staging) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "copy", interrupted)
        with pytest.raises(KeyboardInterrupt):
            reshard.async_save({"w": torch.ones(3)}, tmp_path / "c", background="thread")
    with pytest.raises(errors.RankError, match="failed, and nothing was saved now: KeyboardInterrupt"):
        reshard.async_save({"w": torch.ones(3)}, tmp_path / "c", background="thread")
    reshard.async_save({"w": torch.ones(3)}, tmp_path / "c", background="thread").result()


def test_a_save_from_the_callback_of_the_save_that_it_would_wait_for_is_refused(tmp_path: Path) -> None:
    raised: list[BaseException] = []

    def save_again(progress: object) -> None:
        if not raised:
            try:
                reshard.async_save({"w": torch.ones(9)}, tmp_path / "b")
            except errors.BusyError as error:
                raised.append(error)

    reshard.async_save({"w": torch.ones(1000, 1000)}, tmp_path / "a", progress=save_again).result(60)
    assert "from the progress callback" in str(raised[0])
    reshard.async_save({"w": torch.ones(9)}, tmp_path / "b").result(60)


def test_a_step_may_wait_for_several_saves_beside_other_hooks(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    handles = []
    called = []
    for at in range(2):
        handles.append(reshard.async_save({"w": weight}, tmp_path / str(at), background="thread"))
        handles[-1].before(optimizer)
        optimizer.register_step_pre_hook(lambda *_, at=at: called.append(at))
    for _ in range(2):
        weight.grad = torch.ones(3)
        optimizer.step()
    assert called == [0, 1] * 2
    for at, handle in enumerate(handles):
        handle.result()
        assert reshard.open(tmp_path / str(at)).read("w").eq(1).all()


def test_release_memory_ends_the_writer_process_beside_a_forked_child(tmp_path: Path) -> None:
    reshard.async_save({"w": torch.ones(3)}, tmp_path / "c", background="process").result()
    process = writer_process()
    read, write = os.pipe()
    child = os.fork()  # as a worker of a DataLoader, it keeps the connection to the writer process open
    if child == 0:  # pragma: no cover
        os.read(read, 1)
        os._exit(0)
    reshard.release_memory()
    os.write(write, b"x")
    os.waitpid(child, 0)
    assert process._process.returncode == 0  # it ended by itself
