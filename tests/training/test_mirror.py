"""Checkpoints are saved to a first location and copied to a second one in the background."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import reshard
from reshard import errors
from reshard.storage.formats.native.manifest import MANIFEST_NAME
from reshard.storage.formats.native.native_source import NativeSource
from reshard.storage.stores import retry
from reshard.storage.stores.local import LocalStore
from reshard.storage.training import lease as lease_module
from reshard.storage.training import mirror as mirror_module
from reshard.storage.training.lease import Lease
from reshard.storage.training.mirror import CopyResult, MirrorCopier
from reshard.storage.training.run_catalog import RunEntry, metadata_of
from reshard.storage.training.run_controller import RunController
from tests.conftest import Place
from tests.failing_s3 import failing_s3
from tests.ranks import RankFailed, RankPool
from tests.torture.faults import CLIENTS, by_client


def state(value: float) -> dict[str, Any]:
    return {"w": torch.full((200, 300), float(value)), "step": value}


def manager_of(folder: Path, **options: Any) -> reshard.CheckpointManager:
    defaults = {"mirror": folder / "mirror", "asynchronous": False, "signals": ()}
    return reshard.CheckpointManager(folder / "root", **{**defaults, **options})


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.parent.name.removeprefix("step-")) for path in folder.glob("step-*/manifest.reshard"))


def train(manager: reshard.CheckpointManager, steps: Iterable[int]) -> None:
    for step in steps:
        manager.save(step, state(step), {"loss": abs(step - 2)})


def restored(manager: reshard.CheckpointManager) -> int | None:
    loaded = state(0)
    step = manager.restore(loaded)
    assert loaded["step"] == (step or 0)
    assert loaded["w"].eq(step or 0).all()
    return step


def test_complete_checkpoints_are_copied(tmp_path: Path) -> None:
    with manager_of(tmp_path) as manager:
        train(manager, [1, 2])
        manager.wait()
        assert steps_in(tmp_path / "root") == steps_in(tmp_path / "mirror") == [1, 2]
        assert reshard.open(tmp_path / "mirror" / "step-00000002").verify() == []
        assert not reshard.diff(tmp_path / "root" / "step-00000002", tmp_path / "mirror" / "step-00000002")


def test_root_is_read_if_it_is_complete_and_the_mirror_otherwise(tmp_path: Path) -> None:
    with manager_of(tmp_path) as manager:
        train(manager, [1, 2])
    with manager_of(tmp_path) as manager:
        shutil.rmtree(tmp_path / "mirror" / "step-00000002")
        assert restored(manager) == 2
    with manager_of(tmp_path) as manager:
        manager.wait()
        assert steps_in(tmp_path / "mirror") == [1, 2]  # copied again
    shutil.rmtree(tmp_path / "root")
    with manager_of(tmp_path) as manager:
        assert manager.steps() == [1, 2]
        assert restored(manager) == 2
        train(manager, [3])
        assert steps_in(tmp_path / "root") == [3]
        assert manager.steps() == [1, 2, 3]


def test_damaged_root_falls_back_to_the_mirror_of_the_same_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with manager_of(tmp_path) as manager:
        train(manager, [1, 2])
    (path,) = (tmp_path / "root" / "step-00000002" / "data").iterdir()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with manager_of(tmp_path) as manager:
        assert restored(manager) == 2
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"step 2 at {tmp_path}/root/step-00000002 is damaged" in message


def test_missing_objects_at_the_root_fall_back_to_the_mirror(tmp_path: Path) -> None:
    with manager_of(tmp_path) as manager:
        train(manager, [1, 2])
    shutil.rmtree(tmp_path / "root" / "step-00000002" / "data")
    with manager_of(tmp_path) as manager:
        assert restored(manager) == 2
        assert manager.steps() == [1, 2]


def test_policies_apply_to_both_locations(tmp_path: Path) -> None:
    with manager_of(tmp_path, keep=[reshard.latest(2), reshard.best("loss")]) as manager:
        for step in range(1, 7):
            train(manager, [step])
            manager.wait()
        assert steps_in(tmp_path / "root") == steps_in(tmp_path / "mirror") == [2, 5, 6]


def test_abandoned_checkpoints_are_removed_from_both_locations(tmp_path: Path) -> None:
    with manager_of(tmp_path) as manager:
        train(manager, [1, 2, 3, 4])
    with manager_of(tmp_path, keep=[reshard.latest(9)]) as manager:
        assert manager.restore(state(0), step=2) == 2
        manager.save(3, state(3))
        manager.wait()
        assert steps_in(tmp_path / "root") == steps_in(tmp_path / "mirror") == [1, 2, 3]
        assert not reshard.diff(tmp_path / "root" / "step-00000003", tmp_path / "mirror" / "step-00000003")
        assert reshard.gc(tmp_path / "mirror", older_than_s=0, dry_run=True) == []


def test_stale_copy_on_the_mirror_is_not_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 2 was saved again at the root, but its new version is not on the mirror yet, and is lost with the root."""
    with manager_of(tmp_path) as manager:
        train(manager, [1, 2])
    with manager_of(tmp_path) as manager:
        assert manager.restore(state(0), step=1) == 1
        monkeypatch.setattr(mirror_module.MirrorCopier, "_copy", lambda *_: CopyResult(problem="the mirror is down"))
        manager.save(2, {"w": torch.full((200, 300), -2.0), "step": -2})
        with pytest.raises(errors.StoreError, match="could not be copied to the mirror: the mirror is down"):
            manager.wait()
        loaded = state(0)
        assert manager.restore(loaded) == 2
        assert loaded["step"] == -2
        shutil.rmtree(tmp_path / "root" / "step-00000002" / "data")
        assert restored(manager) == 1


def test_failed_copy_is_reported_and_made_after_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    copying = mirror_module.copy_object

    def fail(*_: Any) -> None:
        raise errors.UnavailableError("the mirror is down")

    with manager_of(tmp_path, keep=[reshard.latest(2)]) as manager:
        monkeypatch.setattr(mirror_module, "copy_object", fail)
        train(manager, [1])
        with pytest.raises(errors.StoreError, match=r"step-00000001 is complete, but could not be copied.*is down"):
            manager.wait()
        assert "could not be copied to" in caplog.text
        assert restored(manager) == 1
        monkeypatch.setattr(mirror_module, "copy_object", copying)
        train(manager, [2])
        manager.wait()
        assert steps_in(tmp_path / "mirror") == [1, 2]


def test_checkpoint_is_not_removed_before_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    has_begun, may_copy = threading.Event(), threading.Event()
    copying = mirror_module.copy_object

    def wait(*arguments: Any) -> None:
        has_begun.set()
        assert may_copy.wait(60)
        copying(*arguments)

    monkeypatch.setattr(mirror_module, "copy_object", wait)
    with manager_of(tmp_path, keep=[reshard.latest(1)]) as manager:
        train(manager, [1])
        assert has_begun.wait(60)
        train(manager, range(2, 6))
        manager._controller.root.wait()  # type: ignore[union-attr]
        assert 1 in steps_in(tmp_path / "root")  # its copy has begun
        may_copy.set()
        manager.wait()
        assert steps_in(tmp_path / "root") == steps_in(tmp_path / "mirror") == [5]
    assert not list((tmp_path / "mirror").glob("step-0000000[234]"))  # copies that nobody needs were not made


def test_copy_that_was_cut_off_is_completed(tmp_path: Path) -> None:
    with manager_of(tmp_path) as manager:
        train(manager, [1])
    copied = tmp_path / "mirror" / "step-00000001"
    (copied / MANIFEST_NAME).unlink()
    (path,) = (copied / "data").iterdir()
    path.write_bytes(path.read_bytes()[:50])
    with manager_of(tmp_path) as manager:
        manager.wait()
    assert reshard.open(copied).verify() == []


@pytest.mark.parametrize("store_name", ["moto", "seaweedfs"])
def test_mirror_on_a_store(tmp_path: Path, place: Place) -> None:
    uri, options = place
    with manager_of(tmp_path, mirror=uri, mirror_options=options, keep=[reshard.latest(1)]) as manager:
        train(manager, [1])
        manager.wait()
        train(manager, [2])
        manager.wait()
        assert [found.step for found in reshard.find_checkpoints(uri, options)] == [2]
    shutil.rmtree(tmp_path / "root")
    with manager_of(tmp_path, mirror=uri, mirror_options=options) as manager:
        assert restored(manager) == 2


def value_of(folder: Path, step: int) -> float:
    return float(reshard.open(folder / f"step-{step:08}").read("w").mean())


@pytest.mark.parametrize("last", [4, 6, 8])
@pytest.mark.parametrize("waits", [False, True])
def test_a_disk_with_an_abandoned_branch_does_not_replace_newer_copies(tmp_path: Path, last: int, waits: bool) -> None:
    """Training went back to step 2 on another machine, and then returns to the first one."""

    def manager_on(disk: str) -> reshard.CheckpointManager:
        mirror = tmp_path / "mirror"
        return reshard.CheckpointManager(tmp_path / disk, mirror=mirror, asynchronous=False, signals=())

    with manager_on("a") as manager:
        train(manager, range(1, last + 1))
        manager.wait()
    with manager_on("b") as manager:
        assert manager.restore(state(0), step=2) == 2
        for step in (3, 4, 5):
            manager.save(step, state(100 + step))
    for disk in ("a", "c"):
        with manager_on(disk) as manager:
            assert manager.steps() == [1, 2, 3, 4, 5]
            if waits:
                manager.wait()
            loaded = state(0)
            assert manager.restore(loaded) == 5
            assert loaded["w"].eq(105).all()
            assert manager.restore(loaded, step=4) == 4
            assert loaded["w"].eq(104).all()
        assert [value_of(tmp_path / "mirror", step) for step in (3, 4, 5)] == [103, 104, 105]
    with manager_on("a") as manager:
        assert manager.restore(state(0)) == 5
        manager.save(6, state(106))
    with manager_on("d") as manager:
        assert manager.steps() == [1, 2, 3, 4, 5, 6]
        assert manager.restore(loaded := state(0)) == 6
        assert loaded["w"].eq(106).all()
    assert [value_of(tmp_path / "mirror", step) for step in (3, 4, 5, 6)] == [103, 104, 105, 106]


@pytest.mark.parametrize("last", [5, 6, 7])
def test_two_machines_that_continue_from_one_step_do_not_mix_their_checkpoints(tmp_path: Path, last: int) -> None:
    def manager_on(disk: str, *, has_mirror: bool = True) -> reshard.CheckpointManager:
        mirror = tmp_path / "mirror" if has_mirror else None
        return reshard.CheckpointManager(tmp_path / disk, mirror=mirror, asynchronous=False, signals=())

    with manager_on("a") as manager:
        train(manager, [1, 2, 3, 4])
    with manager_on("a", has_mirror=False) as manager:  # it ends before its checkpoints are copied
        assert manager.restore(state(0)) == 4
        train(manager, [5, 6])
    with manager_on("b") as manager:
        assert manager.restore(state(0)) == 4
        for step in range(5, last + 1):
            manager.save(step, state(100 + step))
    with manager_on("a") as manager:
        manager.wait()
        assert manager.restore(loaded := state(0)) == last
        assert loaded["w"].eq(100 + last).all()
        manager.save(last + 1, state(101 + last))
    steps = range(5, last + 2)
    assert [value_of(tmp_path / "mirror", step) for step in steps] == [100 + step for step in steps]


@pytest.mark.parametrize("is_released", [False, True])
@pytest.mark.parametrize("clock_ahead_s", [0, 3600])
def test_numbers_of_a_machine_are_known_to_the_next_machine_without_its_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_released: bool, clock_ahead_s: int
) -> None:
    """A manager that takes over uses numbers of the future. So does one on a machine whose clock is ahead."""
    monkeypatch.setattr(Lease, "_has_released", lambda self, holder: True)
    options: dict[str, Any] = {"mirror": tmp_path / "mirror", "asynchronous": False, "signals": ()}

    def manager_on(disk: str) -> reshard.CheckpointManager:
        monkeypatch.setattr(lease_module, "_held", {})
        return reshard.CheckpointManager(tmp_path / disk, **options)

    def save_and_leave(step: int, *, is_copied: bool) -> None:
        with monkeypatch.context() as patch:
            if not is_copied:
                patch.setattr(MirrorCopier, "submit", lambda *_, **__: None)
            manager = manager_on("a")
            manager.restore(state(0))
            train(manager, [step])
        if is_copied:
            manager.wait()
        if is_released:
            manager._end()
        left.append(manager)

    left: list[reshard.CheckpointManager] = []
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + clock_ahead_s)
    save_and_leave(2, is_copied=True)
    save_and_leave(4, is_copied=False)
    save_and_leave(6, is_copied=False)
    monkeypatch.setattr(time, "time", clock)
    with manager_on("b") as manager:
        assert restored(manager) == 2
        for step in (3, 5):
            manager.save(step, state(100 + step))
    with manager_on("a") as manager:
        assert manager.restore(loaded := state(0)) == 5
        assert loaded["w"].eq(105).all()
        manager.save(7, state(107))
    assert [value_of(tmp_path / "mirror", step) for step in (2, 3, 5, 7)] == [2, 103, 105, 107]
    assert steps_in(tmp_path / "mirror") == [2, 3, 5, 7]
    for manager in left:
        manager._end()


@pytest.mark.parametrize("keeps_best", [False, True])
def test_checkpoints_of_two_machines_are_not_mixed_after_some_were_removed(tmp_path: Path, keeps_best: bool) -> None:
    """The checkpoint before a save may have been removed, and an abandoned one has a smaller number than that."""
    best = [reshard.best("loss", 1, mode="min")]

    def manager_on(disk: str, **options: Any) -> reshard.CheckpointManager:
        keep = [reshard.latest(1), *(best if keeps_best else [])]
        defaults = {"mirror": tmp_path / "mirror", "asynchronous": False, "signals": (), "keep": keep}
        return reshard.CheckpointManager(tmp_path / disk, **{**defaults, **options})

    with manager_on("a") as manager:
        manager.save(10, state(10), {"loss": 9.0})
    with manager_on("a", mirror=None, keep=None) as manager:
        assert manager.restore(state(0)) == 10
        manager.save(20, state(20), {"loss": 0.1})
        manager.save(30, state(30), {"loss": 0.2})
    with manager_on("b") as manager:
        assert manager.restore(state(0)) == 10
        for step, loss in ((20, 3.0), (30, 2.0), (40, 2.5)):
            manager.save(step, state(100 + step), {"loss": loss})
        manager.wait()
    kept = [30, 40] if keeps_best else [40]
    assert steps_in(tmp_path / "mirror") == kept
    with manager_on("a", keep=[reshard.latest(1), *best]) as manager:
        manager.wait()
        assert set(manager.steps()) - {10} == set(kept)  # 10 is on its disk, too
        assert manager.restore(loaded := state(0)) == 40
        assert loaded["w"].eq(140).all()
        manager.save(50, state(150), {"loss": 4.0})
    assert set(steps_in(tmp_path / "mirror")) - {40} == {*kept[:-1], 50}
    assert all(value_of(tmp_path / "mirror", step) == 100 + step for step in steps_in(tmp_path / "mirror"))


def test_ancestors_that_only_the_mirror_has_are_kept(tmp_path: Path) -> None:
    """A manager without the mirror does not see them, and saves."""
    keep = [reshard.latest(1), reshard.every(10)]
    with manager_of(tmp_path, keep=keep) as manager:
        train(manager, [10, 11])
    shutil.rmtree(tmp_path / "root" / "step-00000010")
    for steps in ([12], [13]):
        with manager_of(tmp_path, keep=keep, mirror=None) as manager:
            assert restored(manager) == steps[0] - 1
            train(manager, steps)
            manager.wait()
    with manager_of(tmp_path, keep=keep) as manager:
        assert manager.steps() == [10, 11, 13]
        train(manager, [14])
    assert steps_in(tmp_path / "mirror") == [10, 14]


def test_what_the_mirror_would_not_keep_is_not_copied_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = [reshard.latest(1), reshard.best("loss", 1, mode="min")]
    copied: list[str] = []
    copying = mirror_module.copy_object

    def count(source: Any, target: Any, name: str, nbytes: int) -> None:
        copied.append(Path(target.location).name)
        copying(source, target, name, nbytes)

    with manager_of(tmp_path, keep=keep) as manager:
        manager.save(1, state(1), {"loss": 0.1})
    shutil.rmtree(tmp_path / "root")
    monkeypatch.setattr(mirror_module, "copy_object", count)
    with manager_of(tmp_path, keep=keep) as manager:
        assert restored(manager) == 1
        for step in range(2, 7):
            manager.save(step, state(step), {"loss": float(step)})
            manager.wait()
    assert sorted(copied) == sorted(set(copied))
    assert steps_in(tmp_path / "mirror") == [1, 6]


def test_retention_removes_an_abandoned_branch_and_nothing_of_the_current_one(tmp_path: Path) -> None:
    def manager_on(disk: str) -> reshard.CheckpointManager:
        keep, mirror = [reshard.latest(3)], tmp_path / "mirror"
        return reshard.CheckpointManager(tmp_path / disk, mirror=mirror, keep=keep, asynchronous=False, signals=())

    with manager_on("a") as manager:
        train(manager, [1, 2, 3, 4])
        manager.wait()
    with manager_on("b") as manager:
        assert manager.restore(state(0), step=2) == 2
        for step in (3, 4, 5):
            manager.save(step, state(100 + step))
        manager.wait()
    with manager_on("a") as manager:
        assert manager.restore(state(0)) == 5
        manager.save(6, state(106))
        manager.wait()
        assert manager.steps() == [2, 4, 5, 6]
    assert steps_in(tmp_path / "a") == [2, 6]  # the last three of this disk that are on the branch
    assert steps_in(tmp_path / "mirror") == [4, 5, 6]
    assert [value_of(tmp_path / "mirror", step) for step in (4, 5, 6)] == [104, 105, 106]


def test_a_manifest_with_a_damaged_block_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a large manifest reads its header alone."""
    monkeypatch.setattr(mirror_module, "_check_undamaged", lambda *_: None)
    finding = NativeSource.find

    def damage_first(store: Any) -> Any:
        path = tmp_path / "root" / "step-00000001" / MANIFEST_NAME
        data = bytearray(path.read_bytes())
        data[-20] ^= 1  # in a block
        path.write_bytes(data)
        return finding(store)

    monkeypatch.setattr(NativeSource, "find", damage_first)
    manager = manager_of(tmp_path)
    train(manager, [1])
    with pytest.raises(errors.StoreError, match=r"could not be copied to the mirror: .*does not match its checksum"):
        manager.close()
    assert steps_in(tmp_path / "mirror") == []


def test_mirror_must_be_another_location(tmp_path: Path) -> None:
    with pytest.raises(errors.ArgumentError, match="root and mirror are the same location"):
        manager_of(tmp_path, mirror=tmp_path / "root")


def test_lost_mirror_lease_stops_the_manager(tmp_path: Path) -> None:
    with manager_of(tmp_path) as manager:
        train(manager, [1])
        with pytest.raises(errors.RunInUseError):
            reshard.CheckpointManager(tmp_path / "elsewhere", mirror=tmp_path / "mirror")


@pytest.mark.parametrize("which", ["root", "mirror"])
@pytest.mark.parametrize("becomes", ["nothing", "empty", "file"])
def test_a_location_that_disappears_is_an_error(tmp_path: Path, which: str, becomes: str) -> None:
    """For example, it was unmounted. A restore must not return None, as if the run were new."""
    place = tmp_path / which
    with manager_of(tmp_path) as manager:
        train(manager, [1])
        manager.wait()
        place.rename(tmp_path / "away")
        if becomes == "empty":
            place.mkdir()
        elif becomes == "file":
            place.write_bytes(b"x")
        with pytest.raises(errors.StoreError):
            manager.restore(state(0))
        if which == "root":
            with pytest.raises(errors.StoreError):
                manager.save(2, state(2))
        else:
            manager.save(2, state(2))
            with pytest.raises(errors.StoreError, match="could not be copied to the mirror"):
                manager.wait()
        assert not list(tmp_path.glob(f"{which}/**/*.json"))  # no new lease, which would hide the loss
        if place.exists():
            place.unlink() if becomes == "file" else shutil.rmtree(place)
        (tmp_path / "away").rename(place)
        manager.save(3, state(3))
        manager.wait()
        assert restored(manager) == 3
    assert value_of(tmp_path / "mirror", 3) == 3


def sharded_state(value: float) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.full((64, 512), float(value))
    return {"w": distribute_tensor(whole, mesh, [Shard(0)]), "r": torch.full((300, 40), float(value)), "step": value}


def train_on_own_disks(
    folder: str, asynchronous: bool, first: int, stop: int, first_disk: int = 0
) -> tuple[list[str], list[int], int | None]:
    """Save with a root that is another folder on each rank, as on disks of the nodes."""
    own = Path(folder) / f"disk-{(dist.get_rank() + first_disk) % dist.get_world_size()}"
    own.mkdir(exist_ok=True)
    before = os.getcwd()
    os.chdir(own)
    try:
        with reshard.CheckpointManager(
            "run",
            mirror=f"{folder}/mirror",
            asynchronous=asynchronous,
            background="thread",
            keep=[reshard.latest(2)],
            signals=(),
        ) as manager:
            loaded = sharded_state(-1)
            restored = manager.restore(loaded)
            if restored is not None:
                assert loaded["step"] == restored
                assert all(loaded[name].eq(restored).all() for name in ("w", "r"))
            for step in range(first, stop):
                manager.save(step, sharded_state(step))
            manager.wait()
            manager.wait()  # the other ranks remove what rank 0 has removed
            steps = manager.steps()
            objects = sorted(str(path.relative_to(own)) for path in own.rglob("*") if path.is_file())
        return objects, steps, restored
    finally:
        os.chdir(before)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_disks_of_the_ranks_need_not_be_shared(ranks: RankPool, tmp_path: Path, asynchronous: bool) -> None:
    results = ranks.run(2, train_on_own_disks, str(tmp_path), asynchronous, 1, 5)
    for rank, (objects, steps, restored) in enumerate(results):
        assert (steps, restored) == ([3, 4], None)
        shards = [name for name in objects if name.endswith(".shard")]
        assert shards
        assert all(name.endswith(f"-{rank:05}.shard") for name in shards)
        assert {name.split("/")[1] for name in shards} == {"step-00000003", "step-00000004"}
    for step in (3, 4):
        assert reshard.open(tmp_path / "mirror" / f"step-{step:08}").verify() == []
    assert steps_in(tmp_path / "mirror") == [3, 4]
    results = ranks.run(2, train_on_own_disks, str(tmp_path), asynchronous, 5, 6)
    assert [result[1:] for result in results] == [([4, 5], 4)] * 2
    shutil.rmtree(tmp_path / "disk-0")  # rank 0 runs on a new node
    results = ranks.run(2, train_on_own_disks, str(tmp_path), asynchronous, 6, 7)
    assert [result[2] for result in results] == [5, 5]
    assert steps_in(tmp_path / "mirror") == [5, 6]
    results = ranks.run(3, train_on_own_disks, str(tmp_path), asynchronous, 7, 8)
    assert [result[2] for result in results] == [6, 6, 6]


def resume_on_moved_ranks(folder: str) -> list[int]:
    """Ranks 0 and 1 are on the first node, and rank 2 on the second one, where ranks 2 and 3 were."""
    before = os.getcwd()
    os.chdir(Path(folder) / f"disk-{dist.get_rank() // 2}")
    try:
        keep = [reshard.latest(1)]
        with reshard.CheckpointManager(
            "run", mirror=f"{folder}/mirror", asynchronous=False, signals=(), keep=keep
        ) as manager:
            manager.wait()
            copied = steps_in(Path(folder) / "mirror")
            assert manager.restore(sharded_state(-1)) == 2
            manager.save(3, sharded_state(3))
            manager.wait()
            manager.wait()
            return copied
    finally:
        os.chdir(before)


def test_what_ranks_wrote_that_have_moved_is_copied_and_removed(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(4, save_on_nodes, str(tmp_path), 2)
    assert ranks.run(3, resume_on_moved_ranks, str(tmp_path)) == [[2]] * 3
    assert steps_in(tmp_path / "mirror") == [3]
    for node in range(2):
        left = {path.parent.parent.name for path in (tmp_path / f"disk-{node}").rglob("*.shard")}
        assert left == {"step-00000003"}


def test_leftovers_do_not_include_a_checkpoint_that_another_rank_0_has_saved(tmp_path: Path) -> None:
    """Its machine may not have copied it yet."""
    for step in (1, 2):
        reshard.save(state(step), tmp_path / f"step-{step:08}")
    (tmp_path / "step-00000002" / MANIFEST_NAME).unlink()
    old = time.time() - 2 * 24 * 3600
    for path in tmp_path.rglob("*"):
        os.utime(path, (old, old))
    mirror_module.remove_local_leftovers(str(tmp_path), set())
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert reshard.open(tmp_path / "step-00000001").verify() == []


def test_the_mirror_of_a_manager_that_another_machine_replaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may still commit a copy, with a number of a clock that is ahead."""
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + 90)
    defaults: dict[str, Any] = {"mirror": tmp_path / "mirror", "asynchronous": False, "signals": ()}
    old = reshard.CheckpointManager(tmp_path / "a", **defaults)
    train(old, [10])
    old.wait()
    entry = old._controller.begin_save(20, {}, force=False).entry  # type: ignore[union-attr]
    monkeypatch.undo()
    monkeypatch.setattr(lease_module, "_held", {})
    monkeypatch.setattr(Lease, "_has_released", lambda self, holder: True)
    with reshard.CheckpointManager(tmp_path / "b", **defaults) as new:
        assert restored(new) == 10
        train(new, [15, 25])
        new.wait()
        reshard.save(state(20), tmp_path / "mirror" / "step-00000020", metadata=metadata_of(entry, None))
    with reshard.CheckpointManager(tmp_path / "c", **defaults) as manager:
        assert manager.steps() == [10, 15, 25]
    old._end()


@pytest.mark.parametrize("is_lost", [False, True])
def test_fewer_ranks_copy_what_more_ranks_have_saved(ranks: RankPool, tmp_path: Path, is_lost: bool) -> None:
    """Each of two nodes has two ranks first, and then one."""
    ranks.run(4, save_on_nodes, str(tmp_path), 2)
    assert steps_in(tmp_path / "mirror") == []
    if is_lost:
        (path,) = (tmp_path / "disk-1" / "run" / "step-00000002" / "data").glob("*-00003.shard")
        path.unlink()
    for message, steps in ranks.run(2, resume_on_nodes, str(tmp_path)):
        assert ("no rank has 'data/" in message) == is_lost
        assert is_lost or steps == [1, 2]
    assert steps_in(tmp_path / "mirror") == ([1] if is_lost else [1, 2])
    for step in steps_in(tmp_path / "mirror"):
        assert reshard.open(tmp_path / "mirror" / f"step-{step:08}").verify() == []


def save_on_nodes(folder: str, ranks_of_node: int) -> None:
    patch = pytest.MonkeyPatch()
    patch.setattr(mirror_module, "copy_object", lambda *_: None)
    patch.setattr(mirror_module, "commit", lambda *_, **__: None)
    own = Path(folder) / f"disk-{dist.get_rank() // ranks_of_node}"
    own.mkdir(exist_ok=True)
    before = os.getcwd()
    os.chdir(own)
    try:
        with reshard.CheckpointManager("run", mirror=f"{folder}/mirror", asynchronous=False, signals=()) as manager:
            for step in (1, 2):
                manager.save(step, sharded_state(step))
    finally:
        os.chdir(before)
        patch.undo()


def resume_on_nodes(folder: str) -> tuple[str, list[int]]:
    before = os.getcwd()
    os.chdir(Path(folder) / f"disk-{dist.get_rank()}")
    try:
        with reshard.CheckpointManager("run", mirror=f"{folder}/mirror", asynchronous=False, signals=()) as manager:
            manager.wait()
            return "", manager.steps()
    except errors.StoreError as error:
        return str(error), []
    finally:
        os.chdir(before)


def restore_on_own_disks(folder: str, read_only: bool) -> tuple[str, int | None]:
    before = os.getcwd()
    own = Path(folder) / f"disk-{dist.get_rank()}"
    own.mkdir(exist_ok=True)
    os.chdir(own)
    try:
        with reshard.CheckpointManager(
            "run", mirror=f"{folder}/mirror", asynchronous=False, signals=(), read_only=read_only
        ) as manager:
            return "", manager.restore(sharded_state(-1))
    except errors.StoreError as error:
        return str(error), None
    finally:
        os.chdir(before)


def test_a_checkpoint_of_which_each_rank_sees_a_part_is_not_passed_over_silently(
    ranks: RankPool, tmp_path: Path
) -> None:
    ranks.run(2, save_on_nodes, str(tmp_path), 1)
    shutil.rmtree(tmp_path / "mirror")
    for result in ranks.run(2, restore_on_own_disks, str(tmp_path), True):
        assert result == ("", None)  # the manager that saves may still copy it
    shutil.rmtree(tmp_path / "disk-1")
    for message, restored in ranks.run(2, restore_on_own_disks, str(tmp_path), False):
        assert restored is None
        assert "none of the checkpoints of this run can be loaded: step 2" in message
        assert "each rank sees only what it wrote itself" in message


def restore_read_only(folder: str) -> str:
    before = os.getcwd()
    os.chdir(Path(folder) / f"disk-{dist.get_rank()}")
    try:
        with reshard.CheckpointManager("run", mirror=f"{folder}/mirror", read_only=True) as manager:
            loaded = sharded_state(-1)
            assert manager.restore(loaded) == 2
            assert loaded["w"].eq(2).all()
        with pytest.raises(errors.ArgumentError) as caught:
            reshard.CheckpointManager("run", read_only=True)
        return str(caught.value)
    finally:
        os.chdir(before)


def test_a_manager_that_only_restores_notices_that_disks_are_not_shared(
    ranks: RankPool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ranks.run(2, train_on_own_disks, str(tmp_path), False, 1, 3)
    for message in ranks.run(2, restore_read_only, str(tmp_path)):
        assert "rank 1 does not see what rank 0 sees at" in message
    assert "damaged" not in caplog.text


def test_nodes_may_change_their_ranks(ranks: RankPool, tmp_path: Path) -> None:
    """Each disk may have a lease of the same number, from the time when its node had rank 0."""
    step = 1
    for first_disk in (0, 0, 1, 1, 0, 1):
        results = ranks.run(2, train_on_own_disks, str(tmp_path), False, step, step + 2, first_disk)
        assert [result[2] for result in results] == [step - 1 or None] * 2
        step += 2
        assert steps_in(tmp_path / "mirror") == [step - 2, step - 1]


def test_what_rank_0_removed_before_a_crash_is_removed_from_the_other_disks_a_day_later(
    ranks: RankPool, tmp_path: Path
) -> None:
    ranks.run(2, train_on_own_disks, str(tmp_path), False, 1, 3)
    disk = tmp_path / "disk-1" / "run"
    left = {}
    for step, name in ((7, "0" * 32 + "-x-00001.shard"), (8, "1" * 32 + "-x-00001.shard"), (9, "notes.txt")):
        left[step] = disk / f"step-{step:08}" / "data" / name
        left[step].parent.mkdir(parents=True)
        left[step].write_bytes(b"RESHARD")
    now = time.time()
    for path in disk.rglob("*"):
        os.utime(path, (now - 25 * 3600, now - 25 * 3600))
    os.utime(left[8], (now - 3600, now - 3600))
    assert [result[1] for result in ranks.run(2, train_on_own_disks, str(tmp_path), False, 0, 0)] == [[1, 2]] * 2
    assert {step for step, path in left.items() if path.exists()} == {8, 9}
    assert not left[7].parent.parent.exists()
    assert all(list((disk / f"step-{step:08}" / "data").iterdir()) for step in (1, 2))


def test_copies_wait_together_for_a_mirror_that_is_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    may_fail = threading.Event()

    def fail(source: Any, target: Any, name: str, nbytes: int) -> None:
        assert may_fail.wait(60)
        tried.append(target.location)
        raise errors.UnavailableError(f"cannot write to {target.location}, which is down")

    copying = mirror_module.copy_object
    monkeypatch.setattr(mirror_module, "copy_object", fail)
    with manager_of(tmp_path) as manager:
        train(manager, [1, 2, 3, 4])
        may_fail.set()
        with pytest.raises(errors.StoreError, match=r"step-00000004 is complete, but could not be copied.*is down"):
            manager.wait()
        assert {location[-1] for location in tried} == {"1"}
        monkeypatch.setattr(mirror_module, "copy_object", copying)
        train(manager, [5])
    assert steps_in(tmp_path / "mirror") == steps_in(tmp_path / "root") == [1, 2, 3, 4, 5]


def test_a_mirror_that_cannot_be_opened_does_not_stop_the_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening = mirror_module._open
    broken = threading.Event()

    def open_or_fail(root: str, options: Any, folder: str) -> Any:
        if broken.is_set() and root.endswith("mirror"):
            raise errors.StoreError("cannot open the mirror")
        return opening(root, options, folder)

    monkeypatch.setattr(mirror_module, "_open", open_or_fail)
    with manager_of(tmp_path) as manager:
        broken.set()
        train(manager, [1])
        with pytest.raises(errors.StoreError, match="cannot open the mirror"):
            manager.wait()
        broken.clear()
        train(manager, [2])
    assert steps_in(tmp_path / "mirror") == [1, 2]


@pytest.mark.parametrize("client", CLIENTS)
def test_copies_and_saves_survive_a_mirror_that_is_slow_or_refuses(
    client: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.001)
    failures: list[str] = []

    def fails(method: str, key: str) -> bool:
        if method == "PUT" and "data/" in key and len(failures) < 3:
            failures.append(key)
            return True
        return False

    with failing_s3(fails=lambda method, key: False) as server:
        options: dict[str, Any] = {"mirror": "s3://bucket/run", "mirror_options": by_client(client, server.options)}
        with reshard.CheckpointManager(tmp_path / "root", asynchronous=False, **options) as manager:
            server.fails = fails
            train(manager, [1])
            manager.wait()
            assert len(failures) == 3
            assert (
                reshard.open("s3://bucket/run/step-00000001", storage_options=options["mirror_options"]).verify() == []
            )
            server.fails, server.answers, server.code = (lambda method, key: True), 403, "AccessDenied"
            train(manager, [2, 3])
            with pytest.raises(errors.StoreError, match="could not be copied to the mirror"):
                manager.wait()
            server.fails = lambda method, key: False
            train(manager, [4])
        assert steps_in(tmp_path / "root") == [1, 2, 3, 4]
        found = reshard.find_checkpoints("s3://bucket/run", options["mirror_options"])
        assert [one.step for one in found if one.is_complete] == [1, 2, 3, 4]


def save_and_leave(folder: str) -> None:
    """Save, but end before the copies are made, as after a kill."""
    patch = pytest.MonkeyPatch()
    patch.setattr(mirror_module, "copy_object", lambda *_: None)
    patch.setattr(mirror_module, "commit", lambda *_, **__: None)
    try:
        train_on_own_disks(folder, False, 1, 3)
    finally:
        patch.undo()


def test_pieces_on_the_disks_are_copied_after_a_restart(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, save_and_leave, str(tmp_path))
    assert steps_in(tmp_path / "mirror") == []
    results = ranks.run(2, train_on_own_disks, str(tmp_path), False, 0, 0)
    assert [result[1:] for result in results] == [([1, 2], 2)] * 2


def die_while_a_copy_is_made(folder: str) -> str:
    def die(*_: Any) -> None:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    manager = manager_of(Path(folder))
    if dist.get_rank() == 1:
        mirror_module.copy_object = die  # type: ignore[assignment]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    manager.save(1, {"w": distribute_tensor(torch.ones(8, 4), mesh, [Shard(0)])})
    with pytest.raises(errors.RankError) as caught:
        manager.wait()
    return str(caught.value)


def test_rank_that_dies_while_a_copy_is_made_is_named(tmp_path: Path) -> None:
    with RankPool() as pool, pytest.raises(RankFailed, match="the process died") as failed:
        pool.run(3, die_while_a_copy_is_made, str(tmp_path), timeout_s=60)
    assert "did not answer" not in str(failed.value)


@pytest.mark.parametrize("reads", [1, 2, 3])
def test_manifest_that_is_read_badly_is_not_copied(reads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short answer is repeated."""
    count = 0
    read = LocalStore.read

    def read_short(store: LocalStore, name: str, start: int, stop: int) -> Any:
        nonlocal count
        data = read(store, name, start, stop)
        if name == MANIFEST_NAME and "root" in store.location:
            count += 1
            return bytes(data)[:-8] if count == reads else data
        return data

    with manager_of(tmp_path) as manager:
        train(manager, [1])
        manager.wait()
        monkeypatch.setattr(LocalStore, "read", read_short)
        train(manager, [2])
        manager.wait()
    assert steps_in(tmp_path / "mirror") == [1, 2]
    assert reshard.open(tmp_path / "mirror" / "step-00000002").verify() == []


def test_damaged_manifest_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copying = NativeSource.find

    def damage_first(store: Any) -> Any:
        path = tmp_path / "root" / "step-00000001" / MANIFEST_NAME
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        return copying(store)

    monkeypatch.setattr(NativeSource, "find", damage_first)
    manager = manager_of(tmp_path)
    train(manager, [1])
    with pytest.raises(errors.StoreError, match=r"could not be copied to the mirror: .*does not match its checksum"):
        manager.wait()
    with pytest.raises(errors.StoreError, match="could not be copied"):
        manager.close()
    assert steps_in(tmp_path / "mirror") == []


def save_without_a_mirror(folder: str) -> str:
    own = Path(folder) / f"disk-{dist.get_rank()}"
    own.mkdir()
    before = os.getcwd()
    os.chdir(own)
    try:
        with pytest.raises(errors.ArgumentError) as caught:
            reshard.CheckpointManager("run")
        return str(caught.value)
    finally:
        os.chdir(before)


def test_disks_that_are_not_shared_need_a_mirror(ranks: RankPool, tmp_path: Path) -> None:
    for message in ranks.run(2, save_without_a_mirror, str(tmp_path)):
        assert message.startswith(f"rank 1 does not see what rank 0 writes to {tmp_path}")
        assert "run: all ranks must save to one shared" in message


def restore_where_one_rank_lost_the_root(folder: str) -> int | None:
    """Rank 0 sees a complete root; rank 1 sees nothing there."""
    before = os.getcwd()
    os.chdir(Path(folder) if dist.get_rank() == 0 else Path(folder) / "empty")
    try:
        with reshard.CheckpointManager("root", mirror=f"{folder}/mirror", read_only=True) as manager:
            loaded = state(0)
            step = manager.restore(loaded)
            assert loaded["step"] == step
            return step
    finally:
        os.chdir(before)


def test_mirror_is_read_if_one_rank_does_not_see_the_root(ranks: RankPool, tmp_path: Path) -> None:
    with manager_of(tmp_path) as manager:
        train(manager, [1, 2])
    (tmp_path / "empty").mkdir()
    assert ranks.run(2, restore_where_one_rank_lost_the_root, str(tmp_path)) == [2, 2]


def test_damaged_object_is_not_copied(tmp_path: Path) -> None:
    """A mirror with the same damage would be of no use."""
    with reshard.CheckpointManager(tmp_path / "root", asynchronous=False, signals=()) as manager:
        train(manager, [1])
    [path] = (tmp_path / "root" / "step-00000001" / "data").iterdir()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    manager = manager_of(tmp_path)
    with pytest.raises(errors.StoreError, match=r"could not be copied.* rank 0: 1 chunks in .*root.* are damaged: 'w'"):
        manager.close()
    assert steps_in(tmp_path / "mirror") == []


def test_error_after_a_copy_does_not_stop_the_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    faults = [RuntimeError("a bug")]

    def end_copy(self: RunController, entry: RunEntry, result: CopyResult) -> None:
        if faults:
            raise faults.pop()
        ending(self, entry, result)

    ending = RunController._end_copy
    monkeypatch.setattr(RunController, "_end_copy", end_copy)
    with manager_of(tmp_path) as manager:
        train(manager, [1])
        manager.wait()
        train(manager, [2])
        manager.wait()
    assert steps_in(tmp_path / "mirror") == [1, 2]
    assert "after the copy of step-00000001: RuntimeError: a bug" in caplog.text
