"""Matching the names of a state dict with those of a checkpoint."""

from __future__ import annotations

import functools
import itertools
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...planner.entries import Entry
from ...planner.errors import MissingTensorError
from ...planner.index import nearest_names
from ...planner.text import quoted
from ..errors import DestinationError, DtypeError
from ..formats.source import Source
from ..runtime.reports import RankReport, added
from ..tensors.dtypes import torch_dtype
from ..tensors.name_patterns import (
    Patterns,
    by_new_name,
    matches_any,
    patterns_of,
    unused_patterns,
    unused_renames,
)
from ..tensors.state_dict import Key, Leaf, Path, flatten, name_of, renamed_path
from ..tensors.tensor_classes import missing_memory, overrides_dispatch
from ..tensors.wrapper_tensors import CLASS, check_class, has_parts, parts_of
from .read_tensors import ReadOptions, check_is_tensor, read_boxes
from .value_buffers import ValueBuffer, check_values


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Which names of a state dict are loaded, and how. See `reshard.load`."""

    strict: bool = True
    allow_missing: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    allow_pickle: bool = False
    budget_bytes: int | None = None

    @classmethod
    def of(
        cls,
        strict: bool,
        allow_missing: Patterns,
        exclude: Patterns,
        rename: Mapping[str, str] | None,
        allow_pickle: bool,
        budget_bytes: int | None,
    ) -> LoadOptions:
        """Return the options for the arguments of `reshard.load`. Raises ArgumentError if a pattern is not valid."""
        missing, excluded = patterns_of("allow_missing", allow_missing), patterns_of("exclude", exclude)
        return cls(strict, missing, excluded, rename or {}, allow_pickle, budget_bytes)


class NameMatch:
    """Where each leaf of a state dict is in a checkpoint.

    A leaf may have an entry of the same name. It may be inside a value of the checkpoint (DCP and torch.save store
    whole dicts as values). Or it may be a dict or list whose items are entries of the checkpoint. An empty dict in the
    state of a Stateful value is such a leaf, because the state of a new object may have no items yet.

    Args:
        states: the state dict, with the states of Stateful values.
        stateful: the names of the Stateful values.

    Raises:
        MissingTensorError: a name is not in the checkpoint, and `options` do not allow that.
        DestinationError: a leaf is a tensor here and not in the checkpoint, or the reverse.
        UnsafeValueError: a value that contains a leaf needs `allow_pickle`.
        CorruptCheckpointError, StoreError: such a value cannot be read.
    """

    def __init__(
        self, source: Source, states: Mapping[str, Any], options: LoadOptions, stateful: Sequence[str] = ()
    ) -> None:
        self._source = source
        self._options = options
        self.report = RankReport(0)
        """What was read to match names."""
        self._stateful = frozenset(stateful)
        self._in_stateful = tuple(f"{name}." for name in stateful)
        self._sections = tuple(f"{key}." for key, state in states.items() if isinstance(state, (Mapping, list)))
        """The keys of the state dict that contain other names."""
        names = [*(entry.name for entry in source.entries), *source.unreadable]
        self.stored_names = by_new_name(names, options.rename)
        """The names in the checkpoint, by the names in the state dict."""
        self._sorted_names = sorted(self.stored_names)
        self._known: set[str] = set()
        """Names that belong to leaves, and are not leaves themselves."""
        self._leaves = self._with_parts(flatten(states))
        wanted = {name: leaf for name, leaf in self._leaves.items() if not matches_any(options.exclude, name)}
        self.is_empty = not wanted
        """Whether no name of the state dict is to be loaded."""
        self.unused_patterns = (
            *unused_patterns(options.exclude, list(self._leaves)),
            *unused_renames(options.rename, names),
        )
        """See `Report`. Patterns of `exclude` may match a name on another rank."""
        self.present = {name: leaf for name, leaf in wanted.items() if self._is_present(name)}
        """The leaves that are entries of the checkpoint, by name."""
        self.containers: list[tuple[Leaf, list[str]]] = []
        """Leaves that are dicts or lists in the checkpoint, each with the names of its items."""
        self.nested: list[tuple[Leaf, Any]] = []
        """Leaves that are inside a value of the checkpoint, each with the decoded value."""
        self._decoded: dict[Path, Any] = {}
        """All leaves of the checkpoint's values that were decoded for `nested`, by their paths in the state dict."""
        self.missing_keys = self._match_others([leaf for name, leaf in wanted.items() if name not in self.present])
        """See `Report`."""
        self.unexpected_keys, self.held_keys = self._divide_keys()
        """The names of the checkpoint that the state dict lacks, below one of its keys, and those that it has."""

    def _with_parts(self, leaves: Mapping[str, Leaf]) -> dict[str, Leaf]:
        """Return the leaves, with the parts of tensors that consist of others if the checkpoint stores them so.

        Raises:
            DestinationError, DtypeError, ShapeMismatchError: the checkpoint has a tensor of another class or form.
        """
        found: dict[str, Leaf] = {}
        wrappers: dict[str, Leaf] = {}
        for name, leaf in leaves.items():
            parts = parts_of(leaf) if name not in self.stored_names and has_parts(leaf.value) else {}
            if not parts or not parts.keys() <= self.stored_names.keys():
                found[name] = leaf
            elif matches_any(self._options.exclude, name):
                found[name] = leaf
                self._known |= parts.keys()
            else:
                for part in parts.values():
                    self._check_part(part, leaf)
                found |= parts
            if parts and (described := f"{name}.{CLASS}") in self.stored_names:
                wrappers[described] = leaf
        self._known |= wrappers.keys()
        buffers = self._read_values([name for name, leaf in wrappers.items() if leaf.name not in found])
        for described, value in buffers.items():
            leaf = wrappers[described]
            check_class(leaf.name, leaf.value, value.value())
        return found

    def _check_part(self, part: Leaf, leaf: Leaf) -> None:
        """Check that a tensor inside another one has its stored dtype and shape: it cannot be cast by itself."""
        entry = self.entry(part.name)
        check_is_tensor(self._source, entry.name)
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
        check_values(self._source, stored, self._options.budget_bytes)
        buffers = ValueBuffer.of(self._source, stored)
        report = read_boxes(self._source, [], [], buffers, ReadOptions(budget_bytes=self._options.budget_bytes))
        self.report = added(self.report, report)
        return dict(zip(names, buffers, strict=True))

    def entry(self, name: str) -> Entry:
        """Return the entry for a name of the state dict."""
        return self._source.entry(self.stored_names[name])

    @property
    def decoded_names(self) -> list[str]:
        """The names of all leaves inside the values of the checkpoint that were decoded."""
        return [name_of(path) for path in self._decoded]

    def describe_resize(self, name: str, *kinds: str) -> str:
        """Return a description of the list or dict around a name that has another number of items in the checkpoint.

        Args:
            kinds: "list", "dict" or both. Default: both.

        Returns:
            An empty string if there is none.
        """
        paths = ((new, self._source.paths.get(stored)) for new, stored in self.stored_names.items())
        known = (renamed_path(path, new) for new, path in paths if path is not None)
        stored_items = _items_by_container([*filter(None, known), *self._decoded])
        items = _items_by_container(leaf.path for leaf in self._leaves.values())
        for end in (at for at in range(len(name) - 1, 0, -1) if name[at] == "."):
            outer = name[:end]
            if outer in items and outer in stored_items and len(items[outer]) != len(stored_items[outer]):
                is_list = all(type(part) is int for part in (*items[outer], *stored_items[outer]))
                kind = "list" if is_list else "dict"
                counts = f"{len(stored_items[outer])} items in the checkpoint and {len(items[outer])} in the state dict"
                return f"the {kind} {outer!r} has {counts}" if kind in (kinds or ("list", "dict")) else ""
        return ""

    def _is_present(self, name: str) -> bool:
        stored = self.stored_names.get(name)
        if stored is None:
            return False
        return stored not in self._source.unreadable or not matches_any(self._options.allow_missing, name)

    def _match_others(self, leaves: Sequence[Leaf]) -> tuple[str, ...]:
        """Match the leaves that are not entries of the checkpoint. Return the names of those that it does not have."""
        by_value: dict[str, list[Leaf]] = {}
        missing: list[Leaf] = []
        for leaf in leaves:
            outer_names = (name_of(leaf.path[:length]) for length in range(len(leaf.path) - 1, 0, -1))
            value_name = next(filter(self._is_value, outer_names), None)
            if value_name is not None:
                by_value.setdefault(value_name, []).append(leaf)
            elif leaf.is_empty_dict and not self._is_to_be_filled(leaf):  # `unexpected_keys` lists what it lacks
                continue
            elif not isinstance(leaf.value, torch.Tensor) and (items := self._names_below(leaf.name)):
                self.containers.append((leaf, items))
            elif not leaf.is_empty_dict:
                missing.append(leaf)
        missing += self._match_inside_values(by_value)
        options = self._options
        fatal = [leaf for leaf in missing if options.strict and not matches_any(options.allow_missing, leaf.name)]
        if fatal:
            raise MissingTensorError(self._describe_missing(fatal))
        return tuple(leaf.name for leaf in missing)

    def _is_to_be_filled(self, leaf: Leaf) -> bool:
        """Return whether an empty dict is, or belongs to, the state of a Stateful value, but not of an optimizer.

        The tensors that an empty optimizer lacks may be sharded, and so may those of an empty module.
        """
        is_state = leaf.name in self._stateful and type(leaf.value) is dict  # that of a module is an OrderedDict
        is_inside = leaf.name.startswith(self._in_stateful) and not leaf.name.startswith(self._optimizers)
        return is_state or is_inside

    @functools.cached_property
    def _optimizers(self) -> tuple[str, ...]:
        """The beginnings of the names in the states of optimizers."""
        outer = (name.partition(".param_groups.") for name in self._leaves)
        return tuple({f"{begin}." for begin, found, _ in outer if found})

    def _is_value(self, name: str) -> bool:
        return name in self.stored_names and not self.entry(name).is_tensor

    def _names_below(self, name: str) -> list[str]:
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
            self._decoded |= {(*path, *leaf.path[1:]): leaf.value for leaf in flatten({name: value}).values()}
            for leaf in leaves:
                try:
                    found = _descend(value, leaf.path[len(path) :])
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
        decoded_values = {name_of(path[:length]) for path in self._decoded for length in range(1, len(path))}
        unexpected, held = [], []
        for name in dict.fromkeys((*self.stored_names, *self.decoded_names)):
            if name in self._leaves or name in self._known or name in in_containers or name in decoded_values:
                held.append(name)
            elif name.startswith(self._sections) and not matches_any(self._options.exclude, name):
                unexpected.append(name)
        return tuple(unexpected), tuple(held)

    def _describe_missing(self, missing: Sequence[Leaf]) -> str:
        """Return a message that names the missing leaves, and suggests what the caller may have meant."""
        message = f"the checkpoint has no {quoted([leaf.name for leaf in missing])}"
        name = missing[0].name
        suggestion = self._suggest_tied(missing) or self._suggest_training_state(name) or self._suggest_name(name)
        return f"{message}; {suggestion}"

    def _suggest_tied(self, missing: Sequence[Leaf]) -> str:
        """Return a suggestion if a missing leaf shares its memory with one that the checkpoint has."""
        owners = {memory: leaf.name for leaf in self.present.values() if (memory := _memory(leaf))}
        for leaf in missing:
            if tied := owners.get(_memory(leaf)):
                return (
                    f"{leaf.name!r} shares its memory with {tied!r}, which the checkpoint has: remove {leaf.name!r} "
                    f"from the state dict, or pass allow_missing={leaf.name!r}"
                )
        return ""

    def _suggest_training_state(self, missing: str) -> str:
        """Return a suggestion if the state dict has an optimizer's numbered states, and the checkpoint named ones."""
        found = _OF_NUMBERED_STATES.match(missing)
        if found is None:
            return ""
        groups = f"{found[1]}param_groups."
        stored = [name.removeprefix(groups) for name in self.stored_names if name.startswith(groups)]
        if not stored or any(name[:1].isdigit() for name in stored):
            return ""
        return (
            f"it names the states and settings below {found[1].rstrip('.')!r} by parameters instead of numbers, as "
            "reshard.training_state does: load into the state dict that training_state returns"
        )

    def _suggest_name(self, missing: str) -> str:
        if resize := self.describe_resize(missing, "list"):
            return f"{resize}: {_SAME_ITEMS}"
        names = list(self.stored_names)
        for name in names:
            if name.endswith(f".{missing}"):
                return f"it has {name!r}: nest the state dict under {name.removesuffix(missing)[:-1]!r}"
            if missing.endswith(f".{name}"):
                outer = missing.removesuffix(name)[:-1]
                return f"it has {name!r}: the state dict is nested too deeply, remove the outer key {outer!r}"
        for path, value in self._decoded.items():
            if isinstance(value, Mapping) and missing.startswith(f"{name_of(path)}."):
                return (
                    f"{name_of(path)!r} is an empty dict in the checkpoint: use an empty dict in the state dict, or "
                    "pass allow_missing= or exclude= for its items"
                )
        if resize := self.describe_resize(missing):
            return f"{resize}: {_SAME_ITEMS}"
        near = nearest_names(missing, names, 5) or names[:5]
        found = f"it has {', '.join(map(repr, near))}" + (", ..." if len(near) < len(names) else "")
        return (
            f"{found if names else 'it is empty'}; pass allow_missing= with patterns of names that may be missing, or "
            "strict=False to skip all missing names"
        )


_OF_NUMBERED_STATES = re.compile(r"(.*\.|)(?:state|param_groups)\.[0-9]+\.")
"""Matches the names of the states and settings that `state_dict` of an optimizer returns."""
_SAME_ITEMS = "use the same items in the state dict, or pass allow_missing= or exclude= for the others"


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


def _items_by_container(paths: Iterable[Path]) -> dict[str, set[str | int | Key]]:
    """Return the keys and positions in each dict and list, by its name."""
    found: dict[str, set[str | int | Key]] = {}
    for path in paths:
        for length in range(1, len(path)):
            found.setdefault(name_of(path[:length]), set()).add(path[length])
    return found


def _memory(leaf: Leaf) -> int:
    """Return the address of the memory of a leaf's tensor; 0 if it has no memory of its own."""
    local = getattr(leaf.value, "_local_tensor", leaf.value)
    if not isinstance(local, torch.Tensor) or overrides_dispatch(local) or missing_memory(local):
        return 0
    return local.untyped_storage().data_ptr()
