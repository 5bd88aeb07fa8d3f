"""Pictures of plans, as figures of matplotlib (`pip install 'reshard[plot]'`): why a rank reads what it reads.

    plans = reshard.open("s3://bucket/run/step-1000").plan(layout)
    reshard.pictures.rank_bars(plans)                     bytes and requests by rank, and those of whole shards
    reshard.pictures.object_map(plans)                    what each rank touches of each data object
    reshard.pictures.chunk_map(plans, "layers.0.up")      which rank reads which chunk of a tensor
    reshard.pictures.overview(plans)                      all three in one

Each returns a Figure, which notebooks show, and `figure.savefig("plan.png")` writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ..errors import ArgumentError
from ..planner.box import Box
from ..planner.rank_plans import RankPlans
from .chunk_map import draw_chunk_map, most_over_read
from .object_map import draw_object_map
from .rank_bars import draw_rank_bars

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["chunk_map", "most_over_read", "object_map", "overview", "rank_bars"]


def chunk_map(plans: RankPlans, name: str, *, shards: Iterable[Box] = ()) -> Figure:
    """The chunks of a tensor, coloured by the ranks that want their values; hatched, where more is read than wanted.

    A tensor of one dimension is drawn as a row; more than two are folded into rows and columns, as square as may be.

    Args:
        shards: those that the tensor was saved as, to be outlined: `checkpoint.layout_of(name)[0]`.

    Raises MissingTensorError where no rank reads the tensor, ArgumentError without matplotlib.
    """
    figure = _figure(9, 6)
    draw_chunk_map(plans, name, list(shards), figure)
    return figure


def object_map(plans: RankPlans) -> Figure:
    """What the ranks fetch of each data object, as a strip an object. Raises ArgumentError without matplotlib."""
    figure = _figure(9, 6)
    draw_object_map(plans, figure)
    return figure


def rank_bars(plans: RankPlans, *, seconds: Sequence[float] = ()) -> Figure:
    """Bytes needed, fetched, and read by whoever takes shards whole, as DCP does; and requests, by rank.

    Args:
        seconds: that each rank takes, to be drawn below.

    Raises ArgumentError without matplotlib.
    """
    figure = _figure(9, 6)
    draw_rank_bars(plans, seconds, figure)
    return figure


def overview(
    plans: RankPlans, *, name: str | None = None, shards: Iterable[Box] = (), seconds: Sequence[float] = ()
) -> Figure:
    """The three pictures in one.

    Args:
        name: the tensor of the chunk map; by default the one of which most is read that is not wanted.
        shards: as of `chunk_map`.
        seconds: as of `rank_bars`.

    Raises as `chunk_map`.
    """
    figure = _figure(15, 11)
    above, below = figure.subfigures(2, 1, squeeze=False)[:, 0]
    left, right = above.subfigures(1, 2, squeeze=False)[0]
    draw_rank_bars(plans, seconds, left)
    draw_object_map(plans, right)
    shown = name or most_over_read(plans)
    if shown is not None:
        draw_chunk_map(plans, shown, list(shards), below)
    return figure


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ArgumentError("pictures need matplotlib: pip install 'reshard[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")
