"""`flax-vit`: the command line. JAX takes most of a second to import, so that only what has work to do imports it."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import rich_click as click
from rich.markup import escape

from convert.console import err
from flax_vit import __version__

RIGHT, WRONG, BAD_INPUT = 0, 1, 2


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
        click.option('--image-size', callback=size, help='As in training: 224, or 224x160 (height x width).'),
        click.option('--patch-size', callback=size, help='As in training: 16, or 16x8.'),
        click.option('--heads', type=click.IntRange(1), help='Attention heads (SimpleViT: not in the weights).'),
        click.option('--dim-head', type=click.IntRange(1), help='Size of a head, when it is not 64.'),
        click.option('--pool', type=click.Choice(['cls', 'mean']), help='Of DeepViT, when it is not cls.'),
        click.option('--dropout', type=click.FloatRange(0, 1), help='Of DeepViT, in training, when it is not 0.'),
        click.option('--emb-dropout', type=click.FloatRange(0, 1), help="Of DeepViT's embedding, likewise."),
        click.option('--channels', type=click.IntRange(1), help='Of the images, when it is not 3.'),
        click.option('--num-classes', type=click.IntRange(0), help='0: without the head, for the pooled features.'),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.group(context_settings={'help_option_names': ['-h', '--help']})
@click.version_option(__version__)
@click.option('--debug', is_flag=True, help='Show the traceback of an error.')
def cli(debug: bool) -> None:
    """Turn vit-pytorch's DeepViT and SimpleViT checkpoints into Flax models, and prove that both compute the same.

    Begin with `flax-vit demo`, or with `flax-vit inspect CHECKPOINT` on your own file.

    Exit status: 0 all is right; 1 verify found the port wrong; 2 bad usage or input.
    """
    keep_compiled()


@cli.command('inspect')
@click.argument('source', metavar='CHECKPOINT')
@model_options
def inspect_command(**arguments: Any) -> None:
    """Say what CHECKPOINT is, and how each of its tensors would be converted; nothing is written.

    CHECKPOINT is a file (.pt, .pth, .safetensors, …: the content tells) or a folder that holds one, or a folder that
    `convert` wrote.
    """
    from convert import commands

    commands.inspect_checkpoint(**arguments)


@cli.command('convert')
@click.argument('source', metavar='CHECKPOINT')
@click.argument('folder', metavar='OUT', type=click.Path(path_type=Path))
@model_options
@click.option('--param-dtype', help='Cast the parameters, say to bfloat16; without it they keep their bits.')
@click.option(
    '--verify', 'proven', is_flag=True, help="Verify first, and keep PyTorch's outputs in OUT to check it by, anywhere."
)
def convert_command(**arguments: Any) -> None:
    """Convert CHECKPOINT to the folder OUT, for flax_vit.from_pretrained(OUT); no torch is needed for that.

    With --verify, which needs torch and vit-pytorch, `flax-vit verify OUT` later checks OUT without either.
    """
    from convert import commands

    sys.exit(RIGHT if commands.convert_checkpoint(**arguments) else WRONG)


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
def verify_command(**arguments: Any) -> None:
    """Run vit-pytorch's module and the Flax model on the same images; compare every block.

    With OUT, the folder that `convert` wrote is what gets verified; its fields are used where none are given. Needs
    torch and vit-pytorch: pip install 'flax-vit[torch]'. The exit status is 0 when the port is right, 1 when not.

    Without torch: give OUT alone, if `convert --verify` wrote it; or outputs of your own model with --reference, which
    also tells when heads or pool were assumed wrongly.
    """
    from convert import commands

    sys.exit(RIGHT if commands.verify_checkpoint(**arguments) else WRONG)


@cli.command('export')
@click.argument('folder', metavar='OUT', type=click.Path(path_type=Path))
@click.argument('target', metavar='CHECKPOINT', type=click.Path(path_type=Path))
@click.option('--layout', help="An older release's names: S1, S0, D1, D0; without it, the newest that computes this.")
@click.option('--overwrite', is_flag=True, help='Replace CHECKPOINT if it exists.')
def export_command(**arguments: Any) -> None:
    """Write the parameters in the folder OUT back to a PyTorch CHECKPOINT, .safetensors or .pt.

    The names are vit-pytorch's, so that load_state_dict takes it as it is. A .pt needs torch.
    """
    from convert import commands

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
    from convert import commands

    commands.export_program(**arguments)


@cli.command('demo')
def demo_command() -> None:
    """Convert, verify and compare, on two models that vit-pytorch trained on handwritten digits."""
    from convert import commands

    sys.exit(RIGHT if commands.run_demo() else WRONG)


def keep_compiled() -> None:
    """Have JAX, once it is imported, keep what it compiles for the next command, unless its own settings say where.

    Where there is no place to keep it, every command compiles anew.
    """
    if 'JAX_COMPILATION_CACHE_DIR' in os.environ:
        return
    folder = Path(os.environ.get('XDG_CACHE_HOME') or Path('~/.cache').expanduser()) / 'flax-vit'
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK):
        os.environ['JAX_COMPILATION_CACHE_DIR'] = str(folder)
        os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')  # a small model's programs, too


def main() -> None:
    """Run the command line; an error is one paragraph and exit status 2."""
    arguments = [argument for argument in sys.argv[1:] if argument != '--debug']
    debug = len(arguments) < len(sys.argv) - 1  # it is taken anywhere, because it is thought of last
    try:
        cli(arguments, prog_name='flax-vit')
    except (ValueError, OSError) as error:
        if debug:
            raise
        message = f'{error.filename}: {error.strerror}' if isinstance(error, OSError) and error.filename else str(error)
        err.print('[red]Error:[/]', escape(message))
        sys.exit(BAD_INPUT)
