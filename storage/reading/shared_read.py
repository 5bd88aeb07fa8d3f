"""Agree with the other ranks on a read that they share, and plan it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from ...planner.chunk_reads import ChunkReads, WantedBox
from ...planner.coalesce import GapLimits
from ...planner.index import CheckpointIndex
from ...planner.read_plan import ReadPlan, find_chunks
from ...planner.request_costs import REMOTE_COSTS
from ...planner.shared_reads import Needs, RankShare, ReadDivision, digest, shared_plan
from ...planner.slabs import NO_GAPS
from ..errors import ArgumentError
from ..formats.source import Source
from ..runtime.limits import budget_of
from ..runtime.peers import Peers
from ..runtime.process_group import Alarm, is_distributed, on_all_ranks, rank_of

T = TypeVar("T")
MAX_RANGES = 2_000_000
"""With "auto", a read of more byte ranges than this in total is not shared. To compare as many takes a second."""
_MODES = (True, False, "auto")


def check_cooperative(cooperative: object) -> None:
    """Raise ArgumentError unless the argument is True, False or "auto"."""
    if not any(cooperative is mode or (mode == "auto" and cooperative == mode) for mode in _MODES):
        raise ArgumentError(f'cooperative must be True, False or "auto", got {cooperative!r}')


@dataclass(frozen=True, slots=True)
class Offer:
    """What a rank sends to the others before a read that they may share."""

    mode: object
    """True or "auto"."""
    digest: bytes
    """A hash of what the rank needs."""
    n_ranges: int
    """The number of byte ranges that the rank needs."""
    budget_bytes: int


def may_share(source: Source, mode: object) -> bool:
    """Return whether a read of a checkpoint may be shared. "auto" never shares reads of local files."""
    return mode is True or (mode == "auto" and not source.store.capabilities.is_local)


def check_same_mode(offers: Sequence[Offer | None]) -> None:
    """Check that either all ranks demand a shared read or none does.

    Raises:
        ArgumentError: some ranks passed `cooperative=True`, and others did not.
    """
    demanding = [offer is not None and offer.mode is True for offer in offers]
    if any(demanding) and not all(demanding):
        raise ArgumentError(
            f"rank {demanding.index(True)} passed cooperative=True, and rank {demanding.index(False)} did not: pass "
            "the same value on all ranks"
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Wanted:
    """What one rank needs. Another rank may read a part of it."""

    index: CheckpointIndex
    reads: tuple[ChunkReads, ...]
    tensors: list[int]
    """For each read, the position of its tensor among those of the checkpoint."""
    needs: Needs
    packed: bytes
    """`needs` as bytes."""

    @classmethod
    def of(cls, source: Source, wants: Sequence[WantedBox]) -> _Wanted:
        index = source.index(wants)
        positions = {entry.name: at for at, entry in enumerate(source.entries)}
        tensors = [positions[want.name] for want in wants]
        reads = tuple(find_chunks(index, wants, NO_GAPS, aligned=True))
        needs = Needs.of(reads, [name for name, _ in index.objects], tensors)
        return cls(index, reads, tensors, needs, needs.pack())


@dataclass(frozen=True, slots=True, eq=False)
class SharedPart:
    """One rank's part of a read that the ranks share."""

    wanted: _Wanted
    share: RankShare
    """What this rank reads, sends and receives."""
    peers: Peers

    @property
    def index(self) -> CheckpointIndex:
        return self.wanted.index

    def plan(self, gap_limits: GapLimits, max_request_bytes: int) -> ReadPlan:
        """Plan what this rank reads, sends and receives."""
        wanted = self.wanted
        return shared_plan(wanted.index, wanted.reads, wanted.tensors, self.share, gap_limits, max_request_bytes)


class SharedRead:
    """A collective read: if it saves time, one rank reads what several need and sends it to them.

    All ranks call `agree` and then `read`, or `run`, which calls both. `offer` is not collective. Use it as a context
    manager. If the block raises, the messages between the ranks end.

    Args:
        mode: see `reshard.load(cooperative=...)`.
        budget_bytes: the memory that this rank may use. None is the default budget.
        process_group: the ranks. None is the default group.
    """

    def __init__(self, mode: object, budget_bytes: int | None, process_group: dist.ProcessGroup | None = None) -> None:
        self.alarm = Alarm(process_group)
        self.part: SharedPart | None = None
        """This rank's part. None if each rank reads for itself."""
        self._mode = mode
        self._budget_bytes = budget_bytes
        self._group = process_group
        self._wanted: _Wanted | None = None

    def offer(self, source: Source, wants: Callable[[], Sequence[WantedBox]]) -> Offer | None:
        """Return what this rank needs, or None if it does not share the read."""
        if self._wanted is None:
            if not (is_distributed() and may_share(source, self._mode)):
                return None
            self._wanted = _Wanted.of(source, wants())
        budget_bytes = budget_of(self._budget_bytes)
        return Offer(self._mode, digest(self._wanted.packed), len(self._wanted.needs), budget_bytes)

    def agree(self, offers: Sequence[Offer | None]) -> None:
        """Decide with the other ranks whether to share the read. Collective.

        Raises:
            ArgumentError: some ranks demand a shared read, and others do not.
        """
        check_same_mode(offers)
        known = [offer for offer in offers if offer is not None]
        if self._wanted is None or len(known) < len(offers) or len(known) == 1:
            return
        share = self._share(self._wanted, known)
        if share is not None:
            self.part = SharedPart(self._wanted, share, Peers.of(self._group))

    def _share(self, wanted: _Wanted, offers: Sequence[Offer]) -> RankShare | None:
        """Divide the read, in the same way on all ranks. Return None if the ranks read separately. Collective."""
        ranks_of: dict[bytes, list[int]] = {}
        for other, offer in enumerate(offers):
            ranks_of.setdefault(offer.digest, []).append(other)
        groups = list(ranks_of.values())
        is_demanded = all(offer.mode is True for offer in offers)
        if not is_demanded and sum(offers[ranks[0]].n_ranges for ranks in groups) > MAX_RANGES:
            return None
        rank = rank_of(self._group)
        if len(groups) == 1:
            needs = [wanted.needs]
        else:
            is_first = any(ranks[0] == rank for ranks in groups)
            packed = on_all_ranks(lambda: wanted.packed if is_first else b"", self._group)
            needs = [Needs.unpack(packed[ranks[0]]) for ranks in groups]
        divided = ReadDivision.of(needs, groups, min(offer.budget_bytes for offer in offers))
        return divided.share_of(rank) if is_demanded or divided.saves_time(REMOTE_COSTS.bytes_per_s) else None

    def run(self, prepare: Callable[[], Offer | None], read: Callable[[], T]) -> list[T]:
        """Prepare on all ranks, agree, and read on all ranks. Return the results of all ranks. Collective.

        Args:
            prepare: returns the result of `offer`.
            read: reads with `ReadOptions(shared_read=...)`.
        """
        with self:
            self.agree(on_all_ranks(prepare, self._group))
            return self.read(read)

    def read(self, read: Callable[[], T]) -> list[T]:
        """Read on all ranks. If one fails, the others stop. Collective."""

        def work() -> T:
            with self.alarm:
                return read()

        return on_all_ranks(work, self._group)

    def __enter__(self) -> SharedRead:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None and self.part is not None:
            self.part.peers.abort()
        self.alarm.close()
