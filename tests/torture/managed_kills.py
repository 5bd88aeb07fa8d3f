"""Training is killed at random moments of asynchronous saves with retention. A complete checkpoint is always left.

In each round, real ranks restore the run, train and save with a CheckpointManager. One of them or all of them are
killed, at a call of their stores or after a random time. Then every checkpoint that is listed must verify and be the
result of a single save, none that was acknowledged and is still needed may be missing, and the run must continue.
"""

from __future__ import annotations

import collections
import json
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import reshard
from reshard.storage.stores.local import LocalStore
from tests.ranks import RankFailed, RankPool

RANKS = 2
SAVE_EVERY = 4
KEEP_EVERY = 60
ACKNOWLEDGED = "acknowledged.jsonl"
METHODS = ("put", "delete", "create", "any")


def state(value: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (RANKS,))
    return {
        "sharded": distribute_tensor(torch.full((96, 1024), float(value)), mesh, [Shard(0)]),
        "replicated": torch.full((64, 64), float(value)),
        "step": value,
    }


def die_at(method: str, calls: int) -> None:
    """Kill this process at the nth call of a method of its stores."""
    lock, left = threading.Lock(), calls

    def counting(name: str) -> Any:
        original = getattr(LocalStore, name)

        def counted(self: LocalStore, *args: Any, **options: Any) -> Any:
            nonlocal left
            with lock:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return original(self, *args, **options)

        return counted

    for name in METHODS[:-1] if method == "any" else (method,):
        setattr(LocalStore, name, counting(name))


def train(folder: str, deaths: dict[int, tuple[str, int]], background: Any, steps: int) -> None:
    """Continue the run for a number of steps. Rank 0 records what the manager reported as complete."""
    rank = dist.get_rank()
    if rank in deaths:
        die_at(*deaths[rank])
    keep = [reshard.latest(2), reshard.every(KEEP_EVERY)]
    root = os.path.join(folder, "run")
    with reshard.CheckpointManager(
        root, save_every=SAVE_EVERY, keep=keep, background=background, signals=()
    ) as manager:
        loaded = state(-1)
        first = manager.restore(loaded) or 0
        if first:
            assert loaded["step"] == first
            assert all(loaded[name].eq(first).all() for name in ("replicated", "sharded"))
        reported: list[int] = []
        for step in range(first + 1, first + 1 + steps):
            time.sleep(0.002)
            manager.save(step, state(step))
            if rank == 0 and manager.steps() != reported:
                reported = manager.steps()
                with open(os.path.join(folder, ACKNOWLEDGED), "a") as file:
                    file.write(f"{json.dumps(reported)}\n")


def check(folder: Path, after: int) -> int:
    """Return the last step. Raise AssertionError if a checkpoint is damaged, or one that is needed is missing.

    Args:
        after: the step after which the values of checkpoints are read.
    """
    path = folder / ACKNOWLEDGED
    acknowledged = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    needed = {step for steps in acknowledged for step in steps if step % KEEP_EVERY == 0}
    last = acknowledged[-1][-1] if acknowledged and acknowledged[-1] else 0
    states = {found.state for found in reshard.find_checkpoints(folder / "run")}
    assert states <= {"complete", "not committed"}, states
    with reshard.CheckpointManager(folder / "run", read_only=True) as manager:
        found = manager.steps()
        assert needed <= set(found), f"{sorted(needed - set(found))} are missing"
        assert max(found, default=0) >= last, f"{last} was reported as complete, but {found} are left"
        for step in [step for step in found if step > after]:
            checkpoint = reshard.open(manager.location(step))
            assert checkpoint.verify() == []
            values = {float(value) for name in checkpoint.tensors for value in checkpoint.read(name).unique()}
            assert values | {float(checkpoint.read_value("step"))} == {float(step)}, f"a mixture of saves: {values}"
        loaded = {"replicated": torch.zeros(64, 64), "step": 0}
        assert manager.restore(loaded) == (found[-1] if found else None)
    return found[-1] if found else 0


def rounds(count: int, seed: int, folder: Path) -> collections.Counter[str]:
    """Kill a run `count` times, and count how the rounds ended."""
    rng = random.Random(seed)
    ended: collections.Counter[str] = collections.Counter()
    last = 0
    for number in range(count):
        background = "process" if rng.random() < 0.15 else "thread"
        by_clock = rng.random() < 0.5
        victims = list(range(RANKS)) if rng.random() < 0.5 else [rng.randrange(RANKS)]
        deaths = {} if by_clock else {rank: (rng.choice(METHODS), rng.randrange(40)) for rank in victims}
        with RankPool() as pool:
            pool.run(RANKS, int)  # the ranks have started
            timer = threading.Timer(rng.uniform(0.05, 4 if background == "process" else 1), pool.kill, [victims])
            if by_clock:
                timer.start()
            failure = ""
            try:
                pool.run(RANKS, train, str(folder), deaths, background, 200, timeout_s=60)
            except RankFailed as failed:
                failure = str(failed)
            finally:
                timer.cancel()
            assert not failure or "the process died" in failure, f"round {number}: {failure}"
            how = "killed" if failure else "finished"
        now = check(folder, last - 10 * SAVE_EVERY if number % 50 else -1)
        assert now >= last, f"round {number}: step {now} after {last}"
        ended[f"{how}, {'with' if now > last else 'without'} a new checkpoint"] += 1
        last = now
    return ended
