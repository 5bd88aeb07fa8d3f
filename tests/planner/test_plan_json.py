"""Plans are converted to JSON and back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from reshard.planner.box import Box
from reshard.planner.chunk_reads import WantedBox
from reshard.planner.coalesce import GapLimits
from reshard.planner.errors import InvalidPlanError
from reshard.planner.grid import Grid
from reshard.planner.layout import Layout, Shard
from reshard.planner.plan_json import plan_from_json, plan_to_json
from reshard.planner.rank_plans import RankPlans, plan_ranks
from reshard.planner.read_plan import plan_reads
from tests.planner.indexes import Saved, index_of

SHAPE = (1024, 2048)
ROWS = [Box((i * 256, 0), (256, 2048)) for i in range(4)]
TENSORS = {
    "raw": Saved("t", Grid.choose(SHAPE, 2), ROWS),
    "heads and tails": Saved("t", Grid.choose(SHAPE, 4), ROWS, "float32", raw=False),
    "plain": Saved("t", Grid(SHAPE, (1, 1)), ROWS, plain=True),
    "scalar": Saved("t", Grid((), ()), [Box((), ())]),
    "empty": Saved("t", Grid((0, 8), (1, 1)), []),
}


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("heads_only", [False, True])
def test_plan_survives_a_json_round_trip(kind: str, heads_only: bool) -> None:
    saved = TENSORS[kind]
    shape = saved.grid.shape
    box = Box((0, 512), (1024, 512)) if shape == SHAPE else Box.whole(shape)
    for gap_limits in (GapLimits(0, 0.0), GapLimits(1 << 20, 10.0)):
        plan = plan_reads(index_of(saved), [WantedBox("t", box, heads_only)], gap_limits=gap_limits)
        back = plan_from_json(json.loads(json.dumps(plan_to_json(plan))))
        assert back == plan
        assert back.report == plan.report
        assert plan_from_json(plan_to_json(plan_reads(index_of(saved), []))) != plan


def test_rank_plans_survive_a_json_round_trip() -> None:
    index = index_of(TENSORS["raw"])
    plans = plan_ranks(index, Layout({"dp": 2, "tp": 2}, {"t": {"tp": Shard(1)}}), location="here")
    assert RankPlans.from_json(plans.to_json()) == plans
    assert RankPlans.from_json(plans.to_json()).whole_shards[0].shards == 4
    assert "'here' read by dp 2 x tp 2" in repr(plans)
    assert "<td" in plans._repr_html_()


def test_plans_of_ranks_that_share_a_read_survive_a_json_round_trip() -> None:
    plans = plan_ranks(index_of(TENSORS["raw"]), Layout(2), cooperative=True)
    assert sum(plan.report.bytes_sent for plan in plans) == sum(plan.report.bytes_received for plan in plans) > 0
    assert RankPlans.from_json(plans.to_json()) == plans
    older = json.loads(plan_ranks(index_of(TENSORS["raw"]), Layout(2)).to_json())
    for plan in older["plans"]:
        del plan["order"], plan["exchange"]
    assert RankPlans.from_json(json.dumps(older)) == plan_ranks(index_of(TENSORS["raw"]), Layout(2)) != plans


@pytest.mark.parametrize(
    ("path", "to"),
    [
        (("order",), [0]),
        (("order",), "x"),
        (("exchange",), []),
        (("exchange", "objects"), [99]),
        (("exchange", "starts"), []),
        (("exchange", "is_given"), []),
        (("exchange", "sent"), None),
    ],
)
def test_invalid_json_of_shared_reads_raises_invalid_plan_error(path: tuple[str, ...], to: Any) -> None:
    value = json.loads(plan_ranks(index_of(TENSORS["raw"]), Layout(2), cooperative=True).to_json())
    with pytest.raises(InvalidPlanError):
        RankPlans.from_json(broken(value, "plans", 0, *path, to=to))


def broken(value: dict[str, Any], *path: str | int, to: Any) -> str:
    parent: Any = value
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = to
    return json.dumps(value)


@pytest.mark.parametrize(
    ("path", "to"),
    [
        (("mesh",), {"tp": 3}),
        (("mesh",), {}),
        (("plans",), None),
        (("objects",), []),
        (("plans", 0, "reads", 0, "box"), [[0], [1, 2]]),
        (("plans", 0, "reads", 0, "starts"), [[1]]),
        (("plans", 0, "reads", 0, "dtype"), "int3"),
        (("plans", 0, "requests"), []),
        (("plans", 0, "requests", "starts"), ["x"]),
        (("plans", 0, "requests", "starts"), []),
        (("plans", 0, "requests", "objects"), -1),
        (("plans", 0, "requests", "objects"), [-1] * 4),
        (("plans", 0, "requests", "request_of_range"), [0]),
        (("plans", 0, "requests", "sparse"), [[99, 1, 1, 1]]),
        (("plans", 0, "reads", 0, "encodings"), "5"),
        (("plans", 0, "reads", 0, "skipped"), [0]),
        (("plans", 0, "gaps"), [float("inf"), 0]),
        (("mesh", "tp"), float("inf")),
        (("objects", 0, 1), float("inf")),
        (("whole_shards", 0, "nbytes"), float("nan")),
    ],
)
def test_invalid_json_raises_invalid_plan_error(path: tuple[str | int, ...], to: Any) -> None:
    value = json.loads(plan_ranks(index_of(TENSORS["raw"]), Layout(2, {"t": "rowwise"})).to_json())
    with pytest.raises(InvalidPlanError):
        RankPlans.from_json(broken(value, *path, to=to))
    for text in ("", "[]", "{", '{"mesh": 3}'):
        with pytest.raises(InvalidPlanError):
            RankPlans.from_json(text)


def test_plans_without_numbers_of_checksums_are_read() -> None:
    index = index_of(TENSORS["raw"], whole_checksums=False)
    older = json.loads(plan_ranks(index, Layout(3)).to_json())
    for read in (read for plan in older["plans"] for read in plan["reads"]):
        del read["checksum_counts"]
    assert RankPlans.from_json(json.dumps(older)) == plan_ranks(index, Layout(3))
