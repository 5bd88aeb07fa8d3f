"""Many tensors in few lines: layers that are alike are one, and names are a tree."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from ..humanize import format_ranges

_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")
"""A part of a name that counts layers. Other digits, as in "01", "²" or a thousand of them, are letters."""
MAX_LEVELS = 32
"""Of a tree; what is below stays in one line."""


@dataclass(frozen=True, slots=True)
class Folded:
    """Tensors that differ in numbers of their names alone."""

    name: str
    """With what the numbers are, as in `layers.[0-31].up.weight`."""
    names: tuple[str, ...]
    alike: tuple[object, ...]
    """What they have in common."""

    @property
    def count(self) -> int:
        return len(self.names)


def fold(tensors: Mapping[str, tuple[object, ...]]) -> list[Folded]:
    """Fold names by what they have in common: names with other numbers, but the same values, are one."""
    groups: dict[tuple[str, tuple[object, ...]], list[str]] = {}
    for name, alike in tensors.items():
        pattern = ".".join("*" if _NUMBER.fullmatch(part) else part for part in name.split("."))
        groups.setdefault((pattern, alike), []).append(name)
    return [Folded(_numbered(names), tuple(names), alike) for (_, alike), names in groups.items()]


def _numbered(names: list[str]) -> str:
    columns = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(
        column[0] if len(set(column)) == 1 else f"[{format_ranges(map(int, column))}]" for column in columns
    )


@dataclass(slots=True)
class _Node:
    own: list[Folded] = field(default_factory=list)
    below: dict[str, _Node] = field(default_factory=dict)


def tree(folded: Iterable[Folded]) -> list[tuple[str, Folded | None]]:
    """The lines of a tree of names, each indented, with the tensors that it stands for, or None.

    A name with one thing below it is in one line with that, and so is all that is nested more than MAX_LEVELS deep.
    """
    root = _Node()
    for tensors in folded:
        node = root
        for part in tensors.name.split(".", MAX_LEVELS - 1):
            node = node.below.setdefault(part, _Node())
        node.own.append(tensors)
    return list(_lines(root, ""))


def _lines(node: _Node, indent: str) -> Iterator[tuple[str, Folded | None]]:
    for name, below in node.below.items():
        while not below.own and len(below.below) == 1:
            ((part, below),) = below.below.items()
            name = f"{name}.{part}"
        own: list[Folded | None] = [*below.own] or [None]
        yield from ((indent + name, tensors) for tensors in own)
        yield from _lines(below, indent + "  ")
