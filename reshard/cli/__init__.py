"""The command line, `reshard …`: a thin layer over the library, which has all that it does."""

from __future__ import annotations

import os
import sys

from reshard.errors import CheckpointError


def main() -> None:
    """Run a command: an error is one sentence and exit code 2; `--debug` shows where it was.

    Exit code 1 is for what was looked for and found: damage, differences.
    """
    from .app import app

    try:
        app()
    except CheckpointError as error:
        if "--debug" in sys.argv:
            raise
        print(f"reshard: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever read the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
