"""Casts between dtypes: which lose bits, which integers do not fit, and what counts as quantised."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

import reshard
from reshard.errors import DtypeError
from reshard.storage.stores.memory import MemoryStore
from reshard.storage.tensors.casts import check_integers, loses_bits

FLOATS = [
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float16,
    torch.bfloat16,
]


def saved(**tensors: torch.Tensor) -> MemoryStore:
    store = MemoryStore()
    reshard.save(dict(tensors), store)
    return store


@pytest.mark.parametrize("value", [65536, -65536, 2**20])
def test_a_power_of_two_above_the_range_does_not_become_infinite(value: int) -> None:
    """Its digits fit the precision of float16, but its size exceeds the range."""
    with pytest.raises(DtypeError, match=str(value)):
        check_integers("n", torch.tensor([1, value]), torch.float16)
    destination = torch.zeros(2, dtype=torch.float16)
    with pytest.raises(DtypeError, match=str(value)):
        reshard.load({"n": destination}, saved(n=torch.tensor([1, value])))
    assert destination.tolist() == [0, 0]


@pytest.mark.parametrize(("stored", "to"), list(permutations(FLOATS, 2)))
def test_casts_that_change_values_lose_bits(stored: torch.dtype, to: torch.dtype) -> None:
    """The ranges of the dtypes differ at both ends."""
    bits = torch.arange(256**stored.itemsize, dtype=torch.int64)
    values = bits.to({1: torch.uint8, 2: torch.uint16}[stored.itemsize]).view(stored)
    exact = values.float()
    exact = exact[exact.isfinite()]
    is_changed = not exact.to(to).float().equal(exact)
    assert loses_bits(stored, to) or not is_changed


@pytest.mark.parametrize("to", FLOATS)
def test_integers_that_a_cast_would_change_are_refused(to: torch.dtype) -> None:
    for value in range(-300, 300):
        values = torch.tensor([value])
        is_exact = values.to(to).float().item() == value
        try:
            check_integers("n", values, to)
        except DtypeError:
            assert not is_exact
        else:
            assert is_exact


def test_a_scale_is_not_its_own_scale() -> None:
    destination = torch.zeros(2)
    reshard.load({"m.weight_scale": destination}, saved(**{"m.weight_scale": torch.tensor([3, 4], dtype=torch.uint8)}))
    assert destination.tolist() == [3, 4]


def test_a_mask_beside_a_scale_is_not_quantised() -> None:
    stored = {"m.weight": torch.tensor([True, False]), "m.weight_scale": torch.ones(1)}
    destination = torch.zeros(2)
    reshard.load({"m.weight": destination}, saved(**stored))
    assert destination.tolist() == [1, 0]
