"""Where the command line prints to."""

import io
import os
import sys
from contextlib import suppress
from typing import NoReturn

from rich.console import Console


class Printer(Console):
    """A console that leaves it to the command line how to end when nobody reads on."""

    def on_broken_pipe(self) -> NoReturn:  # by itself it would exit with 1, which says that a port is wrong
        raise BrokenPipeError


# Where the output is no terminal, the tables' long names would be cut at 80 columns.
out = Printer(width=None if sys.stdout and sys.stdout.isatty() else 160, highlight=False, emoji=False)
err = Printer(stderr=True, highlight=False, emoji=False, soft_wrap=True)


def print_anything() -> None:
    """Characters that the terminal's encoding lacks, and file names in none, are printed by their numbers."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')


def let_go() -> None:
    """What cannot be printed any more is dropped, so that Python does not try again, and complain, when it ends."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError):  # a stream of a test has no number
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
