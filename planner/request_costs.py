"""What a request costs at a store, from which follows how large a gap is worth reading over."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .coalesce import GapLimits

UNBOUNDED_OVER_READ = 1e9
"""An over-read that nothing but the costs bounds."""


@dataclass(frozen=True, slots=True)
class RequestCosts:
    """The figures of a store, as one rank sees it."""

    latency_s: float
    """Seconds until a request is answered."""
    bytes_per_s: float
    """What all its requests together bring, once they are answered."""
    concurrent_requests: int
    """How many are under way at once."""
    max_over_read: float
    """The bound that holds where the user gives none, as a fraction of the bytes wanted."""

    @property
    def gap_bytes(self) -> int:
        """The gap that takes as long to read over as a request of its own takes: latency / concurrency x bandwidth."""
        return int(self.latency_s / self.concurrent_requests * self.bytes_per_s)

    def gap_limits(self, max_over_read: float | None = None) -> GapLimits:
        """Which gaps to read over, under the user's bound or the default one."""
        return GapLimits(self.gap_bytes, self.max_over_read if max_over_read is None else max_over_read)

    def measured(self, latency_s: float | None, bytes_per_s: float | None) -> RequestCosts:
        """The same with what was seen, as far as it was."""
        return replace(self, latency_s=latency_s or self.latency_s, bytes_per_s=bytes_per_s or self.bytes_per_s)


LOCAL_COSTS = RequestCosts(latency_s=2e-6, bytes_per_s=2e9, concurrent_requests=1, max_over_read=0.25)
"""A call of the system on a local disk: a gap of 4 KB, about a page. More bytes would be read than are needed, without
being faster where they do not come from a cache."""
REMOTE_COSTS = RequestCosts(
    latency_s=0.03, bytes_per_s=200e6, concurrent_requests=32, max_over_read=UNBOUNDED_OVER_READ
)
"""An object store in the same region, until something else is seen: a gap of 190 KB."""
