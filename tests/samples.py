"""Tensors of every dtype, and helpers for tests of checkpoints in other formats."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import reshard
from reshard.planner.entries import ITEMSIZES
from reshard.storage.tensors.dtypes import as_array, as_bytes, torch_dtype


def sample(dtype: str, *shape: int) -> torch.Tensor:
    """Return a tensor with random bits."""
    bits = torch.randint(0, 256, (*shape, ITEMSIZES[dtype]), dtype=torch.uint8)
    return bits[..., 0] > 127 if dtype == "bool" else bits.view(torch_dtype(dtype))[..., 0]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors have the same dtype, shape and bits."""
    return a.dtype == b.dtype and a.shape == b.shape and bytes(as_bytes(as_array(a))) == bytes(as_bytes(as_array(b)))


def check_equal(found: Any, expected: Any) -> None:
    """Check that two state dicts have the same values, keys and types at any depth."""
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert same(found, expected)
    elif isinstance(expected, dict):
        assert {(type(key), key) for key in found} == {(type(key), key) for key in expected}
        for key in expected:
            check_equal(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            check_equal(one, other)
    elif isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected)
    else:
        assert found == expected


def assert_holds(checkpoint: reshard.Checkpoint, tensors: Mapping[str, torch.Tensor]) -> None:
    """Check that a checkpoint has exactly these tensors, with correct metadata and values."""
    assert set(checkpoint.tensors) == set(tensors)
    for name, values in tensors.items():
        info = checkpoint.tensors[name]
        assert (info.shape, info.dtype) == (tuple(values.shape), values.dtype), name
        assert same(checkpoint.read(name), values), name


def boxes(shape: tuple[int, ...]) -> Iterator[reshard.Box]:
    """Return boxes of a tensor: all of it, nothing of it, a row, a column, an inner part, and the corners."""
    extents = [[(0, n), (n // 2, 0), (n // 3, 1), (n // 4, max(1, n // 2))] for n in shape]
    for row in itertools.product(*extents):
        yield reshard.Box(tuple(offset for offset, _ in row), tuple(size for _, size in row))
    yield reshard.Box(tuple(n - 1 for n in shape), (1,) * len(shape))


class Runs:
    """A value whose unpickling calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


def running(function: Any, *arguments: Any, protocol: int = 4) -> bytes:
    """Return a pickle that calls a function."""
    return pickle.dumps(Runs(function, *arguments), protocol)


@dataclass(frozen=True)
class Custom:
    """A value that only pickle can store."""

    value: int
