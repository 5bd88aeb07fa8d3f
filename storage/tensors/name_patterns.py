"""Names of tensors by patterns: which are taken, and what they are called instead."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from ...planner.layout import matches
from ..errors import ArgumentError

Patterns = str | Sequence[str]
"""One pattern as in a layout, or several: `*` matches anything, and "model" also matches all names below it."""


def patterns_of(argument: str, value: Patterns) -> tuple[str, ...]:
    """Return the patterns that an argument has.

    Raises:
        ArgumentError: the argument is neither a string nor a sequence of strings.
    """
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise ArgumentError(f"{argument} must be a pattern of names, or a list of them, got {value!r}")
    return tuple(patterns)


def listed(names: Sequence[str]) -> str:
    """Return the first five of some names for a message, and how many more there are."""
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def matches_any(patterns: Sequence[str], name: str) -> bool:
    """Whether one of some patterns matches a name."""
    return any(matches(pattern, name) for pattern in patterns)


def check_renames(argument: str, renames: object) -> None:
    """Check a mapping of patterns to new names.

    Raises:
        ArgumentError: the argument is no such mapping, or a new name has more stars than its pattern.
    """
    if not isinstance(renames, Mapping) or not all(isinstance(text, str) for pair in renames.items() for text in pair):
        raise ArgumentError(f'{argument} must be patterns and new names, as {{"model.*": "*"}}, got {renames!r}')
    for pattern, new in renames.items():
        stars = pattern.count("*")
        if new.count("*") > stars and stars != 1:
            raise ArgumentError(f"{argument}: {new!r} has more stars than the pattern {pattern!r}")


def check_first_matches(argument: str, renames: Mapping[str, str]) -> None:
    """Check that no pattern comes after one that matches all its names, where only the first match counts.

    Raises ArgumentError.
    """
    earlier: list[str] = []
    for pattern in renames:
        above = next((other for other in earlier if _compiled(other).fullmatch(pattern)), None)
        if above is not None:
            raise ArgumentError(
                f"{argument}: the pattern {pattern!r} comes after {above!r}, which takes all names that it matches: "
                "put it first"
            )
        earlier.append(pattern)


def renamed(name: str, renames: Mapping[str, str]) -> str | None:
    """Return what a name becomes by the first pattern that matches it; None if none matches.

    Each star of the new name is replaced by what the star at the same position in the pattern matched. If the pattern
    has one star, it replaces all of them.
    """
    for pattern, new in renames.items():
        found = _compiled(pattern).fullmatch(name)
        if found is not None:
            parts = found.groups()
            texts = new.split("*")
            stood_for = parts * (len(texts) - 1) if len(parts) == 1 else parts
            return texts[0] + "".join(part + text for part, text in zip(stood_for, texts[1:], strict=False))
    return None


def new_name(name: str, renames: Mapping[str, str]) -> str:
    """Return what a name becomes by patterns that are applied one after another."""
    for pattern, new in renames.items():
        found = renamed(name, {pattern: new})
        name = name if found is None else found
    return name


def by_new_name(names: Iterable[str], new: Callable[[str], str]) -> dict[str, str]:
    """Names of a checkpoint by their new names.

    A name that is empty stays so.

    Raises:
        ArgumentError: two would have the same new name, or one would lose its name.
    """
    stored: dict[str, str] = {}
    for name in names:
        becomes = new(name)
        if not becomes and name:
            raise ArgumentError(f"{name!r} would be left without a name")
        if becomes in stored:
            raise ArgumentError(f"both {stored[becomes]!r} and {name!r} would be named {becomes!r}")
        stored[becomes] = name
    return stored


@functools.lru_cache
def _compiled(pattern: str) -> re.Pattern[str]:
    """Each star matches as little as it can, from the first to the last."""
    return re.compile("(.*?)".join(map(re.escape, pattern.split("*"))), re.DOTALL)
