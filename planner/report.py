"""The numbers of a plan: bytes, requests, chunks."""

from __future__ import annotations

from dataclasses import dataclass

from .html import table
from .text import counted

REPORT_COLUMNS = ("MB needed", "MB fetched", "fetched / needed", "requests", "objects", "chunks")
"""The titles of the values in `PlanReport.row`."""


@dataclass(frozen=True, slots=True)
class PlanReport:
    """The bytes and requests that the plan of one rank reads."""

    bytes_needed: int
    """Bytes of the wanted boxes after decoding."""
    bytes_wanted: int
    """Stored bytes of the chunks, or parts of chunks, that contain the wanted boxes."""
    bytes_fetched: int
    """Bytes that the requests read: each wanted byte once, and the gaps between them that are read over."""
    requests: int
    """The number of byte ranges that are read from the store."""
    chunks: int
    objects: int
    """The number of data objects that the requests read."""
    bytes_over_read: int = 0
    """Bytes that the rank reads and no rank wants, in the gaps between the byte ranges that it reads for itself."""
    max_gap_bytes: int = 0
    """The largest gap between byte ranges that a request may read over."""
    opaque_chunks: int = 0
    """The number of opaque chunks (of other formats): they are read and decoded as a whole."""
    bytes_compressed: int = 0
    """Stored bytes of compressed chunks. If the destination is on a GPU, it decompresses them with nvCOMP, or the host
    does so without nvCOMP. The GPU arranges and casts the values of all chunks, except of opaque ones."""
    bytes_sent: int = 0
    """Bytes that the rank sends to other ranks, if they share a read."""
    bytes_received: int = 0

    @property
    def amplification(self) -> float:
        """Bytes fetched divided by bytes needed. It is below 1 if compression saves more than the grid costs."""
        return self.bytes_fetched / self.bytes_needed if self.bytes_needed else 0.0

    @property
    def row(self) -> tuple[str, ...]:
        """The values of REPORT_COLUMNS, formatted."""
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

    @property
    def notes(self) -> list[str]:
        """Why more is read than is needed, if it is."""
        found = []
        if self.bytes_over_read:
            found.append(f"{self.bytes_over_read / 1e6:.2f} MB in gaps of up to {self.max_gap_bytes} bytes")
        if self.opaque_chunks:
            found.append(f"{self.opaque_chunks} chunks read as a whole")
        return found

    def __str__(self) -> str:
        notes = self.notes
        if self.bytes_sent or self.bytes_received:
            notes.append(f"{self.bytes_sent / 1e6:.2f} MB sent, {self.bytes_received / 1e6:.2f} MB received")
        read = (
            f"{self.bytes_needed / 1e6:.2f} MB needed, {self.bytes_fetched / 1e6:.2f} MB fetched "
            f"({self.amplification:.3f} x) by {counted(self.requests, 'request')} of "
            f"{counted(self.objects, 'object')}, {counted(self.chunks, 'chunk')}"
        )
        compressed = [f"{self.bytes_compressed / 1e6:.2f} MB of it compressed"] if self.bytes_compressed else []
        return "; ".join([read, *compressed, *notes])


@dataclass(frozen=True, slots=True)
class WholeShards:
    """What a rank would read if it read whole saved shards, as DCP's readers do."""

    shards: int
    nbytes: int
    """Bytes of the values of these shards, before encoding."""
