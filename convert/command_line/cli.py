"""`flax-vit`: the command line. JAX takes most of a second to import, so that only what has work to do imports it."""

import os
import platform
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import rich_click as click
from click.core import ParameterSource
from click.exceptions import Exit
from rich.markup import escape

from convert.caches import cache_folder
from convert.command_line.console import err, let_go, print_anything
from flax_vit import __version__

RIGHT, WRONG, BAD_INPUT, UNFORESEEN = 0, 1, 2, 3
INTERRUPTED, NOBODY_READS = 130, 141  # as a shell says of a program that SIGINT or SIGPIPE ended
STATUSES: tuple[tuple[type[BaseException], int], ...] = (  # the first that fits; of the rest, UNFORESEEN
    (KeyboardInterrupt, INTERRUPTED),
    (BrokenPipeError, NOBODY_READS),
    (click.ClickException, BAD_INPUT),
    (ValueError, BAD_INPUT),
    (OSError, BAD_INPUT),
    (MemoryError, BAD_INPUT),
)

CACHE = 'JAX_COMPILATION_CACHE_DIR'
CACHE_BYTES = 256 << 20


def size(_context: click.Context, _option: click.Parameter, value: str | None) -> int | tuple[int, int] | None:
    """'224' -> 224, '224x160' -> (224, 160)."""
    if value is None:
        return None
    try:
        numbers = [int(number) for number in value.split('x')]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise click.BadParameter(f'{value!r} is no size; write 224, or 224x160 for height x width.')
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What the weights may not tell."""
    options = [
        click.option('--key', help='Which of several models in the file: the address that the error message lists.'),
        click.option('--part', type=click.Choice(['transformer']), help='Only that, whatever the rest is.'),
        click.option('--image-size', callback=size, help='As in training: 224, or 224x160 (height x width).'),
        click.option('--patch-size', callback=size, help='As in training: 16, or 16x8.'),
        click.option('--heads', type=click.IntRange(1), help='Attention heads (ViT, SimpleViT: not in the weights).'),
        click.option('--dim-head', type=click.IntRange(1), help='Size of a head, when it is not 64.'),
        click.option('--pool', type=click.Choice(['cls', 'mean']), help='Of ViT and DeepViT, when it is not cls.'),
        click.option(
            '--dropout', type=click.FloatRange(0, 1), help='Of ViT and DeepViT, in training, when it is not 0.'
        ),
        click.option('--emb-dropout', type=click.FloatRange(0, 1), help='Of their embedding, likewise.'),
        click.option('--channels', type=click.IntRange(1), help='Of the images, when it is not 3.'),
        click.option('--release', help='The vit-pytorch that wrote it, say 0.6.5, where the weights fit several.'),
        click.option(
            '--image-format',
            type=click.Choice(['channels_first', 'channels_last']),
            help='Of the images, where both fit (as many channels as pixels a side).',
        ),
        click.option('--num-classes', type=click.IntRange(0), help='0: without the head, for the pooled features.'),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.group(context_settings={'help_option_names': ['-h', '--help']})
@click.version_option(__version__)
@click.option('--debug', is_flag=True, help='Show the traceback of an error.')
def cli(debug: bool) -> None:
    """Turn vit-pytorch's ViT, SimpleViT and DeepViT checkpoints into Flax models, and prove that both compute the same.

    Begin with `flax-vit demo`, or with `flax-vit inspect CHECKPOINT` on your own file.

    Exit status: 0 all is right; 1 the port is wrong, and nothing else; 2 bad usage or input, or a full disk; 3 an error
    that was not foreseen, please report it; 130 interrupted; 141 nobody reads the output any more.
    """
    keep_compiled()


@cli.command('inspect')
@click.argument('source', metavar='CHECKPOINT')
@model_options
@click.option('--json', 'as_json', is_flag=True, help='Print it all as JSON, for machines, and nothing else.')
def inspect_command(**arguments: Any) -> None:
    """Say what CHECKPOINT is, how each of its tensors would be converted, and by which command; nothing is written.

    CHECKPOINT is a file (.pt, .pth, .safetensors, …: the content tells) or a folder that holds one, or a folder that
    `convert` wrote. It may be remote (hf://owner/name, https://…), or come on standard input (-).
    """
    from convert.command_line import commands

    commands.inspect_checkpoint(**arguments)


@cli.command('convert')
@click.argument('source', metavar='CHECKPOINT')
@click.argument('folder', metavar='OUT', type=click.Path(path_type=Path))
@model_options
@click.option('--param-dtype', help='Cast the parameters, say to bfloat16; without it they keep their bits.')
@click.option(
    '--verify', 'proven', is_flag=True, help="Verify first, and keep PyTorch's outputs in OUT to check it by, anywhere."
)
def convert_command(**arguments: Any) -> int:
    """Convert CHECKPOINT to the folder OUT, for flax_vit.from_pretrained(OUT); no torch is needed for that.

    With --verify, which needs torch and vit-pytorch, `flax-vit verify OUT` later checks OUT without either.
    """
    from convert.command_line import commands

    return RIGHT if commands.convert_checkpoint(**arguments) else WRONG


@cli.command('verify')
@click.argument('source', metavar='CHECKPOINT')
@click.argument('folder', metavar='[OUT]', required=False, type=click.Path(path_type=Path))
@model_options
@click.option('--images', type=click.Path(path_type=Path), help='A folder of real images, instead of random ones.')
@click.option('--count', type=click.IntRange(1), default=8, show_default=True, help='Number of images.')
@click.option('--seed', type=int, default=0, show_default=True, help='Of the random images.')
@click.option(
    '--dtype',
    type=click.Choice(['float32', 'bfloat16', 'float16', 'float64']),
    default='float32',
    show_default=True,
    help='Compared beside float64, where the port may be 3 times as far from the truth as PyTorch.',
)
@click.option('--gradients', is_flag=True, help='Compare the gradient of every parameter, too.')
@click.option(
    '--reference',
    type=click.Path(path_type=Path),
    help='An .npz with images and logits that your PyTorch model gave, to compare with instead; no torch is needed.',
)
@click.option('--report', 'page', type=click.Path(dir_okay=False, path_type=Path), help='Write an HTML page of it all.')
@click.option(
    '--json', 'data', type=click.Path(dir_okay=False, path_type=Path), help='Write the figures, for machines.'
)
@click.pass_context
def verify_command(context: click.RichContext, /, **arguments: Any) -> int:
    """Run vit-pytorch's module and the Flax model on the same images; compare every block.

    With OUT, the folder that `convert` wrote is what gets verified; its fields are used where none are given. Needs
    torch and vit-pytorch: pip install 'flax-vit[torch]'. The exit status is 0 when the port is right, 1 when not.

    Without torch: give OUT alone, if `convert --verify` wrote it; or CHECKPOINT or OUT with --reference, the outputs of
    your own model, which also tells when heads or pool were assumed wrongly. Both take --json.
    """
    from convert.command_line import commands

    written = {
        parameter.name: 'OUT' if parameter.name == 'folder' else parameter.opts[0]
        for parameter in context.command.params
        if parameter.name and context.get_parameter_source(parameter.name) != ParameterSource.DEFAULT
    }
    return RIGHT if commands.verify(written, **arguments) else WRONG


@cli.command('export')
@click.argument('folder', metavar='OUT', type=click.Path(path_type=Path))
@click.argument('target', metavar='CHECKPOINT', type=click.Path(path_type=Path))
@click.option(
    '--layout', help="An older release's names: V7 to V0, S1, S0, D1, D0; without it, the newest that computes this."
)
@click.option('--overwrite', is_flag=True, help='Replace CHECKPOINT if it exists.')
def export_command(**arguments: Any) -> None:
    """Write the parameters in the folder OUT back to a CHECKPOINT, .safetensors or .pt; of an OfficialSimpleViT .npz.

    The names are those of where they come from, vit-pytorch's for its models: load_state_dict takes it as it is. A .pt
    needs torch.
    """
    from convert.command_line import commands

    commands.export_checkpoint(**arguments)


@cli.command('serve-export')
@click.argument('folder', metavar='OUT', type=click.Path(path_type=Path))
@click.argument('target', metavar='FILE', type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    '--platform',
    'platforms',
    type=click.Choice(['cpu', 'cuda', 'rocm', 'tpu']),
    multiple=True,
    default=['cpu', 'cuda', 'tpu'],
    show_default=True,
    help='Where it shall run; give it once for each.',
)
@click.option('--image-size', callback=size, help="Of the images, where it is not the model's: 224, or 224x160.")
@click.option('--dtype', help='Compute in it, say in bfloat16; without it, in float32.')
@click.option('--param-dtype', help='Cast the parameters, say to bfloat16.')
@click.option('--overwrite', is_flag=True, help='Replace FILE if it exists.')
def serve_export_command(**arguments: Any) -> None:
    """Write the model in the folder OUT to FILE, an .npz of program and weights that runs with JAX alone.

    It takes any number of float32 images, channels last. Needs flatbuffers: pip install 'flax-vit[serving]'.
    """
    from convert.command_line import commands

    commands.export_program(**arguments)


@cli.command('demo')
def demo_command() -> int:
    """Convert, verify and compare, on three models that vit-pytorch trained on handwritten digits."""
    from convert.command_line import commands

    return RIGHT if commands.run_demo() else WRONG


def keep_compiled() -> None:
    """Have JAX, once it is imported, keep what it compiles for the next command, unless its own settings say where.

    Where there is no place to keep it, every command compiles anew. What was not used for the longest time goes, so
    that the place does not grow beyond `CACHE_BYTES` and what one command adds.
    """
    if CACHE in os.environ:
        return
    folder = cache_folder('flax-vit')
    if folder is None:
        return
    with suppress(OSError):  # another command may be at it, too
        trim(folder, CACHE_BYTES)
        os.environ[CACHE] = str(folder)
        os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')  # a small model's programs, too
        # What could not be kept, or was cut off by a full disk, is compiled anew.
        warnings.filterwarnings('ignore', 'Error (reading|writing) persistent compilation cache')


def trim(folder: Path, limit: int) -> None:
    """Remove files until those in `folder` have at most `limit` bytes, first what was not used for the longest time.

    Empty ones, which a full disk leaves, would keep their program from ever being kept.
    JAX's own limit needs a package that nothing else here does, and in jax 0.10 fails on files from before it was set.
    """
    files = {path: path.stat() for path in folder.rglob('*') if path.is_file()}
    size = 0
    for path in sorted(files, key=lambda path: -files[path].st_atime_ns):
        size += files[path].st_size
        if size > limit or not files[path].st_size:
            path.unlink(missing_ok=True)  # another command may do the same


def main() -> None:
    """Run the command line; an error is one paragraph, and an exit status that `--help` explains."""
    arguments = [argument for argument in sys.argv[1:] if argument != '--debug']
    debug = len(arguments) < len(sys.argv) - 1  # it is taken anywhere, because it is thought of last
    print_anything()
    try:
        # not cli.main, which gives 1 for what says nothing about a port
        with cli.make_context('flax-vit', arguments) as context:
            status = cli.invoke(context) or RIGHT
        if sys.stdout:  # it may be closed
            sys.stdout.flush()
    except Exit as ended:  # of --help and --version
        status = ended.exit_code
    except (Exception, KeyboardInterrupt) as error:
        status = next((status for kind, status in STATUSES if isinstance(error, kind)), UNFORESEEN)
        with suppress(OSError):  # there may be nothing to print to
            if debug:
                traceback.print_exc()
            explain(error, status)
    let_go()
    sys.exit(status)


def explain(error: BaseException, status: int) -> None:
    """Say what ended a command."""
    if status == NOBODY_READS:
        return
    if status == INTERRUPTED:
        err.print('Interrupted.')
    elif isinstance(error, click.ClickException):
        error.show()
    elif status == BAD_INPUT:
        said = f'{error.filename}: {error.strerror}' if isinstance(error, OSError) and error.filename else str(error)
        err.print('[red]Error:[/]', escape(said or 'there is not enough memory.'))
    else:
        from convert.versions import versions

        where = ', '.join(f'{name} {version}' for name, version in versions().items())
        err.print('[red]Not foreseen:[/]', escape(f'{type(error).__name__}: {error}'))
        err.print(
            'This says nothing about the port. Please report it to the authors of flax_vit: the command, what it '
            f'prints with --debug, and these versions: {where}, {platform.platform()}.'
        )
