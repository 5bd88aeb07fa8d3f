"""Hostile inputs are read in separate processes with limits on memory and time, so that a fault cannot hang."""

import pytest

from tests.torture.grammars import FORMATS
from tests.torture.structure import rounds

pytestmark = pytest.mark.slow

COUNT = 80


def test_known_hostile_inputs_are_refused() -> None:
    assert rounds("known", 1, 0).total() > 180


@pytest.mark.parametrize("format", FORMATS)
def test_generated_inputs_are_read_or_refused(format: str) -> None:
    ended = rounds(format, COUNT, 0)
    assert ended.total() == COUNT
    assert ended["CorruptCheckpointError"] > COUNT // 4
    assert ended["read"] > 0
