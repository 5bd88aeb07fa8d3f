"""Decides whether the bytes of a request are intact, and makes the errors of a read, which name a tensor."""

from __future__ import annotations

import traceback

from ...planner.errors import CheckpointError
from ...planner.index import CheckpointIndex
from ...planner.masking import harmless
from ..errors import CorruptCheckpointError, ObjectNotFoundError, RankError, StoreError, nearest
from ..stores.base import Store
from .fetcher import read_ranges
from .request_checksums import RequestChecksums, damaged_chunks
from .tasks import CHECKSUM_MISMATCH, Request, TensorProgress

STOPPED = "the read was stopped"
_IF_OVERWRITTEN = "; if another process has overwritten the checkpoint since it was opened, open it again"


def object_of(request: Request, index: CheckpointIndex) -> str:
    """Return the name of the object that a request reads."""
    return index.objects[request.object][0]


class Verifier:
    """Verifies the requests of one read. Threads may share it.

    Args:
        index: the index with the checksums.
        store: the store to read damaged bytes from once more.
    """

    def __init__(self, index: CheckpointIndex, store: Store) -> None:
        self._index = index
        self._store = store
        self._failed_at: dict[BaseException, TensorProgress] = {}

    def intact(self, request: Request, found: memoryview | StoreError, check: RequestChecksums) -> memoryview:
        """Return the bytes of a request. Raise the error of the read, or the damage.

        If a chunk is damaged, the request is read once more, because the damage may have happened in transit.
        """
        if not isinstance(found, StoreError) and check.is_intact(found):
            return found
        if not request.parts:  # the read has failed in the meantime
            raise StoreError(STOPPED)
        name = object_of(request, self._index)
        where = f"bytes [{request.start}, {request.stop}) of object {name!r} in {self._store.location}"
        tensor = request.parts[0][0].tensor
        try:
            if isinstance(found, StoreError):
                raise found
            data = found
            damaged = check.damaged_chunks(data)
            if damaged:
                data = memoryview(read_ranges(self._store, name, request.ranges))
                damaged = damaged_chunks(request, self._index, data)
        except ObjectNotFoundError as error:
            raise self.make_error(
                tensor, f"object {name!r} is missing in {self._store.location}{_IF_OVERWRITTEN}"
            ) from error
        except StoreError as error:
            raise self.failure(nearest(error), tensor, f"{where}: {error}") from error
        except CheckpointError:
            raise
        except Exception as error:  # raised by a store that is not part of reshard, when a read was repeated
            raise self.failure(StoreError, tensor, f"{where}: {type(error).__name__}: {error}") from harmless(error)
        if len(data) != request.nbytes:
            raise self.make_error(tensor, f"only {len(data)} bytes are left of {where}: the object was cut short")
        if damaged:
            where = f"{damaged[0]} of object {name!r} in {self._store.location}"
            raise self.make_error(damaged[0].tensor, f"{where}: {CHECKSUM_MISMATCH}")
        return data

    def make_error(self, tensor: TensorProgress, message: str) -> Exception:
        """Return the error for a tensor whose bytes are damaged or missing. See `failure`."""
        return self.failure(CorruptCheckpointError, tensor, message)

    def failure(self, kind: type[Exception], tensor: TensorProgress, message: str) -> Exception:
        """Return an error that names a tensor. See `add_whether_overwritten`."""
        error = kind(f"{tensor.name!r}: {message}")
        self._failed_at[error] = tensor
        return error

    def device_error(self, tensor: TensorProgress, error: BaseException) -> Exception:
        """Return the error for what torch or a device raised. Memory of a device is not kept by the traceback."""
        traceback.clear_frames(error.__traceback__)
        return self.failure(RankError, tensor, f"{type(error).__name__}: {error}")

    def add_whether_overwritten(self, error: BaseException) -> None:
        """Add to the message of an error that a part of its tensor was overwritten, if it was. Forget all errors."""
        tensor = self._failed_at.get(error)
        self._failed_at.clear()
        if tensor is not None and tensor.overwritten:
            error.args = (f"{error}; a part of the tensor was overwritten",)
