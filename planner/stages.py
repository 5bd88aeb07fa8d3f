"""Assign tensors to the stages of pipeline parallelism, by the layer numbers in their names."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .errors import LayoutError

_EMBEDDING = re.compile(r"embed|(^|[._])(emb|wte|wpe)([._]|$)", re.IGNORECASE)
"""Matches the names of tensors that are used before all layers: embeddings."""
_LAYER_NUMBER = re.compile(r"[0-9]{1,18}")
"""A part of a name that is a layer number. The pattern allows few digits because int() refuses more than 4,300, and
only ASCII digits because int() accepts others."""


def even_stages(names: Iterable[str], stages: int) -> dict[str, int]:
    """Distribute layers evenly over the stages of a pipeline, in their order.

    The first part of a name that is a number is the layer: `model.layers.7.up.weight` belongs to layer 7 of
    `model.layers`, and `layer7.up` belongs to no layer. Layers with different prefixes are distributed separately.
    Embeddings are on the first stage. All other tensors without a layer (the last norm, the head) are on the last
    stage.

    Args:
        names: the names of all tensors.
        stages: the number of stages.

    Returns:
        The stage of each tensor, by name: the argument `stages` of `Layout`.

    Raises:
        LayoutError: `stages` is less than 1.
    """
    if stages < 1:
        raise LayoutError(f"a pipeline needs at least 1 stage, got {stages}")
    names = list(names)
    layers: dict[str, set[int]] = {}
    for name in names:
        if (found := _layer(name)) is not None:
            layers.setdefault(found[0], set()).add(found[1])
    positions = {prefix: {layer: i for i, layer in enumerate(sorted(numbers))} for prefix, numbers in layers.items()}
    stage_of = {}
    for name in names:
        if (found := _layer(name)) is not None:
            of_prefix = positions[found[0]]
            stage_of[name] = of_prefix[found[1]] * stages // len(of_prefix)
        else:
            stage_of[name] = 0 if _EMBEDDING.search(name) else stages - 1
    return stage_of


def _layer(name: str) -> tuple[str, int] | None:
    """Return the prefix and the number of the layer in a name; None if it has no layer."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if _LAYER_NUMBER.fullmatch(part)), None)
    return None if at is None else (".".join(parts[:at]), int(parts[at]))
