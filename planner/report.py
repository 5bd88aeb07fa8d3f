"""A plan in numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PlanReport:
    """What one rank's plan reads, in bytes and requests."""

    bytes_needed: int
    """Bytes of the wanted boxes, decoded."""
    bytes_wanted: int
    """Stored bytes of the chunks, or parts of chunks, that hold them."""
    bytes_fetched: int
    """Bytes that the requests ask for: those wanted, each once, and the gaps read over between them."""
    requests: int
    """Byte ranges asked of the store."""
    chunks: int
    objects: int
    """Data objects that the requests read from."""

    @property
    def amplification(self) -> float:
        """Bytes fetched over bytes needed; below 1 where compression saves more than the grid costs."""
        return self.bytes_fetched / self.bytes_needed if self.bytes_needed else 0.0

    def __str__(self) -> str:
        return (
            f"{self.bytes_needed / 1e6:.2f} MB needed, {self.bytes_fetched / 1e6:.2f} MB fetched "
            f"({self.amplification:.3f} x) by {self.requests} requests of {self.objects} objects, {self.chunks} chunks"
        )
