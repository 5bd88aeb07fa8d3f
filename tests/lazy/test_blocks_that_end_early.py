"""Blocks in generators: loops that stop early, and torch modes that are left in another order than entered."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack, is_in_torch_dispatch_mode

import reshard
from reshard.errors import CheckpointError
from reshard.storage.lazy.weights import LazyWeights
from reshard.testing import MemoryStore

Weights = Generator[tuple[str, torch.Tensor], None, None]
VALUES = {"a": torch.arange(4.0) + 1, "b": torch.arange(4.0) + 5, "c": torch.arange(4.0) + 9}


@pytest.fixture
def store() -> MemoryStore:
    store = MemoryStore()
    reshard.save(VALUES, store, codec="none")
    return store


def weights_of(store: MemoryStore) -> Weights:
    with reshard.open(store).lazy() as weights:
        yield from weights.items()


def stop_with_break(weights: Weights, destinations: dict[str, torch.Tensor]) -> None:
    for name, tensor in weights:
        destinations[name].copy_(tensor)
        if name == "b":
            break


def stop_with_return(weights: Weights, destinations: dict[str, torch.Tensor]) -> None:
    for name, tensor in weights:
        destinations[name].copy_(tensor)
        if name == "b":
            return


def stop_with_zip(weights: Weights, destinations: dict[str, torch.Tensor]) -> None:
    for _, (name, tensor) in zip(range(2), weights, strict=False):
        destinations[name].copy_(tensor)


def stop_with_islice(weights: Weights, destinations: dict[str, torch.Tensor]) -> None:
    for name, tensor in itertools.islice(weights, 2):
        destinations[name].copy_(tensor)


@pytest.mark.parametrize("stop", [stop_with_break, stop_with_return, stop_with_zip, stop_with_islice])
def test_loop_that_stops_early_fills_what_was_copied(
    store: MemoryStore, stop: Callable[[Weights, dict[str, torch.Tensor]], None]
) -> None:
    destinations = {name: torch.zeros(4) for name in VALUES}
    stop(weights_of(store), destinations)
    assert torch.equal(destinations["a"], VALUES["a"])
    assert torch.equal(destinations["b"], VALUES["b"])
    assert not destinations["c"].any()
    assert _get_current_function_mode_stack() == []
    assert _get_current_dispatch_mode_stack() == []


def stop_without_data(store: MemoryStore, destination: torch.Tensor) -> tuple[LazyWeights, dict[str, bytes]]:
    """Stop a loop early after its first copy, which fails. Return the lazy tensors, and the objects that are gone."""
    weights = reshard.open(store).lazy()
    gone = {name: store.content.pop(name) for name in list(store.content) if "manifest" not in name}

    def iterate() -> Weights:
        with weights:
            yield from weights.items()

    iterator = iterate()
    destination.copy_(next(iterator)[1])
    with pytest.raises(CheckpointError):
        iterator.close()
    return weights, gone


def test_copies_that_fail_when_a_loop_stops_early_are_tried_again(store: MemoryStore) -> None:
    destination, other = torch.zeros(4), torch.ones(4)
    weights, gone = stop_without_data(store, destination)
    with pytest.raises(CheckpointError):
        destination.sum()
    assert other.sum() == 4
    store.content |= gone
    assert torch.equal(destination + 0, VALUES["a"])
    outside = torch.zeros(4)
    values = outside.numpy()
    outside.copy_(weights["b"])  # the block has ended, so it is executed at once
    assert values.tolist() == VALUES["b"].tolist()
    with weights:
        outside.copy_(weights["c"])
        assert not np.array_equal(values, VALUES["c"].numpy())
    assert torch.equal(outside, VALUES["c"])
    assert _get_current_function_mode_stack() == []
    assert _get_current_dispatch_mode_stack() == []


def test_copies_after_a_loop_that_stopped_early_are_executed_at_once(store: MemoryStore) -> None:
    destination, later = torch.zeros(4), torch.zeros(4)
    lazy, gone = stop_without_data(store, destination)
    store.content |= gone
    views = destination.numpy(), later.numpy()  # the use of a destination tries again
    later.copy_(lazy["b"])
    assert [view.tolist() for view in views] == [VALUES["a"].tolist(), VALUES["b"].tolist()]
    with lazy:  # removes the modes of the block that a mode has ended
        pass
    assert _get_current_function_mode_stack() == []
    assert _get_current_dispatch_mode_stack() == []


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **kwargs or {})


class Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **kwargs or {})


def test_a_block_that_ends_inside_other_modes_leaves_them(store: MemoryStore) -> None:
    destination, weights = torch.zeros(4), weights_of(store)
    first, functions, dispatches = next(weights)[1], Functions(), Dispatches()  # type: ignore[no-untyped-call]
    with torch.device("meta"), functions, dispatches:
        destination.copy_(first)
        for _ in weights:
            pass
        assert torch.empty(1).device.type == "meta"
        assert _get_current_function_mode_stack()[-1] is functions
        assert len(_get_current_function_mode_stack()) == 2
        assert _get_current_dispatch_mode_stack() == [dispatches]
    assert _get_current_function_mode_stack() == []
    assert _get_current_dispatch_mode_stack() == []
    assert is_in_torch_dispatch_mode() is False
    assert torch.equal(destination, VALUES["a"])


def test_blocks_may_end_in_the_order_in_which_they_began(store: MemoryStore) -> None:
    one, two = weights_of(store), weights_of(store)
    destinations = torch.zeros(4), torch.zeros(4)
    lazy = [next(one)[1], next(two)[1]]
    for destination, tensor in zip(destinations, lazy, strict=True):
        destination.copy_(tensor)
    one.close()
    destinations[1].mul_(2)
    two.close()
    assert torch.equal(destinations[0], VALUES["a"])
    assert torch.equal(destinations[1], VALUES["a"] * 2)
    assert _get_current_function_mode_stack() == []
