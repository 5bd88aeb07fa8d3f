"""`reshard ls`, `rm` and `gc`."""

from __future__ import annotations

import datetime
import sys
from dataclasses import asdict

import typer

from reshard.planner.masking import masked
from reshard.planner.text import shown
from reshard.storage.open_source import open_source
from reshard.storage.places import REMOVABLE, find_checkpoints, find_remains, remove, remove_remains

from ..words import in_bytes, in_time
from .common import print_json, print_table, storage_options, tell


def ls(uri: str, options: list[str] | None, as_json: bool) -> None:
    found = find_checkpoints(uri, storage_options(options))
    if as_json:
        print_json([{**asdict(checkpoint), "uri": masked(checkpoint.uri)} for checkpoint in found])
        return
    if not found:
        tell(f"there is no checkpoint at {uri}, and none below it", file=sys.stderr)
        return
    now = datetime.datetime.now(datetime.UTC)
    rows = [
        (
            checkpoint.uri,
            checkpoint.format,
            "" if checkpoint.step is None else checkpoint.step,
            "" if checkpoint.nbytes is None else in_bytes(checkpoint.nbytes),
            "" if checkpoint.entries is None else checkpoint.entries,
            "" if checkpoint.created is None else in_time((now - checkpoint.created).total_seconds()),
            checkpoint.state,
        )
        for checkpoint in sorted(found, key=lambda checkpoint: (checkpoint.step or 0, checkpoint.uri))
    ]
    print_table(
        ("uri", "format", "step", "stored", "entries", "age", "state"), rows, right=("step", "stored", "entries", "age")
    )


def rm(uri: str, yes: bool, options: list[str] | None) -> None:
    given = storage_options(options)
    source = open_source(uri, given)
    what = f"{source.format} checkpoint of {in_bytes(sum(nbytes for _, nbytes in source.objects))}"
    asks = source.format in REMOVABLE and not yes  # else it is refused
    if asks and not typer.confirm(shown(f"Remove the {what} at {uri}?")):
        raise typer.Exit(1)
    tell(f"{len(remove(uri, given))} objects removed")


def gc(uri: str, older_than_hours: float, dry_run: bool, yes: bool, options: list[str] | None) -> None:
    given = storage_options(options)
    found = find_remains(uri, given, older_than_s=older_than_hours * 3600)
    for place in found:
        tell(f"{place.uri}: {len(place.names)} objects, {in_bytes(place.nbytes)}")
    if not found:
        tell(f"nothing that is older than {older_than_hours:g} hours")
    elif not dry_run:
        total = sum(place.nbytes for place in found)
        if not yes and not typer.confirm(f"Remove {in_bytes(total)} that no checkpoint names?"):
            raise typer.Exit(1)
        remove_remains(found, given, older_than_s=older_than_hours * 3600)
        tell("removed")
