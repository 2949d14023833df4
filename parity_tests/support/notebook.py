"""examples/quickstart.ipynb, made of examples/quickstart.py and executed: `python -m parity_tests.support.notebook`."""

import os
import pathlib
import sys
import tempfile
from typing import Any

import jupytext
import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from parity_tests.support.pages import ROOT

SCRIPT = ROOT / 'examples' / 'quickstart.py'
NOTEBOOK = SCRIPT.with_suffix('.ipynb')
TIMEOUT = 1800  # seconds for a cell, on a machine that others use, too
METADATA = {
    'kernelspec': {'display_name': 'Python 3', 'language': 'python', 'name': 'python3'},
    'language_info': {'name': 'python'},
}


def unexecuted() -> Any:
    """The script's cells. Nothing in it depends on when or where it is made."""
    notebook = jupytext.read(SCRIPT)
    for number, cell in enumerate(notebook.cells):
        cell.id = f'cell-{number}'
        cell.metadata.pop('lines_to_next_cell', None)  # blank lines of the script
    notebook.metadata = nbformat.from_dict(METADATA)
    return notebook


def execute(notebook: Any, folder: pathlib.Path) -> None:
    """Run all cells in a folder, by this interpreter, whatever kernels are installed; their outputs are kept.

    Raises nbclient's CellExecutionError, with the traceback, for a cell that fails.
    """
    kernel = AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[], ensure_native_kernel=True))
    client = NotebookClient(
        notebook,
        km=kernel,
        timeout=TIMEOUT,
        startup_timeout=TIMEOUT,
        resources={'metadata': {'path': str(folder)}},
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute(cleanup_kc=True)  # a kernel of ours is ended as well
    notebook.metadata = nbformat.from_dict(METADATA)  # the kernel adds its version


def main() -> None:
    """Make the notebook anew, or execute it to the file that is given."""
    out = pathlib.Path(sys.argv[1]) if sys.argv[1:] else NOTEBOOK
    notebook = unexecuted()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {'IPYTHONDIR': folder}  # nobody's own settings
        execute(notebook, pathlib.Path(folder))
    out.write_text(nbformat.writes(notebook) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
