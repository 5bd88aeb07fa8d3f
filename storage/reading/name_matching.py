"""Matching the names of a state dict with those of a checkpoint."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ...planner.entries import Entry
from ...planner.text import quoted
from ..errors import DestinationError, DtypeError
from ..formats.source import Source
from ..runtime.logs import logger_of
from ..runtime.reports import RankReport, added
from ..tensors.dtypes import torch_dtype
from ..tensors.name_patterns import (
    by_new_name,
    matches_any,
    unused_patterns,
    unused_renames,
)
from ..tensors.state_dict import Key, Leaf, Path, flatten, name_of
from ..tensors.wrapper_tensors import CLASS, check_class, has_parts, parts_of
from .load_options import LoadOptions
from .read_tensors import ReadOptions, check_is_tensor, read_boxes
from .value_buffers import ValueBuffer, check_values

logger = logger_of(__name__)


class NameMatch:
    """Where each leaf of a state dict is in a checkpoint.

    A leaf may have an entry of the same name. It may be inside a value of the checkpoint (DCP and torch.save store
    whole dicts as values). Or it may be a dict or list whose items are entries of the checkpoint.

    Args:
        states: the state dict, with the states of Stateful values.

    Raises:
        DestinationError: a leaf is a tensor here and not in the checkpoint, or the reverse.
        UnsafeValueError: a value that contains a leaf needs `allow_pickle`.
        CorruptCheckpointError, StoreError: such a value cannot be read.
    """

    def __init__(self, source: Source, states: Mapping[str, Any], options: LoadOptions) -> None:
        self.source = source
        self._options = options
        self.report = RankReport(0)
        """What was read to match names."""
        self._sections = tuple(f"{key}." for key, state in states.items() if isinstance(state, (Mapping, list)))
        """The keys of the state dict that contain other names."""
        names = [*(entry.name for entry in source.entries), *source.unreadable]
        self.stored_names = by_new_name(names, options.rename)
        """The names in the checkpoint, by the names in the state dict."""
        self._sorted_names = sorted(self.stored_names)
        self._part_names: set[str] = set()
        """Names of tensors inside leaves, and of their descriptions."""
        self.leaves = self._with_parts(flatten(states))
        """All leaves, by name."""
        self.wanted = {name: leaf for name, leaf in self.leaves.items() if not matches_any(options.exclude, name)}
        """The leaves that `exclude` does not match, by name."""
        self.present = {name: leaf for name, leaf in self.wanted.items() if self._is_present(name)}
        """The leaves that are entries of the checkpoint, by name."""
        self.containers: list[tuple[Leaf, list[str]]] = []
        """Leaves that are dicts or lists in the checkpoint, each with the names of its items."""
        self.nested: list[tuple[Leaf, Any]] = []
        """Leaves that are inside a value of the checkpoint, each with the decoded value."""
        self.decoded: dict[Path, Any] = {}
        """All leaves of the checkpoint's values that were decoded for `nested`, by their paths in the state dict."""
        self.missing = self._match_others([leaf for name, leaf in self.wanted.items() if name not in self.present])
        """The leaves that the checkpoint does not have. See `check_missing`."""
        self.missing_keys = tuple(leaf.name for leaf in self.missing)
        """See `Report`."""
        self.unexpected_keys, self.held_keys = self._divide_keys()
        """The names of the checkpoint that the state dict lacks, below one of its keys, and those that it has."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing of the state dict is to be loaded."""
        return not self.containers and all(leaf.is_empty_dict for leaf in self.wanted.values())

    @property
    def unused_patterns(self) -> tuple[str, ...]:
        """See `Report`. Patterns of `exclude` may match a name on another rank."""
        excluded = [name for name in self.stored_names if name.startswith(self._sections)]
        return (
            *unused_patterns(self._options.exclude, [*self.leaves, *excluded]),
            *unused_renames(self._options.rename, list(self.stored_names.values())),
        )

    def add_containers(self, containers: Iterable[tuple[Leaf, list[str]]]) -> None:
        """Add leaves that receive entries of the checkpoint: items that a dict or list lacks, or empty dicts.

        Args:
            containers: the leaves, each with the names of its entries.
        """
        self.containers += containers
        self.unexpected_keys, self.held_keys = self._divide_keys()

    def _with_parts(self, leaves: Mapping[str, Leaf]) -> dict[str, Leaf]:
        """Return the leaves, with the parts of tensors that consist of others if the checkpoint stores them so.

        Raises:
            DestinationError, DtypeError: the checkpoint has a tensor of another class or form.
        """
        parts = {name: parts_of(leaf) for name, leaf in leaves.items() if self._may_be_divided(leaf)}
        described = [name for name in parts if f"{name}.{CLASS}" in self.stored_names]
        unknown = [name for name in parts if name not in described and self._has_all(parts[name])]
        for name in (*described, *unknown):
            self._part_names |= {f"{name}.{CLASS}", *parts[name]}
        excluded = {name for name in parts if matches_any(self._options.exclude, name)}
        wanted = [name for name in described if name not in excluded]
        for name, buffer in zip(wanted, self._read_values(f"{name}.{CLASS}" for name in wanted).values(), strict=True):
            check_class(name, leaves[name].value, buffer.value())
        unknown = [name for name in unknown if name not in excluded]
        wanted += unknown
        if unknown:
            logger.warning("the checkpoint does not tell the classes of %s: they are not compared", quoted(unknown))
        found: dict[str, Leaf] = {}
        for name, leaf in leaves.items():
            found |= parts[name] if name in wanted else {name: leaf}
        for name in wanted:
            for part in parts[name].values():
                self._check_part(part, leaves[name])
        return found

    def _may_be_divided(self, leaf: Leaf) -> bool:
        """Return whether a leaf is a tensor that consists of others, and the checkpoint has no tensor of its name."""
        return leaf.name not in self.stored_names and has_parts(leaf.value)

    def _has_all(self, parts: Mapping[str, Leaf]) -> bool:
        return bool(parts) and parts.keys() <= self.stored_names.keys()

    def _check_part(self, part: Leaf, leaf: Leaf) -> None:
        """Check that a tensor inside another one is stored with its dtype: it cannot be cast by itself."""
        if part.name not in self.stored_names or matches_any(self._options.exclude, part.name):
            return
        entry = self.entry(part.name)
        check_is_tensor(self.source, entry.name)
        stored, own = torch_dtype(entry.dtype), part.value.dtype
        if stored != own:
            raise DtypeError(
                f"{part.name!r} is stored as {stored}, and is {own} in the state dict, inside a "
                f"{type(leaf.value).__name__}: create it as it was when it was saved"
            )

    def _read_values(self, names: Iterable[str]) -> dict[str, ValueBuffer]:
        """Read the bytes of values of the checkpoint, by their names in the state dict."""
        names = list(names)
        if not names:
            return {}
        stored = [self.stored_names[name] for name in names]
        check_values(self.source, stored, self._options.budget_bytes)
        buffers = ValueBuffer.of(self.source, stored)
        report = read_boxes(self.source, [], [], buffers, ReadOptions(budget_bytes=self._options.budget_bytes))
        self.report = added(self.report, report)
        return dict(zip(names, buffers, strict=True))

    def entry(self, name: str) -> Entry:
        """Return the entry for a name of the state dict."""
        return self.source.entry(self.stored_names[name])

    @property
    def decoded_names(self) -> list[str]:
        """The names of all leaves inside the values of the checkpoint that were decoded."""
        return [name_of(path) for path in self.decoded]

    def _is_present(self, name: str) -> bool:
        stored = self.stored_names.get(name)
        if stored is None:
            return False
        return stored not in self.source.unreadable or not matches_any(self._options.allow_missing, name)

    def _match_others(self, leaves: Sequence[Leaf]) -> list[Leaf]:
        """Match the leaves that are not entries of the checkpoint. Return those that it does not have."""
        by_value: dict[str, list[Leaf]] = {}
        missing: list[Leaf] = []
        for leaf in leaves:
            outer_names = (name_of(leaf.path[:length]) for length in range(len(leaf.path) - 1, 0, -1))
            value_name = next(filter(self._is_value, outer_names), None)
            if value_name is not None:
                by_value.setdefault(value_name, []).append(leaf)
            elif leaf.is_empty_dict:  # `unexpected_keys` lists what it lacks
                continue
            elif not isinstance(leaf.value, torch.Tensor) and (items := self.names_below(leaf.name)):
                self.containers.append((leaf, items))
            else:
                missing.append(leaf)
        missing += self._match_inside_values(by_value)
        return missing

    def _is_value(self, name: str) -> bool:
        return name in self.stored_names and not self.entry(name).is_tensor

    def names_below(self, name: str) -> list[str]:
        """Return the names in the checkpoint that begin with `name.`, except excluded ones."""
        begin = bisect_left(self._sorted_names, f"{name}.")
        following = (self._sorted_names[at] for at in range(begin, len(self._sorted_names)))
        below = itertools.takewhile(lambda other: other.startswith(f"{name}."), following)
        return [other for other in below if not matches_any(self._options.exclude, other)]

    def _match_inside_values(self, by_value: Mapping[str, list[Leaf]]) -> list[Leaf]:
        """Read the values that contain leaves. Return the leaves that are not in them."""
        missing = []
        for name, buffer in self._read_values(by_value).items():
            leaves = by_value[name]
            value = buffer.value(allow_pickle=self._options.allow_pickle)
            path = leaves[0].path[: _path_length(leaves[0].path, name)]
            self.decoded |= {(*path, *leaf.path[1:]): leaf.value for leaf in flatten({name: value}).values()}
            for leaf in leaves:
                try:
                    found = _descend(value, leaf.path[_path_length(leaf.path, name) :])
                except LookupError:
                    missing.append(leaf)
                    continue
                if isinstance(leaf.value, torch.Tensor) != isinstance(found, torch.Tensor):
                    raise DestinationError(
                        f"{leaf.name!r} is a {type(found).__name__} in the checkpoint and a "
                        f"{type(leaf.value).__name__} in the state dict: load it into a value of the same type"
                    )
                self.nested.append((leaf, found))
        return missing

    def _divide_keys(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        in_containers = {name for _, names in self.containers for name in names}
        decoded_values = {name_of(path[:length]) for path in self.decoded for length in range(1, len(path))}
        unexpected, held = [], []
        for name in dict.fromkeys((*self.stored_names, *self.decoded_names)):
            if name in self.leaves or name in self._part_names or name in in_containers or name in decoded_values:
                held.append(name)
            elif name.startswith(self._sections) and not matches_any(self._options.exclude, name):
                unexpected.append(name)
        return tuple(unexpected), tuple(held)


def _descend(value: Any, path: Path) -> Any:
    """Return the value at a path inside another value. Raises LookupError if there is no such path."""
    for part in path:
        if isinstance(part, int):
            if not isinstance(value, (list, tuple)):
                raise KeyError(part)
            value = value[part]
        elif isinstance(value, Mapping):
            keys = {str(key): key for key in value}
            value = value[part.value if isinstance(part, Key) and part.value in value else keys[str(part)]]
        else:
            raise KeyError(part)
    return value


def _path_length(path: Path, name: str) -> int:
    """Return how many parts of a path form a name."""
    return next(length for length in range(1, len(path) + 1) if name_of(path[:length]) == name)
