"""Draw which bytes of each data object the ranks read: one strip per object, from its first byte to its last."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..planner.coalesce import Requests
from ..planner.rank_plans import RankPlans
from ..planner.text import shown
from .colours import SEVERAL, UNREAD, RankGroup, group_ranks, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

FloatArray = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int32]
BINS = 720
"""The number of bins of the longest object."""
MAX_LANES = 160
"""Each group of ranks has its own lane in the strip of an object if there are at most this many lanes."""
MAX_NAMED_OBJECTS = 32
MAX_STRIPS = 2000
FAINTEST = 0.3
"""The opacity of a bin if only a few of its bytes are read."""


def draw_object_map(plans: RankPlans, figure: FigureBase) -> None:
    axes = figure.subplots()
    groups = group_ranks([_requests_key(plan.fetched) for plan in plans])
    if not groups:
        axes.set_title("No rank reads anything", fontsize="medium", loc="left")
        return
    requests = [plans[group.ranks[0]].fetched for group in groups]
    touched = sorted({int(at) for of in requests for at in np.unique(of.objects)}, key=_by_writer(plans))
    shown = touched[:: -(-len(touched) // MAX_STRIPS)]
    nbytes = np.array([plans.objects[at][1] for at in shown])
    edges = np.linspace(0, max(int(nbytes.max()), 1), BINS + 1)
    inside = nbytes[:, None] > edges[:-1]
    lanes = len(groups) if len(shown) * len(groups) <= MAX_LANES else 1
    gap = 1 if len(shown) * lanes <= MAX_LANES else 0
    image = np.ones((len(shown), lanes + gap, BINS, 4))
    # For each bin: the largest part of it that one group reads, that group, and the number of groups that read it.
    most, who, many = (np.zeros((lanes, len(shown), BINS), kind) for kind in (np.float32, np.int32, np.int32))
    for number, of in enumerate(requests):
        lane = number if lanes > 1 else 0
        for strip, covered in _covered(of, shown, edges):
            more = covered > most[lane, strip]
            most[lane, strip, more], who[lane, strip, more] = covered[more], number
            many[lane, strip] += covered > 0
    for lane in range(lanes):
        image[:, lane] = _coloured(most[lane], who[lane], many[lane], groups, inside)
    height = image.shape[0] * image.shape[1]
    axes.imshow(
        image.reshape(height, BINS, 4),
        extent=(0, edges[-1] / 1e6, height, 0),
        aspect="auto",
        interpolation="nearest",
    )
    _label(axes, plans, shown, lanes + gap, len(touched))
    further = [("not read", {"color": UNREAD})]
    further += [("several ranks", {"color": SEVERAL})] if lanes == 1 and len(groups) > 1 else []
    legend(figure, axes, groups, further)


def _label(axes: Axes, plans: RankPlans, shown: list[int], per_strip: int, touched: int) -> None:
    objects = f"{touched} of {len(plans.objects)} objects are read"
    axes.set_title(objects + (f", {len(shown)} shown" if len(shown) < touched else ""), fontsize="medium", loc="left")
    axes.set_xlabel("MB of the object")
    axes.spines[["top", "right", "left"]].set_visible(False)
    if len(shown) <= MAX_NAMED_OBJECTS:
        names = [_short_object_name(plans.objects[at][0]) for at in shown]
        axes.set_yticks([(i + 0.5) * per_strip for i in range(len(shown))], names, fontsize="x-small", parse_math=False)
        axes.tick_params(axis="y", length=0)
    else:
        axes.set_yticks([])
        axes.set_ylabel("objects, by the rank that wrote them")


def _short_object_name(name: str) -> str:
    """Shorten the name of an object but keep its end, which identifies its writer."""
    base = shown(name.rpartition("/")[2])
    return base if len(base) <= 24 else f"{base[:4]}…{base[-16:]}"


def _by_writer(plans: RankPlans) -> Callable[[int], tuple[list[tuple[int, str]], str]]:
    def key(at: int) -> tuple[list[tuple[int, str]], str]:
        name = plans.objects[at][0]
        return [(len(part), part) for part in re.findall(r"\d+", name.rpartition("-")[2])], name

    return key


def _requests_key(requests: Requests) -> object:
    columns = (requests.objects, requests.starts, requests.stops)
    return tuple(column.tobytes() for column in columns) if len(requests) else None


def _covered(requests: Requests, shown: Sequence[int], edges: FloatArray) -> Iterator[tuple[int, FloatArray]]:
    """Yield each strip that is read, and the part of each of its bins that is read: (bins,) values from 0 to 1."""
    order = np.lexsort((requests.starts, requests.objects))
    objects, starts, stops = requests.objects[order], requests.starts[order], requests.stops[order]
    nbytes = (requests.stops - requests.starts).astype(np.float64)
    for row, (count, run, _) in requests.sparse.items():
        nbytes[row] = count * run
    nbytes = nbytes[order]
    begins, ends = (np.searchsorted(objects, shown, side) for side in ("left", "right"))
    for strip, (begin, end) in enumerate(zip(begins.tolist(), ends.tolist(), strict=True)):
        if begin == end:
            continue
        after = np.cumsum(nbytes[begin:end])
        boundaries = np.stack([starts[begin:end], stops[begin:end]], axis=1).reshape(-1)
        fetched = np.stack([after - nbytes[begin:end], after], axis=1).reshape(-1)
        parts: FloatArray = np.diff(np.interp(edges, boundaries, fetched)) / (edges[1] - edges[0])
        yield strip, np.minimum(parts, 1)


def _coloured(
    most: FloatArray, who: Counts, many: Counts, groups: list[RankGroup], inside: npt.NDArray[np.bool_]
) -> FloatArray:
    """Return the (strips, bins, 4) colours of bins.

    Args:
        most: (strips, bins) the largest part of the bin that one group reads.
        who: (strips, bins) that group.
        many: (strips, bins) the number of groups that read the bin.
        groups: the groups of ranks.
        inside: (strips, bins) whether the bin is inside the object.
    """
    colours = np.array([group.colour for group in groups])[who]
    colours[many > 1] = SEVERAL
    strength = np.where(many > 0, FAINTEST + (1 - FAINTEST) * most, 0)[..., None]
    background = np.where(inside[..., None], np.array(UNREAD), 1.0)
    mixed: FloatArray = strength * colours + (1 - strength) * background
    mixed[..., 3] = 1
    return mixed
