"""`reshard ls`, `rm` and `gc`."""

from __future__ import annotations

import datetime
import os
import sys
from dataclasses import asdict, replace
from typing import Any

import typer

import reshard
from reshard.errors import CheckpointNotFoundError
from reshard.planner.masking import masked
from reshard.planner.text import counted, shown
from reshard.storage.maintenance.catalog import UNFINISHED_CONVERSION, find_removal
from reshard.storage.maintenance.gc import MIN_AGE_S, remove_remains
from reshard.storage.stores.open import absolute_location
from reshard.storage.stores.uris import is_local
from reshard.storage.training.run_catalog import METRICS, stored_metrics

from ..humanize import format_age, format_bytes
from .common import print_json, print_line, print_table, storage_options

SHOWN_NAMES = 10
"""How many names `rm` shows before it asks for confirmation. It shows all unusual names of a DCP checkpoint."""


def _check_exists(uri: str) -> None:
    """Raise CheckpointNotFoundError if a local folder does not exist."""
    if is_local(uri) and not os.path.exists(absolute_location(uri)):
        raise CheckpointNotFoundError(f"there is no folder {uri}")


def ls(uri: str, options: list[str] | None, as_json: bool) -> None:
    _check_exists(uri)
    found = reshard.find_checkpoints(uri, storage_options(options))
    if as_json:
        print_json([_as_json(checkpoint) for checkpoint in found])
        return
    if not found:
        print_line(f"there is no checkpoint at or below {uri}", file=sys.stderr)
        return
    now = datetime.datetime.now(datetime.UTC)
    has_metrics = any(map(_metrics_of, found))
    rows = [
        (
            checkpoint.uri,
            checkpoint.format,
            "" if checkpoint.step is None else checkpoint.step,
            "" if checkpoint.nbytes is None else format_bytes(checkpoint.nbytes),
            "" if checkpoint.entries is None else checkpoint.entries,
            "" if checkpoint.created is None else format_age((now - checkpoint.created).total_seconds()),
            *([_metrics_of(checkpoint)] if has_metrics else []),
            checkpoint.state,
        )
        for checkpoint in sorted(found, key=lambda checkpoint: (checkpoint.step or 0, checkpoint.uri))
    ]
    print_table(
        ("uri", "format", "step", "stored", "entries", "age", *(["metrics"] if has_metrics else []), "state"),
        rows,
        right=("step", "stored", "entries", "age"),
    )


def _as_json(checkpoint: reshard.FoundCheckpoint) -> dict[str, Any]:
    shown_fields = replace(checkpoint, uri=masked(checkpoint.uri), error=None)
    return {name: value for name, value in asdict(shown_fields).items() if name != "error"}


def _metrics_of(checkpoint: reshard.FoundCheckpoint) -> str:
    metrics = stored_metrics(checkpoint.metadata.get(METRICS))
    return " ".join(f"{name}={value:.6g}" for name, value in metrics.items())


def rm(uri: str, yes: bool, options: list[str] | None) -> None:
    given = storage_options(options)
    removal = find_removal(uri, given)
    if not yes:
        names = removal.unusual or removal.names[:SHOWN_NAMES]
        for name in names:
            print_line(f"  {name!r}")
        if len(names) < len(removal.names):
            print_line(f"  and {len(removal.names) - len(names)} more")
        kind = removal.format if removal.format == UNFINISHED_CONVERSION else f"{removal.format} checkpoint"
        what = f"{kind} of {format_bytes(removal.nbytes)}, {counted(len(removal.names), 'object')},"
        if not typer.confirm(shown(f"Remove the {what} at {uri}?")):
            raise typer.Exit(1)
    removed = reshard.remove(uri, given, expected=removal)
    print_line(f"{counted(len(removed), 'object')} removed")


def gc(
    uri: str, older_than_hours: float, dry_run: bool, yes: bool, no_save_running: bool, options: list[str] | None
) -> None:
    older_than_s = older_than_hours * 3600
    if not older_than_s >= MIN_AGE_S and not (dry_run or no_save_running):
        raise typer.BadParameter(
            f"{older_than_hours:g} hours could remove the data of a save that is about to commit, and damage its "
            f"checkpoint: pass {MIN_AGE_S / 3600:g} or more, or add --no-save-running if no save is running there",
            param_hint="--older-than",
        )
    _check_exists(uri)
    given = storage_options(options)
    found = reshard.gc(uri, given, older_than_s=older_than_s, dry_run=True)
    for remains in found:
        print_line(f"{remains.uri}: {counted(len(remains.names), 'object')}, {format_bytes(remains.nbytes)}")
    if not found:
        younger = reshard.gc(uri, given, older_than_s=0, dry_run=True)
        print_line(f"no data that is older than {older_than_hours:g} hours")
        for remains in younger:
            objects = f"{counted(len(remains.names), 'younger object')}, {format_bytes(remains.nbytes)}"
            print_line(f"{remains.uri}: {objects}: a save may be running; see --older-than")
    elif not dry_run:
        total = sum(remains.nbytes for remains in found)
        if not yes and not typer.confirm(f"Remove {format_bytes(total)} that no checkpoint uses?"):
            raise typer.Exit(1)
        remove_remains(found, given, older_than_s=older_than_s)
        print_line("removed")
