"""Flatten state dicts to values by name, with the same names as torch.distributed.checkpoint.

A name consists of the keys and list positions that lead to a value, joined by dots. Mappings are flattened unless they
are empty. Lists are flattened if they contain tensors or mappings. Everything else is a value, including tuples.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from ..errors import ArgumentError, CorruptCheckpointError, DestinationError, UnsupportedValueError
from ..runtime.brief import brief, reason
from .plain_json import NotPlainError, checked_keys, from_plain, to_plain

MAX_NESTING = 100
"""How deeply dicts and lists may be nested."""

CHARS_PER_LEAF = 2048
"""How many characters a value counts for in addition to its name, because of the memory that it takes."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key of a dict that is not a string. Keys are equal if their stored form is: 1, 1.0 and True are different."""

    value: Any = field(compare=False)
    text: str = field(init=False, repr=False)
    """The stored form of the key, in JSON."""

    def __post_init__(self) -> None:
        """Raise NotPlainError if the value is not plain data, and TypeError if it cannot be a key."""
        hash(self.value)
        object.__setattr__(self, "text", json.dumps(to_plain(self.value)))

    def __str__(self) -> str:
        return str(self.value)


Path = tuple[str | int | Key, ...]
"""The path to a value of a state dict: keys of dicts, and integers for positions in lists."""


def path_to_json(path: Path) -> list[Any]:
    """Turn a path into a JSON value. A key that is not a string becomes `{"key": …}`, encoded by `plain_json`."""
    return [{"key": json.loads(part.text)} if isinstance(part, Key) else part for part in path]


def path_from_json(parts: Any) -> Path:
    """Turn the result of `path_to_json` back into a path. Raise ValueError, TypeError or LookupError if malformed."""
    if not isinstance(parts, list) or not 0 < len(parts) <= MAX_NESTING:
        raise ValueError(f"{brief(parts)} is not a path")
    return tuple(map(_part_from_json, parts))


def _part_from_json(part: Any) -> str | int | Key:
    if type(part) is str or (type(part) is int and 0 <= part < 2**63):
        return part
    if not isinstance(part, dict) or part.keys() != {"key"}:
        raise ValueError(f"{brief(part)} is not a part of a path")
    try:
        key = from_plain(part["key"])
        if not isinstance(key, str) and key == key:
            return Key(key)
    except Exception as error:  # constructors can raise anything for values that no save wrote
        raise ValueError(f"{brief(part)} is not a part of a path: {reason(error)}") from error
    raise ValueError(f"{brief(part)} is not a part of a path")


def path_for_dcp(path: Path) -> tuple[str | int, ...]:
    """Return a path as torch.distributed.checkpoint represents it: all keys are strings."""
    return tuple(str(part) if isinstance(part, Key) else part for part in path)


@dataclass(frozen=True, slots=True)
class Leaf:
    """A value of a state dict, and its position."""

    path: Path
    container: Any
    """The dict or list that contains the value."""
    key: Any
    """The key or position in the container."""
    value: Any
    name: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", name_of(self.path))

    @property
    def is_empty_dict(self) -> bool:
        return isinstance(self.value, Mapping)

    def replace(self, value: Any) -> None:
        """Put another value into the container instead, or at the end of a list."""
        if isinstance(self.container, list) and self.key == len(self.container):
            self.container.append(value)
        else:
            self.container[self.key] = value


def name_of(path: Path) -> str:
    """Return the name of a value: the parts of its path, joined by dots."""
    return ".".join(map(str, path))


def renamed_path(path: Path, name: str) -> Path | None:
    """Return the path of a value that gets a new name.

    The path keeps the longest end that matches the end of the new name. The rest of the name is split at its dots.

    Returns:
        The new path, or None if the new name does not end with any end of the path.
    """
    for begin in range(len(path)):
        end = name_of(path[begin:])
        if name == end:
            return path[begin:]
        if name.endswith(f".{end}"):
            return (*name[: -len(end) - 1].split("."), *path[begin:])
    return None


class NameLimit:
    """How many characters the names of a checkpoint may have together. Each takes CHARS_PER_LEAF more than its length.

    Args:
        chars: the number of characters. More can be added.
    """

    def __init__(self, chars: int) -> None:
        self._left = chars
        self._lock = threading.Lock()

    def add(self, chars: int) -> None:
        """Allow more characters."""
        with self._lock:
            self._left += chars

    def take(self, path: Path) -> bool:
        """Count the name of a path. Return whether it is within the limit."""
        self.add(-CHARS_PER_LEAF - sum(len(str(part)) + 1 for part in path))
        return self._left >= 0


def flatten(state_dict: Mapping[Any, Any], limit: NameLimit | None = None) -> dict[str, Leaf]:
    """Return the values of a state dict by name. An empty dict is a value too.

    Args:
        state_dict: the state dict.
        limit: limits the names. Default: no limit.

    Raises:
        DestinationError: two values have the same name.
        UnsupportedValueError: a key is not plain data, dicts and lists are nested too deeply, or names are too long.
    """
    leaves: dict[str, Leaf] = {}
    for key, value in state_dict.items():
        try:
            _walk((_part((), key),), state_dict, key, value, leaves, limit)
        except RecursionError as error:
            raise UnsupportedValueError(f"{str(key)!r} holds itself, or is nested too deeply") from error
    return leaves


def _part(path: Path, key: Any) -> str | Key:
    """Return the part of a path for a key of a dict. Raise UnsupportedValueError if it is not plain data."""
    if isinstance(key, str):
        return str.__str__(key)
    try:
        if key == key:
            return Key(key)
    except NotPlainError:
        pass
    where = f"in {name_of(path)!r}" if path else "of the state dict"
    raise UnsupportedValueError(
        f"the key {key!r} {where} is of {type(key)}: keys may be strings, numbers except NaN, None, dtypes, and tuples "
        "of them"
    )


def check_nesting(path: tuple[Any, ...]) -> None:
    """Raise UnsupportedValueError if a value is in too many dicts and lists."""
    if len(path) > MAX_NESTING:
        raise UnsupportedValueError(f"more than {MAX_NESTING} dicts and lists are nested at {name_of(path[:3])!r}")


def _walk(path: Path, container: Any, key: Any, value: Any, leaves: dict[str, Leaf], limit: NameLimit | None) -> None:
    """Add the values at and below a path to `leaves`. See `flatten` for `limit`."""
    check_nesting(path)
    if isinstance(value, Mapping) and value:
        for inner, item in type(value).items(value):
            _walk((*path, _part(path, inner)), value, inner, item, leaves, limit)
    elif isinstance(value, list) and _is_walked(value):
        for position, item in enumerate(value):
            _walk((*path, position), value, position, item, leaves, limit)
    else:
        leaf = Leaf(path, container, key, value)
        if limit is not None and not limit.take(path):
            raise UnsupportedValueError("the names of its values take many times more memory than the state dict")
        if leaf.name in leaves:
            raise DestinationError(
                f"two values of the state dict have the name {leaf.name!r}, at {leaves[leaf.name].path} and {path}"
            )
        leaves[leaf.name] = leaf


def containers_of(state_dict: Mapping[Any, Any]) -> dict[Path, Any]:
    """Return the dicts and lists in a state dict, by their paths. Lists that are values do not count."""
    found: dict[Path, Any] = {}

    def walk(path: Path, value: Any) -> None:
        if isinstance(value, Mapping):
            found[path] = value
            for key, item in type(value).items(value):
                walk((*path, _part(path, key)), item)
        elif isinstance(value, list) and _is_walked(value):
            found[path] = value
            for at, item in enumerate(value):
                walk((*path, at), item)

    walk((), state_dict)
    return found


class _Nested(dict[str | int | Key, Any]):
    """A dict that `nest` creates. Its class distinguishes it from a value that is a dict."""


def nest(values: Mapping[str, Any], paths: Mapping[str, Path]) -> dict[Any, Any]:
    """Put values back into the dicts and lists that they came from.

    A list with only some of its items becomes a dict by position.

    Args:
        values: the values by name.
        paths: the path of each name. A value without a path is put under its name.

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
            raise CorruptCheckpointError(
                f"{name!r} cannot be at {path} of a state dict, because other values are there"
            )
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
        raise CorruptCheckpointError(f"two keys of a dict are equal, among {', '.join(map(str, node))}")
    return made


def _is_walked(values: list[Any]) -> bool:
    return any(
        isinstance(value, (torch.Tensor, Mapping)) or (isinstance(value, list) and _is_walked(value))
        for value in values
    )


def check_mapping(state_dict: object) -> None:
    """Raise ArgumentError if a state dict is not a mapping."""
    if not isinstance(state_dict, Mapping):
        raise ArgumentError(f"expected a state dict, a mapping of names to values, got {type(state_dict).__name__}")


_PLAIN_TYPES = frozenset((int, float, bool, str, bytes, type(None)))
"""Types that are never Stateful. A list may have millions of such items."""


def has_stateful(state_dict: Mapping[str, Any]) -> bool:
    """Return whether a state dict has a Stateful value, also in nested dicts and lists."""
    return _StatefulSearch().has(state_dict)


def find_stateful(state_dict: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Return the Stateful values of a state dict, with their names."""
    return _StatefulSearch().find((), state_dict)


def stateful_to_state(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a copy in which the state dict of every Stateful value replaces it. Raise ArgumentError.

    Dicts and lists without such values are not copied. The copy of a read-only mapping is read-only.
    """
    check_mapping(state_dict)
    search = _StatefulSearch()
    return _copied(state_dict, {key: _with_states((key,), value, search) for key, value in state_dict.items()})


def _with_states(path: tuple[Any, ...], value: Any, search: _StatefulSearch) -> Any:
    if _is_stateful(value):
        return value.state_dict()
    if not search.has(value):
        return value
    check_nesting(path)
    if isinstance(value, Mapping):
        return _copied(value, {key: _with_states((*path, key), item, search) for key, item in value.items()})
    return [_with_states((*path, at), item, search) for at, item in enumerate(value)]


def _copied(mapping: Mapping[Any, Any], items: dict[Any, Any]) -> Mapping[Any, Any]:
    return items if isinstance(mapping, MutableMapping) else MappingProxyType(items)


def separate_scalars(states: Mapping[str, Any], stateful: Iterable[str]) -> Mapping[str, Any]:
    """Return states in which those of Stateful values share no scalar tensors with each other or with other values.

    A scheduler may refer to the learning rate of its optimizer, if that is a tensor, under several names. They may have
    different values in a checkpoint. Dicts and lists that change are copied.

    Args:
        states: the result of `stateful_to_state`.
        stateful: the names of the Stateful values.
    """
    begins = tuple(f"{name}." for name in stateful)
    scalars = [leaf for leaf in flatten(states).values() if type(leaf.value) is torch.Tensor and not leaf.value.dim()]
    seen: set[int] = set()
    repeated: dict[str, torch.Tensor] = {}
    for leaf in sorted(scalars, key=lambda leaf: leaf.name.startswith(begins)):  # others first: they keep their tensors
        if leaf.name.startswith(begins) and leaf.value.data_ptr() in seen:
            repeated[leaf.name] = leaf.value.detach().clone()
        seen.add(leaf.value.data_ptr())
    return _with_others(states, (), repeated) if repeated else states


def _with_others(value: Any, path: Path, others: Mapping[str, Any]) -> Any:
    """Return a value in which others replace the values of their names. Dicts and lists that change are copied."""
    if isinstance(value, Mapping):
        items = {key: _with_others(item, (*path, _part(path, key)), others) for key, item in value.items()}
    elif isinstance(value, list) and _is_walked(value):
        items = {at: _with_others(item, (*path, at), others) for at, item in enumerate(value)}
    else:
        return others.get(name_of(path), value)
    changed = {key: item for key, item in items.items() if item is not value[key]}
    if not changed:
        return value
    if not isinstance(value, (dict, list)):
        return _copied(value, items)
    copied = copy.copy(value)
    for key, item in changed.items():
        copied[key] = item
    return copied


def state_to_stateful(state_dict: MutableMapping[str, Any], states: Mapping[str, Any]) -> None:
    """Pass the loaded state to every Stateful value, and put the other values into the state dict."""
    _put_states(state_dict, states, _StatefulSearch())


def _put_states(container: Any, states: Any, search: _StatefulSearch) -> None:
    for key, state in states.items() if isinstance(states, Mapping) else enumerate(states):
        if _is_stateful(container[key]):
            container[key].load_state_dict(state)
        elif search.has(container[key]):
            _put_states(container[key], state, search)
        elif container[key] is not state:
            container[key] = state


class _StatefulSearch:
    """Finds the Stateful values of nested dicts and lists. Looks into each of them once."""

    def __init__(self) -> None:
        self._found: dict[int, bool] = {}

    def has(self, container: Any, depth: int = 0) -> bool:
        """Return whether a dict or list has a Stateful value. Other values have none."""
        if not isinstance(container, (Mapping, list)) or depth > MAX_NESTING:
            return False
        if id(container) not in self._found:
            self._found[id(container)] = False  # if it contains itself
            items = container.values() if isinstance(container, Mapping) else container
            self._found[id(container)] = any(
                _is_stateful(item) or self.has(item, depth + 1) for item in items if type(item) not in _PLAIN_TYPES
            )
        return self._found[id(container)]

    def find(self, path: tuple[Any, ...], container: Any) -> Iterator[tuple[str, Any]]:
        """Return the Stateful values in a dict or list, with their names. Raise UnsupportedValueError."""
        check_nesting(path)
        for key, value in container.items() if isinstance(container, Mapping) else enumerate(container):
            if _is_stateful(value):
                yield name_of((*path, key)), value
            elif self.has(value):
                yield from self.find((*path, key), value)


def _is_stateful(value: Any) -> bool:
    """Return whether a value has the methods of torch.distributed.checkpoint's Stateful, and is not a tensor.

    `isinstance` with the protocol takes many times longer.
    """
    if isinstance(value, (torch.Tensor, type)):
        return False
    return all(callable(getattr(value, method, None)) for method in ("state_dict", "load_state_dict"))
