"""`reshard.load`: every rank plans its own reads from the metadata.

All collectives of a load, in their order:

1. The ranks open the checkpoint, and compare their state dicts with it, if each of them can do so by itself.
2. With Stateful values, on an object store: the ranks open the checkpoint with what rank 0 has read. Their
   `state_dict()` may be collective, so it is called when all ranks have opened the checkpoint.
3. With Stateful values: the ranks exchange the names that the states lack. If there are some, they also exchange which
   of them they have.
4. With Stateful values, or on an object store: the ranks compare their state dicts, unless they need blocks of a large
   manifest for it. Rank 0 reads these blocks, and sends them.
5. If they need such blocks: the ranks compare their state dicts.
6. If ranks with different needs may share the read: they exchange what they need.
7. The ranks read. They exchange errors and reports.
8. If ranks lack different names of the checkpoint: they find the names that no rank has.
9. With Stateful values: `load_state_dict()` of each, which may be collective too.

Nothing is changed before all ranks have compared their state dicts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch.distributed as dist
from torch.profiler import record_function

from ..planner.text import quoted
from .errors import ArgumentError
from .formats.source import bounded
from .reading.lacking_items import LackingItems
from .reading.load_options import LoadOptions
from .reading.name_matching import NameMatch
from .reading.opening import (
    BegunOpening,
    ManifestBlocks,
    OpenedCheckpoint,
    Opening,
    are_different,
    check_same_checkpoint,
    keep_manifest_blocks,
    manifest_blocks_to_read,
    read_manifest_blocks,
)
from .reading.read_tensors import ReadOptions
from .reading.shared_read import Offer, SharedRead, check_cooperative
from .reading.state_dict_load import CheckedLoad, FinishedLoad, PreparedLoad
from .runtime.arguments import check_nbytes, check_progress
from .runtime.checksums import checksum
from .runtime.gc_pauses import gc_disabled
from .runtime.limits import budget_of
from .runtime.logs import logger_of
from .runtime.process_group import (
    Collectives,
    on_all_ranks,
    rank_of,
)
from .runtime.progress import Meter, OnProgress
from .runtime.reports import RankReport, Report
from .runtime.torch_modes import without_torch_modes
from .stores.base import Store
from .tensors.name_patterns import Patterns, check_renames
from .tensors.state_dict import (
    check_mapping,
    find_stateful,
    has_stateful,
    separate_scalars,
    state_to_stateful,
    stateful_to_state,
)

logger = logger_of(__name__)


@without_torch_modes()
def load(
    state_dict: MutableMapping[str, Any],
    uri: str | os.PathLike[str] | Store,
    *,
    strict: bool = True,
    allow_missing: Patterns = (),
    exclude: Patterns = (),
    rename: Mapping[str, str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    process_group: dist.ProcessGroup | None = None,
    allow_pickle: bool = False,
    budget_bytes: int | None = None,
    max_over_read: float | None = None,
    cooperative: bool | Literal["auto"] = "auto",
    format: str | None = None,
    progress: OnProgress = False,
) -> Report:
    """Load a checkpoint of any format into a state dict, in place. Collective: every rank of the group calls it.

    Each rank reads only the parts that its own tensors hold, whatever layout the checkpoint was saved under. Tensors
    are written in place and cast if their dtype differs. Other values are replaced. Names that are not in the state
    dict are not read.

    A tensor subclass with its own `__torch_dispatch__`, such as a quantised tensor, is written by its own `copy_` if
    the checkpoint has a tensor of its name. If the checkpoint has the tensors inside it, as `save` stores them, these
    are loaded in place, without casts. The class and its settings must be the same.
    Floating-point tensors that are cast to fewer bits are listed in the report and logged once.

    Args:
        state_dict: the destination: tensors, DTensors, ShardedTensors and values, in nested dicts and lists. Stateful
            values receive their loaded state. Dicts of values and lists inside such a state also receive the saved
            items that they lack, unless another rank has them. Tensors among these are read as a whole, on the CPU.
        uri: a path, a URI that fsspec can open, or a Store.
        strict: whether every name of the state dict must be in the checkpoint, and optimizers in it must have a state
            if the checkpoint has one for them. If False, such names are skipped and listed in the report.
        allow_missing: patterns of names that may be missing, such as "optimizer.*". They are skipped and listed in the
            report.
        exclude: patterns of names of the state dict that are not loaded.
        rename: patterns of names in the checkpoint and their names in the state dict, such as
            `{"*_orig_mod.*": "**", "module.*": "*"}`. The patterns are applied one after another. Each star of the new
            name is replaced by the text that the star at the same position of the pattern matched. Names that no
            pattern matches keep their names.
        storage_options: options for fsspec.
        process_group: the ranks that load together. Default: the default group if there is one, otherwise this process
            alone.
        allow_pickle: whether to unpickle values that torch.load(weights_only=True) refuses. This can run any code.
        budget_bytes: the memory that this rank may use in addition to the tensors. Default: the smaller of 2 GiB and a
            tenth of the available memory, divided by the number of ranks on the machine (LOCAL_WORLD_SIZE, which
            torchrun sets), but at least 64 MiB.
        max_over_read: how many bytes in gaps may be read in order to save requests, as a fraction of the stored bytes
            that are needed. Default: for reshard's format, every gap of at most 4 KiB, and 0.005; for other formats on
            a disk, 0.25. For other formats on an object store, it is as much as the latency of the store justifies.
            The same holds for a checkpoint in reshard's format on an object store that would need hundreds of requests.
        cooperative: whether ranks that need the same bytes, or parts of the same rows, read them once between them and
            send them to each other over gloo. "auto" does so if the checkpoint is on an object store, and if it saves
            at least a tenth of the estimated time. All ranks must pass the same value.
        format: "reshard", "dcp", "safetensors" or "torch". Default: detect the format.
        progress: True for a progress bar on rank 0, or a function that is called with a `Progress` on every rank.

    Returns:
        What each rank read, and which names were missing, unexpected or cast.

    Raises, on every rank and naming the rank that failed:
        CheckpointNotFoundError, NotCommittedError: there is no checkpoint.
        UnsupportedVersionError, UnsupportedFormatError, UnsupportedURIError: the checkpoint cannot be opened.
        MissingTensorError, ShapeMismatchError, DtypeError, DestinationError, LayoutError: the state dict does not fit
            the checkpoint. Nothing was changed on any rank. Exception: if an integer does not fit its dtype, other
            ranks may already have loaded tensors; only the rank that raised the error is unchanged.
        ArgumentError: an argument is not valid, or the ranks opened different checkpoints. Nothing was changed.
        CorruptCheckpointError, StoreError: the bytes cannot be read. The tensor that the error names is unchanged,
            unless the message says otherwise. Other tensors may have been loaded.
        UnsafeValueError: a value needs `allow_pickle`.
        RankError: any other error.
    """

    def begin() -> tuple[LoadOptions, Opening]:
        _check_arguments(strict, budget_bytes, cooperative, rename)
        bounded(max_over_read)
        check_progress(progress)
        options = LoadOptions.of(strict, allow_missing, exclude, rename, allow_pickle, budget_bytes)
        check_mapping(state_dict)
        return options, Opening(uri, storage_options, format, process_group)

    shared_read = SharedRead(cooperative, budget_bytes, process_group)
    run = _Load(state_dict, process_group, shared_read, ReadOptions(0, budget_bytes, max_over_read), progress)
    with shared_read:
        done = run.read(run.prepare(begin))
    return run.finish(done)


def _check_arguments(
    strict: object, budget_bytes: object, cooperative: object, rename: Mapping[str, str] | None
) -> None:
    """Check arguments of `load`. Raise ArgumentError."""
    if not isinstance(strict, bool):
        raise ArgumentError(
            f"strict must be True or False, got {strict!r}; allow_missing= takes patterns of names that may be missing"
        )
    check_nbytes(budget_bytes=budget_bytes)
    check_cooperative(cooperative)
    check_renames(rename or {})


@dataclass(frozen=True, slots=True)
class _Opened:
    """What a rank sends to the others after the first step."""

    begun: BegunOpening
    has_stateful: bool
    """Whether its state dict has a Stateful value."""
    offer: Offer | None
    """What it needs, if it has compared its state dict and may share the read."""


@dataclass(frozen=True, slots=True)
class _Compared:
    """What all ranks know after rank 0 has read metadata for them."""

    opened: list[OpenedCheckpoint]
    offers: list[Offer | None]
    blocks: ManifestBlocks
    all_compared: bool
    """Whether every rank has compared its state dict."""


@dataclass(slots=True)
class _Matched:
    """Where the names of a state dict are in the checkpoint."""

    names: NameMatch
    lacking: LackingItems
    received: frozenset[str] = frozenset()
    """Those of `lacking` that the states of Stateful values receive."""


@dataclass(frozen=True, slots=True)
class _Done:
    """What a rank has read."""

    report: RankReport
    unused: tuple[str, ...]
    """Patterns that match no name on this rank."""
    is_empty: bool
    """Whether there was nothing to load."""
    has_stateful: bool
    """Whether its state dict has a Stateful value, whose `load_state_dict` may fail."""
    unexpected: int
    """A checksum of the names of the checkpoint that its state dict lacks."""
    held: int
    """A checksum of the names of the checkpoint that its state dict has."""


class _Load:
    """One rank's call of `load`."""

    def __init__(
        self,
        state_dict: MutableMapping[str, Any],
        process_group: dist.ProcessGroup | None,
        shared_read: SharedRead,
        options: ReadOptions,
        progress: OnProgress,
    ) -> None:
        self._state_dict = state_dict
        self._group = process_group
        self._shared_read = shared_read
        self._rank = rank_of(process_group)
        self._meter = Meter("load", progress, rank=self._rank)
        interrupt = shared_read.alarm.check
        self._options = replace(
            options, rank=self._rank, interrupt=interrupt, meter=self._meter, shared_read=shared_read
        )
        self._begin = self._prepared = time.perf_counter()
        self._states: Mapping[str, Any] = {}
        self._matched: _Matched | None = None
        self._checked: CheckedLoad | None = None
        self._ready: PreparedLoad | None = None
        self._finished: FinishedLoad | None = None

    def prepare(self, begin: Callable[[], tuple[LoadOptions, Opening]]) -> list[Offer | None]:
        """Open the checkpoint, and compare it with the state dict. Nothing is changed. Collective.

        Args:
            begin: checks the arguments of this rank.

        Returns:
            What each rank needs, if the ranks may share the read.

        Raises what `load` raises before anything is changed.
        """
        ranks = on_all_ranks(lambda: self._open(begin), self._group)
        begun = [rank.begun for rank in ranks]
        any_stateful = any(rank.has_stateful for rank in ranks)
        if all(one.opened_alone for one in begun):
            check_same_checkpoint([one.opened for one in begun])
            if not any_stateful:
                return [rank.offer for rank in ranks]
        elif any_stateful:
            on_all_ranks(lambda: self._finish_opening(begun), self._group)
        if any_stateful:
            self._complete_states(begun)
        return self._compare_together(begun)

    def _open(self, begin: Callable[[], tuple[LoadOptions, Opening]]) -> _Opened:
        """Open the checkpoint, unless rank 0 does it for all. Compare the state dict if nothing else is needed."""
        with record_function("reshard.open"):
            self._load_options, self._opening = begin()
            begun = self._opening.begin()
        is_stateful = has_stateful(self._state_dict)
        if not begun.opened_alone or is_stateful:
            return _Opened(begun, is_stateful, None)
        return _Opened(begun, is_stateful, self._compare())

    def _complete_states(self, begun: Sequence[BegunOpening]) -> None:
        """Let the states of Stateful values receive what they lack, unless another rank has it. Collective."""

        def lacking() -> tuple[str, ...]:
            self._finish_opening(begun)
            return self._match_names().lacking.names

        wanted = {name for names in on_all_ranks(lacking, self._group) for name in names}
        if wanted:  # another rank may have some, such as a random state under a name of its own
            matched = self._match_names()
            held = on_all_ranks(lambda: wanted & matched.names.leaves.keys(), self._group)
            matched.received = frozenset(wanted.difference(*held))

    def _compare_together(self, begun: Sequence[BegunOpening]) -> list[Offer | None]:
        """Open the checkpoint with what rank 0 has read, and compare it with the state dict. Collective."""

        def compare() -> tuple[OpenedCheckpoint, list[int], Offer | None]:
            """Return what this rank opened, and the manifest blocks that it needs or, if it needs none, its offer."""
            self._finish_opening(begun)
            blocks = manifest_blocks_to_read(self._opening.source, self._check().needs)
            return self._opening.opened, blocks, None if blocks else self._compare()

        def read_for_all(found: list[tuple[OpenedCheckpoint, list[int], Offer | None]]) -> list[_Compared]:
            opened, needed, offers = (list(column) for column in zip(*found, strict=True))
            budget_bytes = budget_of(self._options.budget_bytes)
            blocks = {} if are_different(opened) else read_manifest_blocks(self._opening.source, needed, budget_bytes)
            return [_Compared(opened, offers, blocks, all_compared=not any(needed))] * len(found)

        compared = Collectives(self._group).through_rank_0(compare, read_for_all)
        check_same_checkpoint(compared.opened)
        if compared.all_compared:
            return compared.offers
        keep_manifest_blocks(self._opening.source, compared.blocks)
        return on_all_ranks(self._compare, self._group)

    def _finish_opening(self, begun: Sequence[BegunOpening]) -> None:
        with record_function("reshard.open"):
            self._opening.finish(begun)

    def _match_names(self) -> _Matched:
        """Match the names of the state dict with those of the checkpoint, unless this has been done."""
        if self._matched is None:
            stateful = [name for name, _ in find_stateful(self._state_dict)]
            self._states = separate_scalars(stateful_to_state(self._state_dict), stateful)
            with gc_disabled():
                names = NameMatch(self._opening.source, self._states, self._load_options)
                lacking = LackingItems(names, self._states, stateful, self._load_options)
            self._matched = _Matched(names, lacking)
        return self._matched

    def _check(self) -> CheckedLoad:
        """Check that everything fits the checkpoint, unless this has been done."""
        if self._checked is None:
            matched = self._match_names()
            with gc_disabled():
                matched.lacking.add(matched.received)
                self._checked = CheckedLoad(matched.names, self._load_options)
        return self._checked

    def _compare(self) -> Offer | None:
        """Compare the state dict with the checkpoint, unless this has been done. Return what this rank needs."""
        checked = self._check()
        if self._ready is None:
            with gc_disabled():
                self._ready = checked.prepare(self._options)
        return self._shared_read.offer(checked.source, self._ready.shareable_wants)

    def read(self, offers: Sequence[Offer | None]) -> list[_Done]:
        """Decide with the other ranks whether to share the read, and read the tensors and values. Collective."""
        self._shared_read.agree(offers)
        self._prepared = time.perf_counter()

        def run() -> _Done:
            assert self._ready is not None
            checked = self._ready.checked
            self._meter.location = checked.source.location
            with self._meter:
                self._finished = self._ready.run(self._options)
            report = self._finished.report
            times = {"open": self._prepared - self._begin, **report.seconds, "total": time.perf_counter() - self._begin}
            logger.info("loaded from %s: %s", self._meter.location, replace(report, seconds=times).words)
            match = checked.match
            return _Done(
                replace(report, seconds=times),
                match.unused_patterns,
                match.is_empty,
                has_stateful(self._state_dict),
                _checksum(match.unexpected_keys),
                _checksum(match.held_keys),
            )

        return self._shared_read.read(run)

    def finish(self, done: Sequence[_Done]) -> Report:
        """Put the values that were read into the state dict, and return the report. Collective."""
        unexpected = self._unexpected_keys(done)
        self._replace_values(done)
        match = self._check().match
        unused = [pattern for pattern in done[0].unused if all(pattern in of_rank.unused for of_rank in done)]
        reports = tuple(of_rank.report for of_rank in done)
        report = Report(self._rank, reports, match.missing_keys, unexpected, unused_patterns=tuple(unused))
        if self._rank == 0:
            if all(of_rank.is_empty for of_rank in done):
                logger.warning(
                    "nothing was loaded: the state dict of each rank is empty, or `exclude` matches all of its names"
                )
            _log(report, self._check().describe_unexpected_keys(unexpected))
        return report

    def _replace_values(self, done: Sequence[_Done]) -> None:
        """Replace the values of the state dict, and load the states of Stateful values. Collective if there are any."""

        def replace_values() -> None:
            assert self._finished is not None
            self._finished.replace_values()
            state_to_stateful(self._state_dict, self._states)

        if any(of_rank.has_stateful for of_rank in done):
            on_all_ranks(replace_values, self._group)
        else:
            replace_values()

    def _unexpected_keys(self, done: Sequence[_Done]) -> tuple[str, ...]:
        """Return the names that a rank lacks and no rank has. Collective, unless all ranks lack the same."""
        match = self._check().match
        if len({of_rank.unexpected for of_rank in done}) == 1:
            return match.unexpected_keys
        kinds = [(of_rank.unexpected, of_rank.held) for of_rank in done]  # such as one for each pipeline stage
        is_first = kinds.index(kinds[self._rank]) == self._rank

        def combine(found: list[tuple[tuple[str, ...], tuple[str, ...]] | None]) -> list[tuple[str, ...]]:
            known = [names for names in found if names is not None]
            held = {name for _, names in known for name in names}
            unexpected = dict.fromkeys(name for names, _ in known for name in names if name not in held)
            return [tuple(unexpected)] * len(found)

        own = (match.unexpected_keys, match.held_keys) if is_first else None
        return Collectives(self._group).through_rank_0(lambda: own, combine)


def _checksum(names: Sequence[str]) -> int:
    return checksum("\n".join(names).encode(errors="surrogatepass"))


def _log(report: Report, unexpected: str) -> None:
    if report.unused_patterns:
        logger.warning(
            "exclude or rename has patterns that match no name, probably misspelt: %s", quoted(report.unused_patterns)
        )
    if unexpected:
        logger.warning("%s", unexpected)
    if report.cast:
        casts = [f"{cast.name} ({cast.stored} → {cast.to})" for cast in report.cast]
        logger.warning("%d tensors were cast to fewer bits: %s", len(casts), quoted(casts))
