"""A new object receives what its state lacks: the saved one may have had more items."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

import reshard
from reshard.errors import CorruptCheckpointError
from tests.integration.wrappers import Flattened
from tests.ranks import RankPool
from tests.samples import Custom


class Part:
    """A Stateful whose state is one value."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.loaded: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"v": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state["v"]


ONE, TWO = torch.tensor(1.0), torch.tensor([2.0, 3.0])
GROWN: dict[str, tuple[Any, Any]] = {
    "values": ({"a": 5, "b": 7}, {"a": 0}),
    "numbers as keys": ({1: 2, 3: {4: "x"}}, {1: 0}),
    "nested dicts": ({"a": {"b": {"c": 1, "d": [1, {"e": 2}]}}}, {"a": {"b": {"c": 0}}}),
    "a list of tensors": ([ONE, TWO, ONE], [torch.tensor(0.0)]),
    "a list of dicts": ([{"a": 1}, {"a": 2}, {"b": {"c": ONE}}], [{"a": 0}]),
    "a list in a list": ({"h": [[ONE], [ONE, TWO]]}, {"h": [[torch.tensor(0.0)]]}),
    "an empty dict beside others": ({"a": {"x": 1}, "b": 2, "c": {"y": 3}}, {"a": {}, "b": 0}),
    "an empty list": ([ONE, {"a": 2}], []),
    "keys with dots": ({"a.b": {"x": 1, "y": 2}, "a": {"b": {"z": 3}, "c": 2}, "d.e": 4}, {"a.b": {"x": 0}}),
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


@pytest.mark.parametrize("new", [OrderedDict(), defaultdict(list), Counter(), {}])
def test_an_empty_dict_is_replaced_by_one_of_its_class(new: dict[str, Any], tmp_path: Path) -> None:
    reshard.save({"p": Part({"a": 1, "b": 2})}, tmp_path)
    part = Part(new)
    reshard.load({"p": part}, tmp_path)
    assert type(part.loaded) is type(new)
    assert dict(part.loaded) == {"a": 1, "b": 2}
    assert not new
    if isinstance(part.loaded, defaultdict):
        assert part.loaded["c"] == []


@pytest.mark.parametrize("saved", [{"a": 1}, [1, ONE]])
def test_an_empty_dict_receives_a_list_or_has_another_class(saved: Any, tmp_path: Path) -> None:
    class Frozen(dict[str, Any]):
        def __setitem__(self, key: str, value: Any) -> None:
            raise TypeError("frozen")

    reshard.save({"p": Part(saved)}, tmp_path)
    for new in (OrderedDict[str, Any](), Frozen()):
        part = Part(new)
        reshard.load({"p": part}, tmp_path)
        assert part.loaded == saved


def test_the_extra_state_of_a_module_receives_what_it_lacks_but_its_parameters_do_not(tmp_path: Path) -> None:
    saved = nn.Sequential(WithExtraState({"a": 1, "b": {"c": 2}}), nn.Linear(2, 2))
    reshard.save(reshard.training_state(saved), tmp_path)
    model = nn.Sequential(WithExtraState({"a": 0}))
    report = reshard.load(reshard.training_state(model), tmp_path)
    assert model[0].extra == {"a": 1, "b": {"c": 2}}
    assert report.unexpected_keys == ("model.1.bias", "model.1.weight")


class Whole(Part):
    """A Stateful whose state is its value."""

    def state_dict(self) -> dict[str, Any]:
        return dict(self.value)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state


GROUPS = {"param_groups": [{"lr": 1}]}
REFUSED: dict[str, tuple[Part, Part, Any]] = {
    "the state of an optimizer": (
        Part({"o": {"state": {"w": {"step": 3, "n": 4}}, **GROUPS}}),
        Part({"o": {"state": {"w": {"step": 0}}, **GROUPS}}),
        {"o": {"state": {"w": {"step": 3}}, **GROUPS}},
    ),
    "keys of the state itself": (Whole({"a": 1, "old": 2}), Whole({"a": 0}), {"a": 1}),
    "tensors of a model": (Part({"m": {"w": ONE, "head": TWO}}), Part({"m": {"w": 0 * ONE}}), {"m": {"w": ONE}}),
    "values beside tensors": (Part({"w": ONE, "x": 1}), Part({"w": 0 * ONE}), {"w": ONE}),
    "a dict with a tensor": (Part({"a": 1, "b": {"c": 2, "d": ONE}}), Part({"a": 0}), {"a": 1}),
    "an item with a pickled value": (Part({"a": 1, "b": {"c": 1, "d": Custom(2)}}), Part({"a": 0}), {"a": 1}),
    "a pickled value": (Part({"a": 1, "b": Custom(2)}), Part({"a": 0}), {"a": 1}),
    "a tensor of several parts": (Part([ONE, Flattened.of(4, 4)]), Part([0 * ONE]), [ONE]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_received_is_reported(case: str, tmp_path: Path) -> None:
    saved, part, loaded = REFUSED[case]
    reshard.save({"p": saved}, tmp_path)
    report = reshard.load({"p": part}, tmp_path)
    assert repr(part.loaded) == repr(loaded)
    assert report.unexpected_keys


def test_a_value_that_is_larger_than_the_budget_is_not_received(tmp_path: Path) -> None:
    reshard.save({"p": Part({"a": 1, "b": "x" * 10_000})}, tmp_path)
    part = Part({"a": 0})
    assert reshard.load({"p": part}, tmp_path, budget_bytes=5000).unexpected_keys == ("p.v.b",)
    assert part.loaded == {"a": 1}


def test_small_items_are_received_beside_one_that_is_too_large(tmp_path: Path) -> None:
    reshard.save({"p": Part({"a": 1, "b": "x" * 10_000, "c": 3})}, tmp_path)
    part = Part({"a": 0})
    assert reshard.load({"p": part}, tmp_path, budget_bytes=5000).unexpected_keys == ("p.v.b",)
    assert part.loaded == {"a": 1, "c": 3}


def test_a_pickled_value_is_received_if_that_is_allowed(tmp_path: Path) -> None:
    reshard.save({"p": Part({"a": 1, "b": Custom(2)})}, tmp_path)
    part = Part({"a": 0})
    reshard.load({"p": part}, tmp_path, allow_pickle=True)
    assert part.loaded == {"a": 1, "b": Custom(2)}


def test_a_read_only_mapping_in_a_state_is_loaded_as_it_is(tmp_path: Path) -> None:
    reshard.save({"p": Part({"x": ONE, "y": TWO})}, tmp_path)
    part = Part(MappingProxyType({"x": torch.tensor(0.0)}))
    assert reshard.load({"p": part}, tmp_path).unexpected_keys == ("p.v.y",)
    assert part.loaded == {"x": ONE}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_numbers_as_keys_in_a_checkpoint_of_dcp_do_not_become_strings(tmp_path: Path) -> None:
    dcp.save({"p": Part({0: 5, 1: 6})}, checkpoint_id=tmp_path)
    part = Part({0: 1})
    reshard.load({"p": part}, tmp_path, allow_pickle=True)
    assert part.loaded == {0: 5}


def test_an_exclude_pattern_for_a_lacking_name_is_not_reported_as_misspelt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reshard.save({"p": Whole({"a": 1, "legacy": 2}), "d": {"x": 1, "old": 2}}, tmp_path)
    report = reshard.load({"p": Whole({"a": 0}), "d": {"x": 0}}, tmp_path, exclude=["p.legacy", "d.old"])
    assert report.unused_patterns == ()
    assert not caplog.records
    assert reshard.load({"p": Whole({"a": 0})}, tmp_path, exclude="p.legcy").unused_patterns == ("p.legcy",)


def test_renamed_names_are_added_at_their_new_paths(tmp_path: Path) -> None:
    reshard.save({"p": Part({"old": {"x": 1, "y": 2}, "flat.z": {"u": 1, "v": 2}})}, tmp_path)
    part = Part({"new": {"x": 0}, "flat": {"z": {"u": 0}}})
    report = reshard.load({"p": part}, tmp_path, rename={"p.v.old.*": "p.v.new.*"})
    assert part.loaded == {"new": {"x": 1, "y": 2}, "flat": {"z": {"u": 1}}}
    assert report.unexpected_keys == ("p.v.flat.z.v",), "it was in a dict of another key"


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
    reshard.save({"p": Part([ONE, torch.randn(1000)])}, tmp_path, codec="none")
    (data,) = tmp_path.glob("data/*")
    content = bytearray(data.read_bytes())
    content[-5] ^= 1
    data.write_bytes(content)
    value = [torch.tensor(0.0)]
    part = Part(value)
    with pytest.raises(CorruptCheckpointError, match=r"p\.v\.1"):
        reshard.load({"p": part}, tmp_path)
    assert len(value) == 1
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


def load_parts(folder: str) -> tuple[Any, Any]:
    """Rank 1 has a part of what rank 0 lacks."""
    reshard.save({"p": Part([{"a": 1, "b": 2}, {"a": 3, "b": 4}]), "q": Part({"x": 1, "y": {"u": 5, "v": 6}})}, folder)
    rank = dist.get_rank()
    p = Part([{"a": 0, "b": 0}, *([{"a": 0}] if rank else [])])
    q = Part({"x": 0} | ({"y": {"u": 0}} if rank else {}))
    reshard.load({"p": p, "q": q}, folder)
    return p.loaded, q.loaded


@pytest.mark.slow
def test_an_item_is_not_received_in_part(ranks: RankPool, tmp_path: Path) -> None:
    found = ranks.run(2, load_parts, str(tmp_path))
    assert found[0] == ([{"a": 1, "b": 2}], {"x": 1})
    assert found[1] == ([{"a": 1, "b": 2}, {"a": 3, "b": 4}], {"x": 1, "y": {"u": 5, "v": 6}})


def load_on_one_rank(folder: str) -> tuple[Any, Any]:
    """Load a Stateful that only rank 1 has, and an empty dict on the rank that does not hold its names."""
    rank = dist.get_rank()
    reshard.save({"x": rank} | ({"p": Part({"a": 5, "b": 6})} if rank else {}), f"{folder}/c")
    part = Part({"a": 0})
    reshard.load({"x": 0} | ({"p": part} if rank else {}), f"{folder}/c")
    other = Part({} if rank else {"a": 0, "b": 0})
    reshard.load({"p": other}, f"{folder}/c")
    return repr(part.loaded), repr(other.loaded)


@pytest.mark.slow
def test_ranks_with_different_objects(ranks: RankPool, tmp_path: Path) -> None:
    saved = repr({"a": 5, "b": 6})
    assert ranks.run(2, load_on_one_rank, str(tmp_path)) == [("None", saved), (saved, "{}")]


def test_lacking_values_fit_the_budget_together_and_beside_the_needed_ones(tmp_path: Path) -> None:
    """Each of them fits, but not all of them."""
    text = "x" * 3000
    reshard.save({"p": Part({"a": 1, "b": text, "c": text}), "q": 0}, tmp_path / "c")
    part = Part({"a": 0})
    report = reshard.load({"p": part, "q": 0}, tmp_path / "c", budget_bytes=5000)
    assert report.unexpected_keys == ("p.v.c",)
    assert part.loaded == {"a": 1, "b": text}
    reshard.save({"p": Part({"a": text, "b": text})}, tmp_path / "d")
    part = Part({"a": ""})
    assert reshard.load({"p": part}, tmp_path / "d", budget_bytes=5000).unexpected_keys == ("p.v.b",)
    assert part.loaded == {"a": text}
