"""Ranks killed (SIGKILL) at random moments of a save: the place holds the old checkpoint whole, or the new one.

Each round overwrites a checkpoint with another one, from three real ranks, and kills one of them, all, or the
coordinator around the commit; at a call of its store, or by the clock. Then what is there must verify, be of one save,
and be overwritten by the next.
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
"""About as many calls as a rank makes of its store in a save."""


def save_and_die(folder: str, value: float, kills: dict[int, tuple[str, int]]) -> None:
    """Save on this rank, which kills itself at the nth call of a method ("any" counts all) if `kills` names it."""
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


def what_is_there(folder: Path) -> float:
    """The value that the checkpoint holds throughout. Raises AssertionError where it is not whole."""
    checkpoint = reshard.open(folder)
    assert checkpoint.verify() == []
    values = {float(value) for name in checkpoint.tensors for value in checkpoint.read(name).unique()}
    values.add(float(checkpoint.read_value("step")))
    assert len(values) == 1, f"a mixture of saves: {values}"
    return values.pop()


def how_to_kill(rng: random.Random) -> dict[int, tuple[str, int]]:
    kind = rng.choice(("one", "all", "before the commit", "after the commit"))
    if kind == "one":
        return {rng.randrange(RANKS): ("any", rng.randrange(CALLS))}
    if kind == "all":
        return {rank: ("any", rng.randrange(CALLS)) for rank in range(RANKS)}
    return {0: ("put" if kind == "before the commit" else "delete", 0)}


def rounds(count: int, seed: int, folder: Path, pool: RankPool) -> collections.Counter[str]:
    """Kill `count` saves, and count what was there after each. Raises AssertionError where it was not whole."""
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
        # (The clock may kill a rank before it has joined the group, where the others wait for it by torch's own rules.)
        assert by_clock or "did not answer" not in failure, "a rank that lives waits for one that is dead"
        finished = not failure
        found = what_is_there(folder)
        assert found == new if finished else found in (old, new), f"round {number}: {found} after saving {new}"
        if 0 in kills and kills[0][0] in ("put", "delete"):
            assert found == (old if kills[0][0] == "put" else new)
        ended["finished" if finished else "new" if found == new else "old"] += 1
        old = found
    pool.close()  # the clock may have killed a rank that had finished
    pool.run(RANKS, save_and_die, str(folder), 0.0, {})
    assert what_is_there(folder) == 0.0
    return ended
