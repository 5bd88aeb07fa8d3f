"""Decides what a read does next: which requests to fetch, and which batches to write.

A schedule has no threads and does no I/O. Its caller performs the steps that it returns, several at a time, and reports
when they end. So tests can try all orders of events. `executor` drives it with threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .fetcher import Fetched
from .tasks import ChunkBatch, Request, TensorProgress

GROUPS_AHEAD = 4
"""The number of groups of requests that are announced in advance to a store that reads ahead."""


@dataclass(frozen=True, slots=True, eq=False)
class Fetch:
    """Fetch the bytes of some requests, one after another. Only a worker that reads a local file fetches several."""

    requests: Sequence[Request]
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class Verify:
    """Verify the bytes of a request that have arrived."""

    request: Request
    found: Fetched


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Decode batches and write them to their destinations. Several at once only if a device decompresses frames."""

    batches: Sequence[ChunkBatch]


class Schedule:
    """The state of a read plan while it is executed.

    A tensor is written only after all its bytes have been verified. When the bytes that wait for this fill the budget,
    the batches of incomplete tensors are written as they arrive.

    Args:
        tensors, requests: the result of `tasks.build_tasks`.
        budget_bytes: the maximum number of bytes that have been requested and not been written. A single request may
            exceed it.
        group_bytes: the number of bytes that one fetch should read. If it is 0, each fetch has one request.
        max_fetches: the maximum number of fetches at the same time.
        min_frames: batches with frames that a device decompresses wait until there are at least this many frames, or
            until nothing else can be done. Then they are written together.
    """

    def __init__(
        self,
        tensors: Sequence[TensorProgress],
        requests: Sequence[Request],
        *,
        budget_bytes: int,
        group_bytes: int,
        max_fetches: int,
        min_frames: int = 0,
    ) -> None:
        self._tensors = tensors
        self._budget_bytes = budget_bytes
        self._max_fetches = max_fetches
        self._groups = deque(_grouped(requests, min(group_bytes, budget_bytes // 4)))
        self._unannounced = deque(self._groups)
        self._to_verify: deque[Verify] = deque()
        self._to_place: deque[ChunkBatch] = deque()
        self._with_frames: list[ChunkBatch] = []
        """Batches with frames that a device decompresses."""
        self._min_frames = min_frames
        self._fetching = 0
        self._working = 0
        self.held_bytes = 0
        """The number of bytes that have been requested and not been written."""

    @property
    def done(self) -> bool:
        """Whether everything has been written."""
        return not (self._groups or self._has_work)

    @property
    def fetches_left(self) -> int:
        """The number of fetches that have not begun; 0 if `fetch` could do nothing now."""
        if not self._groups or self._fetching >= self._max_fetches or (self._is_full and self._has_work):
            return 0
        return len(self._groups)

    @property
    def _is_full(self) -> bool:
        """Whether the next fetch would exceed the budget."""
        return self.held_bytes > 0 and self.held_bytes + self._groups[0].nbytes > self._budget_bytes

    @property
    def _has_work(self) -> bool:
        """Whether steps that run or wait may free memory."""
        return bool(self._fetching or self._working or self._to_verify or self._to_place or self._with_frames)

    @property
    def work_left(self) -> int:
        """The number of Verify and Place steps that can begin now."""
        return len(self._to_verify) + len(self._to_place) + bool(self._with_frames and self._has_enough_frames)

    @property
    def _has_enough_frames(self) -> bool:
        """Whether to write the batches with frames now. There are some."""
        if sum(batch.frames for batch in self._with_frames) >= self._min_frames:
            return True
        more_may_come = self._fetching or self._working or self._to_verify or self._to_place
        return not more_may_come and (not self._groups or self._is_full)

    def fetch(self) -> Fetch | None:
        """Begin the next fetch. Return None if all have begun, or if the store or the budget is full.

        If the budget is full and nothing else can free memory, batches of incomplete tensors become work.
        """
        if not self._groups or self._fetching >= self._max_fetches:
            return None
        if self._is_full:
            if self._has_work:
                return None
            self._place_incomplete_tensors()
            if self._to_place or self._with_frames:
                return None
            # Nothing else can free memory: this fetch exceeds the budget.
        step = self._groups.popleft()
        self._fetching += 1
        self.held_bytes += step.nbytes
        return step

    def announcements(self) -> list[Request]:
        """Return the requests that will be fetched soon and have not been announced."""
        coming = list[Request]()
        while self._unannounced and len(self._unannounced) > len(self._groups) - GROUPS_AHEAD:
            coming += self._unannounced.popleft().requests
        return coming

    def work(self) -> Verify | Place | None:
        """Return the next step, or None if none can begin. A Place comes before a Verify, because it frees memory."""
        step: Verify | Place | None = None
        if self._to_place:
            step = Place([self._to_place.popleft()])
        elif self._with_frames and self._has_enough_frames:
            step, self._with_frames = Place(self._with_frames), []
        elif self._to_verify:
            step = self._to_verify.popleft()
        self._working += step is not None
        return step

    def fetched(self, step: Fetch, found: Fetched | None = None) -> None:
        """Record that a fetch has ended.

        Args:
            found: what a fetch of one request returned. None if the bytes have been verified already.
        """
        self._fetching -= 1
        if found is not None:
            (request,) = step.requests
            self._to_verify.append(Verify(request, found))

    def verified(self, request: Request, data: memoryview | None) -> None:
        """Record that the bytes of a request are intact.

        Args:
            data: the bytes. None if they are only needed on a device, where they are.
        """
        request.arrived = True
        request.data = data
        for batch, _ in request.parts:
            batch.tensor.missing -= 1
            if batch.tensor.missing == 0:
                self._queue(batch.tensor.batches)
            elif batch.tensor.piecemeal:
                self._queue([batch])

    def ended(self, step: Verify | Place) -> list[Request]:
        """Record that a step has ended. Return the requests whose bytes are no longer needed."""
        self._working -= 1
        if isinstance(step, Verify):
            return []
        freed = []
        for request in (request for batch in step.batches for request in batch.requests):
            request.unplaced -= 1
            if request.unplaced == 0:
                self.held_bytes -= request.nbytes
                freed.append(request)
        return freed

    def _place_incomplete_tensors(self) -> None:
        for tensor in self._tensors:
            if tensor.missing and any(batch.has_arrived for batch in tensor.batches):
                tensor.piecemeal = True
                self._queue(tensor.batches)

    def _queue(self, batches: Sequence[ChunkBatch]) -> None:
        """Queue the batches that have arrived."""
        for batch in batches:
            if batch.has_arrived and not batch.queued:
                batch.queued = True
                (self._with_frames if batch.frames else self._to_place).append(batch)


def _grouped(requests: Sequence[Request], most: int) -> Iterator[Fetch]:
    """Yield groups of requests that are read by one call."""
    group, nbytes = list[Request](), 0
    for request in requests:
        group.append(request)
        nbytes += request.nbytes
        if nbytes >= most:
            yield Fetch(group, nbytes)
            group, nbytes = [], 0
    if group:
        yield Fetch(group, nbytes)
