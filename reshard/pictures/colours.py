"""Choose colours for ranks. Ranks that read the same bytes, such as replicas, share a colour."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..humanize import format_ranks

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase

Colour = tuple[float, float, float, float]
SEVERAL: Colour = (0.35, 0.35, 0.35, 1.0)
"""The colour of bytes that several groups of ranks read."""
UNREAD: Colour = (0.92, 0.92, 0.92, 1.0)
DCP: Colour = (0.85, 0.33, 0.10, 1.0)
NEEDED: Colour = (0.55, 0.55, 0.55, 1.0)
FETCHED: Colour = (0.12, 0.47, 0.71, 1.0)
MAX_COLUMNS = 6
MAX_NAMED_GROUPS = 12
"""Up to this many groups are named in the legend. If there are more, the legend is a colour scale."""


@dataclass(frozen=True, slots=True)
class RankGroup:
    """Ranks that read the same bytes."""

    ranks: tuple[int, ...]
    colour: Colour

    @property
    def label(self) -> str:
        return ("rank " if len(self.ranks) == 1 else "ranks ") + format_ranks(self.ranks)


def group_ranks(keys: Sequence[Hashable]) -> list[RankGroup]:
    """Group ranks by what they read: rank i reads `keys[i]`. A rank with the key None reads nothing and is in no
    group."""
    import matplotlib

    found: dict[Hashable, list[int]] = {}
    for rank, key in enumerate(keys):
        if key is not None:
            found.setdefault(key, []).append(rank)
    few = len(found) <= MAX_NAMED_GROUPS
    colours = matplotlib.colormaps["tab20" if few else "turbo"]
    return [
        RankGroup(tuple(of), colours((2 * i % 20 + i // 10) if few else i / len(found)))
        for i, of in enumerate(found.values())
    ]


def legend(
    figure: FigureBase, axes: Any, groups: Sequence[RankGroup], further: Iterable[tuple[str, dict[str, Any]]]
) -> None:
    """Draw a legend below the axes: the colours of the groups, and `further` labels with their styles."""
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Patch

    named = groups if len(groups) <= MAX_NAMED_GROUPS else []
    handles = [Patch(color=group.colour, label=group.label) for group in named]
    handles += [Patch(label=label, **looks) for label, looks in further]
    if len(named) < len(groups):
        scale = ScalarMappable(Normalize(0, groups[-1].ranks[0]), matplotlib.colormaps["turbo"])
        figure.colorbar(scale, ax=axes, label="rank", fraction=0.03, pad=0.01)
    if handles:
        columns = math.ceil(len(handles) / math.ceil(len(handles) / MAX_COLUMNS))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize="small", frameon=False)
