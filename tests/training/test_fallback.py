"""If a checkpoint is damaged, all ranks restore the previous one together. Other errors are raised."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from typing_extensions import Buffer

import reshard
from reshard import errors
from reshard.storage.formats import detect
from reshard.storage.formats.native.manifest import MANIFEST_NAME
from reshard.storage.stores.base import Store
from reshard.storage.stores.local import LocalStore
from reshard.storage.stores.open import open_store
from reshard.storage.stores.wrapped import WrappedStore
from tests.ranks import RankPool

LAST = "step-00000030"


class Counter:
    """A Stateful value, as an optimizer or a data loader is."""

    def __init__(self, value: float) -> None:
        self.value, self.tensor = value, torch.full((50,), float(value))

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "tensor": self.tensor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def state(value: float) -> dict[str, Any]:
    value = float(value)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.arange(64 * 128).reshape(64, 128) + value
    return {
        "sharded": distribute_tensor(whole, mesh, [Shard(0)]),
        "replicated": torch.full((300, 40), value),
        "counter": Counter(value),
        "large value": [value] * 20_000,
        "step": value,
    }


def value_of(loaded: dict[str, Any]) -> float:
    """Return the value that a state was made with, after checking that no part of it has another one."""
    expected = state(loaded["step"])
    assert loaded["sharded"].to_local().equal(expected["sharded"].to_local())
    assert loaded["replicated"].equal(expected["replicated"])
    assert loaded["counter"].value == loaded["step"]
    assert loaded["counter"].tensor.equal(expected["counter"].tensor)
    assert loaded["large value"] == expected["large value"]
    return float(loaded["step"])


def manager_of(folder: str, **options: Any) -> reshard.CheckpointManager:
    return reshard.CheckpointManager(folder, **{"asynchronous": False, "signals": (), **options})


def save_run(folder: str) -> None:
    with manager_of(folder) as manager:
        for step in (10, 20, 30):
            manager.save(step, state(float(step)))


@pytest.fixture(scope="module")
def saved_run(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks with steps 10, 20 and 30."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    ranks.run(2, save_run, str(folder))
    return folder


def flip(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[min(int(at * len(data)), len(data) - 1)] ^= 4
    path.write_bytes(data)


def truncate(path: Path, to: float) -> None:
    path.write_bytes(path.read_bytes()[: int(to * path.stat().st_size)])


def objects_of(rank: int) -> Callable[[Path], list[Path]]:
    return lambda folder: sorted(folder.glob(f"data/*-{rank:05}*.shard"))


def the_manifest(folder: Path) -> list[Path]:
    return [folder / MANIFEST_NAME]


Fault = tuple[Callable[[Path], list[Path]], Callable[[Path], None]]
FAULTS: dict[str, Fault] = {
    "a byte of rank 0's data flipped": (objects_of(0), lambda path: flip(path, 0.5)),
    "a byte of rank 1's data flipped": (objects_of(1), lambda path: flip(path, 0.5)),
    "the last byte of rank 0's data flipped": (objects_of(0), lambda path: flip(path, 1)),
    "a byte of the manifest's magic flipped": (the_manifest, lambda path: flip(path, 0)),
    "a byte of the manifest's version flipped": (the_manifest, lambda path: flip(path, 8.5 / path.stat().st_size)),
    "a byte of the manifest's header flipped": (the_manifest, lambda path: flip(path, 0.3)),
    "a byte of the manifest's blocks flipped": (the_manifest, lambda path: flip(path, 0.99)),
    "the manifest truncated": (the_manifest, lambda path: truncate(path, 0.6)),
    "the manifest empty": (the_manifest, lambda path: truncate(path, 0)),
    "the manifest missing": (the_manifest, Path.unlink),
    "rank 1's data truncated": (objects_of(1), lambda path: truncate(path, 0.5)),
    "rank 0's data missing": (objects_of(0), Path.unlink),
    "rank 1's data missing": (objects_of(1), Path.unlink),
}


class Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def restore(folder: str, **options: Any) -> tuple[int | None, float, list[str]]:
    logger, handler = logging.getLogger("reshard"), Messages()
    logger.addHandler(handler)
    try:
        with manager_of(folder, read_only=True) as manager:
            loaded = state(-1)
            step = manager.restore(loaded, **options)
            return step, value_of(loaded), handler.messages
    finally:
        logger.removeHandler(handler)


@pytest.mark.parametrize("fault", FAULTS)
def test_all_ranks_restore_the_previous_checkpoint(
    ranks: RankPool, saved_run: Path, tmp_path: Path, fault: str
) -> None:
    shutil.copytree(saved_run, tmp_path / "run")
    which, damage = FAULTS[fault]
    paths = which(tmp_path / "run" / LAST)
    assert paths
    for path in paths:
        damage(path)
    results = ranks.run(2, restore, str(tmp_path / "run"))
    assert [result[:2] for result in results] == [(20, 20), (20, 20)]
    assert results[1][2] == []
    if fault == "the manifest missing":  # as after a killed save, which is normal
        assert results[0][2] == []
    else:
        (message,) = results[0][2]
        assert f"step 30 at {tmp_path}/run/{LAST} is damaged and is not restored: " in message


class DamagedStore(WrappedStore):
    """A store that damages what it reads from some objects."""

    def __init__(self, inner: Store, fault: str, names: str) -> None:
        super().__init__(inner)
        self._fault, self._names = fault, names

    def read(self, name: str, start: int, stop: int) -> Buffer:
        data = bytearray(super().read(name, start, stop))
        if self._names not in name:
            return bytes(data)
        if self._fault == "missing":
            raise errors.ObjectNotFoundError(f"{self.location} has no object {name!r}")
        if self._fault == "denied":
            raise errors.AccessDeniedError(f"no permission to read {name!r}")
        if self._fault == "unavailable":
            raise errors.UnavailableError("the server did not answer")
        if self._fault == "failing":
            raise errors.StoreError(f"cannot read {name!r}: Input/output error")
        if self._fault == "truncated":
            return bytes(data[: max(0, self.size(name) - start)])
        data[len(data) // 2] ^= 1
        return bytes(data)

    def size(self, name: str) -> int:
        size = super().size(name)
        return size // 2 if self._fault == "truncated" and self._names in name else size


def restore_with_one_damaged_rank(folder: str, rank: int, fault: str, names: str, steps: list[str]) -> Any:
    def opened(target: Any, options: Any = None) -> Store:
        store = open_store(target, options)
        is_damaged = any(step in store.location for step in steps) and opening.is_on
        return DamagedStore(store, fault, names) if is_damaged else store

    class opening:
        is_on = dist.get_rank() == rank

    patch = pytest.MonkeyPatch()
    patch.setattr(detect, "open_store", opened)
    try:
        return restore(folder)
    except errors.CheckpointError as error:
        return type(error).__name__, error.rank, str(error)
    finally:
        patch.undo()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("names", ["data/", "manifest"])
@pytest.mark.parametrize("fault", ["flipped", "truncated", "missing", "failing"])
def test_damage_that_one_rank_sees_moves_all_ranks(
    ranks: RankPool, saved_run: Path, fault: str, names: str, rank: int
) -> None:
    results = ranks.run(2, restore_with_one_damaged_rank, str(saved_run), rank, fault, names, [LAST])
    assert [result[:2] for result in results] == [(20, 20), (20, 20)]
    (message,) = results[0][2]
    assert "step 30 at" in message
    assert ("cannot be read and is not restored" if fault == "failing" else "is damaged and is not") in message


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("names", ["data/", "manifest"])
def test_store_that_cannot_read_any_checkpoint_is_an_error_of_the_store(
    ranks: RankPool, saved_run: Path, names: str, rank: int
) -> None:
    for kind, _, message in ranks.run(
        2, restore_with_one_damaged_rank, str(saved_run), rank, "failing", names, ["step-"]
    ):
        assert kind == "StoreError"
        assert "none of the checkpoints of this run can be loaded" in message
        assert all(f"step {step} at" in message for step in (10, 20, 30))
        assert "Input/output error" in message


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("names", ["data/", "manifest"])
@pytest.mark.parametrize(
    ("fault", "kind"),
    [("denied", "AccessDeniedError"), ("unavailable", "UnavailableError")],
    ids=["denied", "unavailable"],
)
def test_error_that_is_not_damage_is_raised(
    ranks: RankPool, saved_run: Path, fault: str, kind: str, names: str, rank: int
) -> None:
    results = ranks.run(2, restore_with_one_damaged_rank, str(saved_run), rank, fault, names, [LAST])
    assert [result[:2] for result in results] == [(kind, rank), (kind, rank)]


def test_ranks_move_past_several_damaged_checkpoints(ranks: RankPool, saved_run: Path) -> None:
    steps = [LAST, "step-00000020"]
    results = ranks.run(2, restore_with_one_damaged_rank, str(saved_run), 1, "flipped", "data/", steps)
    assert [result[:2] for result in results] == [(10, 10), (10, 10)]
    assert len(results[0][2]) == 2


def test_error_names_all_checkpoints_if_all_are_damaged(ranks: RankPool, saved_run: Path) -> None:
    results = ranks.run(2, restore_with_one_damaged_rank, str(saved_run), 1, "flipped", "data/", ["step-"])
    for kind, _, message in results:
        assert kind == "CorruptCheckpointError"
        assert "none of the checkpoints of this run can be loaded" in message
        assert all(f"step {step} at" in message for step in (10, 20, 30))


def restore_damaged_step(folder: str) -> tuple[str, float]:
    with manager_of(folder, read_only=True) as manager:
        loaded = state(-1)
        with pytest.raises(errors.CorruptCheckpointError) as caught:
            manager.restore(loaded, step=30)
        assert loaded["step"] == loaded["counter"].value == -1
        assert manager.restore(loaded, step=20) == 20
        return str(caught.value), value_of(loaded)


def test_error_after_a_damaged_checkpoint_says_that_the_state_may_be_overwritten(tmp_path: Path) -> None:
    with manager_of(str(tmp_path)) as manager:
        manager.save(1, {"w": torch.ones(100, 100)})
        manager.save(2, {"w": torch.ones(200, 200)})
    (path,) = (tmp_path / "step-00000002" / "data").iterdir()
    flip(path, 0.5)
    with manager_of(str(tmp_path)) as manager, pytest.raises(errors.ShapeMismatchError) as caught:
        manager.restore({"w": torch.zeros(200, 200)})
    (note,) = caught.value.__notes__
    assert note.startswith(f"Before this, step 2 at {tmp_path}/step-00000002 was damaged.")


def test_a_checkpoint_that_was_not_loaded_has_overwritten_nothing(tmp_path: Path) -> None:
    with manager_of(str(tmp_path)) as manager:
        manager.save(1, {"w": torch.ones(100, 100)})
        manager.save(2, {"w": torch.ones(200, 200)})
    (path,) = (tmp_path / "step-00000002" / "data").iterdir()
    path.unlink()
    with manager_of(str(tmp_path)) as manager:
        with pytest.raises(errors.ShapeMismatchError) as caught:
            manager.restore({"w": torch.zeros(200, 200)})
        assert caught.value.__notes__ == [f"Before this, step 2 at {tmp_path}/step-00000002 was damaged"]
        (path,) = (tmp_path / "step-00000001" / "data").iterdir()
        path.unlink()
        with pytest.raises(errors.CorruptCheckpointError, match="can be loaded: step 2 at") as lost:
            manager.restore({"w": torch.zeros(200, 200)})
        assert "overwritten" not in str(lost.value)


def test_requested_step_does_not_fall_back(ranks: RankPool, saved_run: Path, tmp_path: Path) -> None:
    shutil.copytree(saved_run, tmp_path / "run")
    for path in objects_of(1)(tmp_path / "run" / LAST):
        flip(path, 0.5)
    for message, value in ranks.run(2, restore_damaged_step, str(tmp_path / "run")):
        assert "does not match its checksum" in message
        assert value == 20


def restore_into_another_shape(folder: str) -> tuple[str, float]:
    with manager_of(folder, read_only=True) as manager:
        loaded = state(-1)
        loaded["replicated"] = torch.zeros(3)
        with pytest.raises(errors.ShapeMismatchError) as caught:
            manager.restore(loaded)
        loaded["replicated"] = torch.full((300, 40), -1.0)
        return str(caught.value), value_of(loaded)


def test_state_that_does_not_fit_is_an_error_and_not_damage(ranks: RankPool, saved_run: Path) -> None:
    for message, value in ranks.run(2, restore_into_another_shape, str(saved_run)):
        assert "'replicated' has shape" in message
        assert value == -1


class StubbornCounter(Counter):
    """A Stateful value that fails on one rank, after all ranks have loaded."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if dist.get_rank() == 1:
            raise ZeroDivisionError("a bug of the caller")


def restore_stubborn(folder: str) -> str:
    with manager_of(folder, read_only=True) as manager, pytest.raises(errors.RankError) as caught:
        manager.restore({**state(-1), "counter": StubbornCounter(-1)})
    return str(caught.value)


def test_error_of_load_state_dict_reaches_every_rank(ranks: RankPool, saved_run: Path) -> None:
    messages = ranks.run(2, restore_stubborn, str(saved_run))
    assert messages == ["rank 1: ZeroDivisionError: a bug of the caller"] * 2


def test_entry_that_only_the_damaged_checkpoint_has_is_not_left_half_loaded(tmp_path: Path) -> None:
    """Its tensor may have the value of the damaged checkpoint, while all others have those of the previous one."""
    old = {"w": torch.ones(100, 100), "step": 1}
    with manager_of(str(tmp_path)) as manager:
        manager.save(1, old)
        manager.save(2, {**old, "new": torch.ones(50), "z": torch.ones(200, 200)})
    (path,) = (tmp_path / "step-00000002" / "data").iterdir()
    flip(path, 0.9)
    with manager_of(str(tmp_path)) as manager:
        loaded = {"w": torch.zeros(100, 100), "step": 0, "new": torch.zeros(50)}
        with pytest.raises(errors.CorruptCheckpointError, match=r"does not have 'new'.*restore\(state, step=1\)"):
            manager.restore({**loaded, "z": torch.zeros(200, 200)}, allow_missing=["new", "z"])
        never_saved = {"w": torch.zeros(100, 100), "z": torch.zeros(200, 200), "other": torch.zeros(1)}
        with pytest.raises(errors.CorruptCheckpointError, match="does not have 'z'"):
            manager.restore(never_saved, strict=False)
        del never_saved["z"]
        flip(tmp_path / "step-00000002" / MANIFEST_NAME, 0.5)
        assert manager.restore(never_saved, strict=False) == 1
        assert never_saved["w"].eq(1).all()


class CollectiveCounter(Counter):
    """A Stateful value whose `state_dict` is collective, as those of FSDP are."""

    def state_dict(self) -> dict[str, Any]:
        dist.barrier()
        return super().state_dict()


def restore_what_one_rank_lacks(folder: str) -> str:
    rank = dist.get_rank()
    with manager_of(folder, read_only=True) as manager:
        loaded: dict[str, Any] = {**state(-1), "counter": CollectiveCounter(-1)}
        if rank == 1:
            loaded["later"] = torch.zeros(50)
        with pytest.raises(errors.CorruptCheckpointError) as caught:
            manager.restore(loaded, allow_missing=["later"])
    return str(caught.value)


def save_with_a_later_entry(folder: str) -> None:
    with manager_of(folder) as manager:
        manager.save(1, state(1))
        manager.save(2, {**state(2), "later": torch.ones(50)})


def test_ranks_with_other_missing_entries_find_together_what_is_left(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, save_with_a_later_entry, str(tmp_path))
    for path in (tmp_path / "step-00000002" / "data").iterdir():
        flip(path, 0.5)
    for message in ranks.run(2, restore_what_one_rank_lacks, str(tmp_path)):
        assert "does not have 'later'" in message


def test_missing_entry_that_no_checkpoint_has_is_no_obstacle(tmp_path: Path) -> None:
    with manager_of(str(tmp_path)) as manager:
        for step in (1, 2):
            manager.save(step, {"w": torch.full((100, 100), float(step))})
    (path,) = (tmp_path / "step-00000002" / "data").iterdir()
    flip(path, 0.5)
    loaded = {"w": torch.zeros(100, 100), "other": torch.zeros(3)}
    with manager_of(str(tmp_path)) as manager:
        assert manager.restore(loaded, strict=False) == 1
    assert loaded["w"].eq(1).all()


def test_newer_format_is_an_error_and_not_damage(tmp_path: Path) -> None:
    with manager_of(str(tmp_path)) as manager:
        for step in (1, 2):
            manager.save(step, {"w": torch.ones(3)})
    path = tmp_path / "step-00000002" / MANIFEST_NAME
    data = bytearray(path.read_bytes())
    data[8], data[24] = 9, data[24] ^ 1  # another version, and its own checksum
    path.write_bytes(data)
    with manager_of(str(tmp_path)) as manager, pytest.raises(errors.UnsupportedVersionError, match="format version 9"):
        manager.restore({"w": torch.zeros(3)})


def list_run(folder: str) -> int:
    listed = 0
    walking = LocalStore.list

    def counted(store: Any, folder: str = "") -> Any:
        nonlocal listed
        listed += 1
        return walking(store, folder)

    patch = pytest.MonkeyPatch()
    patch.setattr(LocalStore, "list", counted)
    try:
        with manager_of(folder, keep=[reshard.latest(2)]) as manager:
            manager.restore(state(-1))
            manager.save(40, state(40))
            assert manager.steps() == [10, 20, 30, 40]
            manager.wait()
            assert manager.steps() == [30, 40]
    finally:
        patch.undo()
    return listed


def test_only_rank_0_lists(ranks: RankPool, saved_run: Path, tmp_path: Path) -> None:
    shutil.copytree(saved_run, tmp_path / "run")
    first, *others = ranks.run(3, list_run, str(tmp_path / "run"))
    assert first > 0
    assert others == [0, 0]
