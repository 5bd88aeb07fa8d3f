"""State dicts as flat names: the same names that torch.distributed.checkpoint gives.

A name joins the keys and list positions that lead to a value by dots. Mappings are walked, unless they are empty; lists
only where they hold tensors or mappings. Everything else is a value, tuples too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from ..errors import ArgumentError, CorruptCheckpointError, DestinationError, UnsupportedValueError
from ..runtime.brief import brief, reason
from .plain_json import NotPlainError, checked_keys, from_plain, to_plain

MAX_NESTING = 100
"""How deeply dicts and lists may be nested."""

CHARS_OF_LEAF = 2048
"""What a value takes in memory, beside its name."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key of a dict that is not a string. Keys are equal if they are stored alike: 1, 1.0 and True are not."""

    value: Any = field(compare=False)
    text: str = field(init=False, repr=False)
    """The key as it is stored."""

    def __post_init__(self) -> None:
        """Raises NotPlainError, and TypeError for what cannot be a key."""
        hash(self.value)
        object.__setattr__(self, "text", json.dumps(to_plain(self.value)))

    def __str__(self) -> str:
        return str(self.value)


Path = tuple[str | int | Key, ...]
"""The way to a value of a state dict: keys of dicts, and integers for positions in lists."""


def path_to_json(path: Path) -> list[Any]:
    """Turn a path into a value of JSON. A key that is not a string is `{"key": …}`, in the words of `plain_json`."""
    return [{"key": json.loads(part.text)} if isinstance(part, Key) else part for part in path]


def path_from_json(parts: Any) -> Path:
    """Turn what `path_to_json` returned back into a path. Raises ValueError, TypeError, LookupError."""
    if not isinstance(parts, list) or not 0 < len(parts) <= MAX_NESTING:
        raise ValueError(f"{brief(parts)} is no path")
    return tuple(map(_part_from_json, parts))


def _part_from_json(part: Any) -> str | int | Key:
    if type(part) is str or (type(part) is int and 0 <= part < 2**63):
        return part
    if not isinstance(part, dict) or part.keys() != {"key"}:
        raise ValueError(f"{brief(part)} is no part of a path")
    try:
        key = from_plain(part["key"])
        if not isinstance(key, str) and key == key:
            return Key(key)
    except Exception as error:  # whatever a value that no save has written makes of a constructor
        raise ValueError(f"{brief(part)} is no part of a path: {reason(error)}") from error
    raise ValueError(f"{brief(part)} is no part of a path")


def path_for_dcp(path: Path) -> tuple[str | int, ...]:
    """A path as torch.distributed.checkpoint has it: all keys are strings."""
    return tuple(str(part) if isinstance(part, Key) else part for part in path)


@dataclass(frozen=True, slots=True)
class Leaf:
    """A value of a state dict, and where it is."""

    path: Path
    container: Any
    """The dict or list that holds it."""
    key: Any
    value: Any

    @property
    def name(self) -> str:
        return name_of(self.path)

    @property
    def is_empty_dict(self) -> bool:
        return isinstance(self.value, Mapping)

    def replace(self, value: Any) -> None:
        """Put another value in its place."""
        self.container[self.key] = value


def name_of(path: Path) -> str:
    """The name of a value: the parts of its path, joined by dots."""
    return ".".join(map(str, path))


def renamed_path(path: Path, name: str) -> Path | None:
    """The path of a value under a new name: its longest end that the name ends with, below what the name has before.

    None where the name ends otherwise.
    """
    for begin in range(len(path)):
        end = name_of(path[begin:])
        if name == end:
            return path[begin:]
        if name.endswith(f".{end}"):
            return (*name[: -len(end) - 1].split("."), *path[begin:])
    return None


def flatten(state_dict: Mapping[Any, Any], room: list[float] | None = None) -> dict[str, Leaf]:
    """List the values of a state dict by name. A dict without items is a value too.

    Args:
        room: a list of one number, the characters that further names may have together. Each name takes CHARS_OF_LEAF
            more than it has.

    Raises:
        DestinationError: two values have the same name.
        UnsupportedValueError: a key is not plain data, dicts and lists are nested too deeply, or names too long.
    """
    leaves: dict[str, Leaf] = {}
    room = [math.inf] if room is None else room
    for key, value in state_dict.items():
        try:
            _walk((_part((), key),), state_dict, key, value, leaves, room)
        except RecursionError as error:
            raise UnsupportedValueError(f"{str(key)!r} holds itself, or is nested too deeply") from error
    return leaves


def _part(path: Path, key: Any) -> str | Key:
    """Return the part of a path for a key of a dict. Raises UnsupportedValueError."""
    if isinstance(key, str):
        return str.__str__(key)
    try:
        if key == key:
            return Key(key)
    except NotPlainError:
        pass
    where = f"in {name_of(path)!r}" if path else "of the state dict"
    raise UnsupportedValueError(
        f"the key {key!r} {where} is of {type(key)}: keys may be strings, numbers, None, dtypes, and tuples of them"
    )


def _walk(path: Path, container: Any, key: Any, value: Any, leaves: dict[str, Leaf], room: list[float]) -> None:
    """Add the values from a path on. `room` has the number of characters that further names may have."""
    if len(path) > MAX_NESTING:
        raise UnsupportedValueError(f"more than {MAX_NESTING} dicts and lists are nested at {name_of(path[:3])!r}")
    if isinstance(value, Mapping) and value:
        for inner, item in type(value).items(value):
            _walk((*path, _part(path, inner)), value, inner, item, leaves, room)
    elif isinstance(value, list) and _is_walked(value):
        for position, item in enumerate(value):
            _walk((*path, position), value, position, item, leaves, room)
    else:
        leaf = Leaf(path, container, key, value)
        if room[0] < math.inf:
            room[0] -= CHARS_OF_LEAF + sum(len(str(part)) + 1 for part in path)
        if room[0] < 0:
            raise UnsupportedValueError("the names of its values take many times more than it does")
        if leaf.name in leaves:
            raise DestinationError(
                f"two values of the state dict have the name {leaf.name!r}, at {leaves[leaf.name].path} and {path}"
            )
        leaves[leaf.name] = leaf


class _Nested(dict[str | int | Key, Any]):
    """What `nest` makes, to be told from a value that is a dict."""


def nest(values: Mapping[str, Any], paths: Mapping[str, Path]) -> dict[Any, Any]:
    """Put values by name into the dicts and lists that they were in; those without a path under their name.

    If only some items of a list are given, it becomes a dict by position.

    Raises:
        CorruptCheckpointError: the paths contradict each other.
    """
    root = _Nested()
    for name, value in values.items():
        path = paths.get(name) or (name,)
        node = root
        for part in path[:-1]:
            node = node.setdefault(part, _Nested())
            if not isinstance(node, _Nested):
                break
        if not isinstance(node, _Nested) or path[-1] in node or len(path) > MAX_NESTING:
            raise CorruptCheckpointError(f"{name!r} cannot stand at {path} of a state dict, where others stand")
        node[path[-1]] = value
    return _as_dict({str(part) if type(part) is int else part: value for part, value in root.items()})


def _key_of_part(part: str | int | Key) -> Any:
    return part.value if isinstance(part, Key) else part


def _with_lists(value: Any) -> Any:
    if not isinstance(value, _Nested):
        return value
    whole = all(type(part) is int for part in value) and set(value) == set(range(len(value)))
    if whole:
        return [_with_lists(value[position]) for position in range(len(value))]
    return _as_dict(value)


def _as_dict(node: Mapping[str | int | Key, Any]) -> dict[Any, Any]:
    try:
        keys = checked_keys(map(_key_of_part, node))
    except ValueError as error:
        raise CorruptCheckpointError(f"the keys of a dict collide: {error}") from error
    made = {key: _with_lists(item) for key, item in zip(keys, node.values(), strict=True)}
    if len(made) != len(node):
        raise CorruptCheckpointError(f"two keys of one dict are equal, of {', '.join(map(str, node))}")
    return made


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
