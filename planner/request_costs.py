"""What a request to a store costs. The costs determine how large a gap is worth reading over.

`benchmarks/foreign.py` measures loads from a disk and from stores with these costs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .coalesce import FREE_GAP_BYTES, GapLimits

UNBOUNDED_OVER_READ = 1e9
"""A value of `max_over_read` that imposes no limit: the costs alone decide which gaps are read over."""

ROUNDS = 4
"""If a rank needs more rounds of concurrent requests than this, larger gaps of a native checkpoint are read over."""


@dataclass(frozen=True, slots=True)
class RequestCosts:
    """The latency and bandwidth of a store, as one rank observes them."""

    latency_s: float
    """Seconds that a small request takes."""
    bytes_per_s: float
    """The bandwidth of all concurrent requests together."""
    concurrent_requests: int
    """The number of requests that are in flight at a time."""
    max_over_read: float
    """The default limit of the over-read, as a fraction of the bytes wanted."""

    @property
    def gap_bytes(self) -> int:
        """The gap that takes as long to read over as another request takes: latency / concurrency x bandwidth."""
        return int(self.latency_s / self.concurrent_requests * self.bytes_per_s)

    def gap_limits(self, max_over_read: float | None = None) -> GapLimits:
        """Return the limits of gaps, with the user's limit of the over-read or the default one."""
        return GapLimits(self.gap_bytes, self.max_over_read if max_over_read is None else max_over_read)

    def native_gap_limits(self) -> GapLimits:
        """Return the limits for a native checkpoint, whose chunks are ordered so that few requests are needed.

        If there are many requests nevertheless, because many ranks saved small shards, gaps are read over as in other
        formats. If there are few, this would save nothing: they are in flight together.
        """
        enough = ROUNDS * self.concurrent_requests
        return replace(self.gap_limits(), enough_requests=enough, free_gap_bytes=FREE_GAP_BYTES)

    def measured(self, latency_s: float | None, bytes_per_s: float | None) -> RequestCosts:
        """Return these costs with the measured latency and bandwidth. None means not measured."""
        return replace(self, latency_s=latency_s or self.latency_s, bytes_per_s=bytes_per_s or self.bytes_per_s)


LOCAL_COSTS = RequestCosts(latency_s=2e-6, bytes_per_s=2e9, concurrent_requests=1, max_over_read=0.25)
"""A local disk: a request is a system call, and a gap of 4 KB, about a page, is worth reading over. A larger
`max_over_read` reads more bytes and is no faster, unless they come from the page cache."""
REMOTE_COSTS = RequestCosts(
    latency_s=0.03, bytes_per_s=200e6, concurrent_requests=32, max_over_read=UNBOUNDED_OVER_READ
)
"""An object store in the same region, before anything is measured: a gap of 190 KB is worth reading over."""
