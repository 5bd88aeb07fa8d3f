"""Shows many tensors in few lines: similar layers are one line, and names form a tree."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from ..humanize import format_ranges

_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")
"""A part of a name that counts layers. Other digits, such as "01", "²" or a thousand digits, are treated as letters."""
MAX_LEVELS = 32
"""The depth of a tree. Deeper names stay in one line."""


@dataclass(frozen=True, slots=True)
class Folded:
    """Tensors whose names differ only in numbers."""

    name: str
    """The name with the ranges of the numbers, such as `layers.[0-31].up.weight`."""
    names: tuple[str, ...]

    @property
    def count(self) -> int:
        return len(self.names)


def fold(tensors: Mapping[str, tuple[object, ...]]) -> list[Folded]:
    """Fold tensors with the same properties whose names differ only in numbers."""
    groups: dict[tuple[str, tuple[object, ...]], list[str]] = {}
    for name, alike in tensors.items():
        pattern = ".".join("*" if _NUMBER.fullmatch(part) else part for part in name.split("."))
        groups.setdefault((pattern, alike), []).append(name)
    return [Folded(_numbered(names), tuple(names)) for names in groups.values()]


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
    """Return the lines of a tree of names, each indented, with the tensors of the line, or None.

    A name with a single child shares a line with it. Names that are nested more than MAX_LEVELS deep share a line, too.
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
