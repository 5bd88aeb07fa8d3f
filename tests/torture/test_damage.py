from tests.torture.damage import accidents, lies


def test_no_accident_passes_a_wrong_value() -> None:
    ended = accidents(1500, seed=0)
    assert ended.total() == 1500
    assert ended["CorruptCheckpointError"] > 800
    assert 0 < ended["right"] < 400, "bytes that no chunk has, or that this state dict does not ask for"


def test_no_lie_crashes_the_reader_or_takes_its_memory() -> None:
    ended = lies(500, seed=0)
    assert ended.total() == 500
    assert ended["CorruptCheckpointError"] > 200
