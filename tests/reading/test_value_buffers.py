"""The sizes of values are checked before memory is allocated for them."""

from __future__ import annotations

from pathlib import Path

import pytest

import reshard
from reshard.errors import ArgumentError, CorruptCheckpointError
from reshard.storage.reading import value_buffers
from reshard.storage.stores.memory import MemoryStore


def test_values_that_exceed_the_budget_together_are_refused(tmp_path: Path) -> None:
    reshard.save({"a": "x" * 3000, "b": "y" * 3000}, tmp_path)
    state = {"a": "", "b": ""}
    with pytest.raises(ArgumentError, match="pass a budget_bytes of at least"):
        reshard.load(state, tmp_path, budget_bytes=5000)
    assert state == {"a": "", "b": ""}


def test_values_larger_than_any_that_can_be_saved_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The metadata may claim any size, and the buffer of a value is allocated at once."""
    store = MemoryStore()
    reshard.save({"v": "x" * 1000}, store)
    monkeypatch.setattr(value_buffers, "MAX_VALUE_BYTES", 100)
    with pytest.raises(CorruptCheckpointError, match="a value has 100 bytes at most"):
        reshard.load({"v": ""}, store)
