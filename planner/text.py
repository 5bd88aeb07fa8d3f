"""Make text from outside safe to show: no secrets, one line, no terminal control characters."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .masking import masked

MAX_SHOWN_CHARACTERS = 20_000
"""The maximum length of a text that is shown."""
MAX_WORD_CHARACTERS = 600
"""The maximum number of characters without a space. Longer words, such as a tensor name of a megabyte, are
shortened."""
_LONG_WORD = re.compile(rf"\S{{{MAX_WORD_CHARACTERS + 1},}}")
_WITHOUT_WIDTH = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0d\uffa0\U000e0100-\U000e01ef]"
)
"""Characters that Python considers printable although they are invisible."""


def shown(value: object, max_characters: int = MAX_SHOWN_CHARACTERS) -> str:
    """Return the text of a value in the form in which messages, logs and tables show it.

    Secrets are masked (see `masked`), control characters are escaped (see `printable`), and long text is shortened.
    Applying it twice has no further effect.

    Args:
        value: any value; its text is `str(value)`.
        max_characters: the maximum number of characters.
    """
    return shortened(printable(masked(str(value))), max_characters)


def first_few(items: Iterable[object], most: int = 5) -> str:
    """Return the first items of a list, and how many more there are: `0, 1 and 3 more`."""
    texts = list(map(str, items))
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def quoted(names: Iterable[str], most: int = 5) -> str:
    """Return the first names of a list in quotes, and how many more there are: `'a', 'b' and 3 more`."""
    return first_few(map(repr, names), most)


def counted(count: int, noun: str) -> str:
    """Return a number with a noun, in the plural unless the number is 1: `1 object`, `2 objects`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def printable(text: str) -> str:
    """Escape the characters that a terminal interprets, hides, or breaks a line at, as in Python literals.

    These are control characters, line and paragraph separators, surrogates, marks that change the direction of writing,
    and invisible characters. Letters of all scripts, emoji and backslashes stay unchanged.
    """
    if text.isprintable() and _WITHOUT_WIDTH.search(text) is None:
        return text
    return "".join(
        char if char.isprintable() and _WITHOUT_WIDTH.match(char) is None else char.encode("unicode_escape").decode()
        for char in text
    )


def shortened(text: str, max_characters: int = MAX_SHOWN_CHARACTERS, max_word: int = MAX_WORD_CHARACTERS) -> str:
    """Replace the middle of a text that is too long by its length. Shorten long words first, then the whole text."""
    if len(text) > max_word:
        pattern = _LONG_WORD if max_word == MAX_WORD_CHARACTERS else re.compile(rf"\S{{{max_word + 1},}}")
        text = pattern.sub(lambda found: _shorten_middle(found[0], max_word), text)
    return _shorten_middle(text, max_characters) if len(text) > max_characters else text


def _shorten_middle(text: str, max_characters: int) -> str:
    begin, end = max_characters // 2, max_characters // 4
    return f"{text[:begin]}…({len(text)} characters)…{text[-end:]}"
