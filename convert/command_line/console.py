"""Where the command line prints to."""

import io
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape


class Printer(Console):
    """A console that leaves it to the command line how to end when nobody reads on."""

    may_move = True

    @property
    def moves(self) -> bool:
        """Whether it shows progress: where that can be drawn, and is wanted."""
        return self.may_move and self.is_interactive

    def on_broken_pipe(self) -> NoReturn:  # by itself it would exit with 1, which says that a port is wrong
        raise BrokenPipeError


# Where the output is no terminal, the tables' long names would be cut at 80 columns.
out = Printer(width=None if sys.stdout and sys.stdout.isatty() else 160, highlight=False, emoji=False)
err = Printer(stderr=True, highlight=False, emoji=False, soft_wrap=True)


def be_quiet(quiet: bool) -> None:
    """Leave out the tables and the progress, or no longer. Errors and warnings are printed all the same."""
    out.quiet, err.may_move = quiet, not quiet
    if quiet:  # the bars of downloads
        os.environ.update(TQDM_DISABLE='1', HF_HUB_DISABLE_PROGRESS_BARS='1')


@contextmanager
def working(words: str) -> Iterator[None]:
    """Show on a terminal what is being done, and for how long already."""
    if not err.moves:
        yield
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn('line'), TextColumn('{task.description}'), TimeElapsedColumn()
    with Progress(*columns, console=err, transient=True) as progress:
        progress.add_task(f'{escape(words)} …', total=None)
        yield


def show_facts(facts: Mapping[str, str]) -> None:
    """Names and what is to be said of them, as a table."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style='bold', no_wrap=True)
    table.add_column()
    for name, fact in facts.items():
        table.add_row(escape(name), escape(fact))
    out.print(table)


def print_json(facts: Mapping[str, Any]) -> None:
    """Print facts for machines, and nothing else."""
    print(json.dumps(facts, indent=2))  # noqa: T201 - as it is, however narrow the terminal is


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
