import os
from pathlib import Path

import pytest

from reshard.storage import resources


def test_the_ranks_of_a_machine_share_its_cores_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "_available", lambda: 64 * 1024**3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert (resources.default_budget(), resources.default_threads()) == (2 * 1024**3, 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert (resources.default_budget(), resources.default_threads()) == (256 * 1024**2, 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert (resources.default_budget(), resources.default_threads()) == (64 * 1024**2, 1)


def test_the_budget_is_a_tenth_of_what_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(resources, "_available", lambda: 10 * 1024**3)
    assert resources.default_budget() == 1024**3


def test_what_is_available_is_less_than_what_the_machine_has() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < resources._available() <= total
