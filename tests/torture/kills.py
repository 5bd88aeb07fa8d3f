"""Ranks are killed with SIGKILL at random moments of a save. The old or the new checkpoint must be complete.

In each round, three real ranks overwrite a checkpoint. One of them, all of them, or the coordinator around the commit
is killed, at a call of its store or after a random time. The checkpoint must then verify, be the result of a single
save, and be overwritten by the next round.
"""

from __future__ import annotations

import collections
import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import reshard
from reshard.storage.stores.local import LocalStore
from reshard.storage.stores.testing import Call, RecordingStore
from tests.ranks import RankFailed, RankPool

RANKS = 3
SHAPE = (96, 4096)
CALLS = 40
"""The approximate number of store calls of a rank in a save."""


def save_and_die(folder: str, value: float, kills: dict[int, tuple[str, int]]) -> None:
    """Save on this rank. If `kills` has it, it kills itself at the nth call of a method ("any": of any method)."""
    method, left = kills.get(dist.get_rank(), ("none", 0))

    def before(call: Call) -> None:
        nonlocal left
        if method in ("any", call.method):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    mesh = init_device_mesh("cpu", (RANKS,))
    state: dict[str, Any] = {
        "sharded": distribute_tensor(torch.full(SHAPE, value), mesh, [Shard(0)]),
        "replicated": torch.full((64, 64), value),
        "step": int(value),
    }
    reshard.save(state, RecordingStore(LocalStore(folder), before), codec="none", overwrite=True)


def saved_value(folder: Path) -> float:
    """Return the value of all tensors of the checkpoint. Raise AssertionError if it is not complete."""
    checkpoint = reshard.open(folder)
    assert checkpoint.verify() == []
    values = {float(value) for name in checkpoint.tensors for value in checkpoint.read(name).unique()}
    values.add(float(checkpoint.read_value("step")))
    assert len(values) == 1, f"a mixture of saves: {values}"
    return values.pop()


def how_to_kill(rng: random.Random) -> dict[int, tuple[str, int]]:
    """Draw the ranks to kill, and the method and the call at which each is killed."""
    kind = rng.choice(("one", "all", "before the commit", "after the commit"))
    if kind == "one":
        return {rng.randrange(RANKS): ("any", rng.randrange(CALLS))}
    if kind == "all":
        return {rank: ("any", rng.randrange(CALLS)) for rank in range(RANKS)}
    return {0: ("put" if kind == "before the commit" else "delete", 0)}


def rounds(count: int, seed: int, folder: Path, pool: RankPool) -> collections.Counter[str]:
    """Kill `count` saves, and count which checkpoint was left. Raise AssertionError if one was not complete."""
    rng = random.Random(seed)
    ended: collections.Counter[str] = collections.Counter()
    pool.run(RANKS, save_and_die, str(folder), 1.0, {})
    old = 1.0
    for number in range(count):
        new = old + 1
        by_clock = rng.random() < 0.3
        kills = {} if by_clock else how_to_kill(rng)
        timer = threading.Timer(rng.uniform(0.02, 0.25), pool.kill, [rng.sample(range(RANKS), rng.randint(1, RANKS))])
        if by_clock:
            timer.start()
        failure = ""
        try:
            pool.run(RANKS, save_and_die, str(folder), new, kills, timeout_s=60)
        except RankFailed as failed:
            failure = str(failed)
        finally:
            timer.cancel()
        # The timer may kill a rank before it has joined the group; torch then waits for it on the other ranks.
        assert by_clock or "did not answer" not in failure, "a live rank waits for a dead one"
        finished = not failure
        found = saved_value(folder)
        assert found == new if finished else found in (old, new), f"round {number}: {found} after saving {new}"
        if 0 in kills and kills[0][0] in ("put", "delete"):
            assert found == (old if kills[0][0] == "put" else new)
        ended["finished" if finished else "new" if found == new else "old"] += 1
        old = found
    pool.close()  # the timer may have killed a rank that had finished
    pool.run(RANKS, save_and_die, str(folder), 0.0, {})
    assert saved_value(folder) == 0.0
    return ended
