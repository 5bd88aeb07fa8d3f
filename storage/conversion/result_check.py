"""Check the result of a conversion before the commit, since anybody who can write there can change its notes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from typing_extensions import Buffer

from ...planner.errors import CheckpointError
from ..errors import CorruptCheckpointError, StoreError
from ..formats.detect import open_source
from ..formats.metadata_reads import Reads
from ..formats.source import Source
from ..runtime.brief import reason
from ..stores.base import Capabilities, Store, top_names
from ..stores.wrapped import WrappedStore
from ..tensors.name_patterns import quoted
from .work_items import Item


class _WithValue(WrappedStore):
    """A store as if it had one more object."""

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
    """Check that a place has all that was to be converted, and can be opened.

    Args:
        commit: the object that is about to be put there to make the checkpoint whole, by its name; nothing if it is
            there already.

    Raises CorruptCheckpointError, StoreError.
    """
    looked_at = store
    for name, data in commit.items():
        looked_at = _WithValue(store, name, data)
    try:
        source = open_source(looked_at, format=format)
        why = _difference(source, items) or _missing_bytes(source)
    except StoreError:
        raise
    except CheckpointError as error:
        why = reason(error)
    if why:
        raise CorruptCheckpointError(
            f"what is in {store.location} is not what was to be converted: {why}. Something else has written to that "
            "place: remove what is there, and convert again"
        )


def _difference(source: Source, items: Sequence[Item]) -> str:
    """Return what a checkpoint has otherwise than it should, empty where that is nothing."""
    due = {item.name: (item.dtype, item.shape) if item.is_tensor else None for item in items}
    found = {entry.name: (entry.dtype, entry.shape) if entry.is_tensor else None for entry in source.entries}
    for names, what in ((due.keys() - found.keys(), "it lacks"), (found.keys() - due.keys(), "it has")):
        if names:
            return f"{what} {quoted(sorted(names))}"
    wrong = next((name for name in due if due[name] != found[name]), None)
    if wrong is not None:
        return f"{wrong!r} is {found[wrong] or 'an object'}, and should be {due[wrong] or 'an object'}"
    source.index()
    return ""


def _missing_bytes(source: Source) -> str:
    """Return which object is shorter than the checkpoint needs, empty where none is."""
    objects = source.objects
    sizes = Reads(source.store).many(source.store.size, [name for name, _ in objects]) if objects else []
    for (name, nbytes), size in zip(objects, sizes, strict=True):
        if size < nbytes:
            return f"object {name!r} has {size} bytes, and should have {nbytes}"
    return ""
