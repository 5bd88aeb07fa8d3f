"""State dicts as flat names: the same names that torch.distributed.checkpoint gives.

A name joins the keys and list positions that lead to a value by dots. Mappings are walked; lists only where they hold
tensors or mappings, otherwise they are values; tuples are values.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.stateful import Stateful

from .errors import ArgumentError, DestinationError, UnsupportedValueError


@dataclass(frozen=True, slots=True)
class Leaf:
    """A value of a state dict, and where it stands."""

    name: str
    container: Any
    """The dict or list that holds it."""
    key: Any
    value: Any

    def replace(self, value: Any) -> None:
        """Put another value in its place."""
        self.container[self.key] = value


def flatten(state_dict: Mapping[str, Any]) -> dict[str, Leaf]:
    """The leaves of a state dict by name. Raises DestinationError where two have the same name."""
    leaves: dict[str, Leaf] = {}
    for key, value in state_dict.items():
        _walk(str(key), state_dict, key, value, leaves)
    return leaves


def _walk(name: str, container: Any, key: Any, value: Any, leaves: dict[str, Leaf]) -> None:
    if isinstance(value, Mapping):
        for inner, item in value.items():
            _walk(f"{name}.{inner}", value, inner, item, leaves)
    elif isinstance(value, list) and _is_walked(value):
        for inner, item in enumerate(value):
            _walk(f"{name}.{inner}", value, inner, item, leaves)
    elif name in leaves:
        raise DestinationError(f"two values of the state dict have the name {name!r}")
    else:
        leaves[name] = Leaf(name, container, key, value)


def _is_walked(values: list[Any]) -> bool:
    return any(
        isinstance(value, (torch.Tensor, Mapping)) or (isinstance(value, list) and _is_walked(value))
        for value in values
    )


def stateful_to_state(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A shallow copy, in which every Stateful value is replaced by its state dict. Raises ArgumentError."""
    if not isinstance(state_dict, Mapping):
        raise ArgumentError(f"expected a state dict, a mapping of names to values, got {type(state_dict).__name__}")
    return {key: value.state_dict() if isinstance(value, Stateful) else value for key, value in state_dict.items()}


def state_to_stateful(state_dict: MutableMapping[str, Any], states: Mapping[str, Any]) -> None:
    """Give every Stateful value its loaded state, and put the other values in their places."""
    for key, state in states.items():
        if isinstance(state_dict[key], Stateful):
            state_dict[key].load_state_dict(state)
        elif state_dict[key] is not state:
            state_dict[key] = state


def check_storable(states: Mapping[str, Any]) -> None:
    """Raises DestinationError for two values of one name, UnsupportedValueError for a tensor without dense memory."""
    for name, leaf in flatten(states).items():
        tensor = leaf.value
        if isinstance(tensor, torch.Tensor) and (tensor.layout is not torch.strided or tensor.device.type == "meta"):
            raise UnsupportedValueError(
                f"{name!r} cannot be stored: it is on device {tensor.device}, of layout {tensor.layout}; only dense "
                "tensors with memory are"
            )
