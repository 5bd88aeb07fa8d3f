"""Draw the bytes and requests of each rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..planner.rank_plans import RankPlans
from .colours import DCP, FETCHED, NEEDED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

MAX_BARS = 48
"""Up to this many ranks are drawn as bars. If there are more, they are drawn as steps."""


def draw_rank_bars(plans: RankPlans, seconds: Sequence[float], figure: FigureBase) -> None:
    reports = [plan.report for plan in plans]
    needed = np.array([report.bytes_needed for report in reports]) / 1e6
    fetched = np.array([report.bytes_fetched for report in reports]) / 1e6
    over = np.array([report.bytes_over_read for report in reports]) / 1e6
    whole = np.array([shards.nbytes for shards in plans.whole_shards]) / 1e6
    further = {"requests": np.array([report.requests for report in reports])}
    further |= {"seconds": np.array(seconds)} if len(seconds) else {}
    above, *below = figure.subplots(1 + len(further), 1, sharex=True, height_ratios=[3] + [1] * len(further))
    above.set_title(_rank_bars_title(needed, fetched, whole), fontsize="medium", loc="left")
    _bars(above, [("needed", needed, NEEDED), ("fetched", fetched, FETCHED), ("in whole shards (DCP)", whole, DCP)])
    if over.sum() > 0.001 * fetched.sum() and len(plans) <= MAX_BARS:
        positions = np.arange(len(plans))
        above.bar(
            positions, over, 0.27, fetched - over, color=FETCHED, edgecolor="white", hatch="////", label="over-read"
        )
    above.set_ylabel("MB")
    above.legend(fontsize="small", frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.08))
    for axes, (what, values) in zip(below, further.items(), strict=True):
        _bars(axes, [(what, values, FETCHED)])
        axes.set_ylabel(what)
        axes.set_title(_most(values), fontsize="medium", loc="left")
    below[-1].set_xlabel("rank")
    for axes in (above, *below):
        axes.set_ylim(0)
        axes.spines[["top", "right"]].set_visible(False)
    if len(plans) <= 16:
        below[-1].set_xticks(range(len(plans)))
    else:
        below[-1].xaxis.get_major_locator().set_params(integer=True)


def _rank_bars_title(needed: np.ndarray, fetched: np.ndarray, whole: np.ndarray) -> str:
    least = float(max(needed.sum(), 1e-9))
    times = f"Read {fetched.sum() / least:.2f} times the bytes needed (whole shards: {whole.sum() / least:.2f})"
    return f"{times}; {_most(fetched, ' MB')}"


def _most(values: np.ndarray, unit: str = "") -> str:
    """Describe the rank with the largest value."""
    least, most = float(values.min()), float(values.max())
    return (
        f"all ranks equal: {most:.4g}{unit}"
        if most <= 1.01 * least
        else f"most by rank {values.argmax()}: {most:.4g}{unit}"
    )


def _bars(axes: Axes, values: list[tuple[str, np.ndarray, tuple[float, ...]]]) -> None:
    count = len(values[0][1])
    if count > MAX_BARS:
        edges = np.arange(count + 1) - 0.5
        for label, heights, colour in values:
            axes.stairs(heights, edges, color=colour, label=label, linewidth=1.5)
        return
    width = 0.81 / len(values)
    for i, (label, heights, colour) in enumerate(values):
        shift = (i - (len(values) - 1) / 2) * width
        axes.bar(np.arange(count) + shift, heights, width, color=colour, label=label)
