"""Putting an object only where there is none, on stores of which some ignore the condition."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterable
from typing import Protocol

from typing_extensions import Buffer

from ..errors import CheckpointExistsError, ObjectNotFoundError
from ..runtime.logs import logger_of
from ..runtime.threads import cleaning_up

logger = logger_of(__name__)
_probed: set[object] = set()
"""The buckets that were asked whether they heed conditions."""


class _Objects(Protocol):
    @property
    def location(self) -> str: ...
    def read(self, name: str, start: int, stop: int) -> Buffer: ...
    def delete(self, names: Iterable[str]) -> None: ...


def put_new(store: _Objects, bucket: object, put: Callable[[str, bytes], None], name: str, data: bytes) -> None:
    """Put an object by `put`, a conditional write, after looking whether it is there, and whether conditions count.

    `bucket` is what is asked once a process. Raises CheckpointExistsError.
    """
    refuse_to_replace(store, name)  # some stores take a condition for granted, and overwrite
    if bucket not in _probed:
        _probe(store, put)
        _probed.add(bucket)
    put(name, data)


def refuse_to_replace(store: _Objects, name: str) -> None:
    """Raises CheckpointExistsError where the object is there."""
    with contextlib.suppress(ObjectNotFoundError):
        store.read(name, 0, 1)
        raise CheckpointExistsError(f"{name!r} exists in {store.location}")


def _probe(store: _Objects, put: Callable[[str, bytes], None]) -> None:
    name = f"data/probe-{uuid.uuid4().hex}"
    try:
        with contextlib.suppress(CheckpointExistsError):  # the answer to the first try of the client was lost
            put(name, b"reshard")
        with contextlib.suppress(CheckpointExistsError):
            put(name, b"reshard")
            logger.warning(
                "%s ignores conditional writes: of two saves to one place at the same time, the later wins, and "
                "neither is told",
                store.location,
            )
    finally:
        with contextlib.suppress(Exception), cleaning_up():
            store.delete([name])
