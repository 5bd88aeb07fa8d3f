"""Checkpoints that earlier versions wrote, which lie beside as files, are still read."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import reshard
from tests.checkpoints import state
from tests.storage.samples import same

FOLDER = Path(__file__).parent / "checkpoints"


def check_equal(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert same(found, expected)
    elif isinstance(expected, dict):
        assert sorted(map(str, found)) == sorted(map(str, expected))
        for key in expected:
            check_equal(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            check_equal(one, other)
    elif isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected)
    else:
        assert found == expected


@pytest.mark.parametrize("codec", ["zstd", "none"])
def test_format_version_3_is_read(codec: str) -> None:
    folder = FOLDER / f"v3-{codec}"
    assert struct.unpack_from("<I", (folder / "manifest.reshard").read_bytes(), 8) == (3,)
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
def test_format_version_3_is_converted(codec: str, tmp_path: Path) -> None:
    reshard.convert(FOLDER / f"v3-{codec}", tmp_path / "now")
    check_equal(reshard.open(tmp_path / "now").state_dict(), reshard.open(FOLDER / f"v3-{codec}").state_dict())
