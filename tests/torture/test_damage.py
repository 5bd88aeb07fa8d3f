import pytest

from tests.torture.damage import accidents, falsehoods

pytestmark = pytest.mark.slow


def test_no_accident_leads_to_a_wrong_value() -> None:
    ended = accidents(600, seed=0)
    assert ended.total() == 600
    assert ended["CorruptCheckpointError"] > 320
    assert 0 < ended["right"] < 160, "damage outside of chunks, or in chunks that the state dict does not need"


def test_no_false_manifest_crashes_the_reader_or_exhausts_memory() -> None:
    ended = falsehoods(250, seed=0)
    assert ended.total() == 250
    assert ended["CorruptCheckpointError"] > 100
