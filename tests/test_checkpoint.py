"""What `reshard.open` returns: a collection of names that can be closed, and read to any device within a budget."""

from __future__ import annotations

import copy
import glob
import os
import pickle
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

import reshard
from reshard.errors import ArgumentError, CorruptCheckpointError, DestinationError, StoreError
from reshard.planner.layout import Layout, Mesh, Shard
from reshard.storage.stores.base import Capabilities
from reshard.storage.stores.memory import MemoryStore

STATE: dict[str, Any] = {"w": torch.arange(24.0).reshape(6, 4), "step": 3, "text": "x" * 3000}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    reshard.save(STATE, tmp_path / "c", codec="none")
    return tmp_path / "c"


def open_files(folder: Path) -> list[str]:
    links = (os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd"))
    return [link for link in links if link.startswith(str(folder))]


def test_a_checkpoint_is_a_collection_of_names(folder: Path) -> None:
    checkpoint = reshard.open(folder)
    assert sorted(checkpoint) == sorted(checkpoint.keys()) == ["step", "text", "w"]
    assert len(checkpoint) == 3
    assert "w" in checkpoint
    assert "v" not in checkpoint
    assert 5 not in checkpoint


def test_the_end_of_a_with_block_closes_files(folder: Path) -> None:
    with reshard.open(folder) as checkpoint:
        assert checkpoint.read("w").equal(STATE["w"])
        assert open_files(folder)
    assert not open_files(folder)
    checkpoint.close()


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.read("w"),
        lambda c: c.read_value("step"),
        lambda c: c.state_dict(),
        lambda c: c.verify(),
        lambda c: c.info,
        lambda c: c.location,
        lambda c: c.keys(),
        lambda c: len(c),
        lambda c: "w" in c,
        lambda c: c.plan(Layout(Mesh(("tp",), (1,)), {})),
    ],
)
def test_a_closed_checkpoint_refuses_every_call(call: Any, folder: Path) -> None:
    checkpoint = reshard.open(folder)
    checkpoint.close()
    with pytest.raises(ArgumentError, match=r"the checkpoint is closed: open it again with reshard\.open"):
        call(checkpoint)
    assert repr(checkpoint) == "Checkpoint(closed)"


def test_a_store_of_the_caller_is_not_closed() -> None:
    class Closable(MemoryStore):
        def __init__(self) -> None:
            super().__init__()
            self.closed = False
            self.capabilities = Capabilities(close=self._close)

        def _close(self) -> None:
            self.closed = True

    store = Closable()
    reshard.save(STATE, store)
    with reshard.open(store) as checkpoint:
        assert checkpoint.read("w").equal(STATE["w"])
    assert not store.closed


def test_tensors_are_made_on_the_device_that_is_given(folder: Path) -> None:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert device is not None
    layout = Layout(Mesh(("tp",), (2,)), {"w": Shard(0)})
    with reshard.open(folder) as checkpoint:
        found = [
            checkpoint.read("w", device=device),
            checkpoint.state_dict(device=str(device))["w"],
            torch.cat([checkpoint.load_rank(layout, rank, device=device)["w"] for rank in range(2)]),
        ]
        assert all(tensor.device.type == device.type and tensor.cpu().equal(STATE["w"]) for tensor in found)
        with pytest.raises(DestinationError, match="out is on cpu, but device='meta' was passed"):
            checkpoint.read("w", out=torch.empty(6, 4), device="meta")


@pytest.mark.parametrize("device", ["meta"])
def test_a_device_without_memory_is_refused(device: str, folder: Path) -> None:
    with reshard.open(folder) as checkpoint, pytest.raises(DestinationError, match="'w'"):
        checkpoint.read("w", device=device)


def test_a_budget_that_objects_exceed_is_refused_before_anything_is_read(folder: Path) -> None:
    with reshard.open(folder) as checkpoint:
        for call in (
            lambda: checkpoint.read_value("text", budget_bytes=1000),
            lambda: checkpoint.state_dict(budget_bytes=1000),
            lambda: reshard.load({"text": "", "step": 0}, folder, budget_bytes=1000),
            lambda: reshard.convert(folder, folder.parent / "d", format="dcp", budget_bytes=1000),
        ):
            with pytest.raises(ArgumentError, match=r"take \d+ bytes, but budget_bytes is 1000. The largest is 'text'"):
                call()
        assert checkpoint.read_value("text", budget_bytes=10_000) == STATE["text"]
        assert checkpoint.read("w", budget_bytes=1000, max_over_read=0.5).equal(STATE["w"])
        assert checkpoint.state_dict(budget_bytes=10_000)["step"] == 3
    assert not (folder.parent / "d").exists()


def test_a_pickled_checkpoint_is_opened_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    checkpoint = reshard.open(folder.name)
    data = pickle.dumps(checkpoint)
    monkeypatch.chdir("/")
    for again in (pickle.loads(data), copy.deepcopy(checkpoint)):  # noqa: S301
        assert again.read("w").equal(STATE["w"])
    torch.save({"w": torch.ones(2)}, tmp_path / "m.pt")
    of_uri = pickle.loads(pickle.dumps(reshard.open(f"file:{tmp_path / 'm.pt'}")))  # noqa: S301
    assert of_uri.read("w").equal(torch.ones(2))
    of_file = pickle.loads(pickle.dumps(reshard.open(tmp_path / "m.pt")))  # noqa: S301
    assert of_file.read("w").equal(torch.ones(2))
    reshard.save(STATE, folder, overwrite=True)
    with pytest.raises(CorruptCheckpointError, match="was replaced after it had been pickled"):
        pickle.loads(data)  # noqa: S301


def test_a_box_must_have_integers(folder: Path) -> None:
    with pytest.raises(ArgumentError, match=r"box must be a reshard\.Box of integers"):
        reshard.open(folder).read("w", reshard.Box((0.5, 0), (1, 1)))  # type: ignore[arg-type]
    assert reshard.open(folder).read("w", reshard.Box((cast(int, np.int64(1)), 0), (1, 1))).item() == 4


def test_names_with_brackets_can_be_selected() -> None:
    store = MemoryStore()
    reshard.save({name: torch.ones(1) for name in ("q[0]", "q0", "q?", "qa")}, store)
    checkpoint = reshard.open(store)
    for name in ("q[0]", "q?"):
        assert list(checkpoint.state_dict(include=glob.escape(name))) == [name]
    assert set(checkpoint.state_dict(exclude=glob.escape("q[0]"))) == {"q0", "q?", "qa"}


def test_find_checkpoints_accepts_a_file(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "m.pt")
    (found,) = reshard.find_checkpoints(tmp_path / "m.pt")
    assert (found.format, found.is_complete) == ("torch", True)
    assert reshard.find_checkpoints(tmp_path / "none.pt") == []


@pytest.mark.parametrize("name", ["link", "link/below"])
def test_a_save_to_a_link_without_a_target_names_the_link(tmp_path: Path, name: str) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(StoreError, match="link is a symbolic link to nowhere, which does not exist"):
        reshard.save(STATE, tmp_path / name)


def test_a_path_with_a_nul_character_is_refused() -> None:
    for call in (lambda: reshard.open("a\0b"), lambda: reshard.save(STATE, "a\0b")):
        with pytest.raises(ArgumentError, match="cannot contain a NUL character"):
            call()
