"""The journal of a conversion: small objects beside its target that make it resumable.

The **claim** names the conversion that a location belongs to. It is written before anything else and removed last.
**Notes** list the work units that have been written; a rank writes at most one per second. Just before the commit, the
checksum of the object that commits is added to the claim. So a run that was killed right after the commit finds that it
has finished.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from typing_extensions import Buffer

from ..errors import CheckpointExistsError, CorruptCheckpointError, ObjectNotFoundError, StoreError
from ..formats.detect import CONVERSION, CONVERSION_NOTE, is_of_any_checkpoint
from ..formats.metadata_reader import MetadataReader
from ..formats.native.commit import put_commit
from ..runtime.checksums import checksum
from ..runtime.logs import logger_of
from ..stores.base import Store
from ..stores.local import TEMPORARY
from ..stores.retry import read_whole
from .targets.target import ConversionTarget, UnitRecord, WorkUnit

logger = logger_of(__name__)

CLAIM = CONVERSION
MAX_CLAIM_BYTES = 4096
"""A claim is smaller than this."""
NOTE_EVERY_S = 1.0
"""The time between two notes of a rank. If it is killed, the units of this time are lost."""


@dataclass(frozen=True, slots=True)
class JournalState:
    """The progress of a conversion, as rank 0 found it."""

    conversion: str
    """Identifies the conversion: a checksum of its source and arguments."""
    units: frozenset[int]
    """The numbers of the work units that have been written."""
    committed: bool
    """Whether the checkpoint is committed. Then only the journal has to be removed."""


class Journal:
    """One rank's view of the journal.

    Rank 0 calls `begin`, and all ranks call `join` with the result before they call any other method.
    """

    def __init__(self, store: Store, target: ConversionTarget) -> None:
        self._store = store
        self._target = target
        self._conversion = ""
        self._records: dict[int, UnitRecord] = {}
        """Records of the units that this rank has written, or whose notes it has read."""
        self._pending: dict[int, UnitRecord] = {}
        """Records that are not in a note yet."""
        self._noted_at = -math.inf

    def begin(self, conversion: str) -> JournalState:
        """Claim the location for a conversion, or find out how far the same conversion came. One rank calls this.

        Raises:
            CheckpointExistsError: the location contains a checkpoint, a part of one, or another conversion.
            CorruptCheckpointError: the claim or a note is damaged.
            StoreError: the store failed.
        """
        names = set(self._store.list())
        if CLAIM not in names:
            self._refuse_checkpoint(names)
            try:
                self._store.put(CLAIM, _encode({"conversion": conversion}), overwrite=False)
            except CheckpointExistsError as error:  # another run was faster, or the response to a first try was lost
                if self._claim() is None:
                    raise StoreError(f"cannot write a checkpoint to {self._store.location}: {error}") from error
        claim = self._claim() or {}
        if claim.get("conversion") != conversion:
            raise CheckpointExistsError(
                f"another conversion has started at {self._store.location}, with another source or other arguments: "
                "remove it with `reshard rm`, or choose another location"
            )
        if self._target.commit_name in names:
            if claim.get("commit") != _commit_digest(self._read_whole(self._target.commit_name)):
                raise CheckpointExistsError(self._exists_message(self._target.commit_name))
            return JournalState(conversion, frozenset(), committed=True)
        notes = self._read_notes(conversion, names)
        self._records = {number: record for number, record in notes.items() if names.issuperset(record["files"])}
        return JournalState(conversion, frozenset(self._records), committed=False)

    def join(self, state: JournalState) -> None:
        """Take part in the conversion that rank 0 has begun."""
        self._conversion = state.conversion

    def check(self) -> None:
        """Check that the location still belongs to this conversion. Another run of it may have finished.

        Raises:
            CheckpointExistsError: it does not.
        """
        if (self._claim() or {}).get("conversion") != self._conversion:
            raise CheckpointExistsError(
                f"{self._store.location} no longer belongs to this conversion: another run has finished it, or "
                f"{CLAIM!r} was removed"
            )

    def add(self, unit: WorkUnit, record: UnitRecord) -> None:
        """Add a unit that has been written. Its note is written now, or with the units of the next second."""
        self._records[unit.number] = self._pending[unit.number] = record
        if time.monotonic() - self._noted_at >= NOTE_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Write a note with the units that are not in a note yet."""
        if not self._pending:
            return
        note = {"conversion": self._conversion, "units": list(self._pending.items())}
        self._store.put(_note_name(min(self._pending)), _encode(note), overwrite=True)
        self._pending = {}
        self._noted_at = time.monotonic()

    def finished(self, units: Sequence[WorkUnit]) -> list[UnitRecord]:
        """Return the records of all units, in order.

        Raises:
            CorruptCheckpointError: a note or an object is missing.
            CheckpointExistsError: as `check`.
            StoreError: the store failed.
        """
        names = set(self._store.list())
        numbers = [unit.number for unit in units]
        if not self._records.keys() >= set(numbers):  # other ranks wrote the rest
            self._records = self._read_notes(self._conversion, names) | self._records
        missing = [_note_name(number) for number in numbers if number not in self._records]
        if not missing:
            missing = [name for number in numbers for name in self._records[number]["files"] if name not in names]
        if missing:
            self.check()
            raise CorruptCheckpointError(
                f"{missing[0]!r}, which the conversion has written, is missing in {self._store.location}: convert again"
            )
        return [self._records[number] for number in numbers]

    def commit(self, data: bytes) -> None:
        """Write the object that commits the checkpoint.

        Raises:
            CheckpointExistsError: the location contains another checkpoint by now, or as `check`.
            CommitError: the store failed, and it is unknown whether the object was written.
            StoreError: the store failed.
        """
        self.check()
        claim = {"conversion": self._conversion, "commit": _commit_digest(data)}
        self._store.put(CLAIM, _encode(claim), overwrite=True)
        try:
            put_commit(self._store, self._target.commit_name, data, repr(self._target.commit_name), overwrite=False)
        except CheckpointExistsError as error:
            raise CheckpointExistsError(self._exists_message(self._target.commit_name)) from error

    def clean(self) -> None:
        """After the commit, remove all objects that are not part of the checkpoint. The claim comes last."""
        try:
            names = list(self._store.list())
            orphans = self._target.orphans(self._store, self._conversion, names)
            self._store.delete([*orphans, *filter(self._is_own, names)])
            self._store.delete([CLAIM])
        except Exception as error:
            logger.warning(
                "the checkpoint at %s is complete, but the journal of its conversion could not be removed: %s. The "
                "same call of convert removes it",
                self._store.location,
                error,
            )

    def _refuse_checkpoint(self, names: Iterable[str]) -> None:
        found = next(filter(is_of_any_checkpoint, sorted(names)), None)
        if found is not None:
            raise CheckpointExistsError(self._exists_message(found))

    def _exists_message(self, name: str) -> str:
        return (
            f"there is already a checkpoint, or a part of one, at {self._store.location}: it has {name!r}. Remove it, "
            "or choose another location"
        )

    def _claim(self) -> dict[str, Any] | None:
        """Read the claim. Return None if there is none."""
        try:
            data = bytes(self._store.read(CLAIM, 0, MAX_CLAIM_BYTES))
            if not data.endswith(b"}"):  # the response was cut short
                data = bytes(read_whole(self._store, CLAIM, 0, MAX_CLAIM_BYTES))
            return self._decode(CLAIM, data)
        except ObjectNotFoundError:
            return None

    def _read_whole(self, name: str) -> Buffer:
        return read_whole(self._store, name, 0, max(1, self._store.size(name)))

    def _decode(self, name: str, data: Buffer) -> dict[str, Any]:
        try:
            return dict(json.loads(bytes(data)))
        except (ValueError, TypeError, RecursionError) as error:
            raise CorruptCheckpointError(
                f"{name!r} in {self._store.location} is not from a conversion: remove it, and convert again"
            ) from error

    def _read_notes(self, conversion: str, names: Iterable[str]) -> dict[int, UnitRecord]:
        """Return the records of the notes that are among some object names."""

        def read(name: str) -> dict[int, UnitRecord]:
            note = self._decode(name, self._read_whole(name))
            units = note.get("units")
            if note.get("conversion") != conversion or not isinstance(units, list) or not all(map(_is_record, units)):
                raise CorruptCheckpointError(
                    f"{name!r} in {self._store.location} is not from this conversion: remove all objects there, and "
                    "convert again"
                )
            return dict(units)

        notes = sorted(name for name in names if CONVERSION_NOTE.fullmatch(name))
        records: dict[int, UnitRecord] = {}
        for found in MetadataReader(self._store).many(read, notes):
            records |= found
        return records

    def _is_own(self, name: str) -> bool:
        """Return whether a name is that of a note, or of a temporary file of this conversion."""
        temporary = TEMPORARY.fullmatch(name)
        final = temporary[1] if temporary else ""
        is_note = CONVERSION_NOTE.fullmatch(name) is not None or CONVERSION_NOTE.fullmatch(final) is not None
        return is_note or final in (CLAIM, self._target.commit_name)


def _is_record(value: Any) -> bool:
    """Return whether a value from a note is the number of a unit and its record."""
    if not (isinstance(value, list) and len(value) == 2 and type(value[0]) is int and isinstance(value[1], dict)):
        return False
    files = value[1].get("files")
    return isinstance(files, list) and all(type(file) is str for file in files)


def _note_name(number: int) -> str:
    return f".reshard-convert-{number:06}.json"


def _encode(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value).encode()


def _commit_digest(data: Buffer) -> str:
    return f"{checksum(data):016x}"
