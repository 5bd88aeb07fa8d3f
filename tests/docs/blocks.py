"""Find the fenced code blocks of a Markdown page, and decide which of them run.

A block runs if its language is Python, or if it has no language or `console` and contains lines that begin with
`reshard `. A block that must not run says why: ```` ```python no_run="needs GPUs" ````.
"""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REASONS = frozenset(
    (
        "needs GPUs",
        "see tests/engines",
        "runs under torchrun: see examples/",
        "see tests/integration/test_demo.py",
    )
)
"""The reasons for which a block may not run."""
LANGUAGES = frozenset(("", "console", "python", "text", "toml", "json"))
"""The languages that a block may have. Another one is probably a typing error, and its block would not run."""
MAX_COLUMNS = 88
"""The width of code. The site scrolls sideways if a line is longer."""
_FENCE = re.compile(r"^( *)(```+) *(\S*)(.*)$")
_NO_RUN = re.compile(r'no_run="([^"]*)"')


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced code block of a page."""

    line: int
    """The number of its first line, counted from 1."""
    language: str
    text: str
    no_run: str | None
    """Why it does not run, or None."""

    @property
    def commands(self) -> list[list[str]]:
        """The arguments of each `reshard` command in the block."""
        if self.language not in ("", "console"):
            return []
        joined = self.text.replace("\\\n", " ").splitlines()
        lines = [line.removeprefix("$ ") for line in joined]
        return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("reshard ")]

    @property
    def runs(self) -> bool:
        return self.no_run is None and (self.language == "python" or bool(self.commands))


def blocks(page: Path) -> Iterator[Block]:
    """Yield the blocks of a page in order.

    Raises:
        ValueError: A block has no end.
    """
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
