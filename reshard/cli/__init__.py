"""The command line, `reshard …`: a thin layer over the library."""

from __future__ import annotations

import errno
import io
import os
import select
import signal
import sys
import traceback
from types import TracebackType

from reshard.errors import CheckpointError
from reshard.planner.text import shown

PIPE_CLOSED = 128 + signal.SIGPIPE
"""The exit code of a program that SIGPIPE ends, as shells show it."""


def main() -> None:
    """Run a command. An error is printed as one sentence, with exit code 2; `--debug` shows its traceback.

    Exit code 1 means that the command found damage or differences.
    """
    from .app import app

    sys.stdout, sys.stderr = sys.stdout or io.StringIO(), sys.stderr or io.StringIO()  # closed, as by `>&-`
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack characters
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except SystemExit as exit:
        if exit.code == 1 and _reader_has_ended():  # click uses 1 for this, too
            sys.exit(PIPE_CLOSED)
        raise
    except CheckpointError as error:
        if "--debug" in sys.argv:
            sys.excepthook = _print_traceback
            raise
        print(f"reshard: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # of the output: the library raises CheckpointErrors
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to write at exit
        if error.errno != errno.EPIPE:  # EPIPE: the reader of the output has closed it
            print(f"reshard: the output cannot be written: {error.strerror}", file=sys.stderr)
        sys.exit(PIPE_CLOSED if error.errno == errno.EPIPE else 2)


def _reader_has_ended() -> bool:
    """Return whether the output is a pipe from which nobody can read any more."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):  # no file
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _print_traceback(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """Print a traceback, each line through `shown`, because causes come from other libraries."""
    for line in "".join(traceback.format_exception(kind, error, where)).split("\n"):
        print(shown(line), file=sys.stderr)
