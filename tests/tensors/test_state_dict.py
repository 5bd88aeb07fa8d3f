import json
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from reshard.storage.errors import CorruptCheckpointError, DestinationError, UnsupportedValueError
from reshard.storage.tensors.state_dict import (
    Key,
    flatten,
    nest,
    path_from_json,
    path_to_json,
    renamed_path,
    separate_scalars,
)


def test_names_match_those_of_dcp() -> None:
    t = torch.zeros(1)
    state: dict[str, Any] = {
        "model": {"w": t, "sub.b": t, "n": {"x": t}},
        "list": [t, [t, {"k": 1}], 3],
        "plain": [1, 2, [3]],
        "tuple": (t, 1),
        "deep": [[[t]]],
        "step": 3,
        "none": None,
        "optim": {"state": {0: {"exp": t}, 1: {"exp": t}}, "groups": [{"params": [0, 1], "lr": 0.1}]},
    }
    expected, _ = flatten_state_dict(state)
    leaves = flatten(state)
    assert list(leaves) == list(expected)
    assert all(leaves[name].value is expected[name] for name in leaves)


@pytest.mark.parametrize(
    "state",
    [
        {"a": [{}, torch.ones(1)]},
        {"a": {}},
        {"a": {"b": {}, "c": [[], {}, [{}]]}},
        {"state": {}, "param_groups": [{"params": []}]},
        {1: torch.ones(1), (0, 1): torch.ones(1), None: 2, False: 3, 1.5: 4, b"k": 5, "1.0": 6},
        {"sched": {"milestones": [{3: 1, 5: 1}], "nested": {0: {"x": {7: torch.zeros(1)}}}}},
        {"list": [{0: torch.ones(1), 1: {}}]},
        {(1, (None, "x")): {(): 1}},
        {torch.float32: 1, torch.device("cpu"): {torch.Size((1, 2)): torch.ones(1)}},
    ],
)
def test_keys_keep_their_types_and_empty_dicts_are_kept(state: dict[Any, Any]) -> None:
    leaves = flatten(state)
    paths = {name: path_from_json(json.loads(json.dumps(path_to_json(leaf.path)))) for name, leaf in leaves.items()}
    again = nest({name: leaf.value for name, leaf in leaves.items()}, paths)
    assert str(again) == str(state)
    assert [*map(type, again)] == [*map(type, state)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.7.w", ("model", "layers", 0, Key(7), "w")),
        ("layers.0.7.w", ("layers", 0, Key(7), "w")),
        ("net.body.layers.0.7.w", ("net", "body", "layers", 0, Key(7), "w")),
        ("net.7.w", ("net", Key(7), "w")),
        ("w", ("w",)),
        ("other", None),
        ("xlayers.0.7.w", ("xlayers", 0, Key(7), "w")),
    ],
)
def test_renamed_path_keeps_the_matching_end_of_the_path(name: str, expected: Any) -> None:
    assert renamed_path(("model", "layers", 0, Key(7), "w"), name) == expected


@pytest.mark.parametrize("key", [object(), frozenset({object()}), (object(),), float("nan"), Exception])
def test_error_names_the_key_that_is_not_plain_data(key: Any) -> None:
    with pytest.raises(UnsupportedValueError, match=r"the key .* in 'a\.b' is of"):
        flatten({"a": {"b": {key: 1}}})


@pytest.mark.parametrize("state", [{1: 0, "1": 0}, {"a": {None: 1, "None": 2}}, {"a": [{}], "a.0": 1}])
def test_keys_of_different_types_with_the_same_name_raise(state: dict[Any, Any]) -> None:
    with pytest.raises(DestinationError, match="two values of the state dict have the name"):
        flatten(state)


@pytest.mark.parametrize(
    "path", [[], [None], [{"key": [1]}], [{"key": {"$no": 1}}], [{}], [1.5], [{"key": {"$set": []}}]]
)
def test_malformed_json_path_raises(path: Any) -> None:
    with pytest.raises((ValueError, TypeError, LookupError)):
        path_from_json(path)


def test_leaf_is_replaced_in_its_container() -> None:
    state: dict[str, Any] = {"a": {3: [{"x": 1}]}}
    flatten(state)["a.3.0.x"].replace(7)
    assert state == {"a": {3: [{"x": 7}]}}


def test_two_values_with_the_same_name_raise() -> None:
    with pytest.raises(DestinationError, match=r"'a\.b'"):
        flatten({"a.b": 1, "a": {"b": 2}})


def test_nest_restores_the_containers_of_values() -> None:
    state: dict[str, Any] = {
        "model": {"a.b": torch.ones(2), "layers": [{"w": torch.zeros(1)}, {"w": torch.ones(1)}]},
        "optimizer": {"groups": [{"lr": 0.1, "params": [1, 2]}], "state": {0: {"step": 3}}},
        "empty list": [],
        "pair": (1, 2),
    }
    leaves = flatten(state)
    back = nest({name: leaf.value for name, leaf in leaves.items()}, {name: leaf.path for name, leaf in leaves.items()})
    assert str(back) == str(state)


def test_partial_list_becomes_a_dict_by_position() -> None:
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
def test_contradictory_paths_raise_corrupt_error(paths: dict[str, Any]) -> None:
    with pytest.raises(CorruptCheckpointError, match="cannot be at"):
        nest({"a": {"y": 1}, "b": 2}, paths)


def test_scalars_of_other_values_keep_their_tensors() -> None:
    """A scalar that the caller also holds keeps its memory; the copy goes to the Stateful value, whatever the order."""
    lr = torch.tensor(0.1)
    for states in ({"s": {"lr": lr}, "own": lr}, {"own": lr, "s": {"lr": lr}}):
        found = separate_scalars(states, ["s"])
        assert found["own"] is lr
        assert found["s"]["lr"].data_ptr() != lr.data_ptr()
        assert found["s"]["lr"] == lr


def test_the_callers_own_scalars_may_share_memory() -> None:
    lr = torch.tensor(0.1)
    states = {"a": lr, "b": lr, "s": {"x": 1}}
    assert separate_scalars(states, ["s"]) is states
