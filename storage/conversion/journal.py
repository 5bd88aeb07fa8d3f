"""What a conversion keeps beside its target while it is under way: whose the place is, and which units stand.

A claim, put before anything else and removed last, names the conversion that the place belongs to. A note says what is
in the units that stand; one is put once a second at most, for all units since the last one. Just before the commit the
claim is given the checksum of what is about to be put, so that a run that was killed right after it finds that it had
come to its end.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from typing_extensions import Buffer

from ..errors import CheckpointExistsError, CorruptCheckpointError, ObjectNotFoundError, StoreError
from ..formats.detect import CONVERSION, is_of_a_checkpoint
from ..formats.metadata_reads import Reads
from ..formats.native.commit import put_commit
from ..formats.native.manifest import DATA_NAME, MANIFEST_NAME
from ..runtime.checksums import checksum
from ..runtime.logs import logger_of
from ..stores.base import Store
from ..stores.local import TEMPORARY
from ..stores.retry import read_whole
from .targets.target import ConversionTarget, UnitRecord, WorkUnit

logger = logger_of(__name__)

CLAIM = CONVERSION
MAX_CLAIM_BYTES = 4096
"""It has less."""
NOTE_EVERY_S = 1.0
"""A kill loses the units of that time at most."""
NOTE = re.compile(r"\.reshard-convert-(\d{6,})\.json")


@dataclass(frozen=True, slots=True)
class JournalState:
    """How far a conversion is."""

    conversion: str
    """What tells it from any other."""
    units: frozenset[int]
    """Those that stand."""
    committed: bool
    """Only what it kept for itself is still to be removed."""


class Journal:
    """What one rank knows of it."""

    def __init__(self, store: Store, target: ConversionTarget) -> None:
        self._store = store
        self._target = target
        self._done: dict[int, UnitRecord] = {}
        """Of units that stand, as far as this rank wrote them, or read their notes."""
        self._unnoted: dict[int, UnitRecord] = {}
        """Of them, those that are in no note yet."""
        self._noted_at = -math.inf

    def begin(self, conversion: str) -> JournalState:
        """Take the place for a conversion, or find out how far it is there. By one rank.

        Raises CheckpointExistsError where anything else is there, CorruptCheckpointError, StoreError.
        """
        names = set(self._store.list())
        if CLAIM not in names:
            self._refuse_if_there(names)
            try:
                self._store.put(CLAIM, _encoded({"conversion": conversion}), overwrite=False)
            except CheckpointExistsError as error:  # by another run, or by a first try whose answer was lost
                if self._claim() is None:
                    raise StoreError(f"{self._store.location} is no place to write a checkpoint to: {error}") from error
        claim = self._claim() or {}
        if claim.get("conversion") != conversion:
            raise CheckpointExistsError(
                f"another conversion was begun at {self._store.location}, of another checkpoint or with other "
                "arguments: remove what is there, or give another place"
            )
        if self._target.commits in names:
            if claim.get("commit") != _told_apart(self._whole(self._target.commits)):
                raise CheckpointExistsError(self._told(self._target.commits))
            return JournalState(conversion, frozenset(), committed=True)
        notes = self._notes(conversion, names)
        self._done = {number: done for number, done in notes.items() if names.issuperset(done["files"])}
        return JournalState(conversion, frozenset(self._done), committed=False)

    def _refuse_if_there(self, names: Iterable[str]) -> None:
        there = next(filter(_is_of_a_checkpoint, sorted(names)), None)
        if there is not None:
            raise CheckpointExistsError(self._told(there))

    def _told(self, name: str) -> str:
        return f"there is a checkpoint at {self._store.location} already, or what is left of one: it has {name!r}"

    def _claim(self) -> dict[str, Any] | None:
        try:
            data = bytes(self._store.read(CLAIM, 0, MAX_CLAIM_BYTES))
            if not data.endswith(b"}"):
                data = bytes(read_whole(self._store, CLAIM, 0, MAX_CLAIM_BYTES))
            return self._json(CLAIM, data)
        except ObjectNotFoundError:
            return None

    def _whole(self, name: str) -> Buffer:
        return read_whole(self._store, name, 0, max(1, self._store.size(name)))

    def _json(self, name: str, data: Buffer) -> dict[str, Any]:
        try:
            return dict(json.loads(bytes(data)))
        except (ValueError, TypeError, RecursionError) as error:
            raise CorruptCheckpointError(f"{name!r} in {self._store.location} is not of a conversion") from error

    def _notes(self, conversion: str, names: Iterable[str]) -> dict[int, UnitRecord]:
        """What stands by the notes that are among some names."""

        def read(name: str) -> dict[int, UnitRecord]:
            note = self._json(name, self._whole(name))
            units = note.get("units")
            if note.get("conversion") != conversion or not isinstance(units, list) or not all(map(_is_unit, units)):
                raise CorruptCheckpointError(
                    f"{name!r} in {self._store.location} is not of this conversion: remove what is there"
                )
            return dict(units)

        notes = sorted(name for name in names if NOTE.fullmatch(name))
        units: dict[int, UnitRecord] = {}
        for of_note in Reads(self._store).many(read, notes):
            units |= of_note
        return units

    def check(self, conversion: str) -> None:
        """Make sure that the place still belongs to this conversion: another run of it may have come to its end.

        Raises CheckpointExistsError.
        """
        if (self._claim() or {}).get("conversion") != conversion:
            raise CheckpointExistsError(
                f"{self._store.location} does not belong to this conversion any more: it was ended by another run, or "
                f"{CLAIM!r} was removed"
            )

    def note(self, conversion: str, unit: WorkUnit, done: UnitRecord) -> None:
        """A unit stands. It is put into a note at once, or with others that follow within a second."""
        self._done[unit.number] = self._unnoted[unit.number] = done
        if time.monotonic() - self._noted_at >= NOTE_EVERY_S:
            self.write(conversion)

    def write(self, conversion: str) -> None:
        """Put a note of the units that are in none yet."""
        if not self._unnoted:
            return
        note = {"conversion": conversion, "units": list(self._unnoted.items())}
        self._store.put(_note_name(min(self._unnoted)), _encoded(note), overwrite=True)
        self._unnoted = {}
        self._noted_at = time.monotonic()

    def finished(self, conversion: str, units: Sequence[WorkUnit]) -> list[UnitRecord]:
        """What was written of all units, in order.

        Raises CorruptCheckpointError where some of it is missing, CheckpointExistsError as `check`, StoreError.
        """
        names = set(self._store.list())
        wanted = [unit.number for unit in units]
        if not self._done.keys() >= set(wanted):  # other ranks wrote them
            self._done = self._notes(conversion, names) | self._done
        missing = [_note_name(number) for number in wanted if number not in self._done]
        if not missing:
            missing = [name for number in wanted for name in self._done[number]["files"] if name not in names]
        if missing:
            self.check(conversion)
            raise CorruptCheckpointError(
                f"{missing[0]!r}, which the conversion has written, is missing in {self._store.location}"
            )
        return [self._done[number] for number in wanted]

    def commit(self, conversion: str, data: bytes) -> None:
        """Put the object that makes the checkpoint whole. Raises CheckpointExistsError, CommitError, StoreError."""
        self.check(conversion)
        self._store.put(CLAIM, _encoded({"conversion": conversion, "commit": _told_apart(data)}), overwrite=True)
        try:
            put_commit(self._store, self._target.commits, data, repr(self._target.commits), overwrite=False)
        except CheckpointExistsError as error:
            raise CheckpointExistsError(self._told(self._target.commits)) from error

    def clean(self, conversion: str) -> None:
        """Remove, once it is committed, what is no part of the checkpoint; the claim last."""
        try:
            names = list(self._store.list())
            remains = self._target.orphans(self._store, conversion, names)
            self._store.delete([*remains, *filter(self._is_own, names)])
            self._store.delete([CLAIM])
        except Exception as error:
            logger.warning(
                "the checkpoint is whole, and what the conversion kept for itself remains in %s, until it is called "
                "again: %s",
                self._store.location,
                error,
            )

    def _is_own(self, name: str) -> bool:
        """Return whether a name is a note's, or that of a put which was killed."""
        killed = TEMPORARY.fullmatch(name)
        of = killed[1] if killed else ""
        return NOTE.fullmatch(name) is not None or of in (CLAIM, self._target.commits) or NOTE.fullmatch(of) is not None


def _is_of_a_checkpoint(name: str) -> bool:
    """Return whether a name is one that a checkpoint of some format has in its folder."""
    return name == MANIFEST_NAME or DATA_NAME.fullmatch(name) is not None or is_of_a_checkpoint(name)


def _is_unit(unit: Any) -> bool:
    """Whether a value of a note is a unit's number and what is in it."""
    if not (isinstance(unit, list) and len(unit) == 2 and type(unit[0]) is int and isinstance(unit[1], dict)):
        return False
    files = unit[1].get("files")
    return isinstance(files, list) and all(type(file) is str for file in files)


def _note_name(number: int) -> str:
    return f".reshard-convert-{number:06}.json"


def _encoded(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value).encode()


def _told_apart(data: Buffer) -> str:
    return f"{checksum(data):016x}"
