"""A CheckpointManager of one process: what is saved, kept, restored and refused."""

from __future__ import annotations

import errno
import gc as gc_of_python
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
import types
import warnings
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

import reshard
from reshard import errors
from reshard.storage.formats.native.manifest import MANIFEST_NAME
from reshard.storage.maintenance import gc
from reshard.storage.stores.local import LocalStore
from reshard.storage.training import lease as lease_module
from reshard.storage.training import manager_threads, run_catalog, run_location
from reshard.storage.training.lease import Lease
from reshard.storage.training.run_catalog import find_entries, metadata_of
from tests.ranks import RankFailed, RankPool

ROOT = Path(__file__).parents[2]


def state(value: float) -> dict[str, Any]:
    return {"model": {"w": torch.full((20, 30), float(value))}, "step": value}


def threads_left(before: set[threading.Thread]) -> list[str]:
    """Wait up to a minute for the threads that are not in `before`, then return the names of those that still run."""
    deadline = time.monotonic() + 60
    while True:  # join() refuses a thread that another thread is starting
        left = [thread.name for thread in threading.enumerate() if thread not in before]
        left = [name for name in left if name != "reshard-loop"]  # the event loop of the process
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.01)


def value_of(loaded: dict[str, Any]) -> float:
    """Return the value of a state, after checking that all its entries are of one save."""
    w: torch.Tensor = loaded["model"]["w"]
    assert w.eq(w[0, 0]).all()
    assert loaded["step"] == w[0, 0]
    return float(w[0, 0])


def manager_of(folder: Path, **options: Any) -> reshard.CheckpointManager:
    return reshard.CheckpointManager(folder, **{"asynchronous": False, "signals": (), **options})


def steps_on_disk(folder: Path) -> list[int]:
    return sorted(int(path.parent.name.removeprefix("step-")) for path in folder.glob("step-*/manifest.reshard"))


def train(manager: reshard.CheckpointManager, steps: Iterable[int]) -> list[int]:
    return [step for step in steps if manager.save(step, state(step), {"loss": abs(step - 30)})]


def test_saves_due_steps_and_restores_the_latest(tmp_path: Path) -> None:
    with manager_of(tmp_path, save_every=10) as manager:
        assert manager.restore(state(0)) is None
        assert (manager.steps(), manager.latest_step(), manager.best_step("loss")) == ([], None, None)
        assert train(manager, range(1, 36)) == [10, 20, 30]
        assert manager.save(36, state(36), force=True)
        assert manager.steps() == [10, 20, 30, 36]
    with manager_of(tmp_path, save_every=10) as manager:
        loaded = state(0)
        assert manager.restore(loaded) == 36
        assert value_of(loaded) == 36
        assert manager.restore(loaded, step=20) == 20
        assert value_of(loaded) == 20


def test_every_call_saves_without_an_interval(tmp_path: Path) -> None:
    with manager_of(tmp_path) as manager:
        assert train(manager, [3, 4, 9]) == [3, 4, 9]


def test_step_may_be_any_whole_number(tmp_path: Path) -> None:
    with manager_of(tmp_path, save_every=2) as manager:
        assert manager.save(torch.tensor(4), state(4))  # type: ignore[arg-type]
        assert manager.steps() == [4]


def test_metrics_and_metadata_are_stored_without_tensors(tmp_path: Path) -> None:
    metrics: dict[str, Any] = {
        "loss": torch.tensor(0.5, requires_grad=True),
        "accuracy": 1,
        "nan": math.nan,
        "inf": -math.inf,
    }
    with manager_of(tmp_path) as manager:
        manager.save(1, state(1), metrics, metadata={"tokens": 100, "git": "abc"})
        with pytest.raises(errors.ArgumentError, match="metadata has the key 'metrics'"):
            manager.save(2, state(2), metadata={"metrics": {}})
    with manager_of(tmp_path) as manager:
        (saved,) = manager.checkpoints()
        assert {name: str(value) for name, value in saved.metrics.items()} == {
            "loss": "0.5", "accuracy": "1.0", "nan": "nan", "inf": "-inf",
        }  # fmt: skip
        metadata = reshard.open(manager.location(1)).metadata
    assert (metadata["tokens"], metadata["git"], metadata["metrics"]["loss"]) == (100, "abc", 0.5)


def test_times_and_metrics_are_the_same_after_a_restart(tmp_path: Path) -> None:
    with manager_of(tmp_path) as manager:
        train(manager, [1, 2])
        before = manager.checkpoints()
    with manager_of(tmp_path) as manager:
        assert manager.checkpoints() == before


def test_policies_decide_what_is_kept(tmp_path: Path) -> None:
    keep = [reshard.latest(2), reshard.every(50), reshard.best("loss")]
    with manager_of(tmp_path, keep=keep) as manager:
        train(manager, range(10, 130, 10))
        manager.wait()
        assert manager.steps() == steps_on_disk(tmp_path) == [30, 50, 100, 110, 120]
        assert manager.best_step("loss") == 30
        assert manager.best_step("loss", mode="max") == 120


def test_nothing_is_removed_without_policies(tmp_path: Path) -> None:
    with manager_of(tmp_path) as manager:
        train(manager, range(1, 8))
        manager.wait()
        assert steps_on_disk(tmp_path) == [*range(1, 8)]


def test_user_can_write_a_policy(tmp_path: Path) -> None:
    def low_loss(saved: Sequence[reshard.SavedStep]) -> Iterable[int]:
        return (found.step for found in saved if found.metrics["loss"] < 2)

    with manager_of(tmp_path, keep=[low_loss]) as manager:
        train(manager, range(27, 36))
        manager.wait()
        assert steps_on_disk(tmp_path) == [29, 30, 31, 35]


def test_policy_that_raises_removes_nothing_and_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def broken(saved: Sequence[reshard.SavedStep]) -> Iterable[int]:
        raise KeyError("a bug")

    with manager_of(tmp_path, keep=[broken]) as manager:
        train(manager, [1, 2, 3])
    assert steps_on_disk(tmp_path) == [1, 2, 3]
    assert "checkpoints of" in caplog.text
    assert "KeyError: 'a bug'" in caplog.text


def test_policy_that_returns_no_steps_removes_nothing_and_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def odd(saved: Sequence[reshard.SavedStep]) -> Iterable[int]:
        return [str(found.step) for found in saved[:1]]  # type: ignore[misc]

    with manager_of(tmp_path, keep=[odd]) as manager:
        train(manager, [1, 2, 3])
    assert steps_on_disk(tmp_path) == [1, 2, 3]
    assert "odd returned '1', which is not a step" in caplog.text


def test_policy_may_return_fixed_steps_before_they_are_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fixed(saved: Sequence[reshard.SavedStep]) -> Iterable[int]:
        return [2, 4, 1000]

    with manager_of(tmp_path, keep=[fixed]) as manager:
        train(manager, [1, 2, 3, 4, 5, 6])
    assert steps_on_disk(tmp_path) == [2, 4, 6]
    assert ["fixed returned step 2, which has no" in message for message in caplog.messages] == [True]


def test_metadata_is_removed_first_so_that_no_half_removed_checkpoint_looks_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    deleting = LocalStore.delete

    def delete(store: LocalStore, names: Iterable[str]) -> None:
        names = list(names)
        deleting(store, names)
        if not names:  # a commit that replaces nothing
            return
        seen.append([found.step or 0 for found in reshard.find_checkpoints(tmp_path) if found.is_complete])

    with manager_of(tmp_path, keep=[reshard.latest(1)]) as manager:
        train(manager, [1])
        monkeypatch.setattr(LocalStore, "delete", delete)
        train(manager, [2])
        manager.wait()
    assert seen[0] == [2]


def test_existing_step_is_skipped_and_replaced_by_force(tmp_path: Path) -> None:
    with manager_of(tmp_path) as manager:
        assert manager.save(1, state(1))
        assert not manager.save(1, state(5))
        assert manager.save(1, {**state(1), "extra": 7}, force=True)
        assert reshard.open(manager.location(1)).read_value("extra") == 7
        assert manager.steps() == [1]


def test_empty_state_dict_is_refused(tmp_path: Path) -> None:
    """It would be the latest checkpoint, so the policies would remove the others."""
    with manager_of(tmp_path, keep=[reshard.latest(1)]) as manager:
        train(manager, [1])
        with pytest.raises(errors.ArgumentError, match="the state dict is empty on every rank"):
            manager.save(2, {})
        assert manager.steps() == [1]
    with pytest.raises(errors.ArgumentError, match="root and mirror must not be empty"):
        reshard.CheckpointManager("")


def test_earlier_step_than_the_last_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with manager_of(tmp_path) as manager:
        train(manager, [10, 20])
    with manager_of(tmp_path) as manager:
        for force in (False, True):
            with pytest.raises(
                errors.ArgumentError, match=r"step 15 cannot be saved.*has a checkpoint of step 20: call"
            ):
                manager.save(15, state(15), force=force)
        with caplog.at_level(logging.WARNING, "reshard"):
            assert not manager.save(10, state(10))
        assert "step 10 was not saved, because the run at" in caplog.text
        with pytest.raises(errors.ArgumentError, match="step 10 cannot be saved"):
            manager.save(10, state(10), force=True)
        assert manager.save(30, state(30))


def test_checkpoints_after_the_restored_step_are_abandoned(tmp_path: Path) -> None:
    """They are not restored, listed or kept when training has continued from an earlier step."""
    with manager_of(tmp_path) as manager:
        train(manager, [10, 20, 30, 40])
    with manager_of(tmp_path) as manager:
        assert manager.restore(state(0), step=20) == 20
        assert manager.steps() == [10, 20]
    with manager_of(tmp_path) as manager:  # nothing was saved since
        assert manager.steps() == [10, 20, 30, 40]
        assert manager.restore(state(0), step=20) == 20
        assert manager.save(25, state(25))
        assert manager.steps() == [10, 20, 25]
    with manager_of(tmp_path) as manager:
        assert manager.steps() == [10, 20, 25]
        assert manager.restore(state(0)) == 25
        assert manager.save(30, state(-30), {"loss": 1})  # replaces an abandoned one
        assert steps_on_disk(tmp_path) == [10, 20, 25, 30, 40]
    with manager_of(tmp_path, keep=[reshard.latest(10)]) as manager:
        loaded = state(0)
        assert manager.restore(loaded) == 30
        assert value_of(loaded) == -30
        assert steps_on_disk(tmp_path) == [10, 20, 25, 30, 40]
        manager.save(35, state(35))
        manager.wait()
        assert steps_on_disk(tmp_path) == [10, 20, 25, 30, 35]


def test_run_of_another_tool_is_continued_and_not_removed(tmp_path: Path) -> None:
    """torchtitan saves to step-N with DCP."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(state(5), storage_writer=dcp.FileSystemWriter(tmp_path / "step-5"), no_dist=True)
    reshard.save(state(7), tmp_path / "step-7")
    with manager_of(tmp_path, keep=[reshard.latest(1)]) as manager:
        assert manager.steps() == [5, 7]
        loaded = state(0)
        assert manager.restore(loaded, step=5) == 5
        assert value_of(loaded) == 5
        assert manager.restore(loaded) == 7
        manager.save(8, state(8))
        manager.wait()
        assert steps_on_disk(tmp_path) == [8]
        assert (tmp_path / "step-5" / ".metadata").exists()


def test_checkpoints_in_other_folders_are_ignored(tmp_path: Path) -> None:
    reshard.save(state(1), tmp_path / "final")
    reshard.save(state(2), tmp_path / "step-2x")
    reshard.save(state(3), tmp_path / "eval" / "step-3")
    with manager_of(tmp_path, keep=[reshard.latest(1)]) as manager:
        assert manager.steps() == []
        train(manager, [1, 2])
        manager.wait()
    assert len(reshard.find_checkpoints(tmp_path)) == 4


def test_remains_of_killed_saves_are_removed_after_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (10, 20):
        reshard.save(state(step), tmp_path / f"step-{step:08}")
    (tmp_path / "step-00000020" / MANIFEST_NAME).unlink()
    with manager_of(tmp_path) as manager:
        manager.wait()
        assert list(tmp_path.glob("step-00000020/data/*"))
    monkeypatch.setattr(gc, "time", types.SimpleNamespace(time=lambda: time.time() + 25 * 3600))
    with manager_of(tmp_path) as manager:
        manager.wait()
        assert not list(tmp_path.glob("step-00000020/data/*"))
        assert manager.restore(state(0)) == 10


def test_damaged_checkpoint_does_not_stop_the_removal_of_remains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (10, 20, 30):
        reshard.save(state(step), tmp_path / f"step-{step:08}")
    (tmp_path / "step-00000010" / MANIFEST_NAME).write_bytes(b"damaged")
    (tmp_path / "step-00000020" / MANIFEST_NAME).unlink()
    monkeypatch.setattr(gc, "time", types.SimpleNamespace(time=lambda: time.time() + 25 * 3600))
    with manager_of(tmp_path) as manager:
        manager.wait()
    assert not list(tmp_path.glob("step-00000020/data/*"))
    assert list(tmp_path.glob("step-00000010/data/*"))


def test_checkpoint_that_is_read_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with manager_of(tmp_path, keep=[reshard.latest(1)]) as manager:
        train(manager, [1])
        manager._controller.root.protect(["step-00000001"])  # type: ignore[union-attr]
        train(manager, [2, 3])
        manager.wait()
        assert steps_on_disk(tmp_path) == [1, 3]
        manager._controller.root.unprotect(["step-00000001"])  # type: ignore[union-attr]
        train(manager, [4])
        manager.wait()
        assert steps_on_disk(tmp_path) == [4]


def test_nothing_is_removed_if_the_last_checkpoint_is_gone(tmp_path: Path) -> None:
    """Somebody removed it, so the others may be needed."""
    with manager_of(tmp_path, keep=[reshard.latest(1)]) as manager:
        train(manager, [1])
        manager._controller.root._policies, policies = None, manager._controller.root._policies  # type: ignore[union-attr]
        train(manager, [2])
        manager._controller.root._policies = policies  # type: ignore[union-attr]
        (tmp_path / "step-00000002" / MANIFEST_NAME).unlink()
        manager._controller.root.remove_not_kept()  # type: ignore[union-attr]
        manager.wait()
    assert steps_on_disk(tmp_path) == [1]


def test_checkpoints_may_be_listed_while_one_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    removing = reshard.remove
    with manager_of(tmp_path) as manager:
        train(manager, [1, 2, 3])

    def remove(uri: str, *options: Any) -> list[str]:
        removed = removing(uri, *options)
        manager._controller.root.refresh()  # type: ignore[union-attr]
        return removed

    monkeypatch.setattr(run_location, "remove", remove)
    with manager_of(tmp_path, keep=[reshard.latest(1)]) as manager:
        train(manager, [4])
        manager.wait()
        assert steps_on_disk(tmp_path) == [4]


def test_failed_removal_is_logged_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    removing = reshard.remove

    def fail(uri: str, *_: Any) -> list[str]:
        raise errors.AccessDeniedError(f"no permission to delete {uri}")

    with manager_of(tmp_path, keep=[reshard.latest(1)]) as manager:
        monkeypatch.setattr(run_location, "remove", fail)
        train(manager, [1, 2])
        manager.wait()
        assert "could not be removed: no permission to delete" in caplog.text
        assert manager.steps() == [1, 2]
        monkeypatch.setattr(run_location, "remove", removing)
        train(manager, [3])
        manager.wait()
        assert steps_on_disk(tmp_path) == [3]


def test_block_that_raises_closes_the_manager_and_keeps_its_exception(tmp_path: Path) -> None:
    def fail(manager: reshard.CheckpointManager) -> None:
        with manager:
            train(manager, [1])
            raise ZeroDivisionError

    manager = manager_of(tmp_path)
    with pytest.raises(ZeroDivisionError):
        fail(manager)
    with pytest.raises(errors.ArgumentError, match="the CheckpointManager is closed"):
        manager.save(2, state(2))
    manager.close()
    with manager_of(tmp_path) as manager:
        assert manager.steps() == [1]


def test_read_only_manager_restores_beside_a_manager_that_saves(tmp_path: Path) -> None:
    with manager_of(tmp_path) as manager:
        train(manager, [1])
        with manager_of(tmp_path, read_only=True, keep=[reshard.latest(1)]) as reader:
            assert reader.restore(state(0)) == 1
            train(manager, [2])
            assert reader.restore(state(0)) == 2
            with pytest.raises(errors.ArgumentError, match="is read_only and cannot save"):
                reader.save(3, state(3))
            with pytest.raises(errors.ArgumentError, match="is read_only and cannot save"):
                reader.save_now()
        train(manager, [3])


def create_outside_of_the_group(folder: str) -> str:
    group: Any = dist.new_group([0])
    if dist.get_rank() == 0:
        reshard.CheckpointManager(folder, process_group=group, signals=()).close()
        return ""
    with pytest.raises(errors.ArgumentError) as caught:
        reshard.CheckpointManager(folder, process_group=group, signals=())
    return str(caught.value)


def test_rank_outside_of_the_group_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    assert "is not in the process group" in ranks.run(2, create_outside_of_the_group, str(tmp_path))[1]


def create_with_other_arguments(folder: str) -> str:
    with pytest.raises(errors.ArgumentError) as caught:
        reshard.CheckpointManager(folder, save_every=10 + dist.get_rank(), signals=())
    with reshard.CheckpointManager(folder, asynchronous=False, signals=()) as manager:
        with pytest.raises(errors.ArgumentError, match="the ranks passed different steps or force"):
            manager.save(dist.get_rank(), {})
        manager.save(3, state(3), {"loss": dist.get_rank()}, metadata={"rank": dist.get_rank()})
        assert manager.checkpoints()[0].metrics == {"loss": 0}
        assert reshard.open(manager.location(3)).metadata["rank"] == 0
        with pytest.raises(errors.ArgumentError, match="rank 1: the metric 'loss'"):
            manager.save(4, state(4), {"loss": [0.5, "x"][dist.get_rank()]})  # type: ignore[dict-item]
    return str(caught.value)


def restore_with_other_arguments(folder: str) -> list[str]:
    rank = dist.get_rank()
    found: list[str] = []
    with reshard.CheckpointManager(folder, asynchronous=False, signals=()) as manager:
        calls: list[dict[str, Any]] = [{"step": None if rank else 1}, {"step": 1 if rank else None}]
        calls += [{"step": rank + 1}, {"step": "x" if rank else 1}, {"exclude": 5 if rank else ()}]
        for train_to in (0, 2):  # also in a run without checkpoints
            train(manager, range(1, train_to + 1))
            for arguments in calls:
                loaded = state(0)
                with pytest.raises(errors.ArgumentError) as caught:
                    manager.restore(loaded, **arguments)
                found.append(str(caught.value))
                assert value_of(loaded) == 0
        assert manager.restore(state(0), step=1) == 1
    return found


def test_ranks_that_restore_with_other_arguments_raise_an_error(ranks: RankPool, tmp_path: Path) -> None:
    different = "the ranks passed different steps to restore(): rank 0: "
    begins = [different, different, different, "rank 1: step must be", "rank 1: exclude"]
    for messages in ranks.run(2, restore_with_other_arguments, str(tmp_path)):
        for message, begin in zip(messages, begins * 2, strict=True):
            assert message.startswith(begin)


def test_ranks_learn_of_removals_after_a_save_that_failed_on_one_rank(tmp_path: Path) -> None:
    with manager_of(tmp_path, keep=[reshard.latest(1)]) as manager:
        train(manager, [1, 2])
        controller = manager._controller
        assert controller is not None
        controller.wait()
        removed = controller.root.removed()
        assert removed
        with pytest.raises(errors.ArgumentError):
            manager.save(3, state(3), {"loss": "x"})  # type: ignore[dict-item]
        assert controller.root.removed() == removed
        manager.wait()
        assert controller.root.removed() == ()


def test_ranks_that_disagree_raise_an_error(ranks: RankPool, tmp_path: Path) -> None:
    for message in ranks.run(2, create_with_other_arguments, str(tmp_path)):
        assert "the ranks passed different arguments" in message


def call_other_methods(folder: str) -> list[str]:
    found = []
    for of_rank_1 in ("close", "wait", "restore"):
        method = of_rank_1
        manager = reshard.CheckpointManager(folder, asynchronous=False, signals=())
        arguments: tuple[Any, ...] = ({},) if method == "restore" else ()
        if dist.get_rank() == 0:
            method, arguments = "save", (6, state(6))
        with pytest.raises(errors.ArgumentError) as caught:
            getattr(manager, method)(*arguments)
        found.append(str(caught.value))
        manager._end()
        dist.barrier()
    return found


def test_ranks_that_call_different_methods_raise_an_error(ranks: RankPool, tmp_path: Path) -> None:
    for messages in ranks.run(2, call_other_methods, str(tmp_path)):
        for method, message in zip(("close", "wait", "restore"), messages, strict=True):
            assert f"rank 1 called {method}() while rank 0 called save(6)" in message


def die_in_a_save(folder: str) -> str:
    manager = reshard.CheckpointManager(folder, signals=())
    manager.save(1, state(1))
    manager.wait()
    if dist.get_rank() == 1:
        os._exit(1)
    with pytest.raises(errors.RankError) as caught:
        manager.save(2, state(2))
    return str(caught.value)


def test_rank_that_dies_ends_the_save_of_the_others(tmp_path: Path) -> None:
    with RankPool() as pool, pytest.raises(RankFailed, match="rank 1:\nthe process died") as failed:
        pool.run(2, die_in_a_save, str(tmp_path))
    assert "rank 0" not in str(failed.value)
    with manager_of(tmp_path) as manager:
        assert manager.restore(state(0)) == 1


@pytest.mark.slow
def test_forked_child_cannot_use_the_manager_and_does_not_release_it(tmp_path: Path) -> None:
    code = """
        import os, sys, warnings
        import reshard
        warnings.simplefilter("ignore")  # Python 3.12 warns of forks with threads
        manager = reshard.CheckpointManager(sys.argv[1], asynchronous=False)
        child = os.fork()
        if not child:
            try:
                with manager:
                    manager.save(1, {"step": 1})
            except reshard.errors.ArgumentError as error:
                print(error)
            sys.exit(0)
        os.waitpid(child, 0)
        print(manager.save(1, {"step": 1}))
        manager._root_lease.check()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "this CheckpointManager belongs to the process that created it: a forked child cannot use it",
        "True",
    ]


def test_restore_of_a_missing_step_names_those_that_exist(tmp_path: Path) -> None:
    with manager_of(tmp_path) as manager:
        train(manager, [1, 2])
        loaded = state(0)
        with pytest.raises(
            errors.CheckpointNotFoundError, match=r"no complete checkpoint of step 3.*checkpoints: 1, 2"
        ):
            manager.restore(loaded, step=3)
        assert value_of(loaded) == 0


def test_failed_save_may_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a CommitError the checkpoint may exist. The next save of that step must work in both cases."""
    with manager_of(tmp_path) as manager:
        for committed in (False, True):
            with monkeypatch.context() as patch:

                def lost(store: Any, manifest: bytes, *_: Any, committed: bool = committed, **__: Any) -> None:
                    if committed:
                        store.put(MANIFEST_NAME, manifest, overwrite=True)
                    raise errors.CommitError("the manifest may or may not have been written")

                patch.setattr("reshard.storage.writing.checkpoint_writer.commit", lost)
                with pytest.raises(errors.CommitError):
                    manager.save(1 + committed, state(1))
        assert manager.save(3, state(3))
        assert manager.steps() == [2, 3]
        with monkeypatch.context() as patch:
            patch.setattr("reshard.storage.writing.checkpoint_writer.commit", lost)
            with pytest.raises(errors.CommitError):
                manager.save(4, state(0))
        assert not manager.save(4, state(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_every": 0}, "save_every must be a whole number of 1 or more, got 0"),
        ({"save_every": 2.5}, "got 2.5"),
        ({"keep": []}, "keep is an empty list, which would keep nothing: pass None"),
        ({"keep": reshard.latest(3)}, r"keep must be a list of policies, got .*write keep=\[latest\(3\)\]"),
        ({"keep": [3]}, r"keep must contain policies such as reshard.latest\(3\), got 3"),
        ({"keep": 3}, r"keep must be a list of policies such as reshard.latest\(3\), got 3"),
        ({"keep": [reshard.latest]}, r"keep contains the function latest: call it, as in reshard.latest\(3\)"),
        ({"keep": [reshard.best]}, "keep contains the function best: call it"),
        ({"codec": "lz4"}, "lz4"),
    ],
    ids=["zero", "float", "empty", "no list", "number", "no sequence", "latest", "best", "codec"],
)
def test_wrong_options_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.ArgumentError, match=message):
        manager_of(tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda manager: manager.save(-1, {}), "step must be a whole number of 0 or more, got -1"),
        (lambda manager: manager.save(True, {}), "got True"),
        (lambda manager: manager.save("3", {}), "got '3'"),
        (lambda manager: manager.save(1, {}, {"loss": "low"}), "the metric 'loss' must be a number"),
        (lambda manager: manager.save(1, {}, {"loss": torch.ones(2)}), "the metric 'loss' must be a number"),
        (lambda manager: manager.save(1, {}, {1: 2}), "the names of metrics must be strings, got 1"),
        (lambda manager: manager.save(1, {}, [1]), "metrics must be a dict"),
        (lambda manager: manager.best_step("loss", mode="low"), 'mode must be "min" or "max"'),
        (lambda manager: manager.restore({}, step=-1), "step must be a whole number"),
    ],
    ids=["negative", "bool", "text", "metric", "many", "name", "list", "mode", "restore"],
)
def test_wrong_arguments_are_refused(tmp_path: Path, call: Any, message: str) -> None:
    with manager_of(tmp_path) as manager, pytest.raises(errors.ArgumentError, match=message):
        call(manager)


def test_relative_locations_do_not_follow_a_change_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with manager_of(Path("run"), mirror="copies") as manager:
        monkeypatch.chdir(tmp_path / "elsewhere")
        train(manager, [1, 2])
    assert steps_on_disk(tmp_path / "run") == steps_on_disk(tmp_path / "copies") == [1, 2]
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"signals": ("x",)}, "signals that a process can handle, such as signal.SIGTERM, got 'x'"),
        ({"signals": (9,)}, "got 9"),
        ({"signals": 15}, r"signals must be a sequence of signals, got 15: write signals=\(15,\)"),
        ({"signals": None}, "signals must be a sequence"),
        ({"asynchronous": "q"}, "asynchronous must be True or False, got 'q'"),
        ({"allow_pickle": None}, "allow_pickle must be True or False, got None"),
    ],
    ids=["text", "SIGKILL", "number", "none", "asynchronous", "pickle"],
)
def test_refused_arguments_do_not_lock_the_run(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.ArgumentError, match=message):
        manager_of(tmp_path, **options)
    manager_of(tmp_path).close()


def test_mirror_inside_of_the_root_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.ArgumentError, match="is inside root"):
        manager_of(tmp_path, mirror=tmp_path / "copies")


def test_missing_signal_handlers_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import signal
    import threading

    def create() -> None:
        manager_of(tmp_path, signals=[signal.SIGUSR1]).close()

    with caplog.at_level(logging.WARNING):
        thread = threading.Thread(target=create)
        thread.start()
        thread.join()
    assert "signals are not handled" in caplog.text


@pytest.mark.parametrize("is_mirrored", [False, True])
def test_dropped_manager_ends_its_threads_and_releases_its_lease(
    is_mirrored: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = set(threading.enumerate())
    manager = reshard.CheckpointManager(
        tmp_path / "run",
        mirror=tmp_path / "mirror" if is_mirrored else None,
        keep=[reshard.latest(1)],
        background="thread",
        signals=(),
    )
    manager.save(1, state(1))
    manager.save(2, state(2))
    dropped = weakref.ref(manager)
    started = set(threading.enumerate()) - before
    assert {thread.name for thread in started} >= {"reshard-lease_0", *["reshard-mirror_0"] * is_mirrored}
    del manager
    gc_of_python.collect()
    assert dropped() is None
    assert threads_left(before) == []
    (lease,) = (tmp_path / "run" / ".reshard-manager").iterdir()
    assert json.loads(lease.read_text())["released"]
    steps = steps_on_disk(tmp_path / "run")
    assert steps[-1] == 2, "the running save was not lost"
    assert is_mirrored or steps == [2]  # a checkpoint that is not on the mirror yet is not removed
    assert [record.message for record in caplog.records if record.levelno >= logging.ERROR] == []


def drop_on_all_ranks(folder: str) -> tuple[list[str], list[str]]:
    before = set(threading.enumerate())
    manager = manager_of(Path(folder))
    started = set(threading.enumerate()) - before
    del manager
    gc_of_python.collect()
    return [thread.name for thread in started], threads_left(before)


def test_dropped_managers_of_several_ranks_end_their_threads(ranks: RankPool, tmp_path: Path) -> None:
    for started, left in ranks.run(2, drop_on_all_ranks, str(tmp_path)):
        assert "reshard-requests_0" in started
        assert left == []


def test_a_new_manager_waits_for_the_save_of_a_dropped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = LocalStore.put

    def slow_put(store: LocalStore, name: str, data: bytes, *, overwrite: bool) -> None:
        time.sleep(0.5 if name == MANIFEST_NAME else 0)
        put(store, name, data, overwrite=overwrite)

    monkeypatch.setattr(LocalStore, "put", slow_put)
    manager = manager_of(tmp_path, asynchronous=True, background="thread")
    manager.save(1, {"w": torch.ones(3)})
    del manager
    gc_of_python.collect()
    with manager_of(tmp_path) as other:
        assert other.steps() == [1]
    assert reshard.open(tmp_path / "step-00000001").read("w").eq(1).all()


AT_EXIT = """
import atexit, sys, torch
import reshard

def save():
    print(manager.save(2, {"w": torch.ones(3)}))

manager = reshard.CheckpointManager(sys.argv[1], background=sys.argv[2])
if sys.argv[3] == "second":
    manager.save(1, {"w": torch.zeros(3)})
atexit.register(save)
"""


@pytest.mark.parametrize(("background", "which"), [("process", "first"), ("thread", "first"), ("process", "second")])
def test_a_save_at_exit_is_committed(background: str, which: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", AT_EXIT, str(tmp_path / "run"), background, which]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    assert reshard.open(tmp_path / "run" / "step-00000002").read("w").eq(1).all()


AFTER_MAIN = """
import atexit, sys, threading, time, torch
import reshard

def save():
    time.sleep(0.5)
    for _ in range(2):
        reshard.async_save({"w": torch.ones(3)}, sys.argv[1], background=sys.argv[2], overwrite=True)

if sys.argv[3] == "thread":
    threading.Thread(target=save).start()
else:
    atexit.register(save)
"""


@pytest.mark.parametrize("background", ["process", "thread"])
@pytest.mark.parametrize("where", ["thread", "atexit"])
def test_async_saves_after_the_main_thread_has_ended_are_committed(background: str, where: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", AFTER_MAIN, str(tmp_path / "c"), background, where]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert reshard.open(tmp_path / "c").read("w").eq(1).all()


def test_closed_manager_is_not_ended_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    monkeypatch.setattr(manager_threads, "_end_dropped", lambda *_: ended.append("dropped"))
    manager = manager_of(tmp_path)
    manager.close()
    del manager
    gc_of_python.collect()
    assert ended == []


@pytest.mark.parametrize("is_saved", [False, True])
def test_restore_refuses_an_empty_state_dict(is_saved: bool, tmp_path: Path) -> None:
    with manager_of(tmp_path) as manager:
        if is_saved:
            manager.save(1, state(1))
        with pytest.raises(errors.ArgumentError, match=r"the state dict is empty on every rank.*latest_step\(\)"):
            manager.restore({})
        with pytest.raises(errors.ArgumentError, match="expected a state dict, a mapping of names to values, got int"):
            manager.restore(3)  # type: ignore[arg-type]
        assert manager.restore(state(0)) == (1 if is_saved else None)


def restore_nothing_on_one_rank(folder: str) -> tuple[int | None, float]:
    loaded: dict[str, Any] = {} if dist.get_rank() == 1 else state(0)
    with manager_of(Path(folder)) as manager:
        manager.save(1, state(1))
        step = manager.restore(loaded)
    return step, value_of(loaded) if loaded else 1.0


def test_one_rank_may_restore_nothing(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(2, restore_nothing_on_one_rank, str(tmp_path)) == [(1, 1.0)] * 2


def count_new_groups(folder: str) -> int:
    before = len(distributed_c10d._world.pg_names)
    with reshard.CheckpointManager(folder, save_every=1, signals=()) as manager:
        for step in range(3):
            manager.save(step, {"w": torch.full((3,), float(step))})
        return len(distributed_c10d._world.pg_names) - before


def test_manager_creates_two_process_groups(ranks: RankPool, tmp_path: Path) -> None:
    """Each of them connects every rank with every other one. One is for calls, the other for saves that are running."""
    assert ranks.run(3, count_new_groups, str(tmp_path)) == [2, 2, 2]


def test_process_group_of_another_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        errors.ArgumentError, match=r"process_group must be a torch\.distributed\.ProcessGroup or None, got 3"
    ):
        reshard.CheckpointManager(tmp_path, process_group=3)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_damaged_checkpoint_is_not_called_a_killed_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with manager_of(tmp_path) as manager:
        train(manager, [1, 2])
    path = tmp_path / "step-00000001" / MANIFEST_NAME
    path.write_bytes(path.read_bytes()[:50])
    with manager_of(tmp_path) as manager:
        manager.wait()
    (message,) = [message for message in caplog.messages if "step-00000001" in message]
    assert message.startswith(f"the checkpoint at {tmp_path}/step-00000001 is damaged, so nothing is removed there: ")


@pytest.mark.parametrize("is_empty", [False, True])
def test_data_that_is_a_folder_is_named_by_a_save_over_it(is_empty: bool, tmp_path: Path) -> None:
    with manager_of(tmp_path) as manager:
        manager.save(1, state(1))
        folder = Path(manager.location(1))
        (path,) = (folder / "data").iterdir()
        path.unlink()
        path.mkdir()
        if not is_empty:
            (path / "notes").touch()
        for save in (
            lambda: manager.save(1, state(2), force=True),
            lambda: reshard.save(state(2), folder, overwrite=True),
            lambda: reshard.async_save(state(2), folder, overwrite=True, background="thread").result(),
        ):
            with pytest.raises(errors.StoreError) as caught:
                save()
            message = str(caught.value)
            assert message.startswith(f"the checkpoint at {folder} cannot be replaced, and is unchanged: ")
            assert f"'data/{path.name}' in {folder}: it is a folder instead of an object" in message
            assert message.endswith("remove that folder by other means; then save again, or save to another location")
        shutil.rmtree(path)
        manager.save(1, state(2), force=True)
        assert reshard.open(folder).verify() == []


@pytest.mark.parametrize("has_mirror", [False, True])
def test_restore_of_an_earlier_step_removes_nothing_until_a_save_is_complete(tmp_path: Path, has_mirror: bool) -> None:
    """Removals that began before, and copies to a mirror that end afterwards, keep the later checkpoints."""
    with manager_of(tmp_path / "run", keep=[reshard.latest(5)]) as manager:
        train(manager, [10, 20, 30])
    options: dict[str, Any] = {"mirror": tmp_path / "mirror"} if has_mirror else {}
    with manager_of(tmp_path / "run", keep=[reshard.latest(5)], **options) as manager:
        manager.restore(state(0), step=10)
        assert manager._controller is not None
        manager._controller.root.remove_not_kept()
        manager.wait()
        assert manager.steps() == [10]
        assert steps_on_disk(tmp_path / "run") == [10, 20, 30]
        train(manager, [15])
        manager.wait()
        assert manager.steps() == steps_on_disk(tmp_path / "run") == [10, 15]


def test_abandoned_step_that_is_restored_is_continued(tmp_path: Path) -> None:
    with manager_of(tmp_path) as manager:
        train(manager, [10, 20, 30])
        manager.restore(state(0), step=10)
        manager.save(20, state(-20))
        assert manager.steps() == [10, 20]
        assert manager.restore(state(0), step=30) == 30
        assert manager.steps() == [10, 30]
        assert manager.latest_step() == 30
        with pytest.raises(errors.ArgumentError, match="has a checkpoint of step 30"):
            manager.save(25, state(25))
        assert manager.save(40, state(40))
        assert manager.steps() == [10, 30, 40]
    with manager_of(tmp_path, keep=[reshard.latest(10)]) as manager:  # finds the same branch on the disk
        assert manager.steps() == [10, 30, 40]
        loaded = state(0)
        assert manager.restore(loaded) == 40
        assert manager.save(50, state(50))
        manager.wait()
        assert manager.steps() == steps_on_disk(tmp_path) == [10, 30, 40, 50]


def test_checkpoint_with_a_metric_that_is_no_number_is_not_removed_when_the_run_is_listed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with manager_of(tmp_path, keep=[reshard.latest(2)]) as manager:
        for step in (1, 2, 3):
            manager.save(step, state(step), {"loss": math.nan})
            manager.wait()
        assert manager._controller is not None
        run = manager._controller.root
        keeping = run.kept()
        run.refresh()
        monkeypatch.setattr(run, "kept", lambda: keeping)
        run.remove_not_kept()
        run.wait()
        assert steps_on_disk(tmp_path) == [2, 3]


def test_metadata_with_impossible_numbers_does_not_hide_the_run(tmp_path: Path) -> None:
    with manager_of(tmp_path) as manager:
        train(manager, [1])
    first = reshard.open(tmp_path / "step-00000001").metadata["manager"]["sequence"]
    managed = {"sequence": first + 5, "parent": first, "time": "0001-01-01T00:00:00+05:00"}
    metadata = {"metrics": {"loss": 10**400, "acc": 0.5}, "manager": managed}
    reshard.save(state(2), tmp_path / "step-00000002", metadata=metadata)
    with manager_of(tmp_path) as manager:
        assert manager.steps() == [1, 2]
        assert manager.best_step("acc") == 2
        assert manager.best_step("loss") == 1


def test_ranks_learn_of_a_removal_from_the_folder_of_their_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise, on disks that are not shared, they would later remove what they have just saved."""
    news: list[Any] = []
    with manager_of(tmp_path, keep=[reshard.latest(1)]) as manager:
        train(manager, [1, 2])
        manager.wait()
        location = manager._controller.root  # type: ignore[union-attr]
        with location._changed:
            location._removing = "step-00000003"

        waiting = location._changed.wait_for
        is_waiting = threading.Event()

        def wait_for(predicate: Any) -> Any:
            is_waiting.set()
            return waiting(predicate)

        monkeypatch.setattr(location._changed, "wait_for", wait_for)

        def end_removal() -> None:
            assert is_waiting.wait(60)
            with location._changed:
                location._removed.append("step-00000003")
                location._removing = None
                location._changed.notify_all()

        accepting = manager._accept

        def accept(found: Any) -> None:
            news.append(found)
            accepting(found)

        monkeypatch.setattr(manager, "_accept", accept)
        thread = threading.Thread(target=end_removal)
        thread.start()
        train(manager, [3])
        thread.join()
        assert "step-00000003" in news[0].removed
        assert location.removed() == ()
        location.wait()


def test_a_call_that_fails_on_another_rank_protects_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reshard.storage.training import manager as manager_module

    def refuse(calls: Any) -> Any:
        raise errors.ArgumentError("no")

    with manager_of(tmp_path) as manager:
        train(manager, [1])
        with monkeypatch.context() as patch:
            patch.setattr(manager_module, "checked_order", refuse)
            with pytest.raises(errors.ArgumentError, match="no"):
                train(manager, [2])
        assert not manager._controller.root._protected  # type: ignore[union-attr]
        train(manager, [2])
        assert manager.steps() == [1, 2]


@pytest.mark.parametrize("shift", [-3600, 3600])
def test_a_clock_that_is_corrected_abandons_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: int
) -> None:
    clock = time.time
    with manager_of(tmp_path, keep=[reshard.latest(3)]) as manager:
        train(manager, [10])
    with manager_of(tmp_path, keep=[reshard.latest(3)]) as manager:
        assert manager.restore(state(0)) == 10
        monkeypatch.setattr(time, "time", lambda: clock() + shift)
        assert train(manager, [20, 30]) == [20, 30]
        assert train(manager, [20, 30]) == []
        assert manager.steps() == [10, 20, 30]
        monkeypatch.undo()
        train(manager, [40])
    with manager_of(tmp_path) as manager:
        assert manager.steps() == [20, 30, 40]


def test_a_save_that_the_previous_manager_still_commits_is_on_no_branch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of its machine is ahead."""
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + 90)
    old = manager_of(tmp_path)
    train(old, [10])
    decision = old._controller.begin_save(20, {}, force=False)  # type: ignore[union-attr]
    monkeypatch.undo()
    monkeypatch.setattr(lease_module, "_held", {})
    monkeypatch.setattr(Lease, "_has_released", lambda self, holder: True)
    with manager_of(tmp_path) as new:
        assert new.restore(state(0)) == 10
        train(new, [15, 25])
        reshard.save(state(20), old.location(20), metadata=metadata_of(decision.entry, None))
    with manager_of(tmp_path) as manager:
        assert manager.steps() == [10, 15, 25]
    old._end()


def test_ancestors_of_a_long_run_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_catalog, "MAX_ANCESTORS", 3)
    with manager_of(tmp_path) as manager:
        train(manager, range(1, 8))
    stored = reshard.open(tmp_path / "step-00000007").metadata["manager"]
    numbers = [reshard.open(tmp_path / f"step-0000000{step}").metadata["manager"]["sequence"] for step in range(1, 7)]
    assert stored["ancestors"] == [numbers[3], *numbers[3:]]
    with manager_of(tmp_path) as manager:
        assert manager.steps() == [*range(1, 8)]
        assert manager.restore(state(0), step=5) == 5
        train(manager, [6])
        assert manager.steps() == [*range(1, 7)]


def test_removed_ancestors_are_left_out_if_there_are_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the list is still complete, and an old checkpoint that is abandoned is not taken for an ancestor."""
    monkeypatch.setattr(run_catalog, "MAX_ANCESTORS", 3)
    with manager_of(tmp_path) as manager:
        train(manager, [1, 2, 3])
    shutil.copytree(tmp_path / "step-00000002", tmp_path / "kept")
    with manager_of(tmp_path, keep=[reshard.latest(1)]) as manager:
        assert manager.restore(state(0), step=1) == 1
        for step in range(3, 12):
            train(manager, [step])
            manager.wait()
    shutil.move(tmp_path / "kept", tmp_path / "step-00000002")  # such as on the disk of another machine
    with manager_of(tmp_path) as manager:
        assert manager.steps() == [11]


def test_a_run_of_an_older_version_is_continued(tmp_path: Path) -> None:
    """It has small numbers, and lists no ancestors."""
    for number, step in enumerate((1, 2, 3)):
        managed = {"sequence": number, "parent": number - 1, "time": f"2026-01-0{step}T00:00:00+00:00"}
        reshard.save(state(step), tmp_path / f"step-0000000{step}", metadata={"manager": managed})
    with manager_of(tmp_path) as manager:
        assert manager.steps() == [1, 2, 3]
        assert manager.restore(state(0), step=2) == 2
        train(manager, [4])
        assert manager.steps() == [1, 2, 4]
    with manager_of(tmp_path, keep=[reshard.latest(2)]) as manager:
        assert manager.steps() == [1, 2, 4]
        train(manager, [5])
        manager.wait()
        assert manager.steps() == [4, 5]


def test_an_interrupt_while_a_removal_is_awaited_protects_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with manager_of(tmp_path / "run", mirror=tmp_path / "mirror") as manager:
        train(manager, [1])
        manager.wait()
        controller: Any = manager._controller
        root, mirror = controller._locations

        def interrupt(folders: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(mirror, "protect", interrupt)
            with pytest.raises(KeyboardInterrupt):
                train(manager, [2])
        assert not root._protected
        train(manager, [2])
        assert manager.steps() == [1, 2]


def test_a_root_that_may_not_be_listed_is_an_access_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with manager_of(tmp_path) as manager:
        train(manager, [1])
    scandir = os.scandir

    def refuse(path: Any = ".") -> Any:
        if str(path) == str(tmp_path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    def refuse_list(path: Any = ".") -> list[str]:
        return [entry.name for entry in refuse(path)]

    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(os, "listdir", refuse_list)
    with pytest.raises(errors.AccessDeniedError, match="no permission to list"):
        manager_of(tmp_path, read_only=True)


def test_a_checkpoint_that_is_added_while_the_run_is_listed_stays_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    listing = find_entries
    with manager_of(tmp_path) as manager:
        train(manager, [1])
        location = manager._controller.root  # type: ignore[union-attr]
        (first,) = location.entries()
        new = replace(first, folder="step-00000002", sequence=first.sequence + 1)
        calls: list[int] = []

        def list_slowly(*arguments: Any, **options: Any) -> Any:
            found = listing(*arguments, **options)
            if not calls:
                location.add(new)
            calls.append(len(found))
            return [*found, new] if len(calls) > 1 else found

        monkeypatch.setattr(run_location, "find_entries", list_slowly)
        location.refresh()
        assert [entry.folder for entry in location.entries()] == ["step-00000001", "step-00000002"]
        with location._changed:
            location._removing = "step-00000002"
        location.refresh()  # the removal may still fail
        assert {entry.folder for entry in location.entries()} == {"step-00000001", "step-00000002"}
        with location._changed:
            location._removing = None


def test_all_threads_of_a_manager_are_ended_if_one_end_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manager = manager_of(tmp_path)

    def fail() -> None:
        raise OSError("injected")

    manager._threads.ends.callback(fail)
    with pytest.raises(OSError, match="injected"):
        manager.close()
    with manager_of(tmp_path) as other:  # the lease was released
        assert other.steps() == []


@pytest.mark.parametrize("closed", ["", "data"])
def test_a_checkpoint_that_may_not_be_read_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed: str
) -> None:
    """Training would otherwise continue from an earlier step."""
    with manager_of(tmp_path) as manager:
        train(manager, [1, 2])
    folder = tmp_path / "step-00000002" / closed
    scandir, stat = os.scandir, os.stat

    def is_closed(path: Any) -> bool:
        return Path(str(path)) == folder or folder in Path(str(path)).parents

    def refuse_scandir(path: Any = ".") -> Any:
        if is_closed(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    def refuse_stat(path: Any, *arguments: Any, **options: Any) -> Any:
        if not isinstance(path, int) and Path(str(path)) != folder and is_closed(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "scandir", refuse_scandir)
    monkeypatch.setattr(os, "stat", refuse_stat)
    loaded = state(0)
    with manager_of(tmp_path, read_only=True) as manager, pytest.raises(errors.AccessDeniedError):
        manager.restore(loaded)
    assert loaded["step"] == 0


def test_steps_may_have_many_digits(tmp_path: Path) -> None:
    step = 5 * 10**18
    with manager_of(tmp_path) as manager:
        train(manager, [step])
    with manager_of(tmp_path) as manager:
        assert manager.steps() == [step]


def test_interrupted_wait_for_a_save_does_not_forget_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupts = [KeyboardInterrupt()]
    waiting = reshard.AsyncSave.exception

    def interrupted(self: Any, timeout: float | None = None) -> BaseException | None:
        if threading.current_thread() is threading.main_thread() and interrupts:
            raise interrupts.pop()
        return waiting(self, timeout)

    monkeypatch.setattr(reshard.AsyncSave, "exception", interrupted)
    manager = manager_of(tmp_path, asynchronous=True)
    manager.save(1, state(1))
    with pytest.raises(KeyboardInterrupt):
        manager.wait()
    manager.close()
    assert manager.steps() == [1]
    assert reshard.open(tmp_path / "step-00000001").verify() == []


def test_removal_that_was_decided_before_a_restore_does_not_remove_what_it_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The removal of step 20 goes on during the restore of step 30, which was to be removed next."""
    is_removing, may_go_on = threading.Event(), threading.Event()
    removing: Any = vars(run_location)["remove"]

    def remove_slowly(uri: str, *arguments: Any) -> None:
        is_removing.set()
        assert may_go_on.wait(30)
        removing(uri, *arguments)

    with manager_of(tmp_path, keep=[reshard.latest(5)]) as manager:
        train(manager, [10, 20, 30])
        manager.restore(state(0), step=10)
        monkeypatch.setattr(run_location, "remove", remove_slowly)
        train(manager, [15])
        assert is_removing.wait(30)
        assert manager._controller is not None
        ending = manager._controller.end_restore

        def end_restore() -> None:
            ending()
            may_go_on.set()

        monkeypatch.setattr(manager._controller, "end_restore", end_restore)
        assert manager.restore(state(0), step=30) == 30
        manager.wait()
        assert steps_on_disk(tmp_path) == [10, 15, 30]
        assert manager.steps() == [10, 30]


def test_removal_uses_one_state_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restore may end while a removal that is being decided looks at the store."""
    with manager_of(tmp_path, keep=[reshard.latest(5)]) as manager:
        train(manager, [10, 20, 30])
        manager.wait()
        manager.restore(state(0), step=10)
        assert manager._controller is not None
        run = manager._controller.root
        opening: Any = vars(run_location)["open_store"]

        def restore_meanwhile(*arguments: Any) -> Any:
            monkeypatch.setattr(run_location, "open_store", opening)
            assert manager.restore(state(0)) == 30
            return opening(*arguments)

        monkeypatch.setattr(run_location, "open_store", restore_meanwhile)
        run._remove_not_kept()
        assert steps_on_disk(tmp_path) == [10, 20, 30]
        assert manager.steps() == [10, 20, 30]


def test_failed_restore_does_not_change_the_branch(tmp_path: Path) -> None:
    with manager_of(tmp_path) as manager:
        train(manager, [10, 20, 30])
        manager.restore(state(0), step=10)
        with pytest.raises(errors.CheckpointNotFoundError):
            manager.restore(state(0), step=999)
        assert manager.steps() == [10]
        assert manager.save(15, state(15))
        assert manager.steps() == [10, 15]


def test_restore_of_a_step_prefers_the_current_branch(tmp_path: Path) -> None:
    """The mirror still has the step 20 of the branch, and the root has one of an abandoned branch."""
    with manager_of(tmp_path / "root", mirror=tmp_path / "mirror") as manager:
        train(manager, [10, 20, 30])
    with manager_of(tmp_path / "root") as manager:
        manager.restore(state(0), step=10)
        manager.save(20, state(-20))
        manager.restore(state(0), step=30)
        manager.save(40, state(40))
    with manager_of(tmp_path / "root", mirror=tmp_path / "mirror") as manager:
        assert manager.steps() == [10, 20, 30, 40]
        loaded = state(0)
        assert manager.restore(loaded, step=20) == 20
        assert value_of(loaded) == 20


def test_checkpoint_that_was_just_saved_is_not_removed_for_the_one_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A removal was decided when the folder had an abandoned checkpoint. It comes to it when a save has replaced it."""
    with manager_of(tmp_path, keep=[reshard.latest(5)]) as manager:
        train(manager, [10, 20, 30])
        manager.restore(state(0), step=10)
        assert manager._controller is not None
        run = manager._controller.root
        with monkeypatch.context() as patch:
            patch.setattr(run, "remove_not_kept", lambda: None)
            train(manager, [15])
            decided = run._to_remove()
            assert [entry.step for entry in decided[0]] == [20, 30]
            unprotect = run.unprotect

            def remove_at_once(folders: Iterable[str]) -> None:
                unprotect(folders)
                run._remove_not_kept()

            patch.setattr(run, "_to_remove", lambda: decided)
            patch.setattr(run, "unprotect", remove_at_once)
            train(manager, [20])
        assert steps_on_disk(tmp_path) == manager.steps() == [10, 15, 20]
        assert reshard.open(tmp_path / "step-00000020").verify() == []


def test_checkpoint_that_is_removed_while_the_run_is_listed_is_not_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with manager_of(tmp_path, keep=[reshard.latest(2)]) as manager:
        assert manager._controller is not None
        run = manager._controller.root
        with monkeypatch.context() as patch:
            patch.setattr(run, "remove_not_kept", lambda: None)
            train(manager, [10, 20, 30])
        finding: Any = vars(run_location)["find_entries"]

        def remove_meanwhile(*arguments: Any, **options: Any) -> Any:
            monkeypatch.setattr(run_location, "find_entries", finding)
            found = finding(*arguments, **options)
            run._remove_not_kept()
            return found

        monkeypatch.setattr(run_location, "find_entries", remove_meanwhile)
        with pytest.raises(errors.CheckpointNotFoundError):
            manager.restore(state(0), step=10)
        manager.wait()
        assert manager.steps() == steps_on_disk(tmp_path) == [20, 30]
