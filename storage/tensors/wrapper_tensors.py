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
from .plain_json import NotPlainError, to_plain
from .state_dict import Leaf
from .tensor_classes import is_whole, missing_memory, only_values, overrides_dispatch

CLASS = "__class__"
"""The last part of the name under which the class of such a tensor is stored."""


def has_parts(value: object) -> bool:
    """Return whether a value is a tensor that consists of other tensors. A sharded tensor is none."""
    if not isinstance(value, torch.Tensor) or not (overrides_dispatch(value) and is_whole(value)):
        return False
    is_flattened = all(hasattr(value, method) for method in ("__tensor_flatten__", "__tensor_unflatten__"))
    return is_flattened and not missing_memory(value)


def parts_of(leaf: Leaf) -> dict[str, Leaf]:
    """Return the tensors inside a tensor by name. Parts that consist of other tensors are divided, too."""
    tensor: Any = leaf.value
    attributes, _ = tensor.__tensor_flatten__()
    parts: dict[str, Leaf] = {}
    for attribute in attributes:
        part = Leaf((*leaf.path, attribute), leaf.container, leaf.key, getattr(tensor, attribute))
        parts |= parts_of(part) if has_parts(part.value) else {part.name: part}
    return parts


def _describe(tensor: Any) -> dict[str, Any]:
    """Return a tensor's class, its attributes that are tensors, and its settings that are plain data, by `to_plain`."""
    attributes, context = tensor.__tensor_flatten__()
    if not isinstance(context, Mapping):
        context = dict(enumerate(context if isinstance(context, (list, tuple)) else [context]))
    settings: dict[str, Any] = {}
    for name, value in context.items():
        try:
            settings[str(name)] = to_plain(list(value) if isinstance(value, tuple) else value)
        except (NotPlainError, RecursionError):
            continue
    return {"class": type(tensor).__qualname__, "tensors": sorted(attributes), "settings": settings}


def check_class(name: str, tensor: torch.Tensor, stored: Any) -> None:
    """Check that a tensor has the class, the tensors inside and the settings that a checkpoint describes.

    Settings that only one of them has are not compared: other versions of a library may have other ones.

    Args:
        stored: what the checkpoint has under CLASS.

    Raises:
        CorruptCheckpointError: the checkpoint has no description.
        DestinationError: they differ.
    """
    own = _describe(tensor)
    try:
        described = json.loads(stored)
        kind, tensors, settings = described["class"], described["tensors"], dict(described["settings"])
    except (ValueError, LookupError, TypeError) as error:
        raise CorruptCheckpointError(f"the class of {name!r} is not described: {reason(error)}") from error
    if kind != own["class"]:
        raise DestinationError(
            f"{name!r} is of the class {own['class']} in the state dict and of {kind} in the checkpoint: create it as "
            "it was when it was saved"
        )
    if tensors != own["tensors"]:
        raise DestinationError(
            f"{name!r}, of the class {kind}, consists of {own['tensors']} in the state dict and of {tensors} in the "
            "checkpoint: create it as it was when it was saved"
        )
    for setting, value in own["settings"].items():
        if setting in settings and settings[setting] != value:
            raise DestinationError(
                f"{name!r}, of the class {kind}, has {setting}={value!r} in the state dict and {settings[setting]!r} "
                "in the checkpoint: create it as it was when it was saved"
            )


def with_parts(leaves: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """Return leaves to save in which tensors that consist of others are replaced by their parts.

    Raises:
        DestinationError: a part has the name of another value.
    """
    found: dict[str, Leaf] = {}
    for name, leaf in leaves.items():
        if not has_parts(leaf.value):
            found[name] = leaf
        elif (values := only_values(leaf.value)) is not None:
            found[name] = Leaf(leaf.path, leaf.container, leaf.key, values)
        else:
            described = Leaf((*leaf.path, CLASS), leaf.container, leaf.key, json.dumps(_describe(leaf.value)))
            for part in (*parts_of(leaf).values(), described):
                if part.name in found or part.name in leaves:
                    raise DestinationError(f"two values of the state dict have the name {part.name!r}")
                found[part.name] = part
    return found
