"""Text from outside is safe to show: masked, escaped and shortened."""

from __future__ import annotations

import copy
import subprocess
import sys
import time

import pytest

from reshard.errors import ArgumentError, CheckpointError, StoreError
from reshard.planner.html import table
from reshard.planner.text import MAX_SHOWN_CHARACTERS, MAX_WORD_CHARACTERS, printable, shortened, shown

OBEYED = [
    *map(chr, range(32)),
    *map(chr, range(0x7F, 0xA1)),
    "\u00ad",
    *map(chr, range(0x200B, 0x2010)),
    *map(chr, range(0x2028, 0x202F)),
    *map(chr, range(0x2060, 0x2070)),
    "\u061c",
    "\ufeff",
    "\ufff9",
    "\u034f",
    "\u115f",
    "\u3164",
    "\ud800",
    "\udfff",
    "\U000e0041",
    "\U000e0100",
]
READABLE = [
    "é",
    "中文",
    "Ω",
    "ж",
    "日本語",
    "עברית",
    "العربية",
    "हिन्दी",
    "😀",
    "❤️",
    "a b",
    "\\x1b",
    "a.²",
    "<b>",
    "[bold]x[/bold]",
]


@pytest.mark.parametrize("char", OBEYED, ids=ascii)
def test_control_and_invisible_characters_are_escaped(char: str) -> None:
    text = printable(f"a{char}b")
    assert text.isprintable()
    assert text.isascii()
    assert text.startswith("a\\")
    assert printable(text) == text


@pytest.mark.parametrize("text", READABLE)
def test_readable_characters_are_unchanged(text: str) -> None:
    assert printable(text) == text
    assert shown(text) == text


def test_escapes_are_those_of_python_literals() -> None:
    assert printable("\x1b]0;T\x07\x9b2J\t\n\u202e\ud800") == r"\x1b]0;T\x07\x9b2J\t\n\u202e\ud800"


def test_long_text_is_shortened() -> None:
    name = "n" * 1_000_000
    text = shown(f"{name!r} has shape (3, 4)")
    assert text.startswith("'nnn")
    assert text.endswith("n' has shape (3, 4)")
    assert "…(1000002 characters)…" in text
    assert len(text) <= MAX_WORD_CHARACTERS + 50
    words = "word " * 100_000
    assert len(shown(words)) <= MAX_SHOWN_CHARACTERS
    assert shown(words).startswith("word word")
    for value in (text, shown(words), shortened("x" * 5000, 100, 100)):
        assert shown(value) == value
    assert shown("x" * MAX_WORD_CHARACTERS) == "x" * MAX_WORD_CHARACTERS


@pytest.mark.parametrize("kind", [CheckpointError, StoreError, ArgumentError])
def test_error_messages_are_one_line_without_secrets(kind: type[CheckpointError]) -> None:
    error = kind("'a\x1b[2J\n\ud800b' at https://u:pass-word@host/x?sig=5ec2e7 " + "n" * 10**6)
    error.rank = 3
    for text in (str(error), repr(error), str(copy.copy(error)), str(kind(str(error)))):
        assert text.isprintable()
        assert len(text) < 3000
        assert "5ec2e7" not in text
        assert "pass-word" not in text
        assert "https://***@host/x?sig=***" in text
    assert copy.copy(error).rank == 3
    assert kind("a", 5).args == ("a", 5)


def test_html_tables_escape_their_cells() -> None:
    page = table("c<\x1b>\n", ("n\u202e", "v"), [("<script>\x1b\ud800", "https://u:pass-word@h")])
    assert page.isprintable()
    assert "<script>" not in page
    assert "&lt;script&gt;\\x1b\\ud800" in page
    assert "pass-word" not in page
    page.encode()


@pytest.mark.parametrize(
    "text",
    [
        "a", "a=", ":/", "@", "://", "http://", "http://x?", "a:", "secret", "secret='", "Bearer ", "<Token", "a=b&",
        "?a", "&sig=", "\x1b", "'", "%3D", "key", "*", "https://u:p@h?sig=x ", "x://y:z@", '"secret": "',
    ],
)  # fmt: skip
def test_shown_is_fast_for_repetitive_text(text: str) -> None:
    code = "import sys; from reshard.planner.text import shown; text = sys.argv[1]; shown((text * 2**18)[:2**18])"
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", code, text], check=True, timeout=20)
    assert time.monotonic() - begin < 15
