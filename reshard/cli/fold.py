"""Many tensors in few lines: layers that are alike are one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..words import ranges


@dataclass(frozen=True, slots=True)
class Folded:
    """Tensors that differ in numbers of their names alone."""

    name: str
    """With what the numbers are, as in `layers.[0-31].up.weight`."""
    count: int
    alike: tuple[object, ...]
    """What they have in common."""


def fold(tensors: Mapping[str, tuple[object, ...]]) -> list[Folded]:
    """Fold names by what they have in common: names with other numbers, but the same values, are one."""
    groups: dict[tuple[str, tuple[object, ...]], list[str]] = {}
    for name, alike in tensors.items():
        pattern = ".".join("*" if part.isdigit() else part for part in name.split("."))
        groups.setdefault((pattern, alike), []).append(name)
    return [Folded(_numbered(names), len(names), alike) for (_, alike), names in groups.items()]


def _numbered(names: list[str]) -> str:
    columns = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(column[0] if len(set(column)) == 1 else f"[{ranges(map(int, column))}]" for column in columns)
