"""`reshard verify`."""

from __future__ import annotations

import sys
from dataclasses import asdict

import reshard

from ..humanize import format_bytes
from .common import print_json, storage_options, tell


def run(uri: str, quick: bool, format: str | None, options: list[str] | None, as_json: bool) -> int:
    """Returns the exit code."""
    checkpoint = reshard.open(uri, storage_options=storage_options(options), format=format)
    damages = checkpoint.verify(quick=quick, progress=not as_json)
    if as_json:
        print_json([{**asdict(damage), "box": str(damage.box)} for damage in damages])
        return int(bool(damages))
    for damage in damages:
        tell(damage)
    others = {name: why for name, why in checkpoint.unreadable.items() if name not in checkpoint.damaged}
    for why in others.values():
        tell(f"cannot be read: {why}")
    if others and checkpoint.format != "reshard":
        tell(f"{len(others)} names that cannot be read were not checked")
    stored = sum(info.stored_bytes for info in checkpoint.tensors.values())
    if damages:
        tensors = sorted({damage.tensor for damage in damages})
        missing = f", of them {len(checkpoint.damaged)} tensors as a whole" if checkpoint.damaged else ""
        tell(f"{len(damages)} chunks of {len(tensors)} tensors are damaged or missing{missing}", file=sys.stderr)
        return 1
    what = "are right"
    if quick:
        what = "are there, by the sizes of the objects"
    elif checkpoint.format == "dcp":
        what = "are there, and match the CRC-32s of their slices as far as they have some"
    elif checkpoint.format != "reshard":
        what = "are there; the format has no checksums of them that would be looked at"
    tell(f"{checkpoint.location}: all {format_bytes(stored)} of {len(checkpoint.tensors)} tensors {what}")
    return 0
