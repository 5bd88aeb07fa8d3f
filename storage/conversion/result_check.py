"""Checks the result of a conversion before its commit. Its notes can be changed by everyone who can write there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from typing_extensions import Buffer

from ...planner.errors import CheckpointError
from ...planner.text import quoted
from ..errors import CorruptCheckpointError, StoreError
from ..formats.detect import open_source
from ..formats.metadata_reader import MetadataReader
from ..formats.source import Source
from ..runtime.brief import reason
from ..stores.base import Capabilities, Store, top_names
from ..stores.wrapped import WrappedStore
from .work_items import Item


class _StoreWithObject(WrappedStore):
    """A store that appears to have one more object."""

    def __init__(self, store: Store, name: str, data: bytes) -> None:
        super().__init__(store)
        self._name = name
        self._data = data

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, list_top=lambda: {*top_names(self.inner), self._name})

    def read(self, name: str, start: int, stop: int) -> Buffer:
        return self._data[start:stop] if name == self._name else super().read(name, start, stop)

    def size(self, name: str) -> int:
        return len(self._data) if name == self._name else super().size(name)

    def list(self, folder: str = "") -> Iterable[str]:
        return {*super().list(folder), self._name}


def check_converted(store: Store, format: str, items: Sequence[Item], commit: Mapping[str, bytes]) -> None:
    """Check that the converted checkpoint can be opened and has all entries and bytes.

    Args:
        items: all entries that the checkpoint must have.
        commit: the object that will commit the checkpoint, by its name. Empty if the checkpoint is committed already.

    Raises:
        CorruptCheckpointError: something is missing or different.
        StoreError: the store failed.
    """
    checked = store
    for name, data in commit.items():
        checked = _StoreWithObject(store, name, data)
    try:
        source = open_source(checked, format=format)
        difference = _find_difference(source, items) or _find_missing_bytes(source)
    except StoreError:
        raise
    except CheckpointError as error:
        difference = reason(error)
    if difference:
        raise CorruptCheckpointError(
            f"the conversion to {store.location} did not write what it should: {difference}. Another program has "
            "changed its objects: remove what is there, and convert again"
        )


def _find_difference(source: Source, items: Sequence[Item]) -> str:
    """Describe how the entries of a checkpoint differ from what they should be. Empty if they do not."""
    expected = {item.name: (item.dtype, item.shape) if item.is_tensor else None for item in items}
    found = {entry.name: (entry.dtype, entry.shape) if entry.is_tensor else None for entry in source.entries}
    if missing := expected.keys() - found.keys():
        return f"it has no {quoted(sorted(missing))}"
    if unexpected := found.keys() - expected.keys():
        return f"it has the unexpected {quoted(sorted(unexpected))}"
    wrong = next((name for name in expected if expected[name] != found[name]), None)
    if wrong is not None:
        return f"{wrong!r} is {found[wrong] or 'a value'}, expected {expected[wrong] or 'a value'}"
    source.index()
    return ""


def _find_missing_bytes(source: Source) -> str:
    """Describe which object is shorter than the checkpoint needs. Empty if none is."""
    objects = source.objects
    sizes = MetadataReader(source.store).many(source.store.size, [name for name, _ in objects]) if objects else []
    for (name, nbytes), size in zip(objects, sizes, strict=True):
        if size < nbytes:
            return f"object {name!r} has {size} bytes, expected {nbytes}"
    return ""
