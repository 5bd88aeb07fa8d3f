"""Run the demo from the command line, with fewer steps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import reshard

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_demo_trains_serves_and_resumes(tmp_path: Path) -> None:
    uri = str(tmp_path / "checkpoint")
    done = subprocess.run(
        [sys.executable, "-m", "reshard.cli", "demo", f"--uri={uri}", "--steps=3"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for line in ("1. Train", "2. Load", "3. Resume", "logits: agree", "losses of the next 5 steps: agree"):
        assert line in done.stdout
    assert reshard.open(uri).read_value("step") == 3
