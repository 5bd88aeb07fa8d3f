"""Items that the states of Stateful values lack: a new object may have fewer than the one that was saved."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...planner.entries import Kind
from ..tensors.state_dict import Key, Leaf, Path, containers_of, name_of, renamed_path
from ..tensors.tensor_classes import is_whole
from ..tensors.wrapper_tensors import CLASS
from .load_options import LoadOptions
from .name_matching import NameMatch


@dataclass(frozen=True, slots=True)
class _LackingItem:
    """A place in a state, and the names of the checkpoint that belong to it."""

    leaf: Leaf
    names: list[str]
    is_appended: bool = False
    """Whether it is a new item of a list. Otherwise it is a new key of a dict, or an empty dict."""


class _Container:
    """A dict or list in a state.

    Args:
        value: the dict or list.
    """

    def __init__(self, value: Any) -> None:
        self.value = value
        self.is_list = isinstance(value, list)
        self._has_names = isinstance(value, Mapping) and any(isinstance(key, str) for key in value)
        if self.is_list:
            self._is_open = all(map(_is_plain, value))
        else:  # tensors may be those of a model
            self._is_open = isinstance(value, dict) and not any(isinstance(v, torch.Tensor) for v in value.values())

    def accepts(self, part: str | int | Key, *, is_tensor: bool) -> bool:
        """Return whether it may receive an item that contains an entry of the checkpoint.

        Args:
            part: the last part of the path to the item.
            is_tensor: whether the entry is a tensor.
        """
        if not self._is_open:
            return False
        if self.is_list:
            return isinstance(part, int) and part >= len(self.value)
        is_key = isinstance(part, Key) or (isinstance(part, str) and self._has_names)  # DCP turns numbers into strings
        return is_key and not is_tensor and _key_of(part) not in self.value


class LackingItems:
    """What dicts and lists in the states of Stateful values can receive from a checkpoint in addition.

    - An empty dict can receive everything below its name, except in the state of an optimizer.
    - A dict without tensors, inside a state, can receive values.
    - A list, inside a state, can receive further items.

    The keys of the state itself are fixed by its class, and dicts of tensors may be those of a model: what they lack
    stays in `unexpected_keys`. So does what cannot be read, or would exceed the budget for values.

    Args:
        match: where the names of the state dict are in the checkpoint.
        states: the state dict, with the states of Stateful values.
        stateful: the names of the Stateful values.
        options: which values the load may read.
    """

    def __init__(
        self, match: NameMatch, states: Mapping[str, Any], stateful: Collection[str], options: LoadOptions
    ) -> None:
        self._match = match
        self._options = options
        self._stateful = stateful
        self._in_stateful = tuple(f"{name}." for name in stateful)
        outer = (name.partition(".param_groups.") for name in match.leaves)
        self._in_optimizers = tuple({f"{begin}." for begin, found, _ in outer if found})
        self._items = list(self._in_empty_dicts()) if stateful else []
        self._items += self._in_other_containers(states)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the checkpoint that are lacking."""
        return tuple(name for item in self._items for name in item.names)

    def add(self, names: Collection[str]) -> None:
        """Let the states receive some of the names that they lack: those that no other rank has."""
        lengths: dict[int, int] = {}
        added: list[tuple[Leaf, list[str]]] = []
        budget_bytes = self._options.budget_bytes
        needed = [*self._match.present, *(name for _, items in self._match.containers for name in items)]
        left = None if budget_bytes is None else budget_bytes - self._value_bytes(needed)
        for item in self._items:
            found = [name for name in item.names if name in names]
            container = item.leaf.container
            length = lengths.get(id(container), len(container)) if item.is_appended else 0
            nbytes = 0 if left is None else self._value_bytes(found)
            is_part = not item.leaf.is_empty_dict and len(found) < len(item.names)  # another rank has the rest
            is_after_gap = item.is_appended and item.leaf.key != length  # an item before it is left out
            if not found or is_part or is_after_gap or (left is not None and nbytes > left):
                continue
            left = None if left is None else left - nbytes
            if item.is_appended:
                lengths[id(container)] = length + 1
            added.append((item.leaf, found))
        if added:
            self._match.add_containers(added)

    def _value_bytes(self, names: Iterable[str]) -> int:
        """Return the bytes of the entries that are not tensors."""
        entries = map(self._match.entry, names)
        return sum(entry.numel for entry in entries if not entry.is_tensor)

    def _in_empty_dicts(self) -> Iterator[_LackingItem]:
        for name, leaf in self._match.wanted.items():
            is_state = name in self._stateful and type(leaf.value) is dict  # that of a module is an OrderedDict
            is_inside = name.startswith(self._in_stateful) and not name.startswith(self._in_optimizers)
            if leaf.is_empty_dict and (is_state or is_inside) and (names := self._match.names_below(name)):
                yield _LackingItem(leaf, names)

    def _in_other_containers(self, states: Mapping[str, Any]) -> list[_LackingItem]:
        in_empty_dicts = set(self.names)
        lacking = [
            name
            for name in self._match.unexpected_keys
            if name.startswith(self._in_stateful)
            and not name.startswith(self._in_optimizers)
            and name not in in_empty_dicts
            and name in self._match.stored_names  # not inside a value that was decoded
        ]
        found = containers_of(states) if lacking else {}
        own_names = set(map(name_of, found))
        containers: dict[Path, _Container] = {}
        items: dict[Path, _LackingItem] = {}
        refused: set[Path] = set()
        for name in lacking:
            path = renamed_path(self._match.source.paths.get(self._match.stored_names[name], ()), name) or ()
            depth = next((n for n in range(len(path) - 1, 0, -1) if path[:n] in found), 0)
            if not depth or name_of(path[:depth]) in self._stateful:
                continue
            place, part = path[: depth + 1], path[depth]
            if not self._can_be_read(name):
                refused.add(place)
                continue
            if path[:depth] not in containers:
                containers[path[:depth]] = _Container(found[path[:depth]])
            container = containers[path[:depth]]
            accepts = container.accepts(part, is_tensor=self._match.entry(name).is_tensor)
            if not accepts or name_of(place) in own_names or CLASS in path:
                refused.add(place)  # rather than receive only a part of an item
                continue
            leaf = Leaf(place, container.value, _key_of(part), None)
            items.setdefault(place, _LackingItem(leaf, [], container.is_list)).names.append(name)
        kept = [item for place, item in items.items() if place not in refused]
        return sorted(kept, key=lambda item: item.leaf.key if item.is_appended else -1)

    def _can_be_read(self, name: str) -> bool:
        """Return whether a load can read an entry that it does not need."""
        stored = self._match.stored_names[name]
        if stored in self._match.source.unreadable:
            return False
        return self._match.source.entry(stored).kind is not Kind.TORCH_SAVE or self._options.allow_pickle


def _key_of(part: str | int | Key) -> Any:
    return part.value if isinstance(part, Key) else part


def _is_plain(value: Any) -> bool:
    """Return whether a value is no tensor, or a whole one on the CPU."""
    return not isinstance(value, torch.Tensor) or (is_whole(value) and value.device.type == "cpu")
