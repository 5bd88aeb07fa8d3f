"""Restore the latest checkpoint that can be loaded. If one is damaged, all ranks move to the previous one together."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch.distributed as dist

from ...planner.errors import CheckpointError, InvalidIndexError
from ...planner.text import shown
from ..errors import (
    AccessDeniedError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    ObjectNotFoundError,
    StoreError,
    UnavailableError,
)
from ..formats.detect import open_source
from ..reading.load_options import LoadOptions
from ..reading.missing_names import check_missing
from ..reading.name_matching import NameMatch
from ..runtime.logs import logger_of
from ..runtime.process_group import first_failure, on_all_ranks, portable, rank_of
from ..runtime.reports import Report
from ..tensors.state_dict import stateful_to_state
from .run_controller import Candidate

logger = logger_of(__name__)
DAMAGE_ERRORS = (CorruptCheckpointError, InvalidIndexError, ObjectNotFoundError, CheckpointNotFoundError)
"""Errors that mean that a checkpoint is damaged or gone."""
STORE_ERRORS = (UnavailableError, AccessDeniedError)
"""Errors that concern the store as a whole. A later restore may not have them."""
OVERWRITTEN = ", and the loads may have overwritten a part of the state dict, so do not continue with it"
Load = Callable[[Candidate], Report]
_Failure = tuple[Candidate, CheckpointError]


def restore_latest(
    state_dict: MutableMapping[str, Any],
    candidates: Sequence[Candidate],
    load: Load,
    options: LoadOptions,
    storage_options: Callable[[Candidate], Any],
    process_group: dist.ProcessGroup | None,
) -> Candidate | None:
    """Load the first candidate that is not damaged. Collective. Return None if there are no candidates.

    Args:
        candidates: the same on every rank, in the order in which they are tried.
        load: calls `reshard.load` for a candidate.
        options: the options of `load` that concern names.
        storage_options: returns the options for the location of a candidate.

    Raises:
        CorruptCheckpointError: all candidates are damaged, or the state dict has been partly overwritten by a damaged
            candidate and the one that was loaded does not have these entries.
        StoreError: the same, but not all of these candidates are damaged: some could not be read.
        CheckpointError: what `reshard.load` raises for other reasons than damage.
    """
    failed: list[_Failure] = []
    for candidate in candidates:
        entry = candidate.entry
        if entry.error is not None and not _is_unreadable(entry.error):
            raise _noting(entry.error, failed)
        if entry.problem:
            why = entry.error or CorruptCheckpointError(entry.problem)
            _pass_over(candidate, why, process_group)
            if entry.is_committed:
                failed.append((candidate, why))
            continue
        report, error = _attempt(lambda candidate=candidate: load(candidate), process_group)  # type: ignore[misc]
        if report is not None:
            _check_nothing_is_left(state_dict, report, candidate, failed, options, storage_options, process_group)
            return candidate
        assert error is not None
        if not _is_unreadable(error):
            raise _noting(error, failed)
        _pass_over(candidate, error, process_group)
        failed.append((candidate, error))
    if failed:
        details = "; ".join(f"{candidate}: {error}" for candidate, error in failed)
        is_damage = all(isinstance(error, DAMAGE_ERRORS) for _, error in failed)
        raise (CorruptCheckpointError if is_damage else StoreError)(
            "none of the checkpoints of this run can be loaded"
            + (OVERWRITTEN if any(map(_was_tried, failed)) else "")
            + f": {details}"
        )
    return None


def _is_unreadable(error: CheckpointError) -> bool:
    """Return whether an error concerns one checkpoint, so that the previous one is loaded.

    Any other error is not a reason to continue from an earlier step: the state dict does not fit, the access is denied,
    the store is not available, or a newer version is needed. If a store fails in another way, loading the previous
    checkpoint shows whether it fails as a whole.
    """
    return isinstance(error, DAMAGE_ERRORS) or (isinstance(error, StoreError) and not isinstance(error, STORE_ERRORS))


def _noting(error: CheckpointError, failed: Sequence[_Failure]) -> CheckpointError:
    """Return an error with a note about the checkpoints that were tried before."""
    if failed:
        candidate, earlier = failed[-1]
        state = "was damaged" if isinstance(earlier, DAMAGE_ERRORS) else "could not be read"
        note = f"Before this, {candidate} {state}"
        if any(map(_was_tried, failed)):
            note += ". A load that failed may have overwritten a part of the state dict"
        error.add_note(shown(note))
    return error


def _was_tried(failure: _Failure) -> bool:
    """Return whether a load of the checkpoint began. It may have overwritten a part of the state dict."""
    return not failure[0].entry.problem


def _attempt(
    load: Callable[[], Report], process_group: dist.ProcessGroup | None
) -> tuple[Report | None, CheckpointError | None]:
    """Load on all ranks, and return the report of this rank, or the error of the lowest rank that failed."""
    reports: list[Report] = []

    def task() -> CheckpointError | None:
        try:
            reports.append(load())
        except CheckpointError as error:
            return portable(error)
        return None

    errors = on_all_ranks(task, process_group)
    failures = {rank: error for rank, error in enumerate(errors) if error is not None}
    if not failures:
        return reports[0], None
    return None, first_failure(failures)[1]


def _pass_over(candidate: Candidate, error: CheckpointError, process_group: dist.ProcessGroup | None) -> None:
    if rank_of(process_group):
        return
    if candidate.entry.is_committed:
        state = "is damaged" if isinstance(error, DAMAGE_ERRORS) else "cannot be read"
        logger.warning("%s %s and is not restored: %s", candidate, state, error)
    else:
        logger.info("%s is not restored: its save did not finish", candidate)


def _check_nothing_is_left(
    state_dict: MutableMapping[str, Any],
    report: Report,
    loaded: Candidate,
    failed: Sequence[_Failure],
    options: LoadOptions,
    storage_options: Callable[[Candidate], Any],
    process_group: dist.ProcessGroup | None,
) -> None:
    """Check that the load that succeeded replaced everything that failed loads may have overwritten.

    This concerns only entries that may be missing (`strict=False`, `allow_missing`).
    """
    tried = list(filter(_was_tried, failed))
    if not tried or not any(on_all_ranks(lambda: bool(report.missing_keys), process_group)):
        return

    def find_left() -> list[str]:
        states = stateful_to_state(state_dict)
        left: set[str] = set()
        for candidate, _ in tried:
            try:
                match = NameMatch(open_source(candidate.uri, storage_options(candidate)), states, options)
                check_missing(match, options)
            except CheckpointError:  # then the load failed before it wrote anything
                continue
            left |= set(report.missing_keys) - set(match.missing_keys)
        return sorted(left)

    names = [name for found in on_all_ranks(find_left, process_group) for name in found]
    if names:
        candidate, error = tried[-1]
        is_damage = isinstance(error, DAMAGE_ERRORS)
        raise (CorruptCheckpointError if is_damage else StoreError)(
            f"{candidate} {'is damaged' if is_damage else 'cannot be read'}, and its load may have changed "
            f"{names[0]!r}. {loaded} does not have {names[0]!r}: do not continue with this state dict. Initialize it "
            f"again, and call restore(state, step={loaded.entry.step})"
        )
