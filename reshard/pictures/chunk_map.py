"""Draw the chunks of one tensor and the ranks that read them."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..errors import MissingTensorError
from ..planner.box import Box
from ..planner.chunk_reads import ChunkReads
from ..planner.rank_plans import RankPlans
from ..planner.read_plan import ReadPlan
from ..planner.text import shortened, shown
from .colours import UNREAD, group_ranks, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

Rectangle = tuple[int, int, int, int]
"""Left, top, width and height, in elements."""
MAX_RECTANGLES = 40_000
MAX_LINES = 1500
"""Up to this many chunks are outlined, and hatched if they are over-read. If there are more, over-read ones are
darker."""
MAX_OUTLINES = 100
MAX_OF_A_NAME = 120
"""The number of characters that fit into a title."""


def draw_chunk_map(plans: RankPlans, name: str, shards: Sequence[Box], figure: FigureBase) -> None:
    from matplotlib.ticker import MaxNLocator

    reads = [_reads_of(plan, name) for plan in plans]
    groups = group_ranks([tuple(read.want.box for read in of_rank) or None for of_rank in reads])
    if not groups:
        raise MissingTensorError(f"no rank reads {name!r} in this plan")
    entry = reads[groups[0].ranks[0]][0].entry
    flat = _Flat(entry.shape)
    axes = figure.subplots()
    _add(axes, flat.whole, facecolor=UNREAD)
    chunks: set[Rectangle] = set()
    over: set[Rectangle] = set()
    for group in groups:
        for read in reads[group.ranks[0]]:
            box = read.want.box
            _add(axes, flat.of(np.array([box.offsets]), np.array([box.sizes])), facecolor=group.colour, alpha=0.85)
            if len(chunks) < MAX_RECTANGLES:
                chunks.update(flat.of(read.chunk_offsets, read.chunk_sizes))
            more = read.bytes_over > 0
            over.update(flat.of(read.chunk_offsets[more], read.chunk_sizes[more]))
    dense = len(chunks) > MAX_LINES
    if not dense:
        _add(axes, chunks, facecolor="none", edgecolor="white", linewidth=0.4)
    looks = {"facecolor": "black", "alpha": 0.35} if dense else {"facecolor": "none", "hatch": "////", "alpha": 0.6}
    _add(axes, over, edgecolor="none" if dense else "black", linewidth=0, **looks)
    boxes = [(box.offsets, box.sizes) for box in shards]
    outlines = [flat.of(np.array([offsets]), np.array([sizes])) for offsets, sizes in boxes]
    _add(
        axes,
        itertools.chain.from_iterable(outlines),
        facecolor="none",
        edgecolor="black",
        linewidth=1.2 if len(boxes) <= MAX_OUTLINES else 0.2,
    )
    axes.set_xlim(0, flat.columns)
    axes.set_ylim(flat.rows, 0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[:].set_visible(False)
    axes.set_xlabel(flat.column_label)
    axes.set_ylabel(flat.row_label)
    axes.set_title(
        _chunk_map_title(name, entry.dtype, entry.shape, reads, plans), fontsize="medium", loc="left", parse_math=False
    )
    further = [("over-read", {"facecolor": "white"} | looks)] if over else []
    further += [("a saved shard", {"facecolor": "none", "edgecolor": "black"})] if shards else []
    legend(figure, axes, groups, further)


def most_over_read(plans: RankPlans) -> str | None:
    """Return the tensor with the largest over-read, or the largest tensor if nothing is over-read."""
    over: Counter[str] = Counter()
    needed: Counter[str] = Counter()
    for plan in plans:
        for read in plan.reads:
            needed[read.want.name] += read.bytes_needed
            over[read.want.name] += int(read.bytes_over.sum())
    return max(needed, key=lambda name: (over[name], needed[name]), default=None)


def _reads_of(plan: ReadPlan, name: str) -> list[ChunkReads]:
    return [read for read in plan.reads if read.want.name == name and len(read)]


def _chunk_map_title(
    name: str, dtype: str, shape: tuple[int, ...], reads: list[list[ChunkReads]], plans: RankPlans
) -> str:
    fetched = sum(read.bytes_spanned for of_rank in reads for read in of_rank)
    needed = sum(read.bytes_needed for of_rank in reads for read in of_rank)
    size = " x ".join(map(str, shape)) or "scalar"
    name = shortened(shown(name), MAX_OF_A_NAME, MAX_OF_A_NAME)
    return f"{name}, {dtype}, {size}, read by {plans.mesh}: {fetched / max(needed, 1):.2f} times the bytes needed"


class _Flat:
    """A tensor as a matrix: its dimensions are folded into rows and columns, as close to a square as possible."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = (1,) * (2 - len(shape)) + shape
        cuts = range(1, len(self._shape))
        at = min(cuts, key=lambda at: abs(math.log(max(1, self._size(0, at)) / max(1, self._size(at, None)))))
        self._at = at if len(shape) > 2 else 1
        self._added = 2 - len(shape) if len(shape) < 2 else 0
        self.rows, self.columns = self._size(0, self._at), self._size(self._at, None)
        self.whole = [(0, 0, self.columns, self.rows)]

    def _size(self, first: int, last: int | None) -> int:
        return math.prod(self._shape[first:last])

    @property
    def row_label(self) -> str:
        return self._label(range(self._at))

    @property
    def column_label(self) -> str:
        return self._label(range(self._at, len(self._shape)))

    def _label(self, dimensions: Iterable[int]) -> str:
        real = [str(d - self._added) for d in dimensions if d >= self._added]
        return ("dimension " if len(real) == 1 else "dimensions ") + ", ".join(real) if real else ""

    def of(self, offsets: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> list[Rectangle]:
        """Return the rectangles that boxes cover. Offsets and sizes are (n, ndim) arrays."""
        found: list[Rectangle] = []
        for low, extent in zip(offsets.tolist(), sizes.tolist(), strict=True):
            low, extent = [0] * self._added + low, [1] * self._added + extent
            rows = _runs(low[: self._at], extent[: self._at], self._shape[: self._at])
            columns = _runs(low[self._at :], extent[self._at :], self._shape[self._at :])
            found += [(x, y, width, height) for (y, height), (x, width) in itertools.product(rows, columns)]
            if len(found) > MAX_RECTANGLES:
                break  # too many to see each of them
        return found


def _runs(offsets: Sequence[int], sizes: Sequence[int], shape: Sequence[int]) -> list[tuple[int, int]]:
    """Return the positions and lengths of the runs that a box covers in row-major order."""
    runs = [(0, 1)]
    for low, extent, n in zip(offsets, sizes, shape, strict=True):
        grown = [(start * n + low, extent) for first, length in runs for start in range(first, first + length)]
        if extent == n:
            grown = [(first * n, length * n) for first, length in runs]
        runs = grown
    return runs


def _add(axes: Axes, rectangles: Iterable[Rectangle], **looks: object) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle as Patch

    patches = [Patch((x, y), width, height) for x, y, width, height in rectangles]
    axes.add_collection(PatchCollection(patches, match_original=False, **looks))
