"""HTML tables, in which notebooks show plans and reports."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from .text import shown

MAX_ROWS = 64
"""A table with more rows shows only the first and the last ones."""


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table with a caption. The first column is left-aligned (text), the others right-aligned (numbers).

    Every value is cleaned with `shown` and escaped.
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
