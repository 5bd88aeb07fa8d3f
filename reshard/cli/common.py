"""What commands share: their options, and how they print."""

from __future__ import annotations

import datetime
import json
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

Uri = Annotated[str, typer.Argument(metavar="URI", help="A path, or a URI that fsspec opens.", show_default=False)]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--storage-option",
        "-o",
        metavar="KEY=VALUE",
        help="Passed to fsspec; dots nest: -o client_kwargs.endpoint_url=http://…",
    ),
]
Format = Annotated[
    str | None, typer.Option("--format", help="reshard, dcp, safetensors or torch; found out by default.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def storage_options(pairs: Iterable[str] | None) -> dict[str, Any]:
    """Options of fsspec from `key=value`; a value that is JSON is read as that."""
    options: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"{pair!r} is not KEY=VALUE", param_hint="--storage-option")
        *outer, last = key.split(".")
        place = options
        for part in outer:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise typer.BadParameter(f"{part!r} is a value, and has none below it", param_hint="--storage-option")
        try:
            place[last] = json.loads(text)
        except ValueError:
            place[last] = text
    return options


def options_of(uri: str, uris: Sequence[str], options: dict[str, Any]) -> dict[str, Any]:
    """Return what one of several places takes of the options that were given for all of them.

    A local path takes none. Where all are local, they are returned, so that they are refused.
    """
    from reshard.storage.fsspec_store import is_local

    return {} if is_local(uri) and not all(map(is_local, uris)) else options


def print_json(value: object) -> None:
    print(json.dumps(_finite(value), indent=1, default=_in_iso))


def _in_iso(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime.datetime) else str(value)


def _finite(value: object) -> object:
    """A value without infinities and NaNs, which JSON has no word for: they are strings."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[str] = ()) -> None:
    """A table on a terminal; plain lines, tabs between the values, elsewhere.

    Args:
        right: columns of numbers.
    """
    if not sys.stdout.isatty():
        print("\t".join(columns))
        for row in rows:
            print("\t".join(map(str, row)))
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        fits = column in right or column == "ranks"
        table.add_column(column, justify="right" if column in right else "left", overflow="fold", no_wrap=fits)
    for row in rows:
        table.add_row(*(Text(str(value)) for value in row))
    Console(highlight=False).print(table)
