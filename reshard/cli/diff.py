"""`reshard diff`."""

from __future__ import annotations

from dataclasses import asdict

import reshard

from .common import options_of, print_json, print_line, print_table, storage_options


def run(a: str, b: str, options: list[str] | None, as_json: bool) -> int:
    """Return the exit code."""
    given = storage_options(options)
    a_options, b_options = (options_of(uri, (a, b), given) for uri in (a, b))
    found = sorted(
        reshard.diff(a, b, a_options=a_options, b_options=b_options), key=lambda d: (-d.largest, -d.changed, d.name)
    )
    if as_json:
        print_json([asdict(difference) for difference in found])
    elif found:
        rows = [
            (d.name, d.what, d.a, d.b if d.b != d.a else "", d.changed or "", f"{d.largest:.3g}" if d.changed else "")
            for d in found
        ]
        columns = ("name", "difference", "A", "B", "elements", "largest")
        print_table(columns, rows, right=("elements", "largest"))
    else:
        print_line("no difference")
    return int(bool(found))
