"""Models that are stored as several files: find the files of a model, and the index that says where each tensor is.

Hugging Face numbers the files (`model-00001-of-00003.safetensors`) and writes an index beside them. A tensor is read
from the file that the index names, even if other files contain it too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from ...planner.text import quoted
from ..errors import CorruptCheckpointError, ObjectNotFoundError
from ..runtime.brief import reason
from .foreign import ForeignSource
from .metadata_reader import MALFORMED_ERRORS, MetadataReader

MAX_INDEX_BYTES = 100_000_000
"""The largest size of an index."""
MAX_FILES_IN_ERROR = 8
"""How many files an error message names."""
_PLAIN_NAME = re.compile(r"[^/\\\0]+")
_PART = re.compile(r"(?P<prefix>.*[-_.])?(?P<number>\d{1,7})[-_]of[-_](?P<count>\d{1,7})(?P<suffix>(?:\.\w+)+)")
_OF_RANK = re.compile(r"shard-\d+-")
"""The prefix that torch's HuggingFaceStorageWriter gives to the files of one rank."""
InFile = TypeVar("InFile")
TensorsByName = dict[str, list[tuple[int, InFile]]]
"""The contents of files by name: positions of files in the source's `objects`, with what they say about the tensor."""


@dataclass(frozen=True, slots=True)
class WeightMap:
    """An index: which file holds which tensor."""

    index: str
    """The name of the index."""
    files: Mapping[str, str]
    """The file of each tensor."""

    @property
    def names(self) -> list[str]:
        """The names of all files, sorted."""
        return sorted(set(self.files.values()))


def read_weight_map(reader: MetadataReader, name: str, beside: Sequence[str]) -> WeightMap:
    """Read an index of Hugging Face.

    Args:
        reader: reads the store.
        name: the name of the index.
        beside: weight files in the same folder, for the error message.

    Raises:
        CorruptCheckpointError: the object is not an index.
        ObjectNotFoundError: there is no such object.
        StoreError: the store cannot be read.
    """
    try:
        nbytes = reader.size(name)
        if nbytes > MAX_INDEX_BYTES:
            raise ValueError(f"it has {nbytes} bytes")
        weight_map = json.loads(reader.exactly(name, 0, nbytes))["weight_map"]
        files = {str(tensor): file.removeprefix("./") for tensor, file in weight_map.items()}
        if not all(_is_inside(file) for file in files.values()):
            raise ValueError(f"it names files outside its folder, among {sorted(set(files.values()))}")
        return WeightMap(name, files)
    except MALFORMED_ERRORS as error:
        kind = "safetensors" if name.endswith(".safetensors.index.json") else "weights"
        raise CorruptCheckpointError(
            f"{name!r} in {reader.store.location} is not an index of {kind}: {reason(error)}{_weights_beside(beside)}"
        ) from error


def _is_inside(file: str) -> bool:
    """Return whether a name is that of a file inside the folder."""
    return all(_PLAIN_NAME.fullmatch(part) and part not in (".", "..") for part in file.split("/"))


def _weights_beside(files: Sequence[str]) -> str:
    if not files:
        return ""
    return (
        f". The folder also has the weight files {quoted(files, MAX_FILES_IN_ERROR)}: restore the index, or remove it "
        "to read all of them"
    )


def check_numbered_files(location: str, names: Iterable[str]) -> None:
    """Check that no file named `…-00001-of-00003.…` is missing. Raise CorruptCheckpointError with the missing names."""
    groups: dict[tuple[str, str, str], set[int]] = {}
    for name in names:
        part = _PART.fullmatch(name)
        if part:
            # A rank writes only the files that it has shards for.
            prefix = _OF_RANK.sub("shard-*-", part["prefix"] or "", count=1)
            groups.setdefault((prefix, part["count"], part["suffix"]), set()).add(int(part["number"]))
    for (prefix, count, suffix), numbers in sorted(groups.items()):
        first = 0 if 0 in numbers else 1
        due = range(first, first + int(count))
        lacking = len(due) - sum(number in due for number in numbers)
        if lacking:
            missing = islice((number for number in due if number not in numbers), MAX_FILES_IN_ERROR)
            files = [f"{prefix}{number:0{len(count)}}-of-{count}{suffix}" for number in missing]
            more = f" and {lacking - MAX_FILES_IN_ERROR} more" if lacking > MAX_FILES_IN_ERROR else ""
            raise CorruptCheckpointError(
                f"the checkpoint at {location} is incomplete: of {int(count)} files, "
                f"{', '.join(map(repr, files))}{more} {'is' if lacking == 1 else 'are'} missing. Copy them again, or "
                "open one of the existing files by its own path"
            )


def group_numbered_files(names: Iterable[str]) -> dict[tuple[str, str], list[str]]:
    """Group the files named `…-00001-of-00003.…` by the parts of their names before and after the first number."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        part = _PART.fullmatch(name)
        if part:
            groups.setdefault((part["prefix"] or "", part["count"] + part["suffix"]), []).append(name)
    return groups


class FilesSource(ForeignSource):
    """The tensors of a file, or of the files of a folder, possibly with an index.

    Args:
        reader: reads the store.
        names: the files.
        weight_map: the index that says which file contains which tensor, if there is one.

    Raises:
        ObjectNotFoundError, CorruptCheckpointError: see `existing_files`.
    """

    def __init__(self, reader: MetadataReader, names: Sequence[str], weight_map: WeightMap | None) -> None:
        super().__init__(reader, existing_files(reader, names, weight_map))
        self.is_folder = weight_map is not None or len(self.objects) > 1

    @property
    def location(self) -> str:
        return self.store.location if self.is_folder else f"{self.store.location}/{self.objects[0][0]}"


def existing_files(reader: MetadataReader, names: Sequence[str], weight_map: WeightMap | None) -> list[tuple[str, int]]:
    """Return the files that exist, with their sizes.

    Args:
        reader: reads the store.
        names: the files of a model.
        weight_map: the index that names them, if there is one.

    Raises:
        ObjectNotFoundError: a file is missing, and there is no index.
        CorruptCheckpointError: there is an index, and all files that it names are missing.
    """

    def size(name: str) -> int | None:
        try:
            return reader.size(name)
        except ObjectNotFoundError:
            if weight_map is None:
                raise
            return None

    sizes = reader.many(size, names)
    found = [(name, nbytes) for name, nbytes in zip(names, sizes, strict=True) if nbytes is not None]
    if weight_map is not None and not found:
        said = "names no tensors"
        if names:
            said = "names a file that is missing" if len(names) == 1 else "names files that are all missing"
        raise CorruptCheckpointError(
            f"the index {weight_map.index!r} in {reader.store.location} {said}"
            f"{': ' if names else ''}{quoted(names, MAX_FILES_IN_ERROR)}"
        )
    return found


def select_by_index(
    source: ForeignSource, found: TensorsByName[InFile], weight_map: WeightMap
) -> TensorsByName[InFile]:
    """Return the contents of the files that the index names.

    Names that the index names and that are missing become unreadable. Names that it does not name are noted in the
    source's `unindexed`.

    Raises:
        CorruptCheckpointError: the index names nothing, although the files contain tensors.
    """
    where = f"the index {weight_map.index!r} in {source.store.location}"
    if found and not weight_map.files:
        files = [source.objects[at][0] for at in sorted({at for parts in found.values() for at, _ in parts})]
        raise CorruptCheckpointError(f"{where} names no tensors{_weights_beside(files)}")
    there = {name for name, _ in source.objects}
    selected: TensorsByName[InFile] = {}
    for name, file in weight_map.files.items():
        parts = [part for part in found.get(name, ()) if source.objects[part[0]][0] == file]
        if parts:
            selected[name] = parts
            continue
        why = "does not have it" if file in there else "is missing"
        reason = f"{where} says that {name!r} is in {file!r}, which {why}. Copy the file again, or leave this name out"
        source.refuse(name, CorruptCheckpointError, reason, file)
    source.unindexed = tuple(sorted(found.keys() - weight_map.files.keys()))
    return selected


def duplicate_tensor_error(source: ForeignSource, name: str, files: Sequence[str]) -> CorruptCheckpointError:
    """Return the error for a tensor that several files contain, without an index that names one of them."""
    return source.contradiction(
        f"two files have the tensor {name!r}: {' and '.join(map(repr, files[:2]))}. Open one of them, for example "
        f"'{source.store.location}/{files[0]}', or add an index that says which one to use"
    )
