"""Compares how the ranks of a save describe their entries."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ArgumentError
from ..runtime.brief import brief
from ..tensors.state_dict import Key, Path, name_of, path_from_json, path_to_json


@dataclass(frozen=True, slots=True)
class EntryDescription:
    """How one rank describes one entry of its state dict, a tensor or a value."""

    path: Path
    kind: str
    """ "tensor", "sharded tensor", "value" or "empty dict"."""
    dtype: str = ""
    shape: tuple[int, ...] = ()

    def __str__(self) -> str:
        what = f" of {self.dtype}, shape {list(self.shape)}" if self.dtype else ""
        return f"{'an' if self.kind[0] == 'e' else 'a'} {self.kind}{what}, at {self.path}"


def pack_descriptions(described: Mapping[str, EntryDescription]) -> bytes:
    """Return descriptions as bytes, which are equal for equal descriptions in the same order."""
    rows = [[name, path_to_json(d.path), d.kind, d.dtype, d.shape] for name, d in described.items()]
    return zlib.compress(json.dumps(rows, separators=(",", ":")).encode(), 1)


def unpack_descriptions(packed: bytes) -> dict[str, EntryDescription]:
    """Return the descriptions from the result of `pack_descriptions`."""
    return {
        name: EntryDescription(path_from_json(path), kind, dtype, tuple(shape))
        for name, path, kind, dtype, shape in json.loads(zlib.decompress(packed))
    }


def agreed_paths(described: Mapping[int, Mapping[str, EntryDescription]]) -> dict[str, Path]:
    """Return the path of every entry of a save.

    A dict that is empty on one rank may have items on another.

    Args:
        described: by rank, the descriptions of its entries by name. Of ranks with the same descriptions, one suffices.

    Raises:
        ArgumentError: two ranks disagree about a name.
    """
    first: dict[str, tuple[int, EntryDescription]] = {}
    containers: dict[Path, tuple[bool, int, Path]] = {}
    """For each dict and list: whether it is a list, a rank that has an entry in it, and the path of that entry."""
    keys: dict[tuple[Path, Any], tuple[Key, int]] = {}
    """For each key of each dict: how it is stored, and a rank that has it."""
    for rank, values in described.items():
        for name, value in values.items():
            known_by, known = first.setdefault(name, (rank, value))
            if known_by == rank:
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
            elif known != value:
                raise _disagreement(name, known_by, known, rank, value)
    for name, (rank, value) in first.items():
        inside = containers.get(value.path)
        if inside is not None and not (value.kind == "empty dict" and not inside[0]):
            raise _disagreement(name, rank, value, inside[1], _holding(inside))
    return {name: value.path for name, (_, value) in first.items() if value.path not in containers}


def uneven_lists(described: Sequence[Mapping[str, EntryDescription]]) -> list[str]:
    """Return the names of lists that have items on several ranks, but not equally many.

    Args:
        described: descriptions of entries by name. Of ranks with the same descriptions, one suffices.
    """
    first: dict[Path, int] = {}
    found: dict[Path, None] = {}
    for values in described if len(described) > 1 else ():
        lengths: dict[Path, int] = {}
        for value in values.values():
            for at, part in enumerate(value.path):
                if type(part) is int:
                    lengths[value.path[:at]] = max(part + 1, lengths.get(value.path[:at], 0))
        for path, length in lengths.items():
            if first.setdefault(path, length) != length:
                found[path] = None
    return list(map(name_of, found))


def check_same_metadata(metadata: Sequence[str]) -> None:
    """Check that all ranks passed the same metadata.

    Args:
        metadata: for each rank, its metadata as JSON with sorted keys.

    Raises:
        ArgumentError: two ranks passed different metadata.
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


def _check_key(name: str, rank: int, value: EntryDescription, keys: dict[tuple[Path, Any], tuple[Key, int]]) -> None:
    """Check that the keys in the path of an entry have the same types on all ranks.

    Raises:
        ArgumentError: a key is equal to a key of another rank, but has another type.
    """
    for at, part in enumerate(value.path):
        if isinstance(part, Key):
            known, other_rank = keys.setdefault((value.path[:at], part.value), (part, rank))
            if known != part:
                raise ArgumentError(
                    f"the ranks disagree about {name!r}: rank {other_rank} has the key {known.value!r}, but rank "
                    f"{rank} has {part.value!r}. The keys are equal but not of one type: use the same type on all ranks"
                )
