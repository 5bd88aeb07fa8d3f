"""Draw read plans with matplotlib (`pip install 'reshard[plot]'`), to show why a rank reads what it reads.

    plans = reshard.open("s3://bucket/run/step-1000").plan(layout)
    reshard.pictures.rank_bars(plans)                     bytes and requests per rank, compared with whole shards
    reshard.pictures.object_map(plans)                    which parts of each data object each rank reads
    reshard.pictures.chunk_map(plans, "layers.0.up")      which rank reads which chunk of a tensor
    reshard.pictures.overview(plans)                      all three in one figure

Each function returns a Figure. Notebooks show it, and `figure.savefig("plan.png")` writes it to a file.
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
    """Draw the chunks of a tensor. Colours show the ranks that want their values; hatches show over-read.

    A tensor with one dimension is drawn as a row. A tensor with more than two dimensions is folded into rows and
    columns, as close to a square as possible.

    Args:
        plans: the plans, as `Checkpoint.plan` returns them.
        name: the name of the tensor.
        shards: the shards that the tensor was saved as, to outline them: `checkpoint.shards_of(name)[0]`.

    Raises:
        MissingTensorError: no rank reads the tensor.
        ArgumentError: matplotlib is not installed.
    """
    figure = _figure(9, 6)
    draw_chunk_map(plans, name, list(shards), figure)
    return figure


def object_map(plans: RankPlans) -> Figure:
    """Draw the parts of each data object that the ranks read: one strip per object.

    Raises:
        ArgumentError: matplotlib is not installed.
    """
    figure = _figure(9, 6)
    draw_object_map(plans, figure)
    return figure


def rank_bars(plans: RankPlans, *, seconds: Sequence[float] = ()) -> Figure:
    """Draw the bytes of each rank as bars: needed, fetched, and in whole shards (which DCP reads).

    The requests of each rank are drawn below the bytes.

    Args:
        plans: the plans, as `Checkpoint.plan` returns them.
        seconds: the seconds that each rank takes, to draw them below the requests.

    Raises:
        ArgumentError: matplotlib is not installed.
    """
    figure = _figure(9, 6)
    draw_rank_bars(plans, seconds, figure)
    return figure


def overview(
    plans: RankPlans, *, name: str | None = None, shards: Iterable[Box] = (), seconds: Sequence[float] = ()
) -> Figure:
    """Draw all three pictures in one figure.

    Args:
        plans: the plans, as `Checkpoint.plan` returns them.
        name: the tensor of the chunk map. By default, the tensor with the largest over-read.
        shards: see `chunk_map`.
        seconds: see `rank_bars`.

    Raises:
        MissingTensorError: no rank reads the tensor.
        ArgumentError: matplotlib is not installed.
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
        raise ArgumentError("pictures need matplotlib; install it with pip install 'reshard[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")
