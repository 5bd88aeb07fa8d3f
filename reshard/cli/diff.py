"""`reshard diff`."""

from __future__ import annotations

from dataclasses import asdict

from reshard.storage.formats.detect import open_source
from reshard.storage.maintenance.diff import diff

from .common import options_of, print_json, print_table, storage_options, tell


def run(a: str, b: str, options: list[str] | None, as_json: bool) -> int:
    """Returns the exit code."""
    given = storage_options(options)
    sources = [open_source(uri, options_of(uri, (a, b), given)) for uri in (a, b)]
    found = sorted(diff(*sources), key=lambda d: (-d.largest, -d.changed, d.name))
    if as_json:
        print_json([asdict(difference) for difference in found])
    elif found:
        rows = [
            (d.name, d.what, d.a, d.b if d.b != d.a else "", d.changed or "", f"{d.largest:.3g}" if d.changed else "")
            for d in found
        ]
        columns = ("name", "differs in", "A", "B", "values", "largest")
        print_table(columns, rows, right=("values", "largest"))
    else:
        tell("no difference")
    return int(bool(found))
