"""The options of a load that concern names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..tensors.name_patterns import Patterns, patterns_of


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Which names of a state dict are loaded, and how. See `reshard.load`."""

    strict: bool = True
    allow_missing: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    allow_pickle: bool = False
    budget_bytes: int | None = None

    @classmethod
    def of(
        cls,
        strict: bool,
        allow_missing: Patterns,
        exclude: Patterns,
        rename: Mapping[str, str] | None,
        allow_pickle: bool,
        budget_bytes: int | None,
    ) -> LoadOptions:
        """Return the options for the arguments of `reshard.load`. Raises ArgumentError if a pattern is not valid."""
        missing, excluded = patterns_of("allow_missing", allow_missing), patterns_of("exclude", exclude)
        return cls(strict, missing, excluded, rename or {}, allow_pickle, budget_bytes)
