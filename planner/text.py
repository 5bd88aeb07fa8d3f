"""Text from outside as it may be shown: without secrets, in one line, and without what a terminal obeys."""

from __future__ import annotations

import re

from .masking import masked

MAX_SHOWN_CHARACTERS = 20_000
"""Of a text that is shown."""
MAX_WORD_CHARACTERS = 600
"""Characters without a space between them: longer words, as a tensor's name of a megabyte, are shortened."""
_LONG_WORD = re.compile(rf"\S{{{MAX_WORD_CHARACTERS + 1},}}")
_WITHOUT_WIDTH = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0d\uffa0\U000e0100-\U000e01ef]"
)
"""Characters that Python takes for printable, and that have no width, or no ink."""


def shown(value: object, most: int = MAX_SHOWN_CHARACTERS) -> str:
    """Return a value's text as messages, logs and tables show it.

    Secrets are masked (see `masked`), characters are escaped (see `printable`), and what is too long is shortened.
    Done again, it changes nothing.
    """
    return shortened(printable(masked(str(value))), most)


def printable(text: str) -> str:
    """Escape the characters of a text that a terminal obeys, hides, or breaks the line at, as Python's literals do.

    Those are control characters, separators of lines and paragraphs, surrogates, marks that change the direction of
    writing, and characters without a width. Letters of all scripts and emoji stay as they are; so does a backslash.
    """
    if text.isprintable() and _WITHOUT_WIDTH.search(text) is None:
        return text
    return "".join(
        char if char.isprintable() and _WITHOUT_WIDTH.match(char) is None else char.encode("unicode_escape").decode()
        for char in text
    )


def shortened(text: str, most: int = MAX_SHOWN_CHARACTERS, max_word: int = MAX_WORD_CHARACTERS) -> str:
    """Leave out the middle of what is too long, of words first, and say how long it was."""
    if len(text) > max_word:
        pattern = _LONG_WORD if max_word == MAX_WORD_CHARACTERS else re.compile(rf"\S{{{max_word + 1},}}")
        text = pattern.sub(lambda found: _middle_left_out(found[0], max_word), text)
    return _middle_left_out(text, most) if len(text) > most else text


def _middle_left_out(text: str, most: int) -> str:
    begin, end = most // 2, most // 4
    return f"{text[:begin]}…({len(text)} characters)…{text[-end:]}"
