"""Patterns of names: which names of a checkpoint are selected, and what they are renamed to."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ...planner.errors import MissingTensorError
from ...planner.index import nearest_names
from ...planner.layout import matches
from ..errors import ArgumentError

Patterns = str | Sequence[str]
"""One pattern or several. `*` matches any text, and "model" also matches every name below it, as "model.w"."""


def patterns_of(argument: str, value: Patterns) -> tuple[str, ...]:
    """Return the patterns that were passed as an argument.

    Raises:
        ArgumentError: the argument is neither a string nor a sequence of strings.
    """
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise ArgumentError(f"{argument} must be a pattern of names, or a list of patterns, got {value!r}")
    return tuple(patterns)


def matches_any(patterns: Sequence[str], name: str) -> bool:
    """Return whether one of some patterns matches a name."""
    return any(matches(pattern, name) for pattern in patterns)


@dataclass(frozen=True, slots=True)
class Selection:
    """Which names of a checkpoint are selected, and their new names."""

    include: tuple[str, ...]
    exclude: tuple[str, ...]
    rename: Mapping[str, str]

    @classmethod
    def of(cls, include: Patterns = "*", exclude: Patterns = (), rename: Mapping[str, str] | None = None) -> Selection:
        """Check the arguments of a call.

        Raises:
            ArgumentError: one of them is not valid.
        """
        patterns = patterns_of("include", include)
        if not patterns:
            raise ArgumentError('include has no pattern, so no name would be selected: "*" selects all')
        check_renames(rename or {})
        return cls(patterns, patterns_of("exclude", exclude), rename or {})

    def includes(self, name: str) -> bool:
        """Return whether a name is selected."""
        return matches_any(self.include, name) and not matches_any(self.exclude, name)

    def new_name(self, name: str) -> str:
        """Return what a name is renamed to."""
        return new_name(name, self.rename)

    def select(self, names: Iterable[str]) -> dict[str, str]:
        """Return the selected names, by their new names and in the order of `names`.

        Raises:
            ArgumentError: two of them would have the same new name, or one would have an empty name.
        """
        return by_new_name((name for name in names if self.includes(name)), self.rename)

    def check(
        self, names: Sequence[str], *, may_miss: Sequence[str] = (), includable: Sequence[str] | None = None
    ) -> None:
        """Check that every pattern matches a name: of `include` and `exclude` any name, of `rename` a selected one.

        Args:
            names: the names of the checkpoint. If there are none, `exclude` and `rename` may have any patterns.
            may_miss: patterns that may match no name.
            includable: the names of which each pattern of `include` must match one. Default: all.

        Raises:
            MissingTensorError: a pattern matches none of the names. The message shows the nearest ones.
        """
        includable = names if includable is None else includable
        self._refuse(
            unused_patterns([pattern for pattern in self.include if pattern != "*"], includable), may_miss, includable
        )
        if not names:
            return
        self._refuse(unused_patterns(self.exclude, names), may_miss, names)
        selected = [name for name in names if self.includes(name)]
        unused = unused_renames(self.rename, selected)
        self._refuse(unused, may_miss, selected, "" if len(selected) == len(names) else " and is selected")

    @staticmethod
    def _refuse(unused: Sequence[str], may_miss: Sequence[str], names: Sequence[str], kind: str = "") -> None:
        """Raise MissingTensorError for patterns that match no name, except those that `may_miss` allows."""
        unused = [pattern for pattern in unused if not matches_any(may_miss, pattern)]
        if unused:
            raise no_match(unused, names, kind)


def unused_patterns(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the patterns that match none of the names."""
    return [pattern for pattern in patterns if not any(matches(pattern, name) for name in names)]


def unused_renames(renames: Mapping[str, str], names: Sequence[str]) -> list[str]:
    """Return the patterns that match none of the names when all are applied one after another."""
    unused = []
    for pattern, new in renames.items():
        renamed = [_renamed(name, pattern, new) for name in names]
        if all(name is None for name in renamed):
            unused.append(pattern)
        names = [old if name is None else name for old, name in zip(names, renamed, strict=True)]
    return unused


def no_match(patterns: Sequence[str], names: Sequence[str], kind: str = "") -> MissingTensorError:
    """Return the error for patterns that match none of the names of a checkpoint, or none of a kind."""
    parents = {f"{name[: dot.start()]}.*" for name in names for dot in re.finditer(r"\.", name)}
    near = nearest_names(patterns[0], [*names, *sorted(parents)], 3) or names[:3]
    return MissingTensorError(
        f"the checkpoint has no name that matches {', '.join(map(repr, patterns))}{kind}"
        + (f"; nearest are {', '.join(map(repr, near))}" if near else "")
    )


def check_renames(renames: object) -> None:
    """Check a mapping of patterns to new names.

    Raises:
        ArgumentError: the argument is not such a mapping, or a new name has more stars than its pattern.
    """
    if not isinstance(renames, Mapping) or not all(isinstance(text, str) for pair in renames.items() for text in pair):
        raise ArgumentError(f'rename must map patterns to new names, as {{"model.*": "*"}}, got {renames!r}')
    for pattern, new in renames.items():
        stars = pattern.count("*")
        if new.count("*") > stars and stars != 1:
            raise ArgumentError(f"rename: {new!r} has more stars than the pattern {pattern!r}")


def new_name(name: str, renames: Mapping[str, str]) -> str:
    """Return what a name becomes when patterns are applied one after another."""
    for pattern, new in renames.items():
        renamed = _renamed(name, pattern, new)
        name = name if renamed is None else renamed
    return name


def by_new_name(names: Iterable[str], renames: Mapping[str, str]) -> dict[str, str]:
    """Return names of a checkpoint by their new names. An empty name stays empty.

    Raises:
        ArgumentError: two names would have the same new name, or one would have an empty name.
    """
    stored: dict[str, str] = {}
    for name in names:
        new = new_name(name, renames)
        if not new and name:
            raise ArgumentError(f"{name!r} would be renamed to an empty name")
        if new in stored:
            several = ": the patterns of rename are applied one after another" if len(renames) > 1 else ""
            raise ArgumentError(f"{stored[new]!r} and {name!r} would both be named {new!r}{several}")
        stored[new] = name
    return stored


def _renamed(name: str, pattern: str, new: str) -> str | None:
    """Return what a name becomes if a pattern matches it; None if it does not.

    Each star of the new name is replaced by the text that the star at the same position of the pattern matched. If the
    pattern has one star, its text replaces all of them.
    """
    found = _compiled(pattern).fullmatch(name)
    if found is None:
        return None
    matched = found.groups()
    texts = new.split("*")
    stars = matched * (len(texts) - 1) if len(matched) == 1 else matched
    return texts[0] + "".join(star + text for star, text in zip(stars, texts[1:], strict=False))


@functools.lru_cache
def _compiled(pattern: str) -> re.Pattern[str]:
    """Compile a pattern. Each star matches as little as possible, from the first to the last."""
    return re.compile("(.*?)".join(map(re.escape, pattern.split("*"))), re.DOTALL)
