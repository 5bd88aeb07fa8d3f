"""Put an object only if it does not exist yet, also on stores that ignore the condition of a write."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable

from ..errors import CheckpointExistsError, ObjectNotFoundError, StoreError, as_refusal
from ..runtime.logs import logger_of
from ..runtime.threads import cleaning_up
from .base import Store

logger = logger_of(__name__)
_probed: set[object] = set()
"""The buckets for which it is known whether they respect conditions."""


def put_new(store: Store, bucket: object, put: Callable[[str, bytes], None], name: str, data: bytes) -> None:
    """Put an object that does not exist yet.

    Args:
        store: the store of the object.
        bucket: identifies the bucket. The first call for a bucket checks whether it respects conditions, and logs a
            warning if it does not.
        put: puts an object on the condition that it does not exist.
        name: the object.
        data: its content.

    Raises:
        CheckpointExistsError: the object exists.
        StoreError: the bucket refuses conditional writes, or the store failed.
    """
    refuse_to_replace(store, name)  # some stores ignore the condition and overwrite
    if bucket not in _probed:
        try:
            _probe(store, put)
        except StoreError as error:
            raise as_refusal(
                error,
                f"whether {store.location} respects conditional writes cannot be checked: {error}. A save with "
                "overwrite=True needs none",
            ) from error
        _probed.add(bucket)
    put(name, data)


def refuse_to_replace(store: Store, name: str) -> None:
    """Raise CheckpointExistsError if an object exists."""
    with contextlib.suppress(ObjectNotFoundError):
        store.read(name, 0, 1)
        raise CheckpointExistsError(f"{name!r} exists in {store.location}")


def _probe(store: Store, put: Callable[[str, bytes], None]) -> None:
    name = f"data/probe-{uuid.uuid4().hex}"
    try:
        with contextlib.suppress(CheckpointExistsError):  # the client retried a put whose first answer was lost
            put(name, b"reshard")
        with contextlib.suppress(CheckpointExistsError):
            put(name, b"reshard")
            logger.warning(
                "%s ignores conditional writes: if two saves write to one location at the same time, the later one "
                "wins, and neither raises an error",
                store.location,
            )
    finally:
        with contextlib.suppress(Exception), cleaning_up():
            store.delete([name])
