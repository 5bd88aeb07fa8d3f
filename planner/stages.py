"""Which stage of a pipeline holds which tensor, by the numbers in their names."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .errors import LayoutError

_EMBEDDING = re.compile(r"embed|(^|[._])(emb|wte|wpe)([._]|$)", re.IGNORECASE)
"""What the names of tensors contain that come before all layers."""
_LAYER_NUMBER = re.compile(r"[0-9]{1,18}")
"""A part of a name that counts layers. Python reads no integer of more than 4,300 digits, and knows other digits."""


def even_stages(names: Iterable[str], stages: int) -> dict[str, int]:
    """Deal layers evenly over the stages of a pipeline, in their order, as the `stages` of a Layout.

    The layer of a tensor is the first part of its name that is a number: `model.layers.7.up.weight` is of layer 7 of
    `model.layers`; `layer7.up` is of none.
    Layers below another name are dealt by themselves. Of the tensors without a number, embeddings are on the first
    stage, and the others (the last norm, the head) on the last.

    Raises LayoutError.
    """
    if stages < 1:
        raise LayoutError(f"a pipeline has 1 stage or more, got {stages}")
    names = list(names)
    layers: dict[str, set[int]] = {}
    for name in names:
        if (found := _layer(name)) is not None:
            layers.setdefault(found[0], set()).add(found[1])
    places = {stack: {layer: i for i, layer in enumerate(sorted(numbers))} for stack, numbers in layers.items()}
    dealt = {}
    for name in names:
        if (found := _layer(name)) is not None:
            of_stack = places[found[0]]
            dealt[name] = of_stack[found[1]] * stages // len(of_stack)
        else:
            dealt[name] = 0 if _EMBEDDING.search(name) else stages - 1
    return dealt


def _layer(name: str) -> tuple[str, int] | None:
    """What a tensor's layer is one of, and its number."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if _LAYER_NUMBER.fullmatch(part)), None)
    return None if at is None else (".".join(parts[:at]), int(parts[at]))
