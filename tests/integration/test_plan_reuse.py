"""`reshard.async_save` uses the plan of the last save again, if every rank still holds the same shards."""

from __future__ import annotations

import signal
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import reshard
from reshard import errors
from reshard.storage.async_save import _Ranks
from reshard.storage.save import Saving
from reshard.storage.writing.coordinator import RankContents
from reshard.storage.writing.save_plan import HeldShards
from tests.integration.models import build, local_values
from tests.ranks import RankPool

State = dict[str, Any]

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]


@contextmanager
def counted_plans() -> Iterator[list[int]]:
    """Count the saves for which this rank sends what it holds."""
    plans: list[int] = []
    counted: list[Saving] = []
    create = Saving.describe

    def counting(self: Saving, state_dict: State, *, is_repeated: bool = False) -> RankContents:
        plan = create(self, state_dict, is_repeated=is_repeated)
        if isinstance(plan.held, HeldShards) and self not in counted:
            counted.append(self)
            plans.append(1)
        return plan

    with patch.object(Saving, "describe", counting):
        yield plans


def save(state: State, uri: Path | str, **options: Any) -> reshard.Report:
    return reshard.async_save(state, uri, **{"background": "thread", **options}).result()


def read(uri: Path | str) -> State:
    checkpoint = reshard.open(uri)
    assert checkpoint.verify() == []
    return checkpoint.state_dict(allow_pickle=True)


def text(value: Any) -> str:
    """Return a text that is equal for equal states: dicts are sorted, and keys show their types."""
    if isinstance(value, dict):
        return "{" + ", ".join(sorted(f"{key!r}: {text(item)}" for key, item in value.items())) + "}"
    return "[" + ", ".join(map(text, value)) + "]" if isinstance(value, list) else f"{value!r}"


# Unchanged states


def save_under_a_layout(folder: str, layout: str) -> list[int]:
    state: State = {}
    with counted_plans() as plans:
        for seed in range(3):
            state = {
                "model": build(layout, seed),
                "step": seed,
                "list": [torch.tensor(seed), {"a": seed}],
                "no": {},
            }
            save(state, f"{folder}/{seed}")
            loaded: State = {"model": build(layout, 9), "step": 0, "list": [torch.tensor(0), {"a": 0}], "no": {}}
            reshard.load(loaded, f"{folder}/{seed}")
            expected = local_values(state["model"])
            assert all(value.equal(expected[name]) for name, value in local_values(loaded["model"]).items())
            assert loaded["step"] == int(loaded["list"][0]) == loaded["list"][1]["a"] == seed
    reshard.save(state, f"{folder}/planned")
    return plans


@pytest.mark.parametrize("layout", ["fsdp", "hsdp", "fsdp_tp", "tp", "fsdp1", "plain"])
def test_equal_layouts_are_planned_once(layout: str, ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(4, save_under_a_layout, str(tmp_path), layout) == [[1]] * 4
    assert reshard.diff(tmp_path / "2", tmp_path / "planned") == []
    assert reshard.diff(tmp_path / "1", tmp_path / "planned") != []


def save_new_values(folder: str) -> list[Any]:
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with counted_plans() as plans:
        reports = []
        for step in range(3):
            state = {
                "w": distribute_tensor(torch.full((6, 4), float(step)), mesh, [Shard(0)]),
                "small": torch.full((3,), float(step + (rank == 1 and step == 1))),
                "value": step + (10 if rank == 2 and step == 2 else 0),
                "object": signal.SIGINT if step == 1 else "text" * step,
                f"own{rank}": [rank, step],
            }
            reports.append(save(state, f"{folder}/{step}", metadata={"step": step}))
    return [plans, [report.differing for report in reports], [report.pickled for report in reports]]


def test_values_and_small_replicas_are_compared_in_every_save(ranks: RankPool, tmp_path: Path) -> None:
    expected = [[1], [(), ("small",), ("value",)], [(), ("object",), ()]]
    assert ranks.run(3, save_new_values, str(tmp_path)) == [expected] * 3
    for step in range(3):
        state = read(tmp_path / str(step))
        assert state["w"].equal(torch.full((6, 4), float(step)))
        assert state["small"].tolist() == [step] * 3
        assert state["value"] == step
        assert state["object"] == (signal.SIGINT if step == 1 else "text" * step)
        assert [state[f"own{rank}"] for rank in range(3)] == [[rank, step] for rank in range(3)]
        assert reshard.open(tmp_path / str(step)).metadata == {"step": step}


def test_a_process_without_a_group_plans_once(tmp_path: Path) -> None:
    with counted_plans() as plans:
        for step in range(3):
            codec = ("zstd", "none", "zstd")[step]
            save({"w": torch.full((5, 4), step), "alone": {"step": step}}, tmp_path / str(step), codec=codec)
            state = read(tmp_path / str(step))
            assert state["w"].eq(step).all()
            assert state["alone"] == {"step": step}
    assert plans == [1]


# Changed states

CHANGES: dict[str, Callable[[State], object]] = {
    "shape": lambda state: state.update(w=torch.ones(7, 3)),
    "rank": lambda state: state.update(w=torch.ones(5, 3, 1)),
    "dtype": lambda state: state.update(w=torch.ones(5, 3, dtype=torch.int32)),
    "new key": lambda state: state.update(v=torch.ones(2)),
    "no key": lambda state: state.pop("w"),
    "other key": lambda state: state.update(v=state.pop("w")),
    "value": lambda state: state.update(w=3),
    "tensor": lambda state: state.update(n=torch.ones(4)),
    "empty dict": lambda state: state.update(n={}),
    "nested": lambda state: state.update(w={"w": torch.ones(5, 3)}),
    "longer list": lambda state: state["list"].append(torch.ones(1)),
    "dict instead of list": lambda state: state.update(list={"0": torch.ones(2), "1": torch.zeros(2)}),
    "key of another type": lambda state: state.update(keys={True: torch.ones(3)}),
    "empty tensor": lambda state: state.update(w=torch.ones(0, 3)),
}


def first_state() -> State:
    return {
        "w": torch.zeros(5, 3),
        "n": 1,
        "list": [torch.ones(2), torch.zeros(2)],
        "keys": {1: torch.ones(3)},
    }


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_state_is_planned_again(change: str, tmp_path: Path) -> None:
    with counted_plans() as plans:
        for number in range(2):
            save(first_state(), tmp_path / f"old{number}")
        changed = first_state()
        CHANGES[change](changed)
        for number in range(2):
            save(changed, tmp_path / f"new{number}")
            assert text(read(tmp_path / f"new{number}")) == text(changed)
    assert plans == [1, 1]


def change_on_one_rank(folder: str, change: str) -> list[int]:
    rank = dist.get_rank()

    def state_of(number: int) -> State:
        own = first_state()
        if rank == 1 and number >= 2:
            CHANGES[change](own)
        return {f"of{rank}": own, "all": torch.full((3,), number), "n": number}

    with counted_plans() as plans:
        for number in range(4):
            save(state_of(number), f"{folder}/{number}")
    return plans


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_on_one_rank_makes_all_ranks_plan_again(change: str, ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(3, change_on_one_rank, str(tmp_path), change) == [[1, 1]] * 3
    changed = first_state()
    CHANGES[change](changed)
    for number in range(4):
        state = read(tmp_path / str(number))
        assert text(state["of0"]) == text(state["of2"]) == text(first_state())
        assert text(state["of1"]) == text(changed if number >= 2 else first_state())
        assert state["n"] == state["all"].unique().item() == number


def change_placements(folder: str) -> list[int]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    values = torch.arange(48.0).reshape(6, 8)
    counts = []
    with counted_plans() as plans:
        for number, placement in enumerate([Shard(0), Shard(0), Shard(1), Replicate(), Replicate(), Shard(0)]):
            save({"w": distribute_tensor(values + number, mesh, [placement])}, f"{folder}/{number}")
            counts.append(len(plans))
    return counts


def test_other_placements_are_planned_again(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(3, change_placements, str(tmp_path)) == [[1, 1, 2, 3, 3, 4]] * 3
    for number in range(6):
        assert read(tmp_path / str(number))["w"].equal(torch.arange(48.0).reshape(6, 8) + number)


def move_a_shard(folder: str) -> list[int]:
    """Exchange the halves that two ranks hold: shapes and dtypes of the local tensors stay the same."""
    rank = dist.get_rank()
    with counted_plans() as plans:
        for number in range(4):
            order = [0, 1] if number < 2 else [1, 0]
            mesh = DeviceMesh("cpu", order)
            first = (rank if number < 2 else 1 - rank) * 4
            local = torch.arange(first, first + 4) + 10 * number
            state = {"w": DTensor.from_local(local, mesh, [Shard(0)], run_check=False)}
            save(state, f"{folder}/{number}")
    return plans


def test_a_shard_at_another_position_is_planned_again(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(2, move_a_shard, str(tmp_path)) == [[1, 1]] * 2
    for number in range(4):
        assert read(tmp_path / str(number))["w"].tolist() == [10 * number + i for i in range(8)]


def alternate(folder: str) -> list[int]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with counted_plans() as plans:
        for number in range(6):
            whole = torch.full((6 + number % 2, 4), float(number))
            save({f"w{number % 2}": distribute_tensor(whole, mesh, [Shard(0)]), "n": number}, f"{folder}/{number}")
    return plans


def test_alternating_states_are_saved_correctly(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(3, alternate, str(tmp_path)) == [[1] * 6] * 3
    for number in range(6):
        state = read(tmp_path / str(number))
        assert state["n"] == number
        assert state[f"w{number % 2}"].equal(torch.full((6 + number % 2, 4), float(number)))


# Errors


def fail_between_saves(folder: str) -> list[Any]:
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shared = distribute_tensor(torch.ones(6, 4), mesh, [Shard(0)])
    good: State = {"w": shared, "v": torch.ones(3), "n": 1}
    freed = torch.ones(3)
    freed.untyped_storage().resize_(0)
    one_rank: list[tuple[State, dict[str, Any]]] = [
        ({**good, "v": torch.ones(4)}, {}),
        ({**good, "v": freed}, {}),
        ({**good, "n": lambda: 1}, {}),
        ({**good, "n": signal.SIGINT}, {"allow_pickle": False}),
        (good, {"metadata": {"rank": 1}}),
        (good, {"codec": "none"}),
        (good, {"staging": "never"}),
    ]
    messages = []
    with counted_plans() as plans:
        save(good, f"{folder}/first")
        with pytest.raises(errors.CheckpointExistsError):
            save(good, f"{folder}/first")
        for number, (state, options) in enumerate(one_rank):
            state, options = (state, options) if rank == 1 else (good, {})
            with pytest.raises(errors.CheckpointError) as caught:
                save(state, f"{folder}/bad{number}", **options)
            messages.append(str(caught.value))
        before = len(plans)
        save(good, f"{folder}/last")
    return [before, len(plans), messages]


def test_a_rank_that_fails_fails_all_and_the_next_save_succeeds(ranks: RankPool, tmp_path: Path) -> None:
    expected = [
        "rank 0: the ranks disagree about 'v'",
        "rank 1: 'v' cannot be stored: it has no memory",
        "rank 1: 'n', of <class 'function'>, cannot be stored",
        "rank 1: 'n', of <enum 'Signals'>, needs pickle, but allow_pickle is False",
        "rank 0: the ranks of one save passed different metadata",
        "rank 0: the ranks of one save passed different codecs: none, zstd",
        "rank 1: staging must be one of",
    ]
    for before, after, messages in ranks.run(3, fail_between_saves, str(tmp_path)):
        assert [got for got, start in zip(messages, expected, strict=True) if not got.startswith(start)] == []
        assert before == after == 2, "for the first save, and for that with another shape"
    assert read(tmp_path / "last")["w"].equal(torch.ones(6, 4))
    assert {path.name for path in tmp_path.iterdir()} == {"first", "last"}


def lose_the_plan(folder: str, loser: int) -> list[int]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = {"w": distribute_tensor(torch.arange(24.0).reshape(6, 4), mesh, [Shard(0)])}
    other = {"w": distribute_tensor(torch.arange(28.0).reshape(7, 4), mesh, [Shard(0)])}
    ranks = _Ranks.of(None)
    with counted_plans() as plans:
        save(state, f"{folder}/0")
        old = ranks.plan
        ranks.plan = None if dist.get_rank() == loser else old  # as after an interrupt
        save(state, f"{folder}/1")
        save(other, f"{folder}/2")
        if dist.get_rank() == loser:
            ranks.plan = old
        save(state, f"{folder}/3")
        save(state, f"{folder}/4")
    return plans


@pytest.mark.parametrize("loser", [0, 1])
def test_ranks_with_different_last_plans_plan_again(loser: int, ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(3, lose_the_plan, str(tmp_path), loser) == [[1, 1, 1, 1]] * 3
    for number, rows in enumerate([6, 6, 7, 6, 6]):
        assert read(tmp_path / str(number))["w"].equal(torch.arange(rows * 4.0).reshape(rows, 4))


class OnSomeRanks:
    """A Stateful whose state_dict is collective among the ranks that have it."""

    def __init__(self, value: float) -> None:
        self.value = torch.tensor(value)

    def state_dict(self) -> State:
        dist.all_reduce(self.value)
        return {"value": self.value}

    def load_state_dict(self, state: State) -> None:
        raise AssertionError("never reached")


def save_stateful_values(folder: str) -> list[Any]:
    rank = dist.get_rank()
    bad: Any = {"codec": "lzma"} if rank == 1 else {}
    messages = []
    with counted_plans() as plans:
        for number in range(2):
            save({"s": OnSomeRanks(number + rank), "n": number}, f"{folder}/{number}")
            for call in (save, reshard.save):
                with pytest.raises(errors.ArgumentError) as caught:
                    call({"s": OnSomeRanks(1)}, f"{folder}/bad", **bad)
                messages.append(str(caught.value))
                with pytest.raises(errors.ArgumentError) as caught:
                    call(3 if rank == 1 else {"s": OnSomeRanks(1)}, f"{folder}/bad")  # type: ignore[arg-type]
                messages.append(str(caught.value))
    return [plans, messages]


def test_no_state_dict_is_called_before_all_ranks_are_ready(ranks: RankPool, tmp_path: Path) -> None:
    for plans, messages in ranks.run(3, save_stateful_values, str(tmp_path)):
        assert plans == [1]
        assert all(message.startswith("rank 1: codec must be") for message in messages[::2])
        assert all(message.startswith("rank 1: expected a state dict, a mapping") for message in messages[1::2])
    for number in range(2):
        assert read(tmp_path / str(number))["s"]["value"].item() == 3 * number + 3


def mix_stateful_and_plain_values(folder: str) -> list[int]:
    with counted_plans() as plans:
        for number in range(3):
            value: Any = {"value": torch.tensor(float(number))}
            if dist.get_rank() == 1:
                value = Plain(value)
            save({"s": value}, f"{folder}/{number}")
    return plans


class Plain:
    """A Stateful whose state_dict is not collective."""

    def __init__(self, state: State) -> None:
        self.state = state

    def state_dict(self) -> State:
        return self.state

    def load_state_dict(self, state: State) -> None:
        raise AssertionError("never reached")


def test_only_some_ranks_have_a_stateful_value(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(3, mix_stateful_and_plain_values, str(tmp_path)) == [[1]] * 3
    for number in range(3):
        assert read(tmp_path / str(number))["s"]["value"].item() == number


# Memory


def test_a_plan_does_not_keep_the_tensors(tmp_path: Path) -> None:
    freed = []
    for number in range(3):
        tensor = torch.ones(700)
        freed.append(weakref.ref(tensor))
        save({"w": tensor, "n": number}, tmp_path / str(number))
        del tensor
    assert [reference() for reference in freed] == [None] * 3
