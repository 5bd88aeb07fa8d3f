"""Shows what docstrings have that their style has no word for.

What follows a line "Raises, on every rank ...:" becomes a list, and a tree of lines a block.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_RAISES = re.compile(r"^(Raises, [^\n]*:)\n((?:    [^\n]*\n?)+)", re.MULTILINE)
_TREE = re.compile(r"^\w+\n(?:[ │]*[├└]──[^\n]*\n?)+", re.MULTILINE)


def _as_list(found: re.Match[str]) -> str:
    lines = re.sub(r"^    (?! )", "- ", found[2], flags=re.MULTILINE)
    return f"{found[1]}\n\n{lines}"


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            text = _RAISES.sub(_as_list, obj.docstring.value)
            obj.docstring.value = _TREE.sub(
                lambda found: f"```text\n{found[0].rstrip()}\n```\n", text
            )
