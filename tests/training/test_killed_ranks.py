"""A rank is killed while the others wait for a requested save."""

from __future__ import annotations

import os
import signal
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

import reshard
from reshard.errors import RankError
from reshard.storage.training import requested_saves
from reshard.storage.training.requested_saves import STUCK_S
from tests.ranks import RankFailed, RankPool

pytestmark = pytest.mark.slow

WORLD = 4
SOON_S = 30
"""Much less than the timeout of the process group, and than the 10 minutes for which a rank waits for answers."""


def state() -> dict[str, Any]:
    return {"w": torch.ones(20, 30)}


def train_alone(manager: reshard.CheckpointManager) -> str:
    """Train without collectives until a save is made or fails."""
    for step in range(1, 100 * SOON_S):
        time.sleep(0.01)
        try:
            if manager.save(step, state()):
                return "saved"
        except RankError as error:
            return str(error)
    return "not saved"


def request_after_a_kill(folder: str, dying: int, requesting: int) -> None:
    group: Any = dist.new_group(timeout=timedelta(minutes=30))
    manager = reshard.CheckpointManager(folder, save_every=10_000, signals=(), process_group=group)
    dist.barrier()
    if dist.get_rank() == dying:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1)
    if dist.get_rank() == requesting:
        manager.save_now()
    raise AssertionError(f"found: {train_alone(manager)}")


@pytest.mark.parametrize(("dying", "requesting"), [(0, 1), (1, 0), (3, 2)])
def test_requested_save_names_the_rank_that_was_killed(tmp_path: Path, dying: int, requesting: int) -> None:
    with RankPool() as pool, pytest.raises(RankFailed) as failed:
        pool.run(WORLD, request_after_a_kill, str(tmp_path), dying, requesting, timeout_s=SOON_S)
    assert str(failed.value).count(f"because rank {dying} died or left") == WORLD - 1, str(failed.value)


def lose_the_store(folder: str, port: int, is_stopped: bool) -> None:
    """Rank 0 hosts the store of the process group. Its process is killed or stopped."""
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    manager = reshard.CheckpointManager(folder, save_every=10_000, signals=())
    pids: list[Any] = [None] * size
    dist.all_gather_object(pids, os.getpid())
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP if is_stopped else signal.SIGKILL)
    time.sleep(1)
    if rank == 1:
        manager.save_now()
        found = train_alone(manager)
        if is_stopped:
            os.kill(pids[0], signal.SIGKILL)
        raise AssertionError(f"found: {found}")
    raise AssertionError("did not request")


@pytest.mark.parametrize("is_stopped", [False, True], ids=["killed", "stopped"])
def test_request_is_not_lost_with_the_store(tmp_path: Path, is_stopped: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with RankPool() as pool, pytest.raises(RankFailed) as failed:
        pool.run(2, lose_the_store, str(tmp_path), port, is_stopped, timeout_s=SOON_S + STUCK_S)
    assert "found: a save was requested, but the" in str(failed.value), str(failed.value)


class SlowStore:
    """Answers each request after a while."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def __getattr__(self, method: str) -> Any:
        time.sleep(0.1)
        return getattr(self._store, method)


def save_with_a_slow_store(folder: str) -> str:
    with (
        patch.object(requested_saves, "client_of", SlowStore),
        patch.object(requested_saves, "STUCK_S", 0.3),
        reshard.CheckpointManager(folder, save_every=10_000, signals=()) as manager,
    ):
        manager.save_now()
        return train_alone(manager)


def test_a_slow_store_is_not_lost(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(2, save_with_a_slow_store, str(tmp_path), timeout_s=SOON_S) == ["saved", "saved"]
