"""Check how much larger a value becomes as a tree, if several of its containers hold the same containers."""

from __future__ import annotations

import argparse
import math
import types
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

MAX_REPEATED = 16
"""How many times larger a value may become as a tree."""
FREE_WEIGHT = 1024 * 1024
"""The weight that a value of any size may have as a tree. Each value, character and byte weighs 1."""
SMALL_WEIGHT = 64
"""A string that weighs less counts each time it occurs."""

_SEQUENCES = (list, tuple, set, frozenset, deque)
_NAMESPACES = (argparse.Namespace, types.SimpleNamespace)


def is_repetitive(value: Any) -> bool:
    """Return whether a value would become many times larger if it was written as a tree, as in JSON.

    This takes time and memory in proportion to the size of the value in memory.
    """
    weights: dict[int, float] = {}
    total = 0.0

    def weigh(value: Any) -> float:
        nonlocal total
        children = _contents_of(value)
        if children is None:
            own = _own_weight(value)
            is_new = own > SMALL_WEIGHT and id(value) not in weights
            if is_new:
                weights[id(value)] = own
            total += own if is_new else min(own, SMALL_WEIGHT)
            return own
        total += 1
        known = weights.get(id(value))
        if known is not None:
            return known
        weights[id(value)] = math.inf  # stays if the value holds itself
        weights[id(value)] = weight = 1 + sum(map(weigh, children))
        return weight

    try:
        tree = weigh(value)
    except RecursionError:
        return True
    return tree > MAX_REPEATED * total + FREE_WEIGHT


def _contents_of(value: Any) -> Any:
    """Return an iterable of the contents of a container, or None for other values."""
    if isinstance(value, torch.Tensor):
        return None
    if isinstance(value, _SEQUENCES):
        return value
    if isinstance(value, Mapping):
        return (part for item in type(value).items(value) for part in item)
    if type(value) in _NAMESPACES:
        return vars(value).values()
    return None


def _own_weight(value: Any) -> int:
    if isinstance(value, (str, bytes, bytearray)):
        return 1 + len(value)
    return 1 + value.nbytes if isinstance(value, np.ndarray) else 1
