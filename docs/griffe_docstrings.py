"""Adapt docstrings to the sections that griffe knows.

The lines after "Raises, on every rank ...:" become a list, a tree becomes a code block,
and "Example:" becomes "Examples:".
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_RAISES = re.compile(r"^(Raises, [^\n]*:)\n((?:    [^\n]*\n?)+)", re.MULTILINE)
_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
_TREE = re.compile(r"^\w+\n(?:[ │]*[├└]──[^\n]*\n?)+", re.MULTILINE)


def _as_list(found: re.Match[str]) -> str:
    lines = re.sub(r"^    (?! )", "- ", found[2], flags=re.MULTILINE)
    return f"{found[1]}\n\n{lines}"


def _as_block(found: re.Match[str]) -> str:
    return f"```text\n{found[0].rstrip()}\n```\n"


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            text = _RAISES.sub(_as_list, obj.docstring.value)
            text = _EXAMPLE.sub("Examples:", text)
            obj.docstring.value = _TREE.sub(_as_block, text)
