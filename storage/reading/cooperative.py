"""Agree with the other ranks on a read that they share, and plan it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from ...planner.chunk_reads import WantedBox
from ...planner.coalesce import GapLimits
from ...planner.cooperation import Needs, Shared, Sharing, cooperative_plan, digest
from ...planner.read_plan import ReadPlan, find_chunks
from ...planner.request_costs import REMOTE_COSTS
from ...planner.slabs import NO_GAPS
from ..errors import ArgumentError
from ..formats.source import Source
from ..runtime.limits import default_budget
from ..runtime.peers import Peers
from ..runtime.process_group import Alarm, is_distributed, on_all_ranks, rank_of

T = TypeVar("T")
MAX_ROWS = 2_000_000
"""The most byte ranges of all ranks that "auto" compares. It takes about a second."""
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
    rows: int
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


class Cooperation:
    """One rank's part of a read that several ranks share.

    Args:
        source: the checkpoint.
        wants: the boxes that the rank reads.
        mode: True, or "auto" to share the read only if it saves time.
        budget_bytes: the memory that this rank may use.
    """

    def __init__(self, source: Source, wants: Sequence[WantedBox], mode: object, budget_bytes: int) -> None:
        self._source = source
        self.index = source.index(wants)
        positions = {entry.name: at for at, entry in enumerate(source.entries)}
        self._tensors = [positions[want.name] for want in wants]
        self._reads = find_chunks(self.index, wants, NO_GAPS)
        objects = [name for name, _ in self.index.objects]
        self._needs = Needs.of(self._reads, objects, self._tensors)
        self._packed = self._needs.pack()
        self._budget_bytes = budget_bytes
        self._mode = mode
        self.shared: Shared | None = None
        """What this rank reads, sends and receives. None if the ranks do not share the read."""

    @property
    def offer(self) -> Offer:
        return Offer(self._mode, digest(self._packed), len(self._needs), self._budget_bytes)

    def agree(self, offers: Sequence[Offer], rank: int, gather: Callable[[bytes], Sequence[bytes]]) -> None:
        """Decide whether to share the read, in the same way on all ranks. Collective.

        Args:
            offers: the offers of all ranks.
            rank: this rank.
            gather: returns the bytes that each rank passes.
        """
        ranks_of: dict[bytes, list[int]] = {}
        for other, offer in enumerate(offers):
            ranks_of.setdefault(offer.digest, []).append(other)
        groups = list(ranks_of.values())
        is_demanded = all(offer.mode is True for offer in offers)
        if not is_demanded and sum(offers[ranks[0]].rows for ranks in groups) > MAX_ROWS:
            return
        if len(groups) == 1:
            needs = [self._needs]
        else:
            is_first = any(ranks[0] == rank for ranks in groups)
            packed = gather(self._packed if is_first else b"")
            needs = [Needs.unpack(packed[ranks[0]]) for ranks in groups]
        sharing = Sharing.of(needs, groups, min(offer.budget_bytes for offer in offers))
        if is_demanded or sharing.saves_time(REMOTE_COSTS.bytes_per_s):
            self.shared = sharing.part_of(rank)

    def plan(self, gap_limits: GapLimits, max_request_bytes: int) -> ReadPlan:
        """Plan this rank's part of a shared read."""
        assert self.shared is not None
        return cooperative_plan(self.index, self._reads, self._tensors, self.shared, gap_limits, max_request_bytes)


class SharedRead:
    """A collective read: if it saves time, one rank reads what several need and sends it to them.

    Use it as a context manager. If the block raises, the messages between the ranks end.

    Args:
        mode: see `reshard.load(cooperative=...)`.
        budget_bytes: the memory that this rank may use. None is the default budget.
        process_group: the ranks. None is the default group.
    """

    def __init__(self, mode: object, budget_bytes: int | None, process_group: dist.ProcessGroup | None = None) -> None:
        self.alarm = Alarm(process_group)
        self.cooperation: Cooperation | None = None
        self.peers: Peers | None = None
        """None if each rank reads for itself."""
        self._mode = mode
        self._budget_bytes = budget_bytes
        self._group = process_group

    def offer(self, source: Source, wants: Callable[[], Sequence[WantedBox]]) -> Offer | None:
        """Return what this rank needs, or None if it does not share the read."""
        if self.cooperation is None and is_distributed() and may_share(source, self._mode):
            self.cooperation = Cooperation(source, wants(), self._mode, self._budget_bytes or default_budget())
        return None if self.cooperation is None else self.cooperation.offer

    def agree(self, offers: Sequence[Offer | None]) -> None:
        """Decide with the other ranks whether to share the read. Collective.

        Raises:
            ArgumentError: some ranks demand a shared read, and others do not.
        """
        check_same_mode(offers)
        known = [offer for offer in offers if offer is not None]
        cooperation = self.cooperation
        if cooperation is None or len(known) < len(offers) or len(known) == 1:
            return
        cooperation.agree(known, rank_of(self._group), lambda data: on_all_ranks(lambda: data, self._group))
        if cooperation.shared is not None:
            self.peers = Peers.of(self._group)

    def run(self, prepare: Callable[[], Offer | None], read: Callable[[], T]) -> list[T]:
        """Prepare on all ranks, agree, and read on all ranks. Return the results of all ranks. Collective.

        Args:
            prepare: returns the result of `offer`.
            read: reads with `ReadOptions(sharing=...)`.
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
        if error is not None and self.peers is not None:
            self.peers.abort()
        self.alarm.close()
