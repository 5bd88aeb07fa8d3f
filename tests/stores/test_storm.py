"""Many processes open a checkpoint on a store that answers 503: their retries do not become a storm of requests."""

from __future__ import annotations

import math
import random
import time
import uuid
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

import reshard
from reshard.errors import UnavailableError
from reshard.storage.stores import retry
from tests.proxy import overloaded
from tests.ranks import RankPool
from tests.servers import Server
from tests.torture.faults import CLIENTS, by_client, through

pytestmark = pytest.mark.slow

PROCESSES = {"obstore": 32, "s3fs": 8}
"""A process that imports s3fs needs a second of a core."""
NAMES = ("first", "second")
Found = tuple[list[list[float]], float]


def value_of(name: str, rank: int) -> torch.Tensor:
    return torch.arange(100) + 1000 * rank + len(name)


def read_own_tensors(uri: str, options: dict[str, Any], rank: int) -> None:
    checkpoint = reshard.open(uri, storage_options=options)
    for name in NAMES:
        if not checkpoint.read(f"{name}.{rank}").equal(value_of(name, rank)):
            raise AssertionError(f"rank {rank} has read wrong values of {name}")


def read_while_the_store_is_down(uri: str, options: dict[str, Any], end_of_outage: str) -> Found:
    """Read tensors. The outage ends when every rank has met it.

    The random numbers of all ranks begin with the same seed, as those of many training scripts.

    Returns:
        The pauses of each call that was retried, and the seconds of all calls.
    """
    random.seed(7)
    store, world = distributed_c10d._get_default_store(), dist.get_world_size()
    calls: dict[retry._Pauses, list[float]] = {}
    original = retry._Pauses.next

    def record(self: retry._Pauses, error: UnavailableError) -> float | None:
        if not calls and store.add("refused", 1) == world:
            Path(end_of_outage).touch()
        pause = original(self, error)
        if pause is not None:
            calls.setdefault(self, []).append(pause)
        return pause

    begin = time.monotonic()
    with patch.object(retry._Pauses, "next", record):
        read_own_tensors(uri, options, dist.get_rank())
    return list(calls.values()), time.monotonic() - begin


@pytest.mark.parametrize("client", CLIENTS)
def test_retries_of_many_processes_do_not_become_a_storm(seaweedfs: Server, tmp_path: Path, client: str) -> None:
    processes = PROCESSES[client]
    uri, end_of_outage = seaweedfs.place(uuid.uuid4().hex), tmp_path / "end"
    state = {f"{name}.{rank}": value_of(name, rank) for name in NAMES for rank in range(processes)}
    reshard.save(state, uri, storage_options=seaweedfs.options)
    with overloaded(seaweedfs.endpoint, lambda: False, processes) as (endpoint, proxy):
        read_own_tensors(uri, by_client(client, through(seaweedfs, endpoint)), 0)
        needed = len(proxy.requests)
    with RankPool() as pool, overloaded(seaweedfs.endpoint, lambda: not end_of_outage.exists(), 4) as (endpoint, proxy):
        options = by_client(client, through(seaweedfs, endpoint))
        found: list[Found] = pool.run(
            processes, read_while_the_store_is_down, uri, options, str(end_of_outage), timeout_s=300
        )

    # Each request that is refused leads to one request, after a pause of the policy: no client retries by itself.
    pauses = sum(len(call) for calls, _ in found for call in calls)
    assert sum(proxy.requests) == pauses >= processes
    assert len(proxy.requests) == needed * processes + pauses

    # The pauses double, so the number of requests grows with the logarithm of the time.
    for calls, seconds in found:
        for call in calls:
            assert len(call) <= 1 + math.log2(1 + seconds / (retry.FIRST_WAIT_S / 2)) + seconds / (retry.MAX_WAIT_S / 2)
            for at, pause in enumerate(call):
                longest = min(retry.FIRST_WAIT_S * 2**at, retry.MAX_WAIT_S)
                assert longest / 2 <= pause <= longest

    # The pauses of the processes are spread over an interval of FIRST_WAIT_S / 2, although their seeds are the same.
    first = [calls[0][0] for calls, _ in found]
    assert len(set(first)) == processes
    assert max(first) - min(first) > retry.FIRST_WAIT_S / 16
