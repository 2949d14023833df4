"""What `flax-vit inspect` and `verify` found, for machines, and commands to be copied."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from subprocess import list2cmdline
from typing import Any

from convert.conversion import Inspection
from convert.proof.measure import Row
from convert.proof.report import plain
from convert.proof.saved_outputs import Comparison
from flax_vit.architectures import name_of
from flax_vit.checks import COMPUTATION


def facts_of(inspection: Inspection, options: Mapping[str, Any]) -> dict[str, Any]:
    """All that an inspection tells, in plain JSON. `options`: those that it was made with."""
    layout = inspection.layout
    return {
        'format': 'flax_vit inspection 1',
        'source': inspection.source,
        'read as': inspection.format,
        'files': [str(file) for file in inspection.files],
        'model': name_of(layout.model),
        'layout': {'id': layout.id, 'wrote it': str(layout)},
        'key': inspection.unwrapped.address,
        'parameters': inspection.parameters,
        'dtypes': inspection.dtypes,
        'fields': {
            name: {'value': plain(field.value), 'known by': field.how, 'because': field.why}
            for name, field in inspection.fields.items()
            if name not in COMPUTATION or field.how == 'given'
        },
        'left aside': dict(inspection.unwrapped.left_aside),
        'tensors': [
            {
                'name': name,
                'shape': list(inspection.tensors[name].shape),
                'dtype': str(inspection.tensors[name].dtype),
                'parameter': leaf.place,
                'transform': leaf.transform,
            }
            for name, leaf in inspection.plan
        ],
        'convert': convert_line(inspection, options),
    }


def convert_line(inspection: Inspection, options: Mapping[str, Any]) -> str:
    """The command that converts what was inspected with `options`; what must be filled in, in capitals."""
    asked = [name for name, field in inspection.fields.items() if field.how == 'unknown' and field.why]
    name = Path(inspection.source).name.partition('.')[0].strip('-') or 'vit'  # '-' is standard input
    return command_line(
        'convert', inspection.source, f'{name}-flax', **options, **{name: name.upper() for name in asked}
    )


def command_line(command: str, *arguments: str, **options: Any) -> str:
    """A command of ours, to be copied to a shell."""
    words = [word for name, value in options.items() for word in (flag(name), in_words(value))]
    dashes = ['--'] if any(argument.startswith('-') for argument in arguments) else []
    return joined(['flax-vit', command, *words, *dashes, *arguments])


def joined(words: Sequence[str]) -> str:
    """The line that a shell of this system takes apart into these words."""
    return list2cmdline(words) if sys.platform == 'win32' else shlex.join(words)


def flag(name: str) -> str:
    """How a field is written on the command line."""
    return f'--{name.replace("_", "-")}'


def in_words(value: Any) -> str:
    """How its value is."""
    return 'x'.join(map(str, value)) if isinstance(value, tuple) else str(value)


def this_command() -> str:
    """The command that runs."""
    return joined(['flax-vit', *sys.argv[1:]])


def figures_of(result: Row | Comparison) -> dict[str, Any]:
    """The figures of a comparison with outputs that were kept."""
    when = datetime.now(UTC).isoformat(timespec='seconds')
    head = {'format': 'flax_vit outputs 1', 'time': when, 'command': this_command(), 'right': result.right}
    return head | asdict(result)
