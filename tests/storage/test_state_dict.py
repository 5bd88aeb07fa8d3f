from typing import Any

import pytest
import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from reshard.storage.errors import CorruptCheckpointError, DestinationError
from reshard.storage.state_dict import flatten, nest


def test_names_are_those_of_dcp() -> None:
    t = torch.zeros(1)
    state: dict[str, Any] = {
        "model": {"w": t, "sub.b": t, "n": {"x": t}},
        "list": [t, [t, {"k": 1}], 3],
        "plain": [1, 2, [3]],
        "tuple": (t, 1),
        "deep": [[[t]]],
        "step": 3,
        "none": None,
        "empty": {},
        "optim": {"state": {0: {"exp": t}, 1: {"exp": t}}, "groups": [{"params": [0, 1], "lr": 0.1}]},
    }
    expected, _ = flatten_state_dict(state)
    leaves = flatten(state)
    assert list(leaves) == list(expected)
    assert all(leaves[name].value is expected[name] for name in leaves)


def test_a_leaf_is_replaced_where_it_stands() -> None:
    state: dict[str, Any] = {"a": {3: [{"x": 1}]}}
    flatten(state)["a.3.0.x"].replace(7)
    assert state == {"a": {3: [{"x": 7}]}}


def test_two_values_of_one_name_are_refused() -> None:
    with pytest.raises(DestinationError, match=r"'a\.b'"):
        flatten({"a.b": 1, "a": {"b": 2}})


def test_values_stand_again_where_they_stood() -> None:
    state: dict[str, Any] = {
        "model": {"a.b": torch.ones(2), "layers": [{"w": torch.zeros(1)}, {"w": torch.ones(1)}]},
        "optimizer": {"groups": [{"lr": 0.1, "params": [1, 2]}], "state": {0: {"step": 3}}},
        "empty list": [],
        "pair": (1, 2),
    }
    leaves = flatten(state)
    back = nest({name: leaf.value for name, leaf in leaves.items()}, {name: leaf.path for name, leaf in leaves.items()})
    state["optimizer"]["state"] = {"0": {"step": 3}}
    assert str(back) == str(state)


def test_a_part_of_a_list_is_by_position() -> None:
    assert nest({"a": 1, "b": 2}, {"a": ("l", 0), "b": ("l", 2)}) == {"l": {0: 1, 2: 2}}
    assert nest({"a.b": 1}, {}) == {"a.b": 1}


@pytest.mark.parametrize(
    "paths",
    [
        {"a": ("x",), "b": ("x", "y")},
        {"a": ("x", "y"), "b": ("x",)},
        {"a": ("x",), "b": ("x",)},
        {"a": ("x",) * 10_000, "b": ("y",)},
    ],
)
def test_paths_that_cannot_be_are_refused(paths: dict[str, Any]) -> None:
    with pytest.raises(CorruptCheckpointError, match="cannot stand at"):
        nest({"a": {"y": 1}, "b": 2}, paths)
