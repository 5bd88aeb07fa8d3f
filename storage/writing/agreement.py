"""Whether ranks that save together describe their values alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ArgumentError
from ..tensors.state_dict import Key, Path, name_of


@dataclass(frozen=True, slots=True)
class ValueDescription:
    """What one rank says of one value."""

    path: Path
    kind: str
    """ "tensor", "sharded tensor", "object" or "empty dict"."""
    dtype: str = ""
    shape: tuple[int, ...] = ()
    digests: tuple[tuple[tuple[int, ...], int], ...] = ()
    """The offsets and a checksum of each part that other ranks may hold too; none of large ones."""

    def agrees_with(self, other: ValueDescription) -> bool:
        """Whether they describe one value, but for what its bytes are."""
        return (self.path, self.kind, self.dtype, self.shape) == (other.path, other.kind, other.dtype, other.shape)

    def __str__(self) -> str:
        what = f" of {self.dtype}, shape {list(self.shape)}" if self.dtype else ""
        return f"{'an' if self.kind[0] in 'eo' else 'a'} {self.kind}{what}, at {self.path}"


def agreed_paths(described: Sequence[Mapping[str, ValueDescription]]) -> dict[str, Path]:
    """The path of every value of a save.

    A dict that is empty on one rank may have items on another.

    Args:
        described: what each rank says of its values, by name.

    Raises:
        ArgumentError: two ranks disagree about a name.
    """
    first: dict[str, tuple[int, ValueDescription]] = {}
    containers: dict[Path, tuple[bool, int, Path]] = {}
    """Of each dict and list: whether it is a list, a rank that has a value in it, and that value's path."""
    keys: dict[tuple[Path, Any], tuple[Key, int]] = {}
    """Of each key of each dict: how it is stored, and a rank that has it."""
    for rank, values in enumerate(described):
        for name, value in values.items():
            known_by, known = first.setdefault(name, (rank, value))
            if known is value:
                _check_key(name, rank, value, keys)
                for length in range(1, len(value.path)):
                    is_list = type(value.path[length]) is int
                    seen = containers.setdefault(value.path[:length], (is_list, rank, value.path))
                    if seen[0] != is_list:
                        raise _disagreement(
                            name_of(value.path[:length]),
                            seen[1],
                            _holding(seen),
                            rank,
                            _holding((is_list, rank, value.path)),
                        )
            elif not known.agrees_with(value):
                raise _disagreement(name, known_by, known, rank, value)
    for name, (rank, value) in first.items():
        inside = containers.get(value.path)
        if inside is not None and not (value.kind == "empty dict" and not inside[0]):
            raise _disagreement(name, rank, value, inside[1], _holding(inside))
    return {name: value.path for name, (_, value) in first.items() if value.path not in containers}


def _holding(container: tuple[bool, int, Path]) -> str:
    return f"a {'list' if container[0] else 'dict'} that holds {name_of(container[2])!r}"


def _disagreement(name: str, rank: int, value: object, other_rank: int, other: object) -> ArgumentError:
    return ArgumentError(
        f"the ranks disagree about {name!r}: rank {rank} has {value}; rank {other_rank} has {other}. Give all ranks "
        "the same kind of value under one name"
    )


def differing_names(described: Sequence[Mapping[str, ValueDescription]]) -> list[str]:
    """Names of small values and parts that several ranks hold, and whose bytes are not the same on all of them."""
    known: dict[tuple[str, tuple[int, ...]], int] = {}
    differing: dict[str, None] = {}
    for values in described:
        for name, value in values.items():
            for offsets, digest in value.digests:
                if known.setdefault((name, offsets), digest) != digest:
                    differing[name] = None
    return list(differing)


def _check_key(name: str, rank: int, value: ValueDescription, keys: dict[tuple[Path, Any], tuple[Key, int]]) -> None:
    """Raises ArgumentError where a key on the way to a value equals another rank's, and is of another type."""
    for at, part in enumerate(value.path):
        if isinstance(part, Key):
            known, other_rank = keys.setdefault((value.path[:at], part.value), (part, rank))
            if known != part:
                raise ArgumentError(
                    f"the ranks disagree about {name!r}: rank {other_rank} has the key {known.value!r}, rank {rank} "
                    f"has {part.value!r}. They are equal, and of different types"
                )
