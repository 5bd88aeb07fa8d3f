"""The pictures of plans show the numbers of the plans."""

from __future__ import annotations

import io
import sys
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from reshard import pictures
from reshard.errors import ArgumentError, MissingTensorError
from reshard.pictures.chunk_map import _Flat, _runs
from reshard.pictures.colours import SEVERAL, UNREAD, group_ranks
from reshard.pictures.object_map import _coloured, _covered
from reshard.planner.box import Box
from reshard.planner.coalesce import GapLimits, Requests, coalesce
from reshard.planner.grid import Grid
from reshard.planner.layout import Layout
from reshard.planner.rank_plans import RankPlans, plan_ranks
from tests.planner.indexes import Saved, index_of

pytestmark = pytest.mark.slow

SHAPES: list[tuple[int, ...]] = [(), (64,), (256, 512), (8, 64, 128), (16, 8, 3, 3), (0, 8)]


def saved(name: str, shape: tuple[int, ...], **kind: Any) -> Saved:
    grid = Grid(shape, (1,) * len(shape)) if kind.get("plain") else Grid.choose(shape, 2)
    return Saved(name, grid, [Box.whole(shape)] if all(shape) else [], **kind)


def plans_of(ranks: int, *tensors: Saved, gap_limits: GapLimits = GapLimits(0, 0.0)) -> RankPlans:  # noqa: B008
    return plan_ranks(index_of(*tensors), Layout(ranks, {"*up": "colwise", "*down": "rowwise"}), gap_limits=gap_limits)


def labels(figure: Figure) -> list[str]:
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
    return [text.get_text() for legend in legends if legend is not None for text in legend.get_texts()]


def drawn(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=50)
    return out.getvalue()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ranks", [1, 40])
def test_tensors_of_any_shape_are_drawn(shape: tuple[int, ...], ranks: int) -> None:
    plans = plans_of(ranks, saved("a.up", shape), saved("b.down", (64, 64)))
    figures = [pictures.rank_bars(plans), pictures.object_map(plans), pictures.overview(plans)]
    if all(shape):
        figures.append(pictures.chunk_map(plans, "a.up", shards=[Box.whole(shape)]))
    else:
        with pytest.raises(MissingTensorError, match=r"no rank reads 'a\.up'"):
            pictures.chunk_map(plans, "a.up")
    for figure in figures:
        assert drawn(figure).startswith(b"\x89PNG")


def test_a_thousand_tensors_on_many_ranks_are_drawn() -> None:
    plans = plan_ranks(
        index_of(*(saved(f"{i}.up", (1024, 64)) for i in range(1000))), Layout({"dp": 50, "tp": 2}, {"*up": "colwise"})
    )
    assert drawn(pictures.overview(plans)).startswith(b"\x89PNG")
    assert labels(pictures.object_map(plans))[0] == "ranks 0,2,4,… (50)", "replicas are one group"


def test_object_map_says_that_no_rank_reads_anything() -> None:
    plans = plans_of(2, saved("a.up", (0, 8)))
    assert pictures.object_map(plans).axes[0].get_title(loc="left") == "No rank reads anything"
    assert drawn(pictures.overview(plans)).startswith(b"\x89PNG")


def test_rank_bars_show_the_numbers_of_the_plans() -> None:
    plans = plans_of(4, saved("a.up", (256, 512)), saved("b.down", (256, 512)))
    above, below = pictures.rank_bars(plans).axes
    heights = [[bar.get_height() for bar in bars] for bars in above.containers]
    reports = [plan.report for plan in plans]
    assert heights[0] == [report.bytes_needed / 1e6 for report in reports]
    assert heights[1] == [report.bytes_fetched / 1e6 for report in reports]
    assert heights[2] == [shards.nbytes / 1e6 for shards in plans.whole_shards]
    assert [bar.get_height() for bar in below.containers[0]] == [report.requests for report in reports]
    assert labels(pictures.rank_bars(plans)) == ["needed", "fetched", "in whole shards (DCP)"]


def test_over_read_chunks_are_hatched() -> None:
    aligned = plans_of(4, saved("a.up", (2048, 512), raw=False))
    across = plans_of(5, saved("a.up", (2048, 512), raw=False))
    assert "over-read" not in labels(pictures.chunk_map(aligned, "a.up"))
    assert "over-read" in labels(pictures.chunk_map(across, "a.up"))
    columns = saved("a.down", (256, 512), plain=True)
    assert "over-read" not in labels(pictures.chunk_map(plans_of(4, columns), "a.down"))
    read_over = plans_of(4, columns, gap_limits=GapLimits(1 << 20, 10.0))
    assert "over-read" in labels(pictures.chunk_map(read_over, "a.down"))
    both = plans_of(5, saved("a.up", (250, 512), raw=True), saved("b.up", (256, 512), raw=False))
    assert pictures.most_over_read(both) == "b.up"


def test_bytes_over_is_the_over_read_of_the_byte_ranges() -> None:
    (read,) = plans_of(2, saved("a.down", (256, 512), plain=True), gap_limits=GapLimits(1 << 20, 10.0))[0].reads
    assert read.bytes_over.sum() == 255 * 512, "the other half of all rows but the last"
    assert read.bytes_spanned == read.bytes_wanted + 255 * 512
    (raw,) = plans_of(3, saved("a.up", (100, 512), raw=True))[1].reads
    assert int(raw.bytes_over.sum()) == raw.bytes_wanted - raw.bytes_needed


def test_object_map_computes_the_part_of_each_bin_that_is_read() -> None:
    column = np.array
    requests = coalesce(column([0, 0, 1]), column([10, 25, 0]), column([20, 30, 7]), GapLimits(0, 0.0))
    edges = np.linspace(0, 40, 5)
    found = {strip: covered.tolist() for strip, covered in _covered(requests, [2, 1, 0], edges)}
    assert found == {2: [0, 1, 0.5, 0], 1: [0.7, 0, 0, 0]}
    sparse = Requests(column([0]), column([0]), column([40]), column([0]), {0: (4, 5, 10)})
    ((strip, covered),) = _covered(sparse, [0], edges)
    assert (strip, covered.tolist()) == (0, [0.5] * 4)


def test_a_bin_has_the_colour_of_the_ranks_that_read_it() -> None:
    groups = group_ranks(["x", "y", "x", None])
    assert [group.ranks for group in groups] == [(0, 2), (1,)]
    most, who, many = np.array([[1.0, 1.0, 1.0, 0.0]]), np.array([[0, 1, 1, 0]]), np.array([[1, 1, 2, 0]])
    inside = np.array([[True, True, True, True]])
    colours = _coloured(most, who.astype(np.int32), many.astype(np.int32), groups, inside)[0]
    assert [tuple(colour) for colour in colours] == [groups[0].colour, groups[1].colour, SEVERAL, UNREAD]


@pytest.mark.parametrize("name", ["x$\\bad{$", "w$a$b", "<b>&", "ü_^{"])
def test_tensor_names_with_markup_are_drawn(name: str) -> None:
    plans = plans_of(5, saved(f"{name}.up", (2048, 512), raw=False))
    assert drawn(pictures.overview(plans, seconds=[0.1] * 5)).startswith(b"\x89PNG")
    assert "&lt;b&gt;&amp;" in plans[0]._repr_html_() or "<b>" not in name


def test_titles_of_rank_bars_name_the_rank_with_the_largest_value() -> None:
    equal = plans_of(4, saved("a.up", (2048, 512), raw=False))
    titles = [axes.get_title(loc="left") for axes in pictures.rank_bars(equal, seconds=[1.0, 1.0, 3.0, 1.0]).axes]
    assert "all ranks equal: 0.1" in titles[0]
    assert titles[1].startswith("all ranks equal: ")
    assert titles[2] == "most by rank 2: 3"


def test_chunk_map_folds_boxes_into_rectangles() -> None:
    assert _runs([1, 2], [2, 2], [4, 4]) == [(6, 2), (10, 2)]
    assert _runs([1, 0], [2, 4], [4, 4]) == [(4, 8)]
    assert _Flat((6,)).of(np.array([[2]]), np.array([[3]])) == [(2, 0, 3, 1)]
    experts = _Flat((8, 4, 32))
    assert (experts.rows, experts.columns) == (32, 32)
    assert experts.of(np.array([[1, 0, 8]]), np.array([[2, 4, 8]])) == [(8, 4, 8, 8)]
    assert experts.row_label == "dimensions 0, 1"
    assert experts.column_label == "dimension 2"


def test_without_matplotlib_the_error_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ArgumentError, match=r"pip install 'reshard\[plot\]'"):
        pictures.rank_bars(plans_of(1, saved("a.up", (8, 8))))
