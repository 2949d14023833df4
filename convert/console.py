"""Where the command line prints to."""

import sys

from rich.console import Console

# Where the output is no terminal, the tables' long names would be cut at 80 columns.
out = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
err = Console(stderr=True, highlight=False, soft_wrap=True)
