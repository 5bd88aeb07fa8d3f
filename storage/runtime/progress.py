"""Progress of a call: a bar on the terminal of rank 0, or a callback.

The threads that do the work count bytes in a `Meter`. The thread that made the call shows the progress while it waits
for them. So a callback runs in the caller's thread, and its exception ends the call.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from ...planner.text import shown

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

SHOWN_EVERY_S = 0.1
"""The minimum time between two updates."""


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of one rank's part of a call."""

    task: str
    """ "save", "load", "verify" or "convert"."""
    location: str
    """The location of the checkpoint. For a conversion, that of the destination."""
    rank: int
    done_bytes: int
    """Decoded bytes that were saved or converted, or stored bytes that were loaded or verified."""
    total_bytes: int
    """The bytes that are known so far to be this rank's work; 0 before any are known."""
    seconds: float
    """The time since the call began."""


OnProgress = bool | Callable[[Progress], None]
"""True shows a bar on rank 0 if standard error is a terminal or a notebook. A callback is called on every rank, in the
thread that made the call, at most ten times a second, and once at the end if the call succeeds."""


class Meter(AbstractContextManager["Meter"]):
    """Counts the bytes of one rank's part of a call, and shows its progress.

    Args:
        task: "save", "load", "verify" or "convert".
        progress: whether to show a bar, or a callback.
        location: the location of the checkpoint. It may be set later.
        rank: this rank.
        draws: whether this process shows the bar. None: rank 0 does.
    """

    def __init__(
        self,
        task: str,
        progress: OnProgress = False,
        *,
        location: str = "",
        rank: int = 0,
        draws: bool | None = None,
    ) -> None:
        self.location = location
        self._task = task
        self._rank = rank
        self._show: Callable[[Progress], None] | None = None
        self._bar: _Bar | None = None
        if callable(progress):
            self._show = progress
        elif progress and (rank == 0 if draws is None else draws):
            self._bar = self._show = _Bar()
        self._lock = threading.Lock()
        self._begun = time.perf_counter()
        self._shown = self._begun
        self._done = 0
        self._total = 0

    def __reduce__(self) -> tuple[type[Meter], tuple[str]]:
        """Pickle without the bar and the callback: another process shows nothing."""
        return Meter, (self._task,)

    def expect(self, nbytes: int) -> None:
        """Add to the total number of bytes."""
        with self._lock:
            self._total += nbytes

    def add(self, nbytes: int) -> None:
        """Add to the number of bytes that are done; a negative number subtracts. Any thread may call it."""
        with self._lock:
            self._done += nbytes

    @property
    def done(self) -> int:
        """The number of bytes that are done."""
        return self._done

    @property
    def progress(self) -> Progress:
        """The progress so far."""
        with self._lock:
            done = min(self._done, self._total)
            return Progress(self._task, self.location, self._rank, done, self._total, time.perf_counter() - self._begun)

    def tick(self) -> None:
        """Show the progress, at most every SHOWN_EVERY_S. Only the thread that made the call may call it."""
        if self._show is None or time.perf_counter() - self._shown < SHOWN_EVERY_S:
            return
        self._shown = time.perf_counter()
        self._show(self.progress)

    def watching(self, check: Callable[[], None]) -> Callable[[], None]:
        """Return a function for long work to call from time to time. It calls `check` and shows the progress."""

        def watch() -> None:
            check()
            self.tick()

        return watch

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None and self._show is not None:
                self._show(self.progress)
        finally:
            if self._bar is not None:
                self._bar.close()


class _Bar:
    """A progress bar on a terminal or in a notebook. It appears with the first update."""

    def __init__(self) -> None:
        self._rich: RichProgress | None = None

    def __call__(self, progress: Progress) -> None:
        with contextlib.suppress(Exception):  # a lost terminal must not fail a save
            self._draw(progress)

    def _draw(self, progress: Progress) -> None:
        if self._rich is None:
            self._rich = _rich_progress()
            self._rich.add_task(shown(f"{progress.task} {progress.location}"), total=None, rate="")
            if not self._rich.disable:
                self._rich.start()
        task = self._rich.task_ids[0]
        rate = f"{progress.done_bytes / 1e6 / progress.seconds:.0f} MB/s" if progress.seconds else ""
        self._rich.update(
            task, completed=progress.done_bytes, total=progress.total_bytes or None, rate=rate, refresh=True
        )

    def close(self) -> None:
        with contextlib.suppress(Exception):
            if self._rich is not None and not self._rich.disable:
                self._rich.stop()


def _rich_progress() -> RichProgress:
    """Return a bar of rich with bytes, rate and remaining time. It is drawn only on `update(..., refresh=True)`."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    words, rate = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[rate]}")
    columns = words, BarColumn(), DownloadColumn(), rate, TimeRemainingColumn()
    shown = console.is_terminal or console.is_jupyter
    return Progress(*columns, console=console, auto_refresh=False, disable=not shown)
