"""Reports of what a call did, for each rank and for all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ...planner.html import table
from ...planner.text import counted

RANK_REPORT_COLUMNS = ("", "MB needed", "MB fetched", "MB written", "moved / needed", "requests", "chunks", "seconds")
"""The columns of the table in which notebooks show a report."""


class Cast(NamedTuple):
    """A tensor that was cast to fewer bits."""

    name: str
    stored: str
    """The stored dtype, such as "float32"."""
    to: str
    """The dtype after the cast."""


@dataclass(frozen=True, slots=True)
class RankReport:
    """What one rank did, or all ranks together (`Report.total`)."""

    rank: int | None
    """The rank; None in a total."""
    bytes_needed: int = 0
    """The size of the local tensors that were loaded, or of the shards that were saved, in bytes."""
    bytes_fetched: int = 0
    """Bytes that a load read from the store, with the metadata."""
    bytes_written: int = 0
    """Bytes that a save wrote to the store. The manifest counts on the rank that commits."""
    requests: int = 0
    """The reads of a load, or the objects that a save wrote."""
    chunks: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds by stage. "total" is wall time. The other stages are summed over the threads of the rank. A total over
    ranks contains the longest time of each stage. A save knows "plan", "stage" and "commit" of this rank only."""
    cast: tuple[Cast, ...] = ()
    """See `Report`; of this rank."""
    differing: tuple[str, ...] = ()
    """See `Report`; on the rank that commits."""
    pickled: tuple[str, ...] = ()
    """See `Report`; of what this rank wrote."""
    bytes_sent: int = 0
    """Bytes that a shared load sent to other ranks."""
    bytes_received: int = 0
    """Bytes that a shared load received from other ranks."""
    decoded_by: Mapping[str, int] = field(default_factory=dict)
    """Stored bytes by what decoded them: "host", or "cuda:0", "cuda:0 with nvCOMP" and "host and cuda:0" (the host
    decompresses, the device joins the planes). Empty if nothing was loaded to a device."""

    @property
    def amplification(self) -> float:
        """Bytes fetched (by a save: written), divided by bytes needed."""
        return (self.bytes_fetched or self.bytes_written) / self.bytes_needed if self.bytes_needed else 0.0

    @property
    def row(self) -> tuple[str, ...]:
        """The report as a row of a table, with the columns RANK_REPORT_COLUMNS."""
        return (
            "all ranks" if self.rank is None else f"rank {self.rank}",
            *(f"{nbytes / 1e6:.2f}" for nbytes in (self.bytes_needed, self.bytes_fetched, self.bytes_written)),
            f"{self.amplification:.3f}",
            str(self.requests),
            str(self.chunks),
            ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in self.seconds.items()),
        )

    def _repr_html_(self) -> str:
        return table("", RANK_REPORT_COLUMNS, [self.row])

    def _shows(self, how: str) -> bool:
        """Return whether a zero is shown: what was fetched and written if nothing was."""
        return how in ("fetched", "written") and not self.bytes_fetched + self.bytes_written

    @property
    def words(self) -> str:
        """The report in one line, without the rank."""
        parts = {"fetched": self.bytes_fetched, "written": self.bytes_written}
        parts |= {"sent": self.bytes_sent, "received": self.bytes_received}
        moved = ", ".join(f"{nbytes / 1e6:.2f} MB {how}" for how, nbytes in parts.items() if nbytes or self._shows(how))
        stages = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in self.seconds.items())
        decoded = ", ".join(f"{nbytes / 1e6:.2f} MB decoded by {name}" for name, nbytes in self.decoded_by.items())
        return (
            f"{self.bytes_needed / 1e6:.2f} MB needed, {moved} ({self.amplification:.3f} x), "
            f"{counted(self.requests, 'request')}, {counted(self.chunks, 'chunk')}; "
            f"{decoded + '; ' if decoded else ''}{stages}"
        )

    def __str__(self) -> str:
        return f"{'all ranks' if self.rank is None else f'rank {self.rank}'}: {self.words}"


@dataclass(frozen=True, slots=True)
class Report:
    """What a collective call did: on this rank (`local`), on each rank (`ranks`) and on all together (`total`).

    The amplification, printed as "x", is the bytes moved divided by the bytes needed. It is below 1 if compression
    saves more than the metadata and partly needed chunks cost. The seconds of a stage are summed over the threads of a
    rank, so they can exceed "total".
    """

    rank: int
    """The rank that this report is on."""
    ranks: tuple[RankReport, ...]
    """The reports of all ranks, in order."""
    missing_keys: tuple[str, ...] = ()
    """Names of the state dict that a load did not find in the checkpoint. Their tensors and values are unchanged."""
    unexpected_keys: tuple[str, ...] = ()
    """Names that the checkpoint has under a key of the state dict, but that no rank has in its state dict, for example
    the state of an optimizer that has not been initialized. They were not loaded."""
    unused_patterns: tuple[str, ...] = ()
    """Patterns of `exclude` that match no name of the state dict on any rank, and of `rename` that match no name of the
    checkpoint. They are probably misspelt."""
    dropped: tuple[str, ...] = ()
    """Names of the source that a conversion did not write: `include` does not match them, `exclude` matches them, the
    index of the source does not list them, or the target format cannot store them."""

    @property
    def cast(self) -> tuple[Cast, ...]:
        """Floating-point tensors that were cast to fewer bits, on any rank."""
        return tuple(dict.fromkeys(cast for report in self.ranks for cast in report.cast))

    @property
    def differing(self) -> tuple[str, ...]:
        """Names of values and replicated tensors that differ between ranks. A save stores those of one rank."""
        return tuple(dict.fromkeys(name for report in self.ranks for name in report.differing))

    @property
    def pickled(self) -> tuple[str, ...]:
        """Names of saved values that can only be loaded with `allow_pickle=True`."""
        return tuple(dict.fromkeys(name for report in self.ranks for name in report.pickled))

    @property
    def local(self) -> RankReport:
        """The report of this rank."""
        return self.ranks[self.rank]

    @property
    def total(self) -> RankReport:
        """The report of all ranks together."""
        longest = _merged(max, [report.seconds for report in self.ranks])
        return RankReport(None, **_sums(self.ranks), seconds=longest)

    def __str__(self) -> str:
        shown = self.ranks if len(self.ranks) <= 8 else (self.local,)
        return "\n".join(str(report) for report in (self.total, *shown))

    def _repr_html_(self) -> str:
        notes = [counted(len(self.missing_keys), "missing key")] if self.missing_keys else []
        notes += [counted(len(self.unexpected_keys), "unexpected key")] if self.unexpected_keys else []
        notes += [f"{counted(len(self.cast), 'tensor')} cast to fewer bits"] if self.cast else []
        notes += [f"{len(self.differing)} values differ between ranks"] if self.differing else []
        notes += [f"{len(self.pickled)} values need allow_pickle=True"] if self.pickled else []
        notes += [f"{counted(len(self.dropped), 'name')} dropped"] if self.dropped else []
        return table("; ".join(notes), RANK_REPORT_COLUMNS, [report.row for report in (self.total, *self.ranks)])


def added(a: RankReport, b: RankReport) -> RankReport:
    """Return what a rank did in two calls. The seconds of each stage are added, without a total."""
    seconds = _merged(sum, [a.seconds, b.seconds])
    seconds.pop("total", None)
    return RankReport(a.rank, **_sums([a, b]), seconds=seconds, pickled=a.pickled + b.pickled)


_COUNTS = ("bytes_needed", "bytes_fetched", "bytes_written", "requests", "chunks", "bytes_sent", "bytes_received")


def _sums(reports: Sequence[RankReport]) -> dict[str, Any]:
    counts: dict[str, Any] = {name: sum(getattr(report, name) for report in reports) for name in _COUNTS}
    return {**counts, "decoded_by": _merged(sum, [report.decoded_by for report in reports])}


def _merged(merge: Callable[[list[Any]], Any], numbers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = dict.fromkeys(name for found in numbers for name in found)
    return {name: merge([found.get(name, 0) for found in numbers]) for name in names}
