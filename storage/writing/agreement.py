"""Compares how the ranks of a save describe their entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ArgumentError
from ..runtime.brief import brief
from ..tensors.state_dict import Key, Path, name_of


@dataclass(frozen=True, slots=True)
class ValueDescription:
    """How one rank describes one entry of its state dict, a tensor or a value."""

    path: Path
    kind: str
    """ "tensor", "sharded tensor", "value" or "empty dict"."""
    dtype: str = ""
    shape: tuple[int, ...] = ()
    digests: tuple[tuple[tuple[int, ...], int], ...] = ()
    """Offsets and checksum of each small part that other ranks may hold too."""

    def agrees_with(self, other: ValueDescription) -> bool:
        """Return whether both describe the same entry. Its bytes are not compared."""
        return (self.path, self.kind, self.dtype, self.shape) == (other.path, other.kind, other.dtype, other.shape)

    def __str__(self) -> str:
        what = f" of {self.dtype}, shape {list(self.shape)}" if self.dtype else ""
        return f"{'an' if self.kind[0] == 'e' else 'a'} {self.kind}{what}, at {self.path}"


def agreed_paths(described: Sequence[Mapping[str, ValueDescription]]) -> dict[str, Path]:
    """Return the path of every entry of a save.

    A dict that is empty on one rank may have items on another.

    Args:
        described: For each rank, the descriptions of its entries by name.

    Raises:
        ArgumentError: Two ranks disagree about a name.
    """
    first: dict[str, tuple[int, ValueDescription]] = {}
    containers: dict[Path, tuple[bool, int, Path]] = {}
    """For each dict and list: whether it is a list, a rank that has an entry in it, and the path of that entry."""
    keys: dict[tuple[Path, Any], tuple[Key, int]] = {}
    """For each key of each dict: how it is stored, and a rank that has it."""
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


def check_same_metadata(metadata: Sequence[str]) -> None:
    """Check that all ranks passed the same metadata.

    Args:
        metadata: For each rank, its metadata as JSON with sorted keys.

    Raises:
        ArgumentError: Two ranks passed different metadata.
    """
    for rank, other in enumerate(metadata):
        if other != metadata[0]:
            raise ArgumentError(
                f"the ranks of one save passed different metadata: rank 0 {brief(metadata[0])}, rank {rank} "
                f"{brief(other)}. Pass the same on all ranks: reduce metrics over the ranks first, for example with "
                "torch.distributed.all_reduce"
            )


def _holding(container: tuple[bool, int, Path]) -> str:
    return f"a {'list' if container[0] else 'dict'} that holds {name_of(container[2])!r}"


def _disagreement(name: str, rank: int, value: object, other_rank: int, other: object) -> ArgumentError:
    return ArgumentError(
        f"the ranks disagree about {name!r}: rank {rank} has {value}, but rank {other_rank} has {other}. All "
        "ranks must have the same kind of value under one name"
    )


def differing_names(described: Sequence[Mapping[str, ValueDescription]]) -> list[str]:
    """Return the names of small entries that several ranks hold, but not with the same bytes."""
    known: dict[tuple[str, tuple[int, ...]], int] = {}
    differing: dict[str, None] = {}
    for values in described:
        for name, value in values.items():
            for offsets, digest in value.digests:
                if known.setdefault((name, offsets), digest) != digest:
                    differing[name] = None
    return list(differing)


def _check_key(name: str, rank: int, value: ValueDescription, keys: dict[tuple[Path, Any], tuple[Key, int]]) -> None:
    """Check that the keys in the path of an entry have the same types on all ranks.

    Raises:
        ArgumentError: A key is equal to a key of another rank, but has another type.
    """
    for at, part in enumerate(value.path):
        if isinstance(part, Key):
            known, other_rank = keys.setdefault((value.path[:at], part.value), (part, rank))
            if known != part:
                raise ArgumentError(
                    f"the ranks disagree about {name!r}: rank {other_rank} has the key {known.value!r}, but rank "
                    f"{rank} has {part.value!r}. The keys are equal but not of one type: use the same type on all ranks"
                )
