"""State dicts as flat names: the same names that torch.distributed.checkpoint gives.

A name joins the keys and list positions that lead to a value by dots. Mappings are walked; lists only where they hold
tensors or mappings, otherwise they are values; tuples are values.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from .errors import ArgumentError, CorruptCheckpointError, DestinationError, UnsupportedValueError

Path = tuple[str | int, ...]
"""The keys and list positions that lead to a value."""
MOST_LEVELS = 100
"""Of what is nested again."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """A value of a state dict, and where it stands."""

    path: Path
    container: Any
    """The dict or list that holds it."""
    key: Any
    value: Any

    @property
    def name(self) -> str:
        return ".".join(map(str, self.path))

    def replace(self, value: Any) -> None:
        """Put another value in its place."""
        self.container[self.key] = value


def flatten(state_dict: Mapping[str, Any]) -> dict[str, Leaf]:
    """The leaves of a state dict by name. Raises DestinationError where two have the same name."""
    leaves: dict[str, Leaf] = {}
    for key, value in state_dict.items():
        _walk((str(key),), state_dict, key, value, leaves)
    return leaves


def _walk(path: Path, container: Any, key: Any, value: Any, leaves: dict[str, Leaf]) -> None:
    if isinstance(value, Mapping):
        for inner, item in value.items():
            _walk((*path, str(inner)), value, inner, item, leaves)
    elif isinstance(value, list) and _is_walked(value):
        for inner, item in enumerate(value):
            _walk((*path, inner), value, inner, item, leaves)
    else:
        leaf = Leaf(path, container, key, value)
        if leaf.name in leaves:
            raise DestinationError(f"two values of the state dict have the name {leaf.name!r}")
        leaves[leaf.name] = leaf


class _Nested(dict[str | int, Any]):
    """What `nest` makes, to be told from a value that is a dict."""


def nest(values: Mapping[str, Any], paths: Mapping[str, Path]) -> dict[str, Any]:
    """Values by name as the dicts and lists that they stood in; by their name, where that is not known.

    A list of which not all is here is a dict by position. Raises CorruptCheckpointError where paths contradict each
    other.
    """
    root = _Nested()
    for name, value in values.items():
        path = paths.get(name) or (name,)
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, _Nested())
            if not isinstance(node, _Nested):
                break
        if not isinstance(node, _Nested) or path[-1] in node or len(path) > MOST_LEVELS:
            raise CorruptCheckpointError(f"{name!r} cannot stand at {path} of a state dict, where others stand")
        node[path[-1]] = value
    return {str(key): _with_lists(value) for key, value in root.items()}


def _with_lists(value: Any) -> Any:
    if not isinstance(value, _Nested):
        return value
    whole = all(type(key) is int for key in value) and set(value) == set(range(len(value)))
    return (
        [_with_lists(value[at]) for at in range(len(value))] if whole else {k: _with_lists(v) for k, v in value.items()}
    )


def _is_walked(values: list[Any]) -> bool:
    return any(
        isinstance(value, (torch.Tensor, Mapping)) or (isinstance(value, list) and _is_walked(value))
        for value in values
    )


@runtime_checkable
class Stateful(Protocol):
    """As torch.distributed.checkpoint's, which takes long to import."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def stateful_to_state(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A shallow copy, in which every Stateful value is replaced by its state dict. Raises ArgumentError."""
    if not isinstance(state_dict, Mapping):
        raise ArgumentError(f"expected a state dict, a mapping of names to values, got {type(state_dict).__name__}")
    return {key: value.state_dict() if _is_stateful(value) else value for key, value in state_dict.items()}


def _is_stateful(value: Any) -> bool:
    """A tensor is not: to ask for the methods of a protocol takes longer than to plan its read."""
    return not isinstance(value, torch.Tensor) and isinstance(value, Stateful)


def state_to_stateful(state_dict: MutableMapping[str, Any], states: Mapping[str, Any]) -> None:
    """Give every Stateful value its loaded state, and put the other values in their places."""
    for key, state in states.items():
        if _is_stateful(state_dict[key]):
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
