"""The fenced blocks of a page of Markdown, and which of them are run.

A block runs where it is of python, or is of no language or `console` and has lines that begin with `reshard `. One
that must not run says why: ```` ```python no_run="needs Azure" ````.
"""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REASONS = frozenset(
    ("needs Azure", "needs GPUs", "runs under torchrun: see examples/", "see tests/integration/test_demo.py")
)
"""Why a block may be left out."""
_FENCE = re.compile(r"^( *)(```+) *(\S*)(.*)$")
_NO_RUN = re.compile(r'no_run="([^"]*)"')


LANGUAGES = frozenset(("", "console", "python", "text", "toml", "json"))
"""Of blocks: any other would be passed over unseen."""


@dataclass(frozen=True, slots=True)
class Block:
    line: int
    """Of its first line, counted from 1."""
    language: str
    text: str
    left_out: str | None
    """Why it is not run."""

    @property
    def commands(self) -> list[list[str]]:
        """The calls of the command line in it."""
        if self.language not in ("", "console"):
            return []
        joined = self.text.replace("\\\n", " ").splitlines()
        lines = [line.removeprefix("$ ") for line in joined]
        return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("reshard ")]

    @property
    def runs(self) -> bool:
        return self.left_out is None and (self.language == "python" or bool(self.commands))


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page in order. Raises ValueError for one that has no end."""
    begin: tuple[int, str, re.Match[str]] | None = None
    lines: list[str] = []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = _FENCE.match(line)
        if begin is None and fence:
            begin, lines = (number + 1, fence[2], fence), []
        elif begin is not None and line.strip() == begin[1]:
            reason = _NO_RUN.search(begin[2][4])
            text = textwrap.dedent("\n".join(lines)) + "\n"
            yield Block(begin[0], begin[2][3], text, reason[1] if reason else None)
            begin = None
        elif begin is not None:
            lines.append(line)
    if begin is not None:
        raise ValueError(f"{page}:{begin[0]}: the block has no end")
