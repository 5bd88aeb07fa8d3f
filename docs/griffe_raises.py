"""Shows as a list what a docstring has below a line "Raises, on every rank ...:", which is no section of its style."""

from __future__ import annotations

import re
from typing import Any

import griffe

_RAISES = re.compile(r"^(Raises, [^\n]*:)\n((?:    [^\n]*\n?)+)", re.MULTILINE)


def _as_list(found: re.Match[str]) -> str:
    lines = re.sub(r"^    (?! )", "- ", found[2], flags=re.MULTILINE)
    return f"{found[1]}\n\n{lines}"


class Raises(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = _RAISES.sub(_as_list, obj.docstring.value)
