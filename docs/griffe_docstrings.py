"""Adapt docstrings to the sections that griffe knows.

The lines after "Raises, on every rank ...:" become a list, and "Example:" becomes
"Examples:".
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_RAISES = re.compile(r"^(Raises, [^\n]*:)\n((?:    [^\n]*\n?)+)", re.MULTILINE)
_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)


def _as_list(found: re.Match[str]) -> str:
    lines = re.sub(r"^    (?! )", "- ", found[2], flags=re.MULTILINE)
    return f"{found[1]}\n\n{lines}"


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            text = _RAISES.sub(_as_list, obj.docstring.value)
            obj.docstring.value = _EXAMPLE.sub("Examples:", text)
