"""`reshard verify`."""

from __future__ import annotations

import sys
from dataclasses import asdict

import reshard
from reshard.errors import CorruptCheckpointError
from reshard.planner.text import counted

from ..humanize import format_bytes
from .common import print_json, print_line, storage_options


def run(uri: str, quick: bool, format: str | None, options: list[str] | None, as_json: bool) -> int:
    """Return the exit code."""
    try:
        checkpoint = reshard.open(uri, storage_options=storage_options(options), format=format)
    except CorruptCheckpointError as error:  # of the metadata
        if as_json:
            print_json([{"reason": str(error)}])
        else:
            print_line(f"the metadata is damaged: {error}")
        return 1
    damaged_chunks = checkpoint.verify(quick=quick, progress=not as_json)
    if as_json:
        print_json([{**asdict(damage), "box": str(damage.box)} for damage in damaged_chunks])
        return int(bool(damaged_chunks))
    for damage in damaged_chunks:
        print_line(damage)
    missing = set(checkpoint.damaged)
    others = {name: why for name, why in checkpoint.unreadable.items() if name not in missing}
    for why in others.values():
        print_line(f"cannot be read: {why}")
    if others and checkpoint.format != "reshard":
        print_line(f"{len(others)} names that cannot be read were not checked")
    if damaged_chunks:
        names = {damage.tensor for damage in damaged_chunks}
        tensors = _counted(len(names & checkpoint.tensors.keys()), len(names - checkpoint.tensors.keys() - missing))
        lost = f"; {counted(len(missing), 'tensor')} missing completely" if missing else ""
        print_line(f"{counted(len(damaged_chunks), 'chunk')} of {tensors} damaged or missing{lost}", file=sys.stderr)
        return 1
    what = "match their checksums"
    if quick:
        what = "exist, according to the sizes of the objects"
    elif checkpoint.format in ("dcp", "torch"):
        what = "exist, and match their CRC-32s if they have any"
    elif checkpoint.format != "reshard":
        what = "exist; this format has no checksums to compare"
    stored = sum(info.stored_bytes for info in checkpoint.tensors.values())
    print_line(
        f"{checkpoint.location}: all {format_bytes(stored)} of {counted(len(checkpoint.tensors), 'tensor')} {what}"
    )
    return 0


def _counted(tensors: int, values: int) -> str:
    counts = [counted(count, noun) for count, noun in ((tensors, "tensor"), (values, "value")) if count]
    return " and ".join(counts) or "0 tensors"
