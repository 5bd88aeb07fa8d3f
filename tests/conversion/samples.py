"""Shared by the tests of conversion: state dicts with every kind of entry, saved in every format."""

from __future__ import annotations

import fractions
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemWriter

import reshard
from reshard.storage.conversion import source_stream
from reshard.storage.conversion.targets import target
from reshard.storage.formats.detect import open_source
from reshard.storage.formats.native.manifest import MANIFEST_NAME
from reshard.storage.formats.safetensors_source import SAFETENSORS_DTYPES
from reshard.storage.tensors import splitting
from reshard.storage.tensors.state_dict import flatten
from tests.samples import same, sample

KIB = 1024
COMMITS = {"reshard": MANIFEST_NAME, "dcp": ".metadata", "safetensors": "model.safetensors.index.json"}
"""The object that commits a checkpoint, for each target."""

UNSAFE = ("rng", "third")
"""Values that torch.load(weights_only=True) refuses."""


def cut_small(monkeypatch: pytest.MonkeyPatch, piece: int = 32 * KIB, unit: int = 256 * KIB) -> None:
    """Make pieces and units of some KiB."""
    for module in (splitting, target, source_stream):
        monkeypatch.setattr(module, "MAX_PIECE_BYTES", piece)
    monkeypatch.setattr(target, "MIN_WORK_UNIT_BYTES", unit)


def tensors_of(dtypes: Any = SAFETENSORS_DTYPES) -> dict[str, Any]:
    """Return a nested state dict with tensors of every dtype, scalars, empty tensors, and large ones of many pieces."""
    torch.manual_seed(0)
    return {
        "dtypes": {dtype: sample(dtype, 3, 4) for dtype in dtypes},
        "scalars": {dtype: sample(dtype) for dtype in dtypes if not dtype.endswith("_x2")},
        "empty": {dtype: sample(dtype, 0, 4) for dtype in dtypes},
        "odd": sample("uint8", 3),
        "large": {"wide": torch.randn(130, 501), "tall": torch.randn(70000).to(torch.bfloat16), "row": torch.randn(1)},
        "layers": [torch.randn(40, 30, 50), torch.randn(2, 3, 4, 5)],
    }


def values_of() -> dict[str, Any]:
    """Return values that JSON can store, one that needs pickle, and one that weights_only=True refuses."""
    return {
        "step": 7,
        "lr": float("inf"),
        "betas": (0.9, 0.99),
        "groups": [{"params": [0, 1], "name": "a"}],
        "rng": np.arange(5),
        "size": torch.Size([2, 3]),
        "third": fractions.Fraction(1, 3),
    }


def by_name(state: dict[str, Any]) -> dict[str, Any]:
    """Return the leaves of a state dict by name."""
    return {name: leaf.value for name, leaf in flatten(state).items()}


def save_native(state: dict[str, Any], folder: Path) -> Path:
    reshard.save(state, folder, codec="none")
    return folder


def save_by_dcp(state: dict[str, Any], folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.save(state, storage_writer=FileSystemWriter(folder, sync_files=False, thread_count=2))
    return folder


def save_safetensors(state: dict[str, Any], folder: Path) -> Path:
    folder.mkdir()
    tensors = {name: value for name, value in by_name(state).items() if isinstance(value, torch.Tensor)}
    save_file({name: value for name, value in tensors.items() if "." in name}, folder / "a.safetensors")
    save_file({name: value for name, value in tensors.items() if "." not in name}, folder / "b.safetensors")
    return folder


def save_by_torch(state: dict[str, Any], folder: Path) -> Path:
    folder.mkdir()
    torch.save({key: value for key, value in state.items() if key not in UNSAFE}, folder / "state.pt")
    return folder


SOURCES: dict[str, Callable[[dict[str, Any], Path], Path]] = {
    "native": save_native,
    "dcp": save_by_dcp,
    "safetensors": save_safetensors,
    "torch.save": save_by_torch,
}


def assert_equal(found: Any, expected: Any) -> None:
    """Assert that two entries of a state dict are equal."""
    if isinstance(expected, torch.Tensor):
        assert same(found, expected)
    elif isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype
        assert found.tolist() == expected.tolist()
    else:
        assert type(found) is type(expected)
        assert found == expected


def assert_converted(location: Any, expected: dict[str, Any], format: str, **options: Any) -> None:
    """Assert that a checkpoint has exactly these entries."""
    checkpoint = reshard.open(location, **options)
    assert checkpoint.format == format
    assert {*checkpoint.tensors, *checkpoint.value_names} == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert checkpoint.tensors[name].shape == value.shape
            assert_equal(checkpoint.read(name), value)
        else:
            assert_equal(checkpoint.read_value(name, allow_pickle=True), value)
    if format == "reshard":
        assert checkpoint.verify() == []


def assert_clean(names: set[str], location: Any, format: str) -> None:
    """Assert that no journal, temporary file or orphaned data object is among the names at a location."""
    assert not {name for name in names if "reshard-convert" in name or name.endswith(".tmp")}
    if format == "reshard":
        kept = {name for name, _ in open_source(location).objects}
        assert {name for name in names if name.startswith("data/")} == kept


def names_in(folder: Path) -> set[str]:
    """Return the names of all files in a folder and its subfolders."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
