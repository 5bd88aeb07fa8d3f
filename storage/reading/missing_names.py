"""Advice for names of a state dict that a checkpoint lacks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch

from ...planner.errors import MissingTensorError
from ...planner.index import nearest_names
from ...planner.text import quoted
from ..errors import ArgumentError
from ..tensors.name_patterns import matches_any
from ..tensors.state_dict import Key, Leaf, Path, name_of, renamed_path
from ..tensors.tensor_classes import missing_memory, overrides_dispatch
from ..tensors.wrapper_tensors import CLASS
from .load_options import LoadOptions
from .name_matching import NameMatch

_OF_NUMBERED_STATES = re.compile(r"(.*\.|)(?:state|param_groups)\.[0-9]+\.")
"""Matches the names of the states and settings that `state_dict` of an optimizer returns."""
_OF_PARAMETERS = re.compile(r"(.*\.|)param_groups\.[0-9]+\.params")
"""Matches the names of the lists of an optimizer's parameters."""
_SAME_ITEMS = "use the same items in the state dict, or pass allow_missing= or exclude= for the others"


def check_missing(match: NameMatch, options: LoadOptions) -> None:
    """Check that the names that a checkpoint lacks may be missing.

    Raises:
        MissingTensorError: one may not. The message suggests what the caller may have meant.
    """
    fatal = [leaf for leaf in match.missing if options.strict and not matches_any(options.allow_missing, leaf.name)]
    if fatal:
        raise MissingTensorError(MissingNames(match).describe(fatal))


def check_optimizers(match: NameMatch, options: LoadOptions) -> None:
    """Check that no state of an optimizer is left out because the optimizer has made no step yet.

    Raises:
        ArgumentError: the state dict has an optimizer without state, and the checkpoint has states of its parameters.
    """
    if not options.strict:
        return
    for name, leaf in match.leaves.items():
        found = _OF_PARAMETERS.fullmatch(name)
        state = match.leaves.get(f"{found[1]}state") if found else None
        if found is None or state is None or not state.is_empty_dict or not isinstance(leaf.value, list):
            continue
        own = tuple(f"{state.name}.{parameter}." for parameter in leaf.value)
        lost = [key for key in match.unexpected_keys if key.startswith(own)]
        lost = [key for key in lost if not matches_any(options.allow_missing, key)]
        if lost:
            optimizer = found[1].rstrip(".") or "the state dict"
            raise ArgumentError(
                f"{optimizer!r} is an optimizer without state, so {len(lost)} names of the checkpoint, such as "
                f"{lost[0]!r}, would not be loaded: pass reshard.training_state(model, optimizer) to save and load, "
                f"make a step before the load, or pass allow_missing='{state.name}.*'"
            )


class MissingNames:
    """Finds out what the caller may have meant.

    Args:
        match: the names that were matched.
    """

    def __init__(self, match: NameMatch) -> None:
        self._match = match

    def describe_resize(self, name: str, *kinds: str) -> str:
        """Return a description of the list or dict around a name that has another number of items in the checkpoint.

        Args:
            kinds: "list", "dict" or both. Default: both.

        Returns:
            An empty string if there is none.
        """
        paths = ((new, self._match.source.paths.get(stored)) for new, stored in self._match.stored_names.items())
        known = (renamed_path(path, new) for new, path in paths if path is not None)
        stored_items = _items_by_container([*filter(None, known), *self._match.decoded])
        items = _items_by_container(leaf.path for leaf in self._match.leaves.values())
        for end in (at for at in range(len(name) - 1, 0, -1) if name[at] == "."):
            outer = name[:end]
            if outer in items and outer in stored_items and len(items[outer]) != len(stored_items[outer]):
                is_list = all(type(part) is int for part in (*items[outer], *stored_items[outer]))
                kind = "list" if is_list else "dict"
                counts = f"{len(stored_items[outer])} items in the checkpoint and {len(items[outer])} in the state dict"
                return f"the {kind} {outer!r} has {counts}" if kind in (kinds or ("list", "dict")) else ""
        return ""

    def describe(self, missing: Sequence[Leaf]) -> str:
        """Return a message that names the missing leaves, and suggests what the caller may have meant."""
        message = f"the checkpoint has no {quoted([leaf.name for leaf in missing])}"
        name = missing[0].name
        suggestion = self._suggest_tied(missing) or self._suggest_training_state(name) or self._suggest_name(name)
        return f"{message}; {suggestion}"

    def _suggest_tied(self, missing: Sequence[Leaf]) -> str:
        """Return a suggestion if a missing leaf shares its memory with one that the checkpoint has."""
        owners = {memory: leaf.name for leaf in self._match.present.values() if (memory := _memory(leaf))}
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
        stored = [name.removeprefix(groups) for name in self._match.stored_names if name.startswith(groups)]
        if not stored or any(name[:1].isdigit() for name in stored):
            return ""
        return (
            f"it names the states and settings below {found[1].rstrip('.')!r} by parameters instead of numbers, as "
            "reshard.training_state does: load into the state dict that training_state returns"
        )

    def _suggest_name(self, missing: str) -> str:
        if resize := self.describe_resize(missing, "list"):
            return f"{resize}: {_SAME_ITEMS}"
        names = list(self._match.stored_names)
        parts = [name for name in names if name.startswith(f"{missing}.")]
        if f"{missing}.{CLASS}" in parts:
            return (
                f"it has {parts[0]!r}, ..., of which {missing!r} consisted: load into a tensor of the class that was "
                "saved, or read these by their names"
            )
        outer_names = {name.removesuffix(f".{missing}") for name in names if name.endswith(f".{missing}")}
        if len(outer_names) == 1:
            (outer,) = outer_names
            return f"it has {f'{outer}.{missing}'!r}: nest the state dict under {outer!r}"
        for name in names:
            outer = missing.removesuffix(name)[:-1]
            if missing.endswith(f".{name}") and not any(other.startswith(f"{outer}.") for other in names):
                return f"it has {name!r}: the state dict is nested too deeply, remove the outer key {outer!r}"
        for path, value in self._match.decoded.items():
            if isinstance(value, Mapping) and missing.startswith(f"{name_of(path)}."):
                return (
                    f"{name_of(path)!r} is an empty dict in the checkpoint: use an empty dict in the state dict, or "
                    "pass allow_missing= or exclude= for its items"
                )
        near = nearest_names(missing, names, 5) or names[:5]
        found = f"it has {', '.join(map(repr, near))}" + (", ..." if len(near) < len(names) else "")
        if resize := self.describe_resize(missing):
            return f"{resize}, and {found}: {_SAME_ITEMS}"
        return (
            f"{found if names else 'it is empty'}; pass allow_missing= with patterns of names that may be missing, or "
            "strict=False to skip all missing names"
        )


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
