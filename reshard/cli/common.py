"""What commands share: their options, and how they print."""

from __future__ import annotations

import datetime
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from reshard.errors import UnsupportedValueError
from reshard.planner.text import shown

MAX_OF_A_LINE = 1_000_000
"""Characters."""
_OPTION_NAME = re.compile(r"[A-Za-z_.]{0,32}")
Uri = Annotated[str, typer.Argument(metavar="URI", help="A path, or a URI that fsspec can open.", show_default=False)]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--storage-option",
        "-o",
        metavar="KEY=VALUE",
        help="For fsspec; dots nest: -o a.b=1.",
    ),
]
Format = Annotated[str | None, typer.Option("--format", help="reshard, dcp, safetensors, torch.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def storage_options(pairs: Iterable[str] | None) -> dict[str, Any]:
    """Options of fsspec from `key=value`; a value that is JSON is read as that."""
    options: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, text = pair.partition("=")
        if not equals or not key:
            named = _OPTION_NAME.match(pair)  # the rest may be a secret
            message = f"'{named[0] if named else ''}…' is not KEY=VALUE"
            raise typer.BadParameter(message, param_hint="--storage-option")
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
    from reshard.storage.stores.fsspec import is_local

    return {} if is_local(uri) and not all(map(is_local, uris)) else options


def tell(line: object, *, file: TextIO | None = None) -> None:
    """Print a line, as `shown` returns it: what a checkpoint holds cannot add lines, or move the cursor."""
    print(shown(line, MAX_OF_A_LINE), file=file)


def print_json(value: object) -> None:
    """Print a value as JSON: exact, and in ASCII.

    Raises UnsupportedValueError for one that holds itself, or is nested too deeply.
    """
    try:
        text = json.dumps(_plain(value), indent=1, default=_in_words)
    except (RecursionError, ValueError) as error:
        raise UnsupportedValueError("a value holds itself, or is nested too deeply to be shown") from error
    print(text)


def _in_words(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime.datetime) else in_words(value)


def in_words(value: object) -> str:
    """Return a value of a checkpoint as text."""
    try:
        return str(value)
    except RecursionError:
        return f"a {type(value).__name__}, nested too deeply to be shown"


def _plain(value: object) -> object:
    """A value without infinities and NaNs, which JSON has no word for: they are strings; and so are keys."""
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else in_words(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[str] = ()) -> None:
    """A table on a terminal; plain lines, tabs between the values, elsewhere. Values are as `shown` returns them.

    Args:
        right: columns of numbers.
    """
    if not sys.stdout.isatty():
        print("\t".join(columns))
        for row in rows:
            print("\t".join(map(shown, row)))
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        fits = column in right or column == "ranks"
        table.add_column(column, justify="right" if column in right else "left", overflow="fold", no_wrap=fits)
    for row in rows:
        table.add_row(*(Text(shown(value)) for value in row))
    Console(highlight=False).print(table)
