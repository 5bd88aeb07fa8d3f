"""Tensors that consist of other tensors, such as quantised weights and optimizer states of torchao.

Their classes have torch's protocol `__tensor_flatten__`. A checkpoint stores the tensors inside, each under the name of
the tensor and that of its attribute, and a description of the class in JSON under CLASS.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import CorruptCheckpointError, DestinationError
from ..runtime.brief import reason
from .plain_json import NotPlainError, from_plain, to_plain
from .state_dict import Leaf
from .tensor_classes import derives_from, is_whole, missing_memory, only_values, overrides_dispatch, tensors_inside

CLASS = "__class__"
"""The last part of the name under which the class of such a tensor is stored."""


def has_parts(value: object) -> bool:
    """Return whether a value is a tensor that consists of other tensors.

    Sharded tensors do not count, and neither do results of collectives that may still run.
    """
    if not isinstance(value, torch.Tensor) or not (overrides_dispatch(value) and is_whole(value)):
        return False
    if derives_from(value, "AsyncCollectiveTensor", "torch.distributed"):
        return False
    is_flattened = all(hasattr(value, method) for method in ("__tensor_flatten__", "__tensor_unflatten__"))
    return is_flattened and not missing_memory(value)


def parts_of(leaf: Leaf) -> dict[str, Leaf]:
    """Return the tensors inside a tensor by name. Parts that consist of other tensors are divided, too."""
    parts: dict[str, Leaf] = {}
    for attribute, tensor in tensors_inside(leaf.value).items():
        part = Leaf((*leaf.path, attribute), leaf.container, leaf.key, tensor)
        parts |= parts_of(part) if has_parts(tensor) else {part.name: part}
    return parts


def _describe(tensor: Any) -> dict[str, Any]:
    """Return a tensor's class, the tensors inside, and its settings that are plain data, encoded by `to_plain`."""
    inside = tensors_inside(tensor)
    tensors = {attribute: _describe(part) if has_parts(part) else None for attribute, part in inside.items()}
    context = tensor.__tensor_flatten__()[1]
    settings = (
        {str(name): _plain(value) for name, value in context.items()}
        if isinstance(context, Mapping)
        else [_plain(value) for value in (context if isinstance(context, (list, tuple)) else [context])]
    )
    return {"class": type(tensor).__qualname__, "tensors": tensors, "settings": settings}


def _plain(value: Any) -> Any:
    """Return a setting as JSON, or None if it is not compared: it is no plain data, or the device of a rank."""
    if isinstance(value, torch.device):
        return None
    try:
        return json.loads(json.dumps(to_plain(list(value) if isinstance(value, tuple) else value)))
    except (NotPlainError, RecursionError):
        return None


def check_class(name: str, tensor: torch.Tensor, stored: Any) -> None:
    """Check that a tensor has the class, the tensors inside and the settings that a checkpoint describes.

    Settings that only one of them has are not compared: other versions of a library may have other ones.

    Args:
        stored: what the checkpoint has under CLASS.

    Raises:
        CorruptCheckpointError: the checkpoint has no description.
        DestinationError: they differ.
    """
    try:
        _check_same(name, _describe(tensor), json.loads(stored))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CorruptCheckpointError(f"the class of {name!r} is not described: {reason(error)}") from error


def _check_same(name: str, own: dict[str, Any], stored: dict[str, Any]) -> None:
    """Check that two descriptions of a tensor are the same. Raise DestinationError, or what malformed data raises."""
    kind, advice = stored["class"], "create it as it was when it was saved"
    if kind != own["class"]:
        raise DestinationError(
            f"{name!r} is of the class {own['class']} in the state dict and of {kind} in the checkpoint: {advice}"
        )
    if stored["tensors"].keys() != own["tensors"].keys():
        ours, theirs = (", ".join(sorted(one["tensors"])) for one in (own, stored))
        raise DestinationError(
            f"{name!r}, of the class {kind}, consists of {ours} in the state dict and of {theirs} in the checkpoint: "
            f"{advice}"
        )
    for setting, ours, theirs in _common_settings(own["settings"], stored["settings"]):
        if ours is not None and theirs is not None and ours != theirs:
            raise DestinationError(
                f"{name!r}, of the class {kind}, has {setting}={from_plain(ours)!r} in the state dict and "
                f"{from_plain(theirs)!r} in the checkpoint: {advice}"
            )
    for attribute, part in own["tensors"].items():
        other = stored["tensors"][attribute]
        if part is not None and other is not None:
            _check_same(f"{name}.{attribute}", part, other)


def _common_settings(own: Any, stored: Any) -> list[tuple[str, Any, Any]]:
    """Return the settings that both have: by name, or by position if there are equally many."""
    if isinstance(own, dict):
        return [(name, own[name], stored[name]) for name in own if name in stored]
    if not isinstance(stored, list):
        raise TypeError("the settings are no list")
    same = len(own) == len(stored)
    return [(f"setting {at}", a, b) for at, (a, b) in enumerate(zip(own, stored, strict=True))] if same else []


def with_parts(leaves: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """Return leaves to save in which tensors that consist of others are replaced by their parts.

    Raises:
        DestinationError: a part has the name of another value.
    """
    found: dict[str, Leaf] = {}
    descriptions: dict[str, Leaf] = {}
    for name, leaf in leaves.items():
        if not has_parts(leaf.value):
            found[name] = leaf
        elif (values := only_values(leaf.value)) is not None:
            found[name] = Leaf(leaf.path, leaf.container, leaf.key, values)
        else:
            described = Leaf((*leaf.path, CLASS), leaf.container, leaf.key, json.dumps(_describe(leaf.value)))
            parts = parts_of(leaf)
            for part in (*parts, described.name):
                if part in found or part in leaves:
                    raise DestinationError(f"two values of the state dict have the name {part!r}")
            found |= parts
            descriptions[described.name] = described
    return found | descriptions  # one after another, so that few requests read them
