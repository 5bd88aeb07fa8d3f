import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import reshard
from reshard.errors import ArgumentError
from reshard.storage.runtime import limits


def test_the_ranks_of_a_machine_share_its_cores_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "available_bytes", lambda: 64 * 1024**3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert (limits.default_budget(), limits.default_threads()) == (2 * 1024**3, 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert (limits.default_budget(), limits.default_threads()) == (256 * 1024**2, 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert (limits.default_budget(), limits.default_threads()) == (64 * 1024**2, 1)


def test_the_budget_is_a_tenth_of_the_available_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(limits, "available_bytes", lambda: 10 * 1024**3)
    assert limits.default_budget() == 1024**3


def test_available_memory_is_at_most_that_of_the_machine() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < limits.available_bytes() <= total


@pytest.mark.parametrize("given", ["", " ", "1", " 1 "])
def test_the_default_number_of_local_ranks_is_one(given: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", given)
    assert limits.local_ranks() == 1
    reshard.save({"w": torch.ones(3)}, tmp_path / "x")
    assert reshard.open(tmp_path / "x").read("w").tolist() == [1, 1, 1]


@pytest.mark.parametrize("given", ["0", "-1", "two", "1.5", "8 ranks", "0x8", "²", "None"])
def test_an_invalid_number_of_local_ranks_raises_argument_error(
    given: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reshard.save({"w": torch.ones(3)}, tmp_path / "x")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", given)
    calls = (
        lambda: limits.default_threads(),
        lambda: limits.default_budget(),
        lambda: reshard.save({"w": torch.ones(3)}, tmp_path / "y"),
        lambda: reshard.load({"w": torch.ones(3)}, tmp_path / "x"),
    )
    for call in calls:
        with pytest.raises(ArgumentError, match=f"LOCAL_WORLD_SIZE must be .*, got {re.escape(repr(given))}"):
            call()
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize("budget", [0, -1, -(2**40), 1.5, 2e9, float("nan"), "1GB", True, [1]])
def test_an_invalid_budget_raises_argument_error(budget: Any, tmp_path: Path) -> None:
    reshard.save({"w": torch.ones(3)}, tmp_path / "x")
    w = torch.zeros(3)
    calls: tuple[Callable[[], object], ...] = (
        lambda: reshard.save({"w": w}, tmp_path / "y", budget_bytes=budget),
        lambda: reshard.load({"w": w}, tmp_path / "x", budget_bytes=budget),
        lambda: reshard.convert(tmp_path / "x", tmp_path / "y", budget_bytes=budget),
        lambda: reshard.StorageWriter(tmp_path / "y", budget_bytes=budget),
        lambda: reshard.StorageReader(tmp_path / "x", budget_bytes=budget),
    )
    for call in calls:
        with pytest.raises(ArgumentError, match=f"budget_bytes must be .*, got {re.escape(repr(budget))}"):
            call()
    assert not (tmp_path / "y").exists()
    assert not w.any()


@pytest.mark.parametrize("budget", [None, 1, 10_000, 2**40, np.int64(10_000)])
def test_any_positive_budget_works(budget: Any, tmp_path: Path) -> None:
    values = torch.randn(50, 40)
    reshard.save({"w": values}, tmp_path / "x", budget_bytes=budget)
    loaded = {"w": torch.zeros(50, 40)}
    reshard.load(loaded, tmp_path / "x", budget_bytes=budget)
    assert loaded["w"].equal(values)
    reshard.convert(tmp_path / "x", tmp_path / "y", budget_bytes=budget)
