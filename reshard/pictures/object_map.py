"""What ranks fetch of each data object: a strip an object, from its first byte to its last."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..planner.coalesce import Requests
from ..planner.rank_plans import RankPlans
from .colours import NOBODY, SEVERAL, Group, grouped, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

Array = npt.NDArray[np.float64]
BINS = 720
"""Of the longest object."""
MOST_LANES = 160
"""Up to so many each group of ranks has a lane of its own in each object's strip."""
MOST_NAMED = 32
MOST_STRIPS = 2000
FAINTEST = 0.3
"""How a bin is seen of which little is read."""


def draw_object_map(plans: RankPlans, figure: FigureBase) -> None:
    axes = figure.subplots()
    groups = grouped([_key(plan.requests) for plan in plans])
    if not groups:
        axes.set_title("No rank reads anything", fontsize="medium", loc="left")
        return
    touched = sorted(
        {int(at) for group in groups for at in plans[group.ranks[0]].requests.objects}, key=_by_writer(plans)
    )
    shown = touched[:: -(-len(touched) // MOST_STRIPS)]
    edges = np.linspace(0, max(plans.objects[at][1] for at in shown), BINS + 1)
    lanes = len(groups) if len(shown) * len(groups) <= MOST_LANES else 1
    covered = np.zeros((len(groups), len(shown), BINS))
    for i, group in enumerate(groups):
        requests = plans[group.ranks[0]].requests
        for j, at in enumerate(shown):
            covered[i, j] = _covered(requests, at, edges)
    inside = np.clip((np.array([plans.objects[at][1] for at in shown])[:, None] - edges[:-1]) / edges[1], 0, 1) > 0
    gap = 1 if len(shown) * lanes <= MOST_LANES else 0
    image = np.ones((len(shown), lanes + gap, BINS, 4))
    for lane in range(lanes):
        image[:, lane] = (
            _coloured(covered, groups, inside) if lanes == 1 else _coloured(covered[[lane]], [groups[lane]], inside)
        )
    height = image.shape[0] * image.shape[1]
    axes.imshow(
        image.reshape(height, BINS, 4),
        extent=(0, edges[-1] / 1e6, height, 0),
        aspect="auto",
        interpolation="nearest",
    )
    _label(axes, plans, shown, lanes + gap, len(touched))
    further = [("not read", {"color": NOBODY})]
    further += [("several ranks", {"color": SEVERAL})] if lanes == 1 and len(groups) > 1 else []
    legend(figure, axes, groups, further)


def _label(axes: Axes, plans: RankPlans, shown: list[int], per_strip: int, touched: int) -> None:
    objects = f"{touched} of {len(plans.objects)} objects are read"
    axes.set_title(objects + (f", {len(shown)} shown" if len(shown) < touched else ""), fontsize="medium", loc="left")
    axes.set_xlabel("MB of the object")
    axes.spines[["top", "right", "left"]].set_visible(False)
    if len(shown) <= MOST_NAMED:
        names = [_short(plans.objects[at][0]) for at in shown]
        axes.set_yticks([(i + 0.5) * per_strip for i in range(len(shown))], names, fontsize="x-small")
        axes.tick_params(axis="y", length=0)
    else:
        axes.set_yticks([])
        axes.set_ylabel("objects, by the rank that wrote them")


def _short(name: str) -> str:
    """The end of a name, which tells who wrote it."""
    base = name.rpartition("/")[2]
    return base if len(base) <= 24 else f"{base[:4]}…{base[-16:]}"


def _by_writer(plans: RankPlans) -> Callable[[int], tuple[list[tuple[int, str]], str]]:
    def key(at: int) -> tuple[list[tuple[int, str]], str]:
        name = plans.objects[at][0]
        return [(len(part), part) for part in re.findall(r"\d+", name.rpartition("-")[2])], name

    return key


def _key(requests: Requests) -> object:
    columns = (requests.objects, requests.starts, requests.stops)
    return tuple(column.tobytes() for column in columns) if len(requests) else None


def _covered(requests: Requests, at: int, edges: Array) -> Array:
    """The part of each bin of an object that is fetched: (bins,) values of 0 to 1."""
    rows = np.flatnonzero(requests.objects == at)
    rows = rows[np.argsort(requests.starts[rows])]
    if not len(rows):
        return np.zeros(len(edges) - 1)
    starts, stops = requests.starts[rows], requests.stops[rows]
    nbytes = (stops - starts).astype(np.float64)
    for i, row in enumerate(rows.tolist()):
        if row in requests.sparse:
            count, run, _ = requests.sparse[row]
            nbytes[i] = count * run
    after = np.cumsum(nbytes)
    places = np.stack([starts, stops], axis=1).reshape(-1)
    fetched = np.stack([after - nbytes, after], axis=1).reshape(-1)
    parts: Array = np.diff(np.interp(edges, places, fetched)) / (edges[1] - edges[0])
    return np.minimum(parts, 1)


def _coloured(covered: Array, groups: list[Group], inside: npt.NDArray[np.bool_]) -> Array:
    """(strips, bins, 4): the colour of the one group that reads a bin, that of several, or of nobody."""
    many = (covered > 0).sum(axis=0)
    colours = np.array([group.colour for group in groups])[covered.argmax(axis=0)]
    colours[many > 1] = SEVERAL
    strength = np.where(many > 0, FAINTEST + (1 - FAINTEST) * covered.max(axis=0), 0)[..., None]
    background = np.where(inside[..., None], np.array(NOBODY), 1.0)
    mixed: Array = strength * colours + (1 - strength) * background
    mixed[..., 3] = 1
    return mixed
