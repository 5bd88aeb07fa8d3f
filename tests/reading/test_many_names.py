"""Reading one tensor or value does not cost more if the checkpoint has more of them."""

import functools
import io
import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import pytest
import torch

import reshard
from reshard.storage.stores.memory import MemoryStore


def number_of_calls(function: Callable[[], object]) -> int:
    """Return how many functions this thread calls."""
    calls = 0

    def count(_: FrameType, event: str, __: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


@functools.cache
def checkpoint_of(names: int, format: str) -> MemoryStore:
    state: dict[str, Any] = {f"layers.{i}.w": torch.randn(4).bfloat16() for i in range(names)}
    store, converted = MemoryStore(), MemoryStore()
    if format == "torch":
        file = io.BytesIO()
        torch.save(state, file)
        store.content["model.pt"] = file.getvalue()
        return store
    if format != "safetensors":
        state |= {f"values.{i}": {f"key {i}"} for i in range(names)}
    reshard.save(state, store)
    if format == "reshard":
        return store
    reshard.convert(store, converted, format=format)
    return converted


READS: dict[str, Callable[[reshard.Checkpoint], object]] = {
    "tensor": lambda checkpoint: checkpoint.read("layers.3.w"),
    "part": lambda checkpoint: checkpoint.read("layers.3.w", reshard.Box((1,), (2,))),
    "value": lambda checkpoint: checkpoint.read_value("values.3"),
}


@pytest.mark.parametrize("format", ["reshard", "dcp", "safetensors", "torch"])
@pytest.mark.parametrize("read", READS)
def test_a_read_costs_the_same_among_many_names(read: str, format: str) -> None:
    if read == "value" and format in ("safetensors", "torch"):
        return
    calls = []
    for names in (10, 2000):
        checkpoint = reshard.open(checkpoint_of(names, format))
        READS[read](checkpoint)
        calls.append(number_of_calls(partial(READS[read], checkpoint)))
    few, many = calls
    assert many < 1.2 * few


@pytest.mark.parametrize("format", ["reshard", "safetensors"])
def test_the_use_of_a_lazy_tensor_costs_the_same_among_many_names(format: str) -> None:
    calls = []
    for names in (10, 2000):
        checkpoint = reshard.open(checkpoint_of(names, format))
        with checkpoint.lazy() as weights:
            torch.zeros(4).copy_(weights["layers.2.w"]).sum().item()
            calls.append(number_of_calls(lambda: torch.zeros(4).copy_(weights["layers.3.w"]).sum().item()))
    few, many = calls
    assert many < 1.2 * few
