"""Join byte ranges into requests: reading over a small gap is cheaper than another request.

Bytes in a gap are fetched and discarded. So the smallest gaps are read over first, as long as their sum is at most
`GapLimits.max_over_read` of the bytes wanted. Gaps of at most `GapLimits.free_gap_bytes` are always read over.
`benchmarks/coalescing.py` compares the limits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from .box import IntArray, columns_equal

FREE_GAP_BYTES = 4096
"""A request costs more than a gap of this size on every store. Checkpoints with thousands of small tensors have many
such gaps."""
MAX_GAP_BYTES = 64 * 1024
MAX_OVER_READ = 0.005
MAX_REQUEST_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class GapLimits:
    """Limits on the gaps that a request may read over, so that one request fetches the byte ranges on both sides."""

    max_gap_bytes: int
    """The largest gap."""
    max_over_read: float
    """The sum of all gaps that are read over, as a fraction of the bytes wanted."""
    enough_requests: int = 0
    """If not 0: up to this many requests are fast enough, because they run concurrently. Larger gaps than usual for a
    native checkpoint are read over only to get down to this number."""
    free_gap_bytes: int = 0
    """Gaps of at most this size are always read over, whatever their sum."""


@dataclass(frozen=True, slots=True, eq=False)
class Requests:
    """Requests in columns: request i reads bytes [starts[i], stops[i]) of object objects[i].

    A sparse request reads only byte runs in this range.
    """

    objects: IntArray
    starts: IntArray
    stops: IntArray
    request_of_range: IntArray
    """For each byte range that was joined, the request that reads it."""
    sparse: dict[int, tuple[int, int, int]]
    """For each sparse request: the number of its byte runs, their size and their stride, in bytes."""

    def __len__(self) -> int:
        return len(self.objects)

    __eq__ = columns_equal
    __hash__ = None  # type: ignore[assignment]

    def select(self, kept: npt.NDArray[np.bool_]) -> Requests:
        """Return some of the requests, without `request_of_range`."""
        numbers = np.cumsum(kept) - 1
        sparse = {int(numbers[at]): runs for at, runs in self.sparse.items() if kept[at]}
        none = np.empty(0, np.int64)
        return Requests(self.objects[kept], self.starts[kept], self.stops[kept], none, sparse)

    def extended(self, objects: IntArray, starts: IntArray, stops: IntArray) -> Requests:
        """Return the requests with further ones behind them."""
        return replace(
            self,
            objects=np.concatenate([self.objects, objects]),
            starts=np.concatenate([self.starts, starts]),
            stops=np.concatenate([self.stops, stops]),
        )

    @property
    def nbytes(self) -> int:
        """Bytes that all requests fetch together."""
        spans = self.stops - self.starts
        left_out = sum(int(spans[at]) - count * nbytes for at, (count, nbytes, _) in self.sparse.items())
        return int(spans.sum()) - left_out

    @property
    def byte_ranges(self) -> int:
        """The number of byte ranges that are read from the store: one per request, or one per run of a sparse
        request."""
        return len(self) + sum(count - 1 for count, _, _ in self.sparse.values())


DEFAULT_LIMITS = GapLimits(MAX_GAP_BYTES, MAX_OVER_READ)


def coalesce(
    objects: IntArray,
    starts: IntArray,
    stops: IntArray,
    limits: GapLimits = DEFAULT_LIMITS,
    *,
    max_over_read_bytes: int | None = None,
    max_request_bytes: int = MAX_REQUEST_BYTES,
    sparse: dict[int, tuple[int, int, int]] | None = None,
) -> Requests:
    """Join n byte ranges into requests.

    Args:
        objects, starts, stops: (n,) columns; range i is [starts[i], stops[i]) of object objects[i].
        limits: which gaps between two ranges one request may read over.
        max_over_read_bytes: the most bytes of these gaps together, except those that are free. Default: the fraction of
            the ranges' bytes that `limits` allows.
        max_request_bytes: joined ranges are divided into requests at multiples of this many bytes. A range is never
            split, so a request may be longer.
        sparse: the ranges that are read only in byte runs, as in `Requests`. Each becomes one request.
    """
    n = len(objects)
    if sparse:
        alone = np.array(sorted(sparse), np.int64)
        dense = np.delete(np.arange(n), alone)
        made = coalesce(
            objects[dense],
            starts[dense],
            stops[dense],
            limits,
            max_over_read_bytes=max_over_read_bytes,
            max_request_bytes=max_request_bytes,
        )
        request_of_range = np.empty(n, np.int64)
        request_of_range[dense] = made.request_of_range
        request_of_range[alone] = len(made) + np.arange(len(alone))
        return Requests(
            np.concatenate([made.objects, objects[alone]]),
            np.concatenate([made.starts, starts[alone]]),
            np.concatenate([made.stops, stops[alone]]),
            request_of_range,
            {len(made) + i: sparse[at] for i, at in enumerate(alone.tolist())},
        )
    if n == 0:
        empty = np.empty(0, np.int64)
        return Requests(empty, empty, empty, empty, {})
    order = np.lexsort((stops, starts, objects))
    obj, lo, hi = objects[order], starts[order], stops[order]

    # Ranges may overlap, so a gap starts where the furthest earlier range of its object ends.
    same_object = obj[1:] == obj[:-1]
    gaps = lo[1:] - reach(obj, hi)[:-1]
    joined = same_object & (gaps <= 0)
    candidates = np.flatnonzero(same_object & (gaps > 0) & (gaps <= limits.max_gap_bytes))
    candidates = candidates[np.argsort(gaps[candidates], kind="stable")]
    if max_over_read_bytes is None:
        max_over_read_bytes = int(limits.max_over_read * int((hi - lo).sum()))
    joined[same_object & (gaps <= limits.free_gap_bytes)] = True
    if limits.enough_requests:
        candidates = candidates[~joined[candidates]][: max(0, n - int(joined.sum()) - limits.enough_requests)]
    joined[candidates[np.cumsum(gaps[candidates]) <= max_over_read_bytes]] = True

    opens = cut_runs(lo, joined, max_request_bytes)
    first = np.flatnonzero(opens)
    request_of_range = np.empty(n, np.int64)
    request_of_range[order] = np.cumsum(opens) - 1
    return Requests(obj[first], lo[first], np.maximum.reduceat(hi, first), request_of_range, {})


def reach(objects: IntArray, stops: IntArray) -> IntArray:
    """Return for each byte range the furthest end of it and the ranges of its object before it.

    Args:
        objects: (n,) the objects, sorted.
        stops: (n,) the ends of the ranges.
    """
    # To take the running maximum over all objects at once, shift each object beyond the one before it.
    is_other = objects[1:] != objects[:-1]
    extents = np.maximum.reduceat(stops, np.flatnonzero(np.concatenate(([True], is_other))))
    base = (np.cumsum(extents) - extents)[np.concatenate(([0], np.cumsum(is_other)))]
    return np.asarray(np.maximum.accumulate(stops + base) - base)


def cut_runs(starts: IntArray, follows: npt.NDArray[np.bool_], max_bytes: int) -> npt.NDArray[np.bool_]:
    """Cut runs of byte ranges into parts, at multiples of `max_bytes` from the start of a run.

    Args:
        starts: (n,) the starts of the ranges.
        follows: (n - 1,) whether a range is in the same run as the one before it.
        max_bytes: the most bytes of a part. A range is never cut, so a part may be longer.

    Returns:
        (n,) whether a range is the first one of a part.
    """
    runs = np.concatenate(([0], np.cumsum(~follows)))
    run_starts = starts[np.flatnonzero(np.concatenate(([True], ~follows)))][runs]
    part = (starts - run_starts) // max_bytes
    return np.concatenate(([True], ~follows | (part[1:] != part[:-1])))
