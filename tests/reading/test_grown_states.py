"""A new object receives what its state lacks: the saved one may have had more items."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import reshard
from reshard.errors import CorruptCheckpointError
from tests.ranks import RankPool


class Part:
    """A Stateful whose state is one value."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.loaded: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"v": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state["v"]


class App(Part):
    """A Stateful that holds a module: its state may have the tensors of a model that has changed."""

    def __init__(self, value: Any) -> None:
        super().__init__(value)
        self.model = nn.Linear(2, 2)


class Slots:
    """A Stateful without a `__dict__` that holds a module."""

    __slots__ = ("model", "part")

    def __init__(self, value: Any) -> None:
        self.model, self.part = [nn.Linear(2, 2)], Part(value)

    def state_dict(self) -> dict[str, Any]:
        return self.part.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.part.load_state_dict(state)


ONE, TWO = torch.tensor(1.0), torch.tensor([2.0, 3.0])
GROWN: dict[str, tuple[Any, Any]] = {
    "values": ({"a": 5, "b": 7}, {"a": 0}),
    "tensors": ({"a": ONE, "b": TWO}, {"a": torch.tensor(0.0)}),
    "numbers as keys": ({1: 2, 3: {4: TWO}}, {1: 0}),
    "nested dicts": ({"a": {"b": {"c": 1, "d": [1, TWO]}}}, {"a": {"b": {"c": 0}}}),
    "a list of tensors": ([ONE, TWO, ONE], [torch.tensor(0.0)]),
    "a list of dicts": ([{"a": 1}, {"a": 2}, {"b": {"c": ONE}}], [{"a": 0}]),
    "a list in a list": ({"h": [[ONE], [ONE, TWO]]}, {"h": [[torch.tensor(0.0)]]}),
    "an empty dict beside others": ({"a": {"x": 1}, "b": 2, "c": {"y": ONE}}, {"a": {}, "b": 0}),
    "an empty list": ([ONE, {"a": 2}], []),
    "keys with dots": ({"a.b": 1, "a": {"c": 2}, "d.e": ONE}, {"a.b": 0}),
}


@pytest.mark.parametrize("case", GROWN)
@pytest.mark.parametrize("source", ["reshard", "from torch"])
def test_containers_receive_the_items_that_they_lack(case: str, source: str, tmp_path: Path) -> None:
    saved, new = GROWN[case]
    if source == "reshard":
        reshard.save({"p": Part(saved), "x": 1}, tmp_path / "c")
    else:
        torch.save({"p": {"v": saved}, "x": 1}, tmp_path / "c.pt")
        reshard.convert(tmp_path / "c.pt", tmp_path / "c")
    part = Part(new)
    report = reshard.load({"p": part, "x": 0}, tmp_path / "c")
    assert repr(part.loaded) == repr(saved)
    assert report.unexpected_keys == ()


class WithExtraState(nn.Linear):
    """A module with a dict as its extra state."""

    def __init__(self, extra: Any) -> None:
        super().__init__(2, 2)
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def test_the_extra_state_of_a_module_receives_what_it_lacks_but_its_parameters_do_not(tmp_path: Path) -> None:
    saved = nn.Sequential(WithExtraState({"a": 1, "b": [ONE, 2]}), nn.Linear(2, 2))
    reshard.save(reshard.training_state(saved), tmp_path)
    model = nn.Sequential(WithExtraState({"a": 0}))
    report = reshard.load(reshard.training_state(model), tmp_path)
    assert repr(model[0].extra) == repr({"a": 1, "b": [ONE, 2]})
    assert report.unexpected_keys == ("model.1.bias", "model.1.weight")


@pytest.mark.parametrize("kind", [App, Slots])
def test_an_object_with_a_module_receives_no_tensors_of_another_model(kind: Any, tmp_path: Path) -> None:
    reshard.save({"p": Part({"model": {"w": ONE, "head": TWO}})}, tmp_path)
    app = kind({"model": {"w": torch.tensor(0.0)}})
    report = reshard.load({"p": app}, tmp_path)
    assert getattr(app, "part", app).loaded == {"model": {"w": ONE}}
    assert report.unexpected_keys == ("p.v.model.head",)


def test_a_dict_of_the_caller_receives_no_new_keys(tmp_path: Path) -> None:
    reshard.save({"d": {"a": 1, "b": 2}, "p": Part(1)}, tmp_path)
    state = {"d": {"a": 0}, "p": Part(0)}
    assert reshard.load(state, tmp_path).unexpected_keys == ("d.b",)
    assert state["d"] == {"a": 1}


def test_excluded_names_are_not_added(tmp_path: Path) -> None:
    reshard.save({"p": Part([ONE, TWO, ONE]), "q": Part({"a": 1, "b": 2, "c": 3})}, tmp_path)
    p, q = Part([torch.tensor(0.0)]), Part({"a": 0})
    report = reshard.load({"p": p, "q": q}, tmp_path, exclude=["p.v.1", "q.v.b"])
    assert p.loaded == [ONE], "an item after one that is left out has no place"
    assert q.loaded == {"a": 1, "c": 3}
    assert report.unexpected_keys == ("p.v.2",)


def test_a_damaged_item_changes_nothing(tmp_path: Path) -> None:
    reshard.save({"p": Part({"a": ONE, "b": torch.randn(1000)})}, tmp_path, codec="none")
    (data,) = tmp_path.glob("data/*")
    content = bytearray(data.read_bytes())
    content[-5] ^= 1
    data.write_bytes(content)
    value = {"a": torch.tensor(0.0)}
    part = Part(value)
    with pytest.raises(CorruptCheckpointError, match=r"p\.v\.b"):
        reshard.load({"p": part}, tmp_path)
    assert list(value) == ["a"]
    assert part.loaded is None


def load_on_ranks(folder: str) -> tuple[Any, Any, tuple[str, ...]]:
    rank = dist.get_rank()
    per_rank, shared = Part({f"rank{rank}": rank, "seen": {"a": 1}}), Part({"a": rank})
    per_rank.value["seen"]["b"] = 2
    reshard.save({"own": per_rank, "shared": Part({"a": 5, "b": 7})}, folder)
    own, shared = Part({f"rank{rank}": -1, "seen": {"a": 0}}), Part({"a": 0})
    report = reshard.load({"own": own, "shared": shared}, folder)
    return own.loaded, shared.loaded, report.unexpected_keys


@pytest.mark.slow
def test_a_rank_does_not_receive_what_another_rank_has(ranks: RankPool, tmp_path: Path) -> None:
    """The next save would store an old value of the other rank instead of its new one."""
    for rank, found in enumerate(ranks.run(3, load_on_ranks, str(tmp_path))):
        assert found == ({f"rank{rank}": rank, "seen": {"a": 1, "b": 2}}, {"a": 5, "b": 7}, ())


def load_on_one_rank(folder: str) -> tuple[Any, Any]:
    """Load a Stateful that only rank 1 has, and an empty dict on the rank that does not hold its names."""
    rank = dist.get_rank()
    reshard.save({"x": rank} | ({"p": Part({"a": 5, "b": TWO})} if rank else {}), f"{folder}/c")
    part = Part({"a": 0})
    reshard.load({"x": 0} | ({"p": part} if rank else {}), f"{folder}/c")
    other = Part({} if rank else {"a": 0, "b": torch.zeros(2)})
    reshard.load({"p": other}, f"{folder}/c")
    return repr(part.loaded), repr(other.loaded)


@pytest.mark.slow
def test_ranks_with_different_objects(ranks: RankPool, tmp_path: Path) -> None:
    saved = repr({"a": 5, "b": TWO})
    assert ranks.run(2, load_on_one_rank, str(tmp_path)) == [("None", saved), (saved, "{}")]
