"""Saving from and loading to an accelerator. The same tests also run on the CPU. Without an accelerator, only there."""

import contextlib
import gc
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import reshard

ACCELERATOR = torch.accelerator.current_accelerator(check_available=True)
NEEDS_ACCELERATOR = pytest.mark.skipif(ACCELERATOR is None, reason="this machine has no accelerator")
DEVICES = ["cpu", pytest.param(str(ACCELERATOR), marks=NEEDS_ACCELERATOR)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def busy(device: torch.device) -> None:
    """Start some tenths of a second of work on the device, without waiting for it."""
    matrix = torch.eye(4096 if device.type != "cpu" else 64, device=device)
    for _ in range(200):
        matrix = matrix @ matrix


@pytest.mark.parametrize("codec", ["zstd", "none"])
@pytest.mark.parametrize("budget_bytes", [None, 1 << 20])
def test_tensors_on_a_device_are_saved_and_loaded(
    device: torch.device, codec: str, budget_bytes: int | None, tmp_path: Path
) -> None:
    """Under the small budget, no large tensor is staged in host memory as a whole."""
    values = {
        "float32": torch.randn(1024, 700, device=device),
        "bfloat16": torch.randn(2048, 512, device=device).bfloat16(),
        "complex": torch.randn(64, 64, dtype=torch.complex64, device=device).conj(),
        "integers": torch.arange(100_000, device=device),
        "mask": torch.rand(300, 7, device=device) < 0.5,
        "scalar": torch.tensor(3.0, device=device),
        "view": torch.randn(512, 1024, device=device).t()[::2],
    }
    reshard.save(values, tmp_path, codec=codec, budget_bytes=budget_bytes)
    loaded = {name: torch.zeros_like(tensor) for name, tensor in values.items()}
    rows = torch.zeros(1024, 512, device=device)
    loaded["view"] = rows[::2]
    reshard.load(loaded, tmp_path, budget_bytes=budget_bytes)
    for name, tensor in loaded.items():
        assert tensor.device.type == device.type
        assert tensor.equal(values[name]), name
    assert not rows[1::2].any()


def test_load_casts_float32_to_bfloat16(device: torch.device, tmp_path: Path) -> None:
    values = torch.randn(1000, 300, device=device)
    reshard.save({"w": values}, tmp_path)
    loaded = torch.zeros(1000, 300, dtype=torch.bfloat16, device=device)
    reshard.load({"w": loaded}, tmp_path)
    assert loaded.equal(values.bfloat16())


@pytest.mark.parametrize("budget_bytes", [None, 1 << 20])
def test_save_and_load_wait_for_pending_work_on_the_device(
    device: torch.device, budget_bytes: int | None, tmp_path: Path
) -> None:
    """A save waits for pending writes to the tensors. A load does too, so that they cannot overwrite its values."""
    values = torch.zeros(1024, 1024, device=device)
    busy(device)
    values += 1
    reshard.save({"w": values}, tmp_path)
    busy(device)
    values += 1
    reshard.load({"w": values}, tmp_path, budget_bytes=budget_bytes)
    doubled = values * 2
    assert (values == 1).all()
    assert (doubled == 2).all()


def test_save_and_load_wait_for_the_current_stream(device: torch.device, tmp_path: Path) -> None:
    with contextlib.nullcontext() if device.type == "cpu" else torch.Stream(device):
        test_save_and_load_wait_for_pending_work_on_the_device(device, None, tmp_path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_dcp_saves_and_loads_device_tensors(device: torch.device, tmp_path: Path) -> None:
    state: dict[str, Any] = {"w": torch.randn(512, 512, device=device), "step": 3}
    kept = state["w"].clone()
    saved = dcp.async_save(state, storage_writer=reshard.StorageWriter(tmp_path), no_dist=True)
    state["w"].zero_()
    assert isinstance(saved, Future)
    saved.result()
    loaded: dict[str, Any] = {"w": torch.zeros(512, 512, device=device), "step": 0}
    dcp.load(loaded, storage_reader=reshard.StorageReader(tmp_path), no_dist=True)
    assert loaded["w"].equal(kept)
    assert loaded["step"] == 3


@NEEDS_ACCELERATOR
def test_no_device_memory_is_kept(tmp_path: Path) -> None:
    device = torch.device(str(ACCELERATOR))
    values = {f"w{i}": torch.randn(1024, 1024, device=device) for i in range(4)}
    gc.collect()
    before = torch.accelerator.memory_allocated(device)
    reshard.save(values, tmp_path)
    reshard.load(values, tmp_path)
    assert torch.accelerator.memory_allocated(device) <= before
