import os
from pathlib import Path

import pytest

from tests.torture.managed_kills import rounds

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("RESHARD_MANAGED_KILLS", "12"))


@pytest.mark.timeout(60 * KILLS)
def test_killed_training_leaves_complete_checkpoints(tmp_path: Path) -> None:
    ended = rounds(KILLS, 0, tmp_path)
    assert ended["killed, with a new checkpoint"] > 0
