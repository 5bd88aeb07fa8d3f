"""Writes what one rank saves, and on rank 0 the manifest, which commits the checkpoint."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

from ...planner.entries import Kind
from ...planner.text import quoted
from ..errors import CorruptCheckpointError, UnsupportedValueError
from ..formats.native.codec import check_codec
from ..formats.native.commit import check_may_save, commit
from ..formats.native.manifest import encode_manifest, info_of_save
from ..formats.native.write_records import ObjectRecord, PackedRecords, assemble_index
from ..formats.user_metadata import plain_metadata
from ..formats.value_codec import needs_pickle
from ..runtime.arguments import check_flags, check_nbytes
from ..runtime.gc_pauses import gc_disabled
from ..runtime.logs import logger_of
from ..runtime.process_group import Alarm, Interrupt
from ..runtime.progress import Meter
from ..runtime.reports import RankReport
from ..runtime.threads import cleaning_up
from ..stores.base import Store
from ..stores.open import open_store
from ..stores.retry import without_retries
from ..tensors.state_dict import Path
from .object_layout import ShardToWrite

logger = logger_of(__name__)

S = TypeVar("S")
S_contra = TypeVar("S_contra", contravariant=True)


class WriteObjects(Protocol[S_contra]):
    """`write_objects`, or a function that lets another process call it, with shards of another type."""

    def __call__(
        self,
        store: Store,
        label: str,
        shards: Sequence[S_contra],
        codec: str,
        *,
        budget_bytes: int | None,
        interrupt: Interrupt,
        failed: Callable[[BaseException], None],
        wrote: Callable[[int], None],
    ) -> list[ObjectRecord]: ...


@dataclass(frozen=True, slots=True)
class Written:
    """What a rank wrote, in plain data, because DCP pickles it."""

    records: PackedRecords
    report: dict[str, Any]
    """The report of the rank."""


@dataclass(frozen=True, slots=True)
class SaveOptions:
    """The options that all kinds of saves share; see `reshard.save`."""

    codec: str
    storage_options: Mapping[str, Any] | None
    overwrite: bool
    allow_pickle: bool
    budget_bytes: int | None
    metadata: Mapping[str, Any] | None
    before_commit: Callable[[], object] | None = None
    """Called on the rank that commits, just before the manifest is written. If it raises, nothing is committed."""


class CheckpointWriter:
    """One rank's writer for one save.

    Args:
        uri: a path, a URI that fsspec can open, or a Store.
        options: the options of the save.
        rank: the rank in the process group of the save.
        meter: shows the progress.

    Raises:
        ArgumentError: an option is not valid.
    """

    def __init__(
        self, uri: str | os.PathLike[str] | Store, options: SaveOptions, rank: int = 0, meter: Meter | None = None
    ) -> None:
        check_codec(options.codec)
        check_flags(overwrite=options.overwrite, allow_pickle=options.allow_pickle)
        check_nbytes(budget_bytes=options.budget_bytes)
        self.rank = rank
        self.meter = meter or Meter("save")
        self.alarm = Alarm(alone=True)
        """Stops all ranks when one has failed. By default this rank works without the others."""
        self.in_writer_process = False
        """Whether a writer process writes the objects."""
        self.uri = uri
        self._options = options
        self._metadata = plain_metadata(options.metadata)
        self._opened: Store | None = None
        self.reset()

    def reset(self, uri: str | os.PathLike[str] | Store | None = None) -> None:
        """Begin another save.

        Args:
            uri: its location. Default: the same.
        """
        if uri is not None:
            self.uri, self._opened = uri, None
        self.save_id = uuid.uuid4().hex
        self.has_begun = False
        """Whether this rank has begun to write."""
        self._written: list[ObjectRecord] = []
        self._seconds = 0.0
        self._pickled: list[str] = []

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle. The process that unpickles it opens its own store."""
        return {**self.__dict__, "_opened": None}

    @property
    def store(self) -> Store:
        """The store of the checkpoint, which is opened when it is first needed."""
        if self._opened is None:
            self._opened = open_store(self.uri, self._options.storage_options)
        return self._opened

    @property
    def metadata_json(self) -> str:
        """The metadata of the checkpoint. Equal metadata has the same text."""
        return json.dumps(self._metadata, sort_keys=True)

    def check_may_save(self) -> None:
        """Raise CheckpointExistsError if there is a checkpoint that must not be replaced."""
        check_may_save(self.store, overwrite=self._options.overwrite)

    def announce(self, shards: Sequence[ShardToWrite]) -> None:
        """Prepare to write shards. Raises UnsupportedValueError if one needs pickle and may not use it."""
        self._pickled = self._names_of_pickled(shards)
        self.meter.expect(sum(shard.nbytes for shard in shards))

    def write(self, shards: Sequence[S], writing: WriteObjects[S]) -> Written:
        """Write shards to new objects.

        Args:
            shards: the shards, in the form that `writing` takes.
            writing: does the work: usually `write_objects`.

        Returns:
            What this rank has written since the save began.

        Raises what `write_objects` raises.
        """
        begin = time.perf_counter()
        self.has_begun = True
        with self.alarm:
            records = writing(
                self.store,
                f"{self.rank:05}",
                shards,
                self._options.codec,
                budget_bytes=self._options.budget_bytes,
                interrupt=self.meter.watching(self.alarm.check),
                failed=self.alarm.sound,
                wrote=self.meter.add,
            )
        self._written += records
        self._seconds += time.perf_counter() - begin
        return Written(PackedRecords.of(self._written), self._report())

    def _report(self) -> dict[str, Any]:
        """Return the RankReport of this rank as plain data."""
        records = self._written
        stages = {stage: sum(record.seconds[stage] for record in records) for stage in ("encode", "write")}
        report = RankReport(
            rank=self.rank,
            bytes_needed=sum(record.bytes_needed for record in records),
            bytes_written=sum(record.nbytes for record in records),
            requests=len(records),
            chunks=sum(record.chunks for record in records),
            seconds={**stages, "total": self._seconds},
            pickled=tuple(self._pickled),
        )
        return asdict(report)

    def _names_of_pickled(self, shards: Sequence[ShardToWrite]) -> list[str]:
        """Return the names of the values that need pickle. Raises UnsupportedValueError if it is not allowed."""
        names = [
            shard.name
            for shard in shards
            if shard.kind is Kind.TORCH_SAVE
            and needs_pickle(shard.name, shard.kind, bytes(shard.load(shard.box).numpy()))
        ]
        if names and not self._options.allow_pickle:
            raise UnsupportedValueError(
                f"{quoted(names)} needs pickle, and this save has allow_pickle=False: use plain data instead, or leave "
                "it out"
            )
        return names

    def commit(
        self,
        paths: Mapping[str, Path | None],
        tensors: Mapping[str, tuple[str, tuple[int, ...]]],
        by_rank: Sequence[Written],
        *,
        differing: tuple[str, ...] = (),
    ) -> list[dict[str, Any]]:
        """Write the manifest, which commits the checkpoint.

        Args:
            paths: the path of each entry that is saved. DCP's planner may know no paths.
            tensors: the dtype and shape of each tensor.
            by_rank: what each rank wrote.
            differing: the names of entries that differ between ranks.

        Returns:
            The report of each rank, as plain data.

        Raises what `commit` of the native format raises. CorruptCheckpointError: an entry was not written.
        """
        with gc_disabled():
            manifest, objects = self._manifest(paths, tensors, by_rank)
        reports = [written.report for written in by_rank]
        reports[self.rank]["bytes_written"] += len(manifest)
        reports[self.rank]["requests"] += 1
        pickled = sorted(name for report in reports for name in report["pickled"])
        reports[self.rank]["differing"] = differing
        if pickled:
            logger.warning(
                "%d values can only be loaded with allow_pickle=True, which can run code: %s",
                len(pickled),
                quoted(pickled),
            )
        if differing:
            logger.warning(
                "%d values differ between ranks, and those of one rank are stored: %s. If a value belongs to one "
                "rank only, such as a random state, give it another name on each rank",
                len(differing),
                quoted(differing),
            )
        commit(
            self.store,
            manifest,
            objects,
            before=self._options.before_commit,
            overwrite=self._options.overwrite,
            rank=self.rank,
            in_writer_process=self.in_writer_process,
        )
        return reports

    def _manifest(
        self,
        paths: Mapping[str, Path | None],
        tensors: Mapping[str, tuple[str, tuple[int, ...]]],
        by_rank: Sequence[Written],
    ) -> tuple[bytes, set[str]]:
        """Return the manifest, and the names of the data objects that it lists."""
        without_elements = {name: (dtype, shape) for name, (dtype, shape) in tensors.items() if 0 in shape}
        index = assemble_index([written.records for written in by_rank], without_elements)
        for name in paths:
            if name not in index:
                raise CorruptCheckpointError(f"no rank wrote {name!r}: the checkpoint was not committed")
        info = info_of_save(self._options.codec, ranks=len(by_rank), save_id=self.save_id)
        known = {name: path for name, path in paths.items() if path is not None}
        return encode_manifest(index, known, info, self._metadata), {name for name, _ in index.objects}

    def discard(self) -> None:
        """Remove what this rank wrote, after a save that was not committed. Log what cannot be removed."""
        names = [record.name for record in self._written]
        if names:
            try:
                with cleaning_up():
                    without_retries(self.store).delete(names)
            except Exception as error:
                logger.warning("data objects of a failed save remain, %s: %s", ", ".join(names), error)
