"""Layers are distributed over pipeline stages, and a rank reads only the tensors of its stage."""

from __future__ import annotations

import pytest

from reshard.planner.box import Box
from reshard.planner.errors import LayoutError
from reshard.planner.grid import Grid
from reshard.planner.layout import Layout
from reshard.planner.rank_plans import plan_ranks
from reshard.planner.stages import even_stages
from tests.planner.indexes import Saved, index_of

NAMES = ["model.embed.weight", *(f"model.layers.{i}.up.weight" for i in range(10)), "model.norm.weight", "model.head"]


def test_even_stages_keeps_the_order_of_layers() -> None:
    stages = even_stages(reversed(NAMES), 4)
    assert [stages[f"model.layers.{i}.up.weight"] for i in range(10)] == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert (stages["model.embed.weight"], stages["model.norm.weight"], stages["model.head"]) == (0, 3, 3)


def test_even_stages_distributes_each_prefix_separately() -> None:
    names = [
        f"{stack}.{i}.experts.{j}.w"
        for stack in ("a.layers", "optim.exp_avg.a.layers")
        for i in (4, 7, 8, 9)
        for j in (0, 5)
    ]
    assert [even_stages(names, 2)[name] for name in names] == [0, 0, 0, 0, 1, 1, 1, 1] * 2


def test_rank_reads_only_tensors_of_its_stage() -> None:
    shape = (64, 64)
    index = index_of(*(Saved(name, Grid.choose(shape, 2), [Box.whole(shape)]) for name in NAMES))
    layout = Layout({"pp": 2, "tp": 2}, {"*.up": "colwise"}, even_stages(NAMES, 2))
    plans = plan_ranks(index, layout)
    read = [[read.want.name for read in plan.reads] for plan in plans]
    assert read[0] == read[1] == NAMES[:6]
    assert read[2] == read[3] == NAMES[6:]
    assert plans[0].reads[1].want.box == Box((0, 0), (32, 64))
    without = Layout({"pp": 2, "tp": 2}, {"*.up": "colwise"}, {NAMES[0]: 1})
    assert [len(plan.reads) for plan in plan_ranks(index, without)] == [12, 12, 13, 13], (
        "tensors without a stage are on all of them"
    )


def test_layouts_with_stages_compare_by_value() -> None:
    one, two = (Layout({"pp": 2}, {"a": "replicate"}, stages) for stages in ({"a": 0, "b": 1}, {"b": 1, "a": 0}))
    assert one == two
    assert hash(one) == hash(two)
    assert hash(Layout({"tp": 2})) == hash(Layout({"tp": 2}))
    assert one.holds("a", 0)
    assert not one.holds("a", 1)


def test_even_stages_recognises_embeddings() -> None:
    names = ["member_proj.weight", "emb.weight", "tok_embeddings.weight", "wte.weight", "layer1.conv"]
    assert list(even_stages(names, 2).values()) == [1, 0, 0, 0, 1]


def test_invalid_stages_raise_layout_error() -> None:
    with pytest.raises(LayoutError, match='dimension "pp"'):
        Layout({"tp": 2}, stages={"a": 0})
    with pytest.raises(LayoutError, match="'a' is on stage 2, but the mesh pp 2 has only the stages 0 to 1: use one"):
        Layout({"pp": 2}, stages={"a": 2})
    for wrong in (1.5, "x", None):
        with pytest.raises(LayoutError, match="'a' is on stage"):
            Layout({"pp": 2}, stages={"a": wrong})  # type: ignore[dict-item]
    with pytest.raises(LayoutError, match="at least 1 stage"):
        even_stages([], 0)
