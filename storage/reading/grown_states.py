"""What the states of Stateful values lack: a new object may have fewer items than the one that was saved."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ..tensors.state_dict import Key, Leaf, containers_of, name_of, renamed_path
from .name_matching import NameMatch

_EXTRA_STATE = "._extra_state."
"""In the names of what `get_extra_state` of a module returned, if that is a dict or a list."""


class GrownStates:
    """The items of a checkpoint that dicts and lists in the states of Stateful values lack.

    An empty dict may receive all names of the checkpoint below its own. Other dicts may receive new keys, and lists new
    items at their end, if the object owns its state (see `owns_its_state`), or in the extra state of a module. The
    states of optimizers receive nothing: their tensors may be sharded.

    Args:
        match: where the names of the state dict are in the checkpoint.
        states: the state dict, with the states of Stateful values.
        stateful: the names of the Stateful values, and whether they own their states.
    """

    def __init__(self, match: NameMatch, states: Mapping[str, Any], stateful: Mapping[str, bool]) -> None:
        self._match = match
        self._stateful = stateful
        self._in_stateful = tuple(f"{name}." for name in stateful)
        self._in_owned = tuple(f"{name}." for name, is_owned in stateful.items() if is_owned)
        outer = (name.partition(".param_groups.") for name in match.leaves)
        self._optimizers = tuple({f"{begin}." for begin, found, _ in outer if found})
        """The beginnings of the names in the states of optimizers."""
        self._lacking = list(self._in_empty_dicts()) if stateful else []
        """The leaves that are lacking or empty, each with the names of the checkpoint that belong to it."""
        self._lacking += self._in_other_containers(states)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the checkpoint that are lacking."""
        return tuple(name for _, names in self._lacking for name in names)

    def add(self, names: Collection[str]) -> None:
        """Let the states receive some of the names that they lack: those that no other rank has."""
        lengths: dict[int, int] = {}
        added: list[tuple[Leaf, list[str]]] = []
        for leaf, lacking in self._lacking:
            items = [name for name in lacking if name in names]
            if isinstance(leaf.container, list) and not leaf.is_empty_dict:
                length = lengths.get(id(leaf.container), len(leaf.container))
                if not items or leaf.key != length:
                    continue
                lengths[id(leaf.container)] = length + 1
            if items:
                added.append((leaf, items))
        self._match.add_containers(added)

    def _in_empty_dicts(self) -> Iterator[tuple[Leaf, list[str]]]:
        for name, leaf in self._match.wanted.items():
            is_state = name in self._stateful and type(leaf.value) is dict  # that of a module is an OrderedDict
            is_inside = name.startswith(self._in_stateful) and not name.startswith(self._optimizers)
            if leaf.is_empty_dict and (is_state or is_inside) and (items := self._match.names_below(name)):
                yield leaf, items

    def _in_other_containers(self, states: Mapping[str, Any]) -> list[tuple[Leaf, list[str]]]:
        in_empty_dicts = set(self.names)
        unexpected = [name for name in self._match.unexpected_keys if name in self._match.stored_names]
        lacking = [name for name in unexpected if self._may_grow(name) and name not in in_empty_dicts]
        containers = containers_of(states) if lacking else {}
        found: dict[str, tuple[Leaf, list[str]]] = {}
        for name in lacking:
            path = renamed_path(self._match.source.paths.get(self._match.stored_names[name], ()), name) or ()
            outer = next((n for n in range(len(path) - 1, 0, -1) if name_of(path[:n]) in containers), 0)
            if not outer or not self._may_grow(f"{name_of(path[:outer])}."):
                continue
            own_path, container = containers[name_of(path[:outer])]
            part = path[outer]
            key: Any = part.value if isinstance(part, Key) else part
            if isinstance(container, list):
                is_new = isinstance(part, int) and part >= len(container)
            else:
                is_new = not isinstance(part, int) and key not in container
            if is_new:
                leaf = Leaf((*own_path, part), container, key, None)
                found.setdefault(leaf.name, (leaf, []))[1].append(name)
        return sorted(found.values(), key=lambda one: one[0].key if isinstance(one[0].container, list) else -1)

    def _may_grow(self, name: str) -> bool:
        """Return whether a name is in a state that may receive new items."""
        if name.startswith(self._optimizers):
            return False
        return name.startswith(self._in_owned) or (name.startswith(self._in_stateful) and _EXTRA_STATE in name)
