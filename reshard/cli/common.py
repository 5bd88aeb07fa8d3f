"""Options and printing that the commands share."""

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
    """Return options for fsspec from `key=value` pairs. A value that is JSON is decoded."""
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
                raise typer.BadParameter(
                    f"{part!r} is a value, so it has no options of its own", param_hint="--storage-option"
                )
        try:
            place[last] = json.loads(text)
        except ValueError:
            place[last] = text
    return options


def options_of(uri: str, uris: Sequence[str], options: dict[str, Any]) -> dict[str, Any]:
    """Return the options for one of several locations that share storage options.

    A local path takes no options. If all locations are local, the options are returned, so that the call refuses them.
    """
    from reshard.storage.stores.uris import is_local

    return {} if is_local(uri) and not all(map(is_local, uris)) else options


def print_line(line: object, *, file: TextIO | None = None) -> None:
    """Print a line through `shown`, so that the content of a checkpoint cannot add lines or move the cursor."""
    print(shown(line, MAX_OF_A_LINE), file=file)


def print_json(value: object) -> None:
    """Print a value as JSON, in ASCII and without rounding.

    Raises:
        UnsupportedValueError: the value contains itself or is nested too deeply.
    """
    try:
        text = json.dumps(_plain(value), indent=1, default=_encode_default)
    except (RecursionError, ValueError) as error:
        raise UnsupportedValueError("a value contains itself or is nested too deeply to be shown") from error
    print(text)


def _encode_default(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime.datetime) else as_text(value)


def as_text(value: object) -> str:
    """Return a value of a checkpoint as text."""
    try:
        return str(value)
    except RecursionError:
        return f"a {type(value).__name__}, nested too deeply to be shown"


def _plain(value: object) -> object:
    """Return a value with strings in the place of infinities, NaNs and keys, because JSON cannot express them."""
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else as_text(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[str] = ()) -> None:
    """Print a table on a terminal, and lines with tabs between the values elsewhere. Values go through `shown`.

    Args:
        right: the columns that are aligned to the right.
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
