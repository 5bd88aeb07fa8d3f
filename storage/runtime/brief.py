"""Show untrusted values and errors in messages, with a limited length."""

from __future__ import annotations

import reprlib
from typing import Any

MAX_CHARS = 200
_BUILTIN_TYPES = (str, bytes, int, float, bool, type(None))
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = MAX_CHARS


def brief(value: Any) -> str:
    """Return the `repr` of a value, shortened to about 200 characters per string.

    Lists and tuples are shown to a depth of 3, with up to 4 items each. Of other classes only the name is shown, since
    their `repr` could take any amount of time and memory.
    """
    return _brief(value, 3)


def _brief(value: Any, levels: int) -> str:
    kind = type(value)
    if kind in (str, bytes):
        return _repr.repr(value)
    if kind is int:
        return repr(value) if value.bit_length() <= 4 * MAX_CHARS else f"an integer of {value.bit_length()} bits"
    if kind in _BUILTIN_TYPES:
        return repr(value)
    if kind in (list, tuple) and levels:
        items = [_brief(item, levels - 1) for item in value[:4]] + ["..."] * (len(value) > 4)
        end = "," if kind is tuple and len(value) == 1 else ""
        return f"[{', '.join(items)}]" if kind is list else f"({', '.join(items)}{end})"
    return f"<{kind.__name__}>"


def text_of(error: BaseException) -> str:
    """Return the message of an error of Python or of another library, shortened to about 200 characters."""
    if not all(type(argument) in _BUILTIN_TYPES for argument in error.args):
        return ", ".join(map(brief, error.args[:2]))
    text = str(error)
    return text if len(text) <= MAX_CHARS else f"{text[: MAX_CHARS // 2]}...{text[-MAX_CHARS // 2 :]}"


def reason(error: BaseException) -> str:
    """Return the class of an error and its message, as `text_of` returns it."""
    text = text_of(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
