"""A plan in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from .html import table

REPORT_COLUMNS = ("MB needed", "MB fetched", "fetched / needed", "requests", "objects", "chunks")
"""What `PlanReport.row` has the values of."""


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
    max_gap_bytes: int = 0
    """Gaps of up to so many bytes between ranges were read over, to save requests."""
    opaque_chunks: int = 0
    """Chunks of other formats that have to be decoded, and so are read, as a whole."""

    @property
    def bytes_over_read(self) -> int:
        """Bytes fetched that lie between those wanted."""
        return max(0, self.bytes_fetched - self.bytes_wanted)

    @property
    def amplification(self) -> float:
        """Bytes fetched over bytes needed; below 1 where compression saves more than the grid costs."""
        return self.bytes_fetched / self.bytes_needed if self.bytes_needed else 0.0

    @property
    def row(self) -> tuple[str, ...]:
        """The values of REPORT_COLUMNS, in words."""
        return (
            f"{self.bytes_needed / 1e6:.2f}",
            f"{self.bytes_fetched / 1e6:.2f}",
            f"{self.amplification:.3f}",
            str(self.requests),
            str(self.objects),
            str(self.chunks),
        )

    def _repr_html_(self) -> str:
        return table("", REPORT_COLUMNS, [self.row])

    def __str__(self) -> str:
        notes = ""
        if self.bytes_over_read:
            notes += f"; {self.bytes_over_read / 1e6:.2f} MB in gaps of up to {self.max_gap_bytes} bytes"
        if self.opaque_chunks:
            notes += f"; {self.opaque_chunks} chunks read as a whole"
        chunks = f"{self.chunks} chunks"
        return (
            f"{self.bytes_needed / 1e6:.2f} MB needed, {self.bytes_fetched / 1e6:.2f} MB fetched "
            f"({self.amplification:.3f} x) by {self.requests} requests of {self.objects} objects, {chunks}{notes}"
        )


@dataclass(frozen=True, slots=True)
class WholeShards:
    """What one rank would read that takes saved shards as a whole, as DCP's readers do."""

    shards: int
    nbytes: int
    """Of their values, as they are before encoding."""
