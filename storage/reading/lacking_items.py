"""Items that the states of Stateful values lack: a new object may have fewer than the one that was saved."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
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


class LackingItems:
    """What dicts and lists in the states of Stateful values can receive from a checkpoint in addition.

    - An empty dict can receive everything below its name, except in the state of an optimizer.
    - A dict without tensors, inside a state, can receive values.
    - A list, inside a state, can receive further items.

    The keys of the state itself are fixed by its class, and dicts of tensors may be those of a model: what they lack
    stays in `unexpected_keys`. So does what cannot be read.

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
        for item in self._items:
            found = [name for name in item.names if name in names]
            container = item.leaf.container
            if item.is_appended and found:
                length = lengths.get(id(container), len(container))
                if item.leaf.key != length:  # an item before it is left out
                    continue
                lengths[id(container)] = length + 1
            if found:
                added.append((item.leaf, found))
        if added:
            self._match.add_containers(added)

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
            and self._can_be_read(name)
        ]
        containers = containers_of(states) if lacking else {}
        own_names = set(map(name_of, containers))
        found: dict[Path, _LackingItem] = {}
        refused: set[Path] = set()
        for name in lacking:
            path = renamed_path(self._match.source.paths.get(self._match.stored_names[name], ()), name) or ()
            depth = next((n for n in range(len(path) - 1, 0, -1) if path[:n] in containers), 0)
            if not depth or name_of(path[:depth]) in self._stateful:
                continue
            place, part = path[: depth + 1], path[depth]
            container = containers[path[:depth]]
            if CLASS in path or name_of(place) in own_names or not self._may_receive(container, part, name):
                refused.add(place)
                continue
            key = part.value if isinstance(part, Key) else part
            item = _LackingItem(Leaf(place, container, key, None), [], isinstance(container, list))
            found.setdefault(place, item).names.append(name)
        items = [item for place, item in found.items() if place not in refused]
        return sorted(items, key=lambda item: item.leaf.key if item.is_appended else -1)

    def _may_receive(self, container: Any, part: str | int | Key, name: str) -> bool:
        """Return whether a dict or list can receive an item that contains an entry of the checkpoint."""
        if isinstance(container, list):
            is_new = isinstance(part, int) and part >= len(container)
            return is_new and all(_is_plain(item) for item in container)
        if not isinstance(container, dict) or isinstance(part, int) or self._match.entry(name).is_tensor:
            return False
        is_new = (part.value if isinstance(part, Key) else part) not in container
        # DCP stores all keys as strings.
        are_of_its_kind = isinstance(part, Key) or any(isinstance(key, str) for key in container)
        return is_new and are_of_its_kind and not any(isinstance(item, torch.Tensor) for item in container.values())

    def _can_be_read(self, name: str) -> bool:
        """Return whether a load can read an entry that it does not need."""
        stored = self._match.stored_names.get(name)
        if stored is None or stored in self._match.source.unreadable:  # or inside a value that was decoded
            return False
        entry = self._match.source.entry(stored)
        if entry.is_tensor:
            return True
        budget_bytes = self._options.budget_bytes
        fits = budget_bytes is None or entry.numel <= budget_bytes
        return fits and (entry.kind is not Kind.TORCH_SAVE or self._options.allow_pickle)


def _is_plain(value: Any) -> bool:
    """Return whether a value is no tensor, or a whole one on the CPU."""
    return not isinstance(value, torch.Tensor) or (is_whole(value) and value.device.type == "cpu")
