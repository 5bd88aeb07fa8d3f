from pathlib import Path

import pytest

from tests.ranks import RankPool
from tests.torture.kills import rounds

pytestmark = pytest.mark.slow


def test_a_killed_save_leaves_the_old_checkpoint_or_the_new(tmp_path: Path) -> None:
    with RankPool() as pool:
        ended = rounds(24, 0, tmp_path, pool)
    assert ended.total() == 24
    assert ended["old"] > 5
    assert ended["new"] > 0
