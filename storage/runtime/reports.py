"""What a save or a load did, on each rank and over all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ...planner.html import table

RANK_REPORT_COLUMNS = ("", "MB needed", "MB fetched", "MB written", "moved / needed", "requests", "chunks", "seconds")
"""What `RankReport.row` has the values of."""


class Cast(NamedTuple):
    """A tensor whose values were rounded."""

    name: str
    stored: str
    """The dtype that it is stored with, as "float32"."""
    to: str
    """The dtype that it was cast to."""


@dataclass(frozen=True, slots=True)
class RankReport:
    """What one rank did; or, as `Report.total`, all ranks together."""

    rank: int | None
    """None in a total."""
    bytes_needed: int = 0
    """Bytes of the values: of the local tensors that were loaded, or of the shards that this rank saved."""
    bytes_fetched: int = 0
    """Bytes read from the store by a load, the manifest included."""
    bytes_written: int = 0
    """Bytes written to the store by a save; the manifest counts on the rank that commits."""
    requests: int = 0
    """Reads asked of the store by a load, or objects written by a save."""
    chunks: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds by stage. "total" is wall time; a stage that runs on several threads is the sum over them. A total
    over ranks has the longest of each. What a save took to "plan" and to "commit" is known of this rank alone."""
    cast: tuple[Cast, ...] = ()
    """As of `Report`, of this rank."""
    differing: tuple[str, ...] = ()
    """As of `Report`; on the rank that commits."""
    pickled: tuple[str, ...] = ()
    """As of `Report`, of what this rank wrote."""

    @property
    def amplification(self) -> float:
        """Bytes fetched over bytes needed; of a save, bytes written."""
        return (self.bytes_fetched or self.bytes_written) / self.bytes_needed if self.bytes_needed else 0.0

    @property
    def row(self) -> tuple[str, ...]:
        """The values of RANK_REPORT_COLUMNS, in words."""
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

    @property
    def _moved(self) -> int:
        return self.bytes_fetched + self.bytes_written

    @property
    def words(self) -> str:
        """It in a line, but for the rank."""
        parts = {"fetched": self.bytes_fetched, "written": self.bytes_written}
        moved = ", ".join(f"{nbytes / 1e6:.2f} MB {how}" for how, nbytes in parts.items() if nbytes or not self._moved)
        stages = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in self.seconds.items())
        return (
            f"{self.bytes_needed / 1e6:.2f} MB needed, {moved} ({self.amplification:.3f} x), "
            f"{self.requests} requests, {self.chunks} chunks; {stages}"
        )

    def __str__(self) -> str:
        return f"{'all ranks' if self.rank is None else f'rank {self.rank}'}: {self.words}"


@dataclass(frozen=True, slots=True)
class Report:
    """What a collective call did: `local` is this rank's part, `ranks` are all, `total` is their sum.

    Amplification, printed as "x", is bytes moved over bytes needed: below 1 where compression saves more than the grid
    and the manifest cost. Seconds of a stage are summed over a rank's threads, so that they can exceed "total".
    """

    rank: int
    """The rank that this report is on."""
    ranks: tuple[RankReport, ...]
    """All ranks, in order."""
    missing_keys: tuple[str, ...] = ()
    """Names of the state dict that a load did not find in the checkpoint. Their tensors and values are unchanged."""
    unexpected_keys: tuple[str, ...] = ()
    """Names that the checkpoint has under a key of the state dict, but the state dict does not have, for example the
    state of an optimizer that has not been initialized. They were not loaded."""
    dropped: tuple[str, ...] = ()
    """Names of the source that a conversion did not write: `include` does not match them, `exclude` matches them, the
    index of the source does not list them, or the target format cannot store them."""

    @property
    def cast(self) -> tuple[Cast, ...]:
        """Floating-point tensors that were loaded or written with fewer bits than they are stored with, on any rank."""
        return tuple(dict.fromkeys(cast for report in self.ranks for cast in report.cast))

    @property
    def differing(self) -> tuple[str, ...]:
        """Of a save: names of objects and small tensors that differ between the ranks that hold them.

        Those of the lowest rank are stored.
        """
        return tuple(dict.fromkeys(name for report in self.ranks for name in report.differing))

    @property
    def pickled(self) -> tuple[str, ...]:
        """Of a save: names of objects that can only be loaded with `allow_pickle=True`."""
        return tuple(dict.fromkeys(name for report in self.ranks for name in report.pickled))

    @property
    def local(self) -> RankReport:
        """What this rank did."""
        return self.ranks[self.rank]

    @property
    def total(self) -> RankReport:
        """All ranks together."""
        return RankReport(
            None,
            sum(report.bytes_needed for report in self.ranks),
            sum(report.bytes_fetched for report in self.ranks),
            sum(report.bytes_written for report in self.ranks),
            sum(report.requests for report in self.ranks),
            sum(report.chunks for report in self.ranks),
            _longest([report.seconds for report in self.ranks]),
        )

    def __str__(self) -> str:
        shown = self.ranks if len(self.ranks) <= 8 else (self.local,)
        return "\n".join(str(report) for report in (self.total, *shown))

    def _repr_html_(self) -> str:
        notes = [f"{len(self.missing_keys)} missing keys"] if self.missing_keys else []
        notes += [f"{len(self.unexpected_keys)} unexpected keys"] if self.unexpected_keys else []
        notes += [f"{len(self.cast)} tensors cast to fewer bits"] if self.cast else []
        notes += [f"{len(self.differing)} values differ between ranks"] if self.differing else []
        notes += [f"{len(self.pickled)} objects need allow_pickle=True"] if self.pickled else []
        notes += [f"{len(self.dropped)} names dropped"] if self.dropped else []
        return table("; ".join(notes), RANK_REPORT_COLUMNS, [report.row for report in (self.total, *self.ranks)])


def added(a: RankReport, b: RankReport) -> RankReport:
    """What a rank did in two calls. Seconds of stages that ran at the same time add up, and have no total."""
    return RankReport(
        a.rank,
        a.bytes_needed + b.bytes_needed,
        a.bytes_fetched + b.bytes_fetched,
        a.bytes_written + b.bytes_written,
        a.requests + b.requests,
        a.chunks + b.chunks,
        {
            stage: a.seconds.get(stage, 0.0) + b.seconds.get(stage, 0.0)
            for stage in dict.fromkeys((*a.seconds, *b.seconds))
            if stage != "total"
        },
    )


def _longest(stages: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for seconds in stages for name in seconds)
    return {name: max(seconds.get(name, 0.0) for seconds in stages) for name in names}
