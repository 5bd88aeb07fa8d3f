"""Exchanges through rank 0, in the caller's process group and in one for the background."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import reshard
from reshard.errors import ArgumentError, RankError
from reshard.storage.runtime import process_group
from reshard.storage.runtime.process_group import Collectives
from tests.ranks import RankPool

KINDS = ("caller", "background")


def gather_values(kind: str) -> list[Any]:
    rank = dist.get_rank()
    collectives = Collectives(background=kind == "background")
    assert (collectives.rank, collectives.size) == (rank, dist.get_world_size())
    found: list[Any] = [
        collectives.through_rank_0(lambda: "x" * rank * 1000, lambda all_of: [len(one) for one in all_of]),
        collectives.through_rank_0(lambda: None, lambda all_of: [all_of] * len(all_of)),
    ]

    def fail(ranks: tuple[int, ...], error: BaseException) -> Any:
        def task() -> int:
            if rank in ranks:
                raise error
            return rank

        return task

    def combine(all_of: list[int]) -> list[int]:
        raise ArgumentError("they do not fit")

    for task, combined, expected in (
        (fail((1, 2), ValueError("wrong")), lambda all_of: all_of, RankError),
        (fail((), ValueError()), combine, ArgumentError),
    ):
        with pytest.raises(expected) as caught:
            collectives.through_rank_0(task, combined)
        found.append((str(caught.value), getattr(caught.value, "rank", None)))
    interrupted = fail((1,), KeyboardInterrupt())
    for call in (lambda: collectives.through_rank_0(interrupted, list), lambda: collectives.on_all_ranks(interrupted)):
        with pytest.raises(KeyboardInterrupt if rank == 1 else RankError) as stopped:
            call()
        found.append(str(stopped.value))
    assert collectives.through_rank_0(lambda: rank, lambda all_of: all_of[::-1]) == dist.get_world_size() - 1 - rank
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_results_and_errors_reach_every_rank(kind: str, ranks: RankPool) -> None:
    for rank, found in enumerate(ranks.run(3, gather_values, kind)):
        size, nothing, first, second, *interrupted = found
        assert size == rank * 1000
        assert nothing == [None] * 3
        assert first == ("rank 1: ValueError: wrong", 1)
        assert second == ("rank 0: they do not fit", 0)
        assert interrupted == ["" if rank == 1 else "rank 1: KeyboardInterrupt"] * 2


def call_while_training() -> list[int]:
    group: Any = dist.new_group([2, 0, 1], sort_ranks=False)
    collectives = Collectives(group, background=True)
    results: list[int] = []

    def work() -> None:
        results.extend(collectives.through_rank_0(dist.get_rank, lambda all_of: all_of) for _ in range(20))

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(20):
        dist.all_reduce(torch.ones(1000))
    thread.join()
    return [collectives.rank, *set(results)]


def test_collectives_in_the_background_do_not_disturb_others(ranks: RankPool) -> None:
    assert ranks.run(3, call_while_training) == [[1, 0], [2, 1], [0, 2]]


def test_a_process_without_a_group_is_rank_0() -> None:
    for collectives in (Collectives(), Collectives(background=True)):
        assert collectives.through_rank_0(lambda: 3, lambda all_of: [all_of]) == [3]
        with pytest.raises(RankError, match="ZeroDivisionError") as caught:
            collectives.through_rank_0(lambda: 1 // 0, lambda all_of: all_of)
        assert caught.value.rank is None
        assert isinstance(caught.value.__cause__, ZeroDivisionError)


def create_groups(folder: str, has_gloo: bool) -> list[float]:
    """Use everything that creates groups, on ranks that are in different numbers of other groups."""
    if not has_gloo:
        process_group._has_gloo = lambda group: False
    rank = dist.get_rank()
    dist.new_group([0, 1])
    alone: list[Any] = [dist.new_group([other]) for other in range(3)]
    for _ in range(rank):
        dist.new_group([rank], use_local_synchronization=True)
    state = {"w": torch.arange(6.0)}
    if rank == 0:
        reshard.async_save(state, f"{folder}/alone", process_group=alone[0]).result()
    reshard.async_save(state, f"{folder}/async").result()
    pair: Any = dist.new_group([2, 0])
    if rank != 1:
        reshard.async_save(state, f"{folder}/pair", process_group=pair).result()
    with reshard.CheckpointManager(f"{folder}/run") as manager:
        manager.save(1, state, force=True)
    reshard.load({"w": torch.zeros(6)}, f"{folder}/async", cooperative=True)
    read = torch.zeros(6)
    with reshard.open(f"{folder}/pair").lazy(process_group=dist.group.WORLD, cooperative=True) as weights:
        read.copy_(weights["w"])
    return read.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("has_gloo", [True, False])
def test_ranks_may_be_in_different_numbers_of_groups(tmp_path: Path, has_gloo: bool) -> None:
    with RankPool() as pool:  # its own, because `create_groups` changes a module
        assert pool.run(3, create_groups, str(tmp_path), has_gloo) == [list(range(6))] * 3
    assert reshard.open(tmp_path / "run" / "step-00000001").verify() == []
