"""Destinations that share memory, and views that show the values in their memory with another sign."""

from __future__ import annotations

import pytest
import torch

import reshard
from reshard.errors import DestinationError
from reshard.planner.box import Box
from reshard.planner.chunk_reads import WantedBox
from reshard.storage.formats.detect import open_source
from reshard.storage.reading.read_tensors import ReadOptions, _Comparison, read_boxes
from reshard.storage.stores.memory import MemoryStore


def saved(**tensors: torch.Tensor) -> MemoryStore:
    store = MemoryStore()
    reshard.save(dict(tensors), store)
    return store


@pytest.mark.parametrize("stored", [torch.float32, torch.float64])
def test_a_view_with_negated_values_is_written_with_the_values_that_it_then_shows(stored: torch.dtype) -> None:
    """The imaginary part of a conjugated tensor stores its values with the other sign."""
    memory = torch.zeros(4, dtype=torch.complex64)
    destination = memory.conj().imag
    assert destination.is_neg()
    store = MemoryStore()
    reshard.save({"w": torch.arange(4, dtype=stored)}, store)
    reshard.load({"w": destination}, store)
    assert destination.tolist() == [0, 1, 2, 3]
    assert memory.imag.tolist() == [0, -1, -2, -3]


def test_a_conjugated_view_is_written_with_the_values_that_it_then_shows() -> None:
    memory = torch.zeros(2, dtype=torch.complex64)
    values = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
    store = MemoryStore()
    reshard.save({"w": values}, store)
    destination = memory.conj()
    reshard.load({"w": destination}, store)
    assert destination.tolist() == values.tolist()
    assert memory.tolist() == [1 - 2j, 3 + 4j]


@pytest.mark.parametrize("first", [torch.bfloat16, torch.float32])
def test_one_destination_of_two_names_is_refused_if_only_a_cast_makes_their_values_equal(first: torch.dtype) -> None:
    """1.001 rounds to 1 in bfloat16."""
    other = torch.float32 if first is torch.bfloat16 else torch.bfloat16
    values = {torch.bfloat16: torch.ones(4, dtype=torch.bfloat16), torch.float32: torch.full((4,), 1.001)}
    store = MemoryStore()
    reshard.save({"a": values[first], "b": values[other]}, store)
    tied = torch.zeros(4)
    with pytest.raises(DestinationError, match="different values"):
        reshard.load({"a": tied, "b": tied}, store)
    assert not tied.any()


def test_boxes_at_other_positions_are_not_equal() -> None:
    store = MemoryStore()
    reshard.save({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([1.0, 1.0])}, store)
    comparison = _Comparison(open_source(store), ReadOptions())
    first = WantedBox("a", Box((0,), (1,)))
    assert comparison.are_equal(first, WantedBox("b", Box((0,), (1,))))
    assert not comparison.are_equal(first, WantedBox("a", Box((1,), (1,))))
    assert not comparison.are_equal(WantedBox("a", Box((1,), (1,))), WantedBox("b", Box((0,), (1,))))


def test_two_boxes_of_one_tensor_are_not_read_into_one_memory() -> None:
    source = open_source(saved(w=torch.arange(4.0)))
    memory = torch.zeros(2)
    wants = [WantedBox("w", Box((0,), (2,))), WantedBox("w", Box((2,), (2,)))]
    with pytest.raises(DestinationError, match="the destinations of two parts of 'w' are the same memory"):
        read_boxes(source, wants, [memory, memory])
    assert not memory.any()
    read_boxes(source, [wants[0], wants[0]], [memory, memory])
    assert memory.tolist() == [0, 1]


def test_a_tensor_and_its_conjugate_are_not_one_destination() -> None:
    """The values of one name would be seen through the conjugate of the other one."""
    values = torch.tensor([1 + 2j, 3 - 4j])
    memory = torch.zeros(2, dtype=torch.complex64)
    with pytest.raises(DestinationError, match="share memory"):
        reshard.load({"a": memory, "b": memory.conj()}, saved(a=values, b=values))


def test_one_memory_with_other_strides_of_a_dimension_of_one_element_is_one_destination() -> None:
    values = torch.arange(4.0).reshape(1, 4)
    memory = torch.zeros(1, 4)
    other = memory.as_strided((1, 4), (1, 1))
    assert other.stride() != memory.stride()
    reshard.load({"a": memory, "b": other}, saved(a=values, b=values))
    assert memory.equal(values)
