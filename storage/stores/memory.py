"""A store in the memory of this process."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import AbstractContextManager

from typing_extensions import Buffer

from ..errors import CheckpointExistsError, ObjectNotFoundError
from .base import Capabilities, ObjectWriter, buffered_writer


class MemoryStore:
    """A store in the memory of this process.

    Attributes:
        content: the objects by name. Change it to damage a checkpoint.
        capabilities: may be replaced, also on an instance.
    """

    capabilities = Capabilities()

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}

    @property
    def location(self) -> str:
        return "memory"

    def read(self, name: str, start: int, stop: int) -> Buffer:
        try:
            return self.content[name][start:stop]
        except KeyError:
            raise ObjectNotFoundError(f"memory has no object {name!r}") from None

    def size(self, name: str) -> int:
        return memoryview(self.read(name, 0, 2**60)).nbytes

    def modified(self, name: str) -> float:
        self.size(name)
        return time.time()

    def create(self, name: str) -> AbstractContextManager[ObjectWriter]:
        return buffered_writer(lambda data: self.content.update({name: data}))

    def put(self, name: str, data: bytes, *, overwrite: bool) -> None:
        if name in self.content and not overwrite:
            raise CheckpointExistsError(f"{name} exists")
        self.content[name] = data

    def list(self, folder: str = "") -> Iterable[str]:
        prefix = f"{folder.rstrip('/')}/" if folder else ""
        return [name for name in self.content if name.startswith(prefix)]

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            self.content.pop(name, None)
