"""Untrusted values in messages: short, whatever they hold."""

from __future__ import annotations

import reprlib
from typing import Any

MAX_CHARS = 200
_PLAIN = (str, bytes, int, float, bool, type(None))
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = MAX_CHARS


def brief(value: Any) -> str:
    """Return a value as `repr` does, at most some 200 characters of it.

    Containers are shown to a depth of 3 and a few items each. Of other classes the name alone is shown: their own
    `repr` could take any time and memory.
    """
    return _brief(value, 3)


def _brief(value: Any, levels: int) -> str:
    kind = type(value)
    if kind in (str, bytes):
        return _repr.repr(value)
    if kind is int:
        return repr(value) if value.bit_length() <= 4 * MAX_CHARS else f"an integer of {value.bit_length()} bits"
    if kind in _PLAIN:
        return repr(value)
    if kind in (list, tuple) and levels:
        items = [_brief(item, levels - 1) for item in value[:4]] + ["..."] * (len(value) > 4)
        end = "," if kind is tuple and len(value) == 1 else ""
        return f"[{', '.join(items)}]" if kind is list else f"({', '.join(items)}{end})"
    return f"<{kind.__name__}>"


def text_of(error: BaseException) -> str:
    """Return what an error of Python or of another library says, at most some 200 characters of it."""
    if not all(type(argument) in _PLAIN for argument in error.args):
        return ", ".join(map(brief, error.args[:2]))
    text = str(error)
    return text if len(text) <= MAX_CHARS else f"{text[: MAX_CHARS // 2]}...{text[-MAX_CHARS // 2 :]}"


def reason(error: BaseException) -> str:
    """Return the class of an error, and what it says as `text_of` has it."""
    text = text_of(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
