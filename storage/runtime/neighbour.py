"""What a rank knows about the next one, which it watches."""

from __future__ import annotations

from typing import Any

SILENT_BEATS = 8
"""A rank is considered lost if its pulse does not change during this many checks. Checks are counted instead of
seconds, so that a process that was suspended does not accuse others."""
PINGED_BEATS = 3
"""In how many of these checks a rank may answer a ping."""
CLOSED_BEATS = 3
"""A rank is considered lost if its connection is closed during this many checks. One is not enough: the rank
may just have finished the call and ended its process."""
ABSENT_BEATS = 2
"""A rank is pinged if it shows no pulse in the same call during this many checks. Each further wait is longer."""
LENGTHENED = 4
"""How many times longer."""
MAX_ABSENT_BEATS = 60
"""The longest wait."""


class Silence:
    """What a rank knows about the next one while that is in the same call."""

    def __init__(self) -> None:
        self.pulse = ""
        self.beats = 0
        """In how many checks its pulse has not changed."""
        self.closed = 0
        """In how many checks its connection was closed while it was in the same call."""
        self.answer: Any = None
        """The byte that becomes 1 when it answers the last ping."""
        self.others: dict[int, str] = {}
        """The pulses of all ranks at that time."""

    def listen(self, pulse: str, call: int, *, is_closed: bool) -> None:
        self.closed = self.closed + 1 if is_closed and not pulse.endswith("left") else 0
        self.beats = self.beats + 1 if pulse == self.pulse and is_of_call(pulse, call) else 0
        self.pulse = pulse


class Absence:
    """What a rank knows about the next one while that shows no pulse in the same call."""

    def __init__(self) -> None:
        self.answer: Any = None
        """The byte that becomes 1 when it answers the last ping; None if it has answered."""
        self.pings = 0
        """How many pings were sent."""
        self._beats = 0
        """The number of checks since the last ping or answer in this call."""
        self._wait = ABSENT_BEATS
        self._has_answered = False

    def begin_call(self) -> None:
        """Count from now on, and ping soon again."""
        self._beats, self._wait = 0, ABSENT_BEATS

    def listen(self) -> None:
        """Find out whether it has answered."""
        self._beats += 1
        if self.answer is not None and self.answer[0]:
            self.answer, self._beats, self._has_answered = None, 0, True

    def is_due(self) -> bool:
        """Return whether to ping it now. One that has never answered may not have created its connections yet."""
        return self._has_answered and self.answer is None and self._beats >= self._wait

    def ping(self, answer: Any) -> None:
        """Note that it was pinged."""
        self.answer = answer
        self.pings += 1
        self._beats = 0
        self._wait = min(LENGTHENED * self._wait, MAX_ABSENT_BEATS)

    def is_lost(self) -> bool:
        """Return whether it has not answered a ping for too long."""
        return self._has_answered and self.answer is not None and self._beats >= SILENT_BEATS


def is_of_call(pulse: str, call: int) -> bool:
    """Return whether a pulse shows that its rank is in this call."""
    number, _, beat = pulse.partition(" ")
    return number == str(call) and beat != "left"
