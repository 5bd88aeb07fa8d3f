"""How far a call is: a bar on the terminal of rank 0, or whatever a callback makes of it.

Threads that do the work add what they did; the thread that called shows it, now and then, while it waits for them. So
a callback runs where the call was made, and what it raises ends the call.
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
"""At most so often."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far this rank's part of a call is."""

    task: str
    """ "save", "load", "verify" or "convert"."""
    location: str
    """Of the checkpoint; of a conversion, of the one that is written."""
    rank: int
    done_bytes: int
    """Bytes of values that were saved or converted, or stored bytes that were loaded or verified."""
    total_bytes: int
    """Of all that this rank has to do, as far as it is known; 0 before it is."""
    seconds: float
    """Since the call began."""


OnProgress = bool | Callable[[Progress], None]
"""True shows a bar on rank 0, where standard error is a terminal or a notebook; a callback is called on every rank, in
the thread that made the call: ten times a second at most, and at the end of what has succeeded."""


class Meter(AbstractContextManager["Meter"]):
    """Counts what one rank's part of a call does, and shows it.

    Args:
        location: of the checkpoint; may be set later, once it is known.
        draws: whether it is this process that shows a bar; by default rank 0.
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
        """In another process there is nothing to show."""
        return Meter, (self._task,)

    def expect(self, nbytes: int) -> None:
        """There is more to do."""
        with self._lock:
            self._total += nbytes

    def add(self, nbytes: int) -> None:
        """Some of it was done; a negative number takes it back. Called by any thread."""
        with self._lock:
            self._done += nbytes

    @property
    def done(self) -> int:
        """What was added."""
        return self._done

    def tick(self) -> None:
        """Show it, if it was not shown just now. Called by the thread that made the call."""
        if self._show is None or time.perf_counter() - self._shown < SHOWN_EVERY_S:
            return
        self._shown = time.perf_counter()
        self._show(self._progress())

    def watching(self, check: Callable[[], None]) -> Callable[[], None]:
        """What long work calls now and then: it checks something else, and shows how far it is."""

        def watch() -> None:
            check()
            self.tick()

        return watch

    def _progress(self) -> Progress:
        with self._lock:
            done = min(self._done, self._total)
            return Progress(self._task, self.location, self._rank, done, self._total, time.perf_counter() - self._begun)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None and self._show is not None:
                self._show(self._progress())
        finally:
            if self._bar is not None:
                self._bar.close()


class _Bar:
    """A progress bar, from when there is something to show on a terminal or in a notebook."""

    def __init__(self) -> None:
        self._rich: RichProgress | None = None

    def __call__(self, progress: Progress) -> None:
        with contextlib.suppress(Exception):  # a terminal that is gone ends no save
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
    """Of rich: bytes, rate and what is left of the time; drawn only when it is told to be."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    words, rate = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[rate]}")
    columns = words, BarColumn(), DownloadColumn(), rate, TimeRemainingColumn()
    shown = console.is_terminal or console.is_jupyter
    return Progress(*columns, console=console, auto_refresh=False, disable=not shown)
