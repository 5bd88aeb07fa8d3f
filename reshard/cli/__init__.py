"""The command line, `reshard …`: a thin layer over the library, which has all that it does."""

from __future__ import annotations

import io
import os
import sys
import traceback
from types import TracebackType

from reshard.errors import CheckpointError
from reshard.planner.text import shown


def main() -> None:
    """Run a command: an error is one sentence and exit code 2; `--debug` shows where it was.

    Exit code 1 is for what was looked for and found: damage, differences.
    """
    from .app import app

    sys.stdout, sys.stderr = sys.stdout or io.StringIO(), sys.stderr or io.StringIO()  # closed, as by `>&-`
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may not have all letters
    try:
        app()
    except CheckpointError as error:
        if "--debug" in sys.argv:
            sys.excepthook = _tell_traceback
            raise
        print(f"reshard: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever read the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _tell_traceback(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """Print a traceback as Python does, each line as `shown` returns it: causes are of other libraries."""
    for line in "".join(traceback.format_exception(kind, error, where)).split("\n"):
        print(shown(line), file=sys.stderr)
