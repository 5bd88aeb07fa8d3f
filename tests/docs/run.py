"""Run the code blocks of one page, in order and in one namespace, in a process that a test starts for it."""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .blocks import Block, blocks

SETUP = Path(__file__).parent / "setup"
_NUMBER = re.compile(r"\d[\d.,]*")


def run_page(
    page: Path, folder: Path, environment: Mapping[str, str], replacements: Mapping[str, str], hidden: str, log: Path
) -> None:
    """Run a page and end the process, with exit code 0 if every block succeeded.

    Args:
        page: The Markdown file.
        folder: The working directory.
        environment: Environment variables to set.
        replacements: The addresses to use in place of the example addresses on the page.
        hidden: A package that cannot be imported. Empty for none.
        log: The file that receives the output and the traceback.
    """
    with log.open("w", buffering=1) as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            os.chdir(folder)
            os.environ.update(environment)
            if hidden:
                sys.modules[hidden] = None  # type: ignore[assignment]
            _run(page, replacements)
        except BaseException:
            traceback.print_exc()
            out.flush()
            os._exit(1)
    os._exit(0)


def _run(page: Path, replacements: Mapping[str, str]) -> None:
    namespace: dict[str, Any] = {"__name__": "page", "PAGE": page}
    setup = SETUP / f"{page.stem.lower().replace('-', '_')}.py"
    if setup.exists():
        exec(compile(setup.read_text(), str(setup), "exec"), namespace)
    for block in blocks(page):
        if not block.runs:
            continue
        print(f"--- {page.name}:{block.line}")
        text = block.text
        for address, real in replacements.items():
            text = text.replace(address, real)
        if block.language != "python":
            namespace.get("before_commands", lambda: None)()
            _run_commands(Block(block.line, block.language, text, None))
        elif text.lstrip().startswith(">>>"):
            _run_examples(text, page, block, namespace)
        else:
            exec(compile("\n" * (block.line - 1) + text, str(page), "exec"), namespace)
    _destroy_group()


def _run_commands(block: Block) -> None:
    from reshard.cli import main

    for arguments in block.commands:
        print("$ reshard", *arguments)
        sys.argv = ["reshard", *arguments]
        try:
            main()
        except SystemExit as ended:
            if ended.code:
                raise RuntimeError(f"exit code {ended.code}") from ended


def _run_examples(text: str, page: Path, block: Block, namespace: dict[str, Any]) -> None:
    """Run the lines after `>>>` and compare their output with the page. Numbers may differ; `…` matches any text."""
    for example in doctest.DocTestParser().get_examples(text):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(example.source, f"{page}:{block.line + example.lineno}", "single"), namespace)
        wanted = ".*".join(re.escape(part) for part in _without_numbers(example.want).split("…"))
        if not re.fullmatch(wanted, _without_numbers(out.getvalue()), re.DOTALL):
            raise AssertionError(f"{page}:{block.line + example.lineno}: printed\n{out.getvalue()}")


def _without_numbers(text: str) -> str:
    return re.sub(r"\bN (\w+?)s?\b", r"N \1", _NUMBER.sub("N", text)).strip()  # also without the plural


def _destroy_group() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()  # without it, torch 2.13 with gloo sometimes aborts
        dist.destroy_process_group()
