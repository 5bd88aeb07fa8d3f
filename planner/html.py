"""Tables of HTML, as notebooks show values."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from .text import shown

MAX_ROWS = 64
"""Of a table; of more, the first and the last are shown."""


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table with a caption. The first column is of words, the others of numbers.

    Every value is as `shown` returns it, and escaped.
    """
    rows = list(rows)
    if len(rows) > MAX_ROWS:
        rows = [*rows[: MAX_ROWS // 2], ["⋮"] * len(columns), *rows[-MAX_ROWS // 2 :]]
    head = "".join(f"<th>{html.escape(shown(column))}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(map(_cell, range(len(row)), row))}</tr>" for row in rows)
    caption = f'<caption style="text-align: left">{html.escape(shown(caption))}</caption>'
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(column: int, value: object) -> str:
    align = "right" if column else "left"
    return f'<td style="text-align: {align}">{html.escape(shown(value))}</td>'
