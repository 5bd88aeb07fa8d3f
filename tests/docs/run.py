"""Runs the blocks of one page in order, in one namespace, in a process of its own that a test starts."""

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
    page: Path, folder: Path, environment: Mapping[str, str], instead: Mapping[str, str], without: str, log: Path
) -> None:
    """Run a page; the process ends with 0 where all of it ran.

    Args:
        folder: where it runs.
        instead: what stands for addresses of the page that are nobody's.
        without: a package that is taken not to be installed.
        log: what it printed, and where it failed.
    """
    with log.open("w", buffering=1) as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            os.chdir(folder)
            os.environ.update(environment)
            if without:
                sys.modules[without] = None  # type: ignore[assignment]
            _run(page, instead)
        except BaseException:
            traceback.print_exc()
            out.flush()
            os._exit(1)
    os._exit(0)


def _run(page: Path, instead: Mapping[str, str]) -> None:
    namespace: dict[str, Any] = {"__name__": "page", "PAGE": page}
    setup = SETUP / f"{page.stem.lower().replace('-', '_')}.py"
    if setup.exists():
        exec(compile(setup.read_text(), str(setup), "exec"), namespace)
    for block in blocks(page):
        if not block.runs:
            continue
        print(f"--- {page.name}:{block.line}")
        text = block.text
        for address, real in instead.items():
            text = text.replace(address, real)
        if block.language != "python":
            namespace.get("before_commands", lambda: None)()
            _run_commands(Block(block.line, block.language, text, None))
        elif text.lstrip().startswith(">>>"):
            _run_examples(text, page, block, namespace)
        else:
            exec(compile("\n" * (block.line - 1) + text, str(page), "exec"), namespace)
    _leave_group()


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
    """Run what follows `>>>`, and compare what it prints with the page, but for numbers and what `…` stands for."""
    for example in doctest.DocTestParser().get_examples(text):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(example.source, f"{page}:{block.line + example.lineno}", "single"), namespace)
        wanted = ".*".join(re.escape(part) for part in _without_numbers(example.want).split("…"))
        if not re.fullmatch(wanted, _without_numbers(out.getvalue()), re.DOTALL):
            raise AssertionError(f"{page}:{block.line + example.lineno}: printed\n{out.getvalue()}")


def _without_numbers(text: str) -> str:
    return _NUMBER.sub("N", text).strip()


def _leave_group() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()  # without it, torch 2.13 with gloo aborts now and then
        dist.destroy_process_group()
