"""`reshard demo`."""

from __future__ import annotations

import subprocess
import sys

import typer

from reshard.demo.__main__ import FOLDER, run_demo

from .common import storage_options


def demo(uri: str | None, steps: int, options: list[str] | None) -> None:
    try:
        run_demo(uri or str(FOLDER / "checkpoint"), steps, storage_options(options))
    except subprocess.CalledProcessError as error:
        print(f"reshard: the demo failed, with exit code {error.returncode}", file=sys.stderr)
        raise typer.Exit(2) from None
