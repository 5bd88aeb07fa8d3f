from typing import Any

import pytest
import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from reshard.storage.errors import DestinationError
from reshard.storage.state_dict import flatten


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
