"""Checks of arguments that several functions have. All raise ArgumentError."""

from __future__ import annotations

import numbers
from collections.abc import Collection

from ..errors import ArgumentError


def check_flags(**flags: object) -> None:
    """Check that arguments are True or False."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ArgumentError(f"{name} must be True or False, got {flag!r}")


def check_choice(name: str, passed: object, choices: Collection[str]) -> None:
    """Check that an argument is one of some strings."""
    if not isinstance(passed, str) or passed not in choices:
        raise ArgumentError(f"{name} must be one of {', '.join(map(repr, choices))}, got {passed!r}")


def check_progress(progress: object) -> None:
    """Check that an argument is True, False or a function."""
    if not (isinstance(progress, bool) or callable(progress)):
        raise ArgumentError(f"progress must be True, False or a function, got {progress!r}")


def check_nbytes(**limits: object) -> None:
    """Check that limits are positive numbers of bytes, or None. NumPy's integers are integers, booleans are not."""
    for name, limit in limits.items():
        if limit is None or (isinstance(limit, numbers.Integral) and not isinstance(limit, bool) and int(limit) > 0):
            continue
        raise ArgumentError(f"{name} must be a positive integer or None for the default, got {limit!r}")
