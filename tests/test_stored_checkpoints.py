"""Checkpoints that earlier versions wrote, stored in tests/checkpoints, can still be read."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

import reshard
from tests.checkpoints import state
from tests.samples import check_equal, same

FOLDER = Path(__file__).parent / "checkpoints"


@pytest.mark.parametrize("codec", ["zstd", "none"])
@pytest.mark.parametrize("version", [3, 4])
def test_an_older_format_version_is_read(version: int, codec: str) -> None:
    folder = FOLDER / f"v{version}-{codec}"
    assert struct.unpack_from("<I", (folder / "manifest.reshard").read_bytes(), 8) == (version,)
    expected = {**state.replicated(), "sharded": state.sharded()}
    checkpoint = reshard.open(folder)
    assert checkpoint.verify() == []
    check_equal(checkpoint.state_dict(), expected)
    layout = reshard.Layout({"tp": 3}, {"*.up": "colwise", "*.down": "rowwise"})
    assert same(checkpoint.load_rank(layout, 1)["sharded.down"], expected["sharded"]["down"][:, 86:172])
    destination = {"sharded": {name: torch.zeros_like(tensor) for name, tensor in state.sharded().items()}, "step": 0}
    reshard.load(destination, folder)
    check_equal(destination, {"sharded": state.sharded(), "step": 12})


@pytest.mark.parametrize("codec", ["zstd", "none"])
@pytest.mark.parametrize("version", [3, 4])
def test_an_older_format_version_is_converted_and_compared(version: int, codec: str, tmp_path: Path) -> None:
    old = FOLDER / f"v{version}-{codec}"
    reshard.convert(old, tmp_path / "now", codec=codec)
    check_equal(reshard.open(tmp_path / "now").state_dict(), reshard.open(old).state_dict())
    assert reshard.diff(old, tmp_path / "now") == []
