"""What every rank of a layout reads of a checkpoint, from metadata alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .box import intersect_many
from .byte_ranges import Gaps
from .errors import LayoutError, MissingTensorError
from .index import CheckpointIndex, Entry, Kind, Stream
from .layout import Layout, LocalTensor, matches
from .read_plan import GAPS, ReadPlan, Want, plan_reads
from .report import WholeShards


@dataclass(frozen=True, slots=True)
class RankTensor:
    """One tensor of a rank: what it holds of it under a layout."""

    entry: Entry
    local: LocalTensor

    @property
    def wants(self) -> list[Want]:
        """One for each box of the local tensor that has elements."""
        return [Want(self.entry.name, box) for box in self.local.boxes]


@dataclass(frozen=True, slots=True)
class RankPlans:
    """The read plans of all ranks of a layout: `plans[rank]`."""

    layout: Layout
    plans: tuple[ReadPlan, ...]

    def __getitem__(self, rank: int) -> ReadPlan:
        return self.plans[rank]

    def __len__(self) -> int:
        return len(self.plans)

    def __iter__(self) -> Iterator[ReadPlan]:
        return iter(self.plans)

    def __str__(self) -> str:
        lines = [f"{self.layout.mesh}: {len(self)} ranks"]
        lines += [f"rank {rank}: {plan.report}" for rank, plan in enumerate(self.plans)]
        return "\n".join(lines)


def rank_tensors(entries: Iterable[Entry], layout: Layout, rank: int, names: str = "*") -> list[RankTensor]:
    """What a rank holds of every tensor whose name matches a pattern.

    Raises MissingTensorError where none does, LayoutError where none matches a rule of the layout, or one does not fit.
    """
    entries = [entry for entry in entries if entry.kind is Kind.TENSOR and matches(names, entry.name)]
    if not entries and names != "*":
        raise MissingTensorError(f"the checkpoint has no tensor whose name matches {names!r}")
    patterns = [pattern for pattern, _ in layout.rules]
    if entries and patterns and not any(matches(pattern, entry.name) for entry in entries for pattern in patterns):
        raise LayoutError(f"no pattern of the layout, {patterns}, matches any tensor: {entries[0].name!r}, ...")
    return [RankTensor(entry, layout.local(entry.name, entry.shape, rank)) for entry in entries]


def whole_shards(index: CheckpointIndex, layout: Layout, names: str = "*") -> list[WholeShards]:
    """What every rank of a layout would read that takes saved shards as a whole. Raises LayoutError."""
    found = []
    for rank in range(layout.world_size):
        shards = nbytes = 0
        for want in (want for tensor in rank_tensors(index.entries, layout, rank, names) for want in tensor.wants):
            position = index.position(want.name)
            offsets, sizes = index.shard_boxes(position)
            met = (intersect_many(offsets, sizes, want.box)[1] > 0).all(axis=1)
            met &= index.segments.streams[index.segments_of(position)] != Stream.TAIL
            shards += int(met.sum())
            nbytes += int(sizes[met].prod(axis=1).sum()) * index.entries[position].itemsize
        found.append(WholeShards(shards, nbytes))
    return found


def plan_ranks(index: CheckpointIndex, layout: Layout, names: str = "*", gaps: Gaps = GAPS) -> RankPlans:
    """Plan what every rank of a layout reads of the tensors whose names match a pattern.

    Raises LayoutError, InvalidIndexError.
    """
    held = (rank_tensors(index.entries, layout, rank, names) for rank in range(layout.world_size))
    plans = (plan_reads(index, [want for tensor in tensors for want in tensor.wants], gaps=gaps) for tensors in held)
    return RankPlans(layout, tuple(plans))
