"""Many ranks save small shards: these have fewer, larger chunks, and every layout reads the same values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import reshard
from reshard.planner.grid import Grid
from tests.ranks import RankPool

pytestmark = pytest.mark.slow

SHAPE, UNEVEN = (256, 4096), (300, 4096)
WORLD = 8


def values(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])).bfloat16()


def state(seed: int = 0) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        "even": distribute_tensor(values(SHAPE) + seed, mesh, [Shard(0)], src_data_rank=None),
        "uneven": distribute_tensor(values(UNEVEN) + seed, mesh, [Shard(0)], src_data_rank=None),
        "whole": values((512, 64)) + seed,
        "empty": {},
        "step": seed,
    }


def save(folder: str, codec: str, background: str | None) -> None:
    for seed in (1, 0):  # the second save uses the plan of the first one again
        if background is None:
            reshard.save(state(seed), folder, codec=codec, overwrite=True)
        else:
            reshard.async_save(state(seed), folder, codec=codec, overwrite=True, background=background).result()  # type: ignore[arg-type]
    again = state(2)
    reshard.load(again, folder)
    assert again["even"].to_local().equal(state()["even"].to_local())
    assert again["uneven"].to_local().equal(state()["uneven"].to_local())


def load_columns(folder: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for cooperative in (False, True):
        found: dict[str, DTensor] = {
            name: distribute_tensor(torch.zeros(shape).bfloat16(), mesh, [Shard(1)], src_data_rank=None)
            for name, shape in (("even", SHAPE), ("uneven", UNEVEN))
        }
        reshard.load(found, folder, cooperative=cooperative)
        for name, shape in (("even", SHAPE), ("uneven", UNEVEN)):
            expected = distribute_tensor(values(shape), mesh, [Shard(1)], src_data_rank=None)
            assert found[name].to_local().equal(expected.to_local())


@pytest.mark.parametrize(("codec", "background"), [("zstd", None), ("none", "thread"), ("zstd", "process")])
def test_shards_of_many_ranks_have_chunks_of_eighths(
    ranks: RankPool, tmp_path: Path, codec: str, background: str | None
) -> None:
    ranks.run(WORLD, save, str(tmp_path), codec, background)
    with reshard.open(tmp_path) as checkpoint:
        for name, shape in (("even", SHAPE), ("uneven", UNEVEN)):
            shards, parts = checkpoint.shards_of(name)
            assert len(shards) == WORLD
            assert parts[1] == Grid.choose(shape, 2, raw=codec == "none").parts[1] // 2 == 8
            assert checkpoint.tensors[name].chunks <= 2 * 8 * WORLD
            assert checkpoint.read(name).equal(values(shape))
        assert checkpoint.shards_of("whole")[1] == Grid.choose((512, 64), 2, raw=codec == "none").parts
    for world in (2, 8, 5):
        ranks.run(world, load_columns, str(tmp_path))


def test_tensor_parallelism_over_8_ranks_reads_what_it_needs(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(WORLD, save, str(tmp_path), "none", None)
    with reshard.open(tmp_path) as checkpoint:
        for tp, most in ((2, 1.01), (8, 1.01), (16, 2.01)):
            plans = checkpoint.plan(reshard.Layout({"tp": tp}, {"*even": "rowwise", "*": "replicate"}), include="*even")
            assert all(plan.report.amplification <= most for plan in plans)
