"""Plan what each rank of a layout reads of a checkpoint. This needs metadata only."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from .box import IntArray, intersect_many
from .chunk_reads import WantedBox
from .coalesce import GapLimits
from .entries import Entry
from .errors import InvalidPlanError, LayoutError
from .html import table
from .index import CheckpointIndex
from .layout import Layout, LocalTensor, Mesh, matches
from .plan_json import plan_from_json, plan_to_json
from .read_plan import NATIVE_GAP_LIMITS, ReadPlan, find_chunks, plan_reads
from .report import REPORT_COLUMNS, WholeShards
from .request_costs import REMOTE_COSTS
from .shared_reads import Needs, ReadDivision, shared_plan
from .slabs import NO_GAPS
from .text import quoted


@dataclass(frozen=True, slots=True)
class RankTensor:
    """The part of a tensor that one rank holds under a layout."""

    name: str
    """The name of the tensor in the layout. It may differ from the name in the checkpoint."""
    entry: Entry
    local: LocalTensor

    @property
    def wants(self) -> list[WantedBox]:
        """The boxes that the rank wants to read: one for each box of the local tensor."""
        return [WantedBox(self.entry.name, box) for box in self.local.boxes]


@dataclass(frozen=True, slots=True)
class RankPlans:
    """The read plans of all ranks of a layout: `plans[rank]`."""

    mesh: Mesh
    plans: tuple[ReadPlan, ...]
    whole_shards: tuple[WholeShards, ...]
    """What each rank would read if it read whole saved shards, as DCP does."""
    objects: tuple[tuple[str, int], ...]
    """The name and the size in bytes of each data object. The plans refer to objects by their position here."""
    location: str = ""
    """The location of the checkpoint."""

    def __post_init__(self) -> None:
        if not len(self.plans) == len(self.whole_shards) == self.mesh.world_size:
            raise InvalidPlanError(
                f"the mesh {self.mesh} needs {self.mesh.world_size} plans, got {len(self.plans)} plans and "
                f"{len(self.whole_shards)} counts of whole shards"
            )
        named = [plan.requests.objects for plan in self.plans]
        named += [plan.exchange.objects for plan in self.plans if plan.exchange is not None]
        if any(bool(((objects < 0) | (objects >= len(self.objects))).any()) for objects in named):
            raise InvalidPlanError(f"a plan reads an object that is not one of the {len(self.objects)} listed")

    def __getitem__(self, rank: int) -> ReadPlan:
        return self.plans[rank]

    def __len__(self) -> int:
        return len(self.plans)

    def __iter__(self) -> Iterator[ReadPlan]:
        return iter(self.plans)

    def to_json(self) -> str:
        """Return the plans as JSON, about 100 bytes per chunk and rank. `from_json` converts it back to an equal
        value."""
        value = {
            "location": self.location,
            "mesh": dict(zip(self.mesh.names, self.mesh.sizes, strict=True)),
            "objects": self.objects,
            "whole_shards": [asdict(shards) for shards in self.whole_shards],
            "plans": [plan_to_json(plan) for plan in self.plans],
        }
        return json.dumps(value, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> RankPlans:
        """Return the plans that `to_json` wrote. Raises InvalidPlanError."""
        try:
            value = json.loads(text)
            return cls(
                Mesh.of({str(name): int(size) for name, size in value["mesh"].items()}),
                tuple(plan_from_json(plan) for plan in value["plans"]),
                tuple(WholeShards(int(shards["shards"]), int(shards["nbytes"])) for shards in value["whole_shards"]),
                tuple((str(name), int(nbytes)) for name, nbytes in value["objects"]),
                str(value["location"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError, RecursionError, LayoutError) as error:
            raise InvalidPlanError(f"these are not valid read plans: {type(error).__name__}: {error}") from error

    def __str__(self) -> str:
        lines = [f"{self.mesh}: {len(self)} ranks"]
        lines += [f"rank {rank}: {plan.report}" for rank, plan in enumerate(self.plans)]
        return "\n".join(lines)

    def __repr__(self) -> str:
        reports = [plan.report for plan in self.plans]
        fetched = sum(report.bytes_fetched for report in reports)
        return f"RankPlans({self.location!r} read by {self.mesh}: {fetched / 1e6:.2f} MB fetched)"

    def _repr_html_(self) -> str:
        rows = [
            (f"rank {rank}", *plan.report.row, f"{shards.nbytes / 1e6:.2f}")
            for rank, (plan, shards) in enumerate(zip(self.plans, self.whole_shards, strict=True))
        ]
        return table(f"{self.location} read by {self.mesh}", ("", *REPORT_COLUMNS, "MB in whole shards"), rows)


def check_layout_fits(layout: Layout, names: Collection[str]) -> None:
    """Check that the rules and the stages of a layout concern some of the tensors of a checkpoint.

    Args:
        names: the names of all tensors of the checkpoint.

    Raises:
        LayoutError: no tensor matches a rule, or none is in the stages.
    """
    patterns, in_stages = [pattern for pattern, _ in layout.rules], [name for name, _ in layout.stages]
    if names and patterns and not any(matches(pattern, name) for name in names for pattern in patterns):
        raise LayoutError(
            f"no pattern of the layout ({quoted(patterns)}) matches any of the {len(names)} tensors, such as "
            f"{next(iter(names))!r}: correct the patterns, or pass no rules to replicate all tensors"
        )
    if names and in_stages and set(names).isdisjoint(in_stages):
        raise LayoutError(
            f"none of the names in the stages of the layout ({quoted(in_stages)}) is one of the {len(names)} tensors, "
            f"such as {next(iter(names))!r}: stages take names of tensors, not patterns or names of modules; "
            "reshard.layout.even_stages returns them"
        )


def rank_tensors(entries: Mapping[str, Entry], layout: Layout, rank: int) -> list[RankTensor]:
    """Return the part of each tensor that a rank holds under a layout.

    Args:
        entries: the tensors of a checkpoint, by their names in the layout.
        layout: the layout.
        rank: the rank.

    Raises:
        LayoutError: a tensor does not fit its rule.
    """
    return [
        RankTensor(name, entry, layout.local(name, entry.shape, rank))
        for name, entry in entries.items()
        if layout.holds(name, rank)
    ]


def plan_ranks(
    index: CheckpointIndex,
    layout: Layout,
    entries: Mapping[str, Entry] | None = None,
    gap_limits: GapLimits = NATIVE_GAP_LIMITS,
    location: str = "",
    cooperative: bool | Literal["auto"] = False,
    bytes_per_s: float = REMOTE_COSTS.bytes_per_s,
) -> RankPlans:
    """Plan what each rank of a layout reads.

    Args:
        index: the index of the checkpoint.
        layout: the layout.
        entries: the tensors to read, by their names in the layout. By default, all tensors of the index.
        gap_limits: which gaps between byte ranges to read over.
        location: the location of the checkpoint.
        cooperative: whether ranks read together what several of them need. "auto": if it saves time.
        bytes_per_s: how fast a rank reads from the store.

    Raises:
        LayoutError: a tensor does not fit its rule, or `entries` is None and no tensor matches a rule.
        InvalidIndexError: the shards in the index do not cover a box exactly once.
    """
    if entries is None:
        entries = {entry.name: entry for entry in index.entries if entry.is_tensor}
        check_layout_fits(layout, entries.keys())
    wants = [
        tuple(want for tensor in rank_tensors(entries, layout, rank) for want in tensor.wants)
        for rank in range(layout.world_size)
    ]
    ranks_of: dict[tuple[WantedBox, ...], list[int]] = {}  # replicas want the same boxes
    for rank, of_rank in enumerate(wants):
        ranks_of.setdefault(of_rank, []).append(rank)
    plans = None
    if cooperative is not False and len(wants) > 1:
        plans = _plan_together(index, ranks_of, gap_limits, bytes_per_s if cooperative == "auto" else None)
    if plans is None:
        separate = {of_rank: plan_reads(index, of_rank, gap_limits=gap_limits) for of_rank in ranks_of}
        plans = [separate[of_rank] for of_rank in wants]
    shards_of = functools.cache(index.shards)
    shards = {of_rank: _whole_shards(index, of_rank, shards_of) for of_rank in ranks_of}
    return RankPlans(layout.mesh, tuple(plans), tuple(shards[of_rank] for of_rank in wants), index.objects, location)


def _plan_together(
    index: CheckpointIndex,
    ranks_of: Mapping[tuple[WantedBox, ...], Sequence[int]],
    gap_limits: GapLimits,
    bytes_per_s: float | None,
) -> list[ReadPlan] | None:
    """Plan what each rank reads if the ranks share a read.

    Args:
        ranks_of: the ranks that want the same boxes.
        bytes_per_s: how fast a rank reads. The result is None if sharing is then estimated to save no time. None:
            share in any case.
    """
    objects = [name for name, _ in index.objects]
    reads = [find_chunks(index, wants, NO_GAPS, aligned=True) for wants in ranks_of]
    tensors = [[index.position(want.name) for want in wants] for wants in ranks_of]
    needs = [Needs.of(of_group, objects, at) for of_group, at in zip(reads, tensors, strict=True)]
    divided = ReadDivision.of(needs, list(ranks_of.values()))
    if bytes_per_s is not None and not divided.saves_time(bytes_per_s):
        return None
    plans = {
        rank: shared_plan(index, of_group, at, divided.share_of(rank), gap_limits)
        for of_group, at, ranks in zip(reads, tensors, ranks_of.values(), strict=True)
        for rank in ranks
    }
    return [plans[rank] for rank in sorted(plans)]


def _whole_shards(
    index: CheckpointIndex, wants: Sequence[WantedBox], shards_of: Callable[[int], tuple[IntArray, IntArray]]
) -> WholeShards:
    """Count the shards that these boxes overlap, and their bytes. `shards_of` returns the shards of an entry."""
    shards = nbytes = 0
    for want in wants:
        position = index.position(want.name)
        offsets, sizes = shards_of(position)
        met = (intersect_many(offsets, sizes, want.box)[1] > 0).all(axis=1)
        shards += int(met.sum())
        nbytes += int(sizes[met].prod(axis=1).sum()) * index.entries[position].itemsize
    return WholeShards(shards, nbytes)
