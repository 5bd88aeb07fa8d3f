"""Arguments of a wrong type raise an error that says what to pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

import reshard
from reshard.errors import ArgumentError, LayoutError, MissingTensorError
from reshard.testing import MemoryStore


def saved() -> MemoryStore:
    store = MemoryStore()
    reshard.save({"w": torch.ones(4, 4), "step": 3}, store)
    return store


CALLS: dict[str, tuple[Callable[[MemoryStore], Any], type[Exception], str]] = {
    "gc": (reshard.gc, ArgumentError, "expected a path or a URI, got"),  # type: ignore[dict-item]
    "find": (reshard.find_checkpoints, ArgumentError, "expected a path or a URI, got"),  # type: ignore[dict-item]
    "class": (lambda _: reshard.Layout(2, {"w": Shard}), LayoutError, r"pass an instance, such as Shard\(0\)"),  # type: ignore[dict-item]
    "rules": (lambda _: reshard.Layout(2, ["w"]), LayoutError, "rules must map patterns"),  # type: ignore[arg-type]
    "plan": (lambda store: reshard.open(store).plan(2), ArgumentError, "layout must be a reshard.Layout, got 2"),  # type: ignore[arg-type]
    "rank": (
        lambda store: reshard.open(store).load_rank(reshard.Layout(2), "0"),  # type: ignore[arg-type]
        LayoutError,
        "a rank must be an integer from 0 to 1, got '0'",
    ),
    "value": (
        lambda store: reshard.open(store).plan(reshard.Layout(2), include="step"),
        MissingTensorError,
        "'step' is a value, not a tensor",
    ),
}


WRONG_GROUP = r"process_group must be a torch\.distributed\.ProcessGroup or None, got 3"
GROUP_CALLS: dict[str, tuple[Callable[[MemoryStore], Any], type[Exception], str]] = {
    f"group of {name}": (call, ArgumentError, WRONG_GROUP)
    for name, call in {
        "save": lambda _: reshard.save({"w": torch.ones(1)}, MemoryStore(), process_group=3),  # type: ignore[arg-type]
        "load": lambda store: reshard.load({"w": torch.ones(4, 4)}, store, process_group=3),  # type: ignore[arg-type]
        "convert": lambda store: reshard.convert(store, "unused", format="torch", process_group=3),  # type: ignore[arg-type]
        "async_save": lambda _: reshard.async_save({"w": torch.ones(1)}, MemoryStore(), process_group=3),  # type: ignore[arg-type]
    }.items()
}


PROGRESS_CALLS: dict[str, tuple[Callable[[MemoryStore], Any], type[Exception], str]] = {
    f"progress of {name}": (call, ArgumentError, "progress must be True, False or a function, got 'bar'")
    for name, call in {
        "save": lambda _: reshard.save({"w": torch.ones(1)}, MemoryStore(), progress="bar"),  # type: ignore[arg-type]
        "load": lambda store: reshard.load({"w": torch.ones(4, 4)}, store, progress="bar"),  # type: ignore[arg-type]
        "convert": lambda store: reshard.convert(store, "unused", progress="bar"),  # type: ignore[arg-type]
        "load_rank": lambda store: reshard.open(store).load_rank(reshard.Layout(1), 0, progress="bar"),  # type: ignore[arg-type]
        "state_dict": lambda store: reshard.open(store).state_dict(progress="bar"),  # type: ignore[arg-type]
        "lazy": lambda store: reshard.open(store).lazy(progress="bar"),  # type: ignore[arg-type]
        "verify": lambda store: reshard.open(store).verify(progress="bar"),  # type: ignore[arg-type]
    }.items()
}


OVER_READ_CALLS: dict[str, tuple[Callable[[MemoryStore], Any], type[Exception], str]] = {
    f"over-read of {name}": (call, ArgumentError, "max_over_read must be a number of 0 or more")
    for name, call in {
        "load": lambda store: reshard.load({}, store, max_over_read=-1),
        "lazy": lambda store: reshard.open(store).lazy(max_over_read=-1),
        "load_rank": lambda store: reshard.open(store).load_rank(reshard.Layout(1), 0, max_over_read=-1),
        "state_dict": lambda store: reshard.open(store).state_dict(max_over_read=-1),
        "read": lambda store: reshard.open(store).read("w", max_over_read=-1),
        "plan": lambda store: reshard.open(store).plan(reshard.Layout(1), max_over_read=-1),
    }.items()
}


WRONG_CALLS = CALLS | GROUP_CALLS | PROGRESS_CALLS | OVER_READ_CALLS


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_wrong_arguments_raise_an_error_that_says_what_to_pass(case: str) -> None:
    call, error, message = WRONG_CALLS[case]
    with pytest.raises(error, match=message):
        call(saved())


def test_a_layout_accepts_placements_of_torch() -> None:
    layout = reshard.Layout({"dp": 2, "tp": 2}, {"a": [Replicate(), Shard(0)], "b": {"tp": Shard(-1)}, "c": Shard(1)})
    boxes = [layout.local(name, (4, 4), rank=3).boxes[0] for name in "abc"]
    assert boxes == [reshard.Box((2, 0), (2, 4)), reshard.Box((0, 2), (4, 2)), reshard.Box((0, 2), (4, 2))]
