"""`flax-vit`: the command line. JAX takes most of a second to import, so that only what has work to do imports it."""

import gc
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import rich_click as click
from click import get_current_context
from click.core import ParameterSource
from click.exceptions import Exit
from click.shell_completion import shell_complete
from rich.markup import escape

from convert.caches import keep_compiled
from convert.command_line.console import err, let_go, print_anything, print_json, show_facts, working
from convert.command_line.options import EVERYWHERE, MODEL, size
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

COMPLETE = '_FLAX_VIT_COMPLETE'
SOURCE = click.Path(readable=False)  # for the shells: what is wrong with a source, reading it tells


def examples(*commands: str) -> str:
    """What a help text ends with: commands to be copied, as they run where the project's examples are."""
    return '\n\n'.join(['Examples, to be run in a clone of the project:', *commands])


@click.group(
    context_settings={'help_option_names': ['-h', '--help'], 'rich_help_config': {'text_paragraph_linebreaks': '\n\n'}},
    epilog=examples('flax-vit demo', 'flax-vit inspect vit.pt'),
)
@click.version_option(__version__)
def cli() -> None:
    """Turn vit-pytorch's ViT, SimpleViT and DeepViT checkpoints into Flax models, and prove that both compute the same.

    Begin with `flax-vit demo`, or with `flax-vit inspect CHECKPOINT` on a file of your own.

    Exit status: 0 all is right; 1 the port is wrong, and nothing else; 2 bad usage or input, or a full disk; 3 an
    unforeseen error, please report it; 130 interrupted; 141 nobody reads the output any more.
    """
    keep_compiled()


@contextmanager
def for_good() -> Iterator[None]:
    """What is imported stays: without this, looking for garbage in it, also at the end, takes a fifth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def work() -> Any:
    """What the commands do, with JAX and all; in its 64-bit mode, so that float64 weights keep their bits."""
    with working('Starting JAX'), for_good():
        import jax

        from convert.command_line import commands
    get_current_context().with_resource(jax.enable_x64(True))
    return commands


@cli.command(
    'inspect',
    params=[*MODEL],
    epilog=examples(
        'flax-vit inspect simple_vit.pt',
        'flax-vit inspect vit.pt --heads 2 --json',
    ),
)
@click.argument('source', metavar='CHECKPOINT', type=SOURCE)
@click.option('--json', 'as_json', is_flag=True, help='Print everything as JSON, and nothing else.')
def inspect_command(**arguments: Any) -> None:
    """Say what CHECKPOINT is, how each tensor would be converted, and by which command. Nothing is written.

    CHECKPOINT is a file (.pt, .pth, .safetensors, …; the content decides, not the name), a folder that holds one, or a
    folder that `convert` wrote. It may be remote (hf://owner/name, https://…) or come from standard input (-).
    """
    work().inspect_checkpoint(**arguments)


@cli.command(
    'convert',
    params=[*MODEL],
    epilog=examples(
        'flax-vit convert deep_vit.pt digits --channels 1',
        'flax-vit convert vit.pt proven --channels 1 --heads 2 --verify',
    ),
)
@click.argument('source', metavar='CHECKPOINT', type=SOURCE)
@click.argument('folder', metavar='OUT', type=click.Path(path_type=Path))
@click.option('--param-dtype', metavar='DTYPE', help='Cast the parameters, say to bfloat16; by default no bit changes.')
@click.option('--verify', 'proven', is_flag=True, help="Verify first, and keep PyTorch's outputs in OUT.")
def convert_command(**arguments: Any) -> int:
    """Convert CHECKPOINT to a folder OUT that flax_vit.from_pretrained(OUT) reads.

    This needs no torch, except with --verify; then `flax-vit verify OUT` can check OUT later, without torch.
    """
    return RIGHT if work().convert_checkpoint(**arguments) else WRONG


@cli.command(
    'verify',
    params=[*MODEL],
    epilog=examples(
        'flax-vit verify deep_vit.pt --channels 1',
        'flax-vit verify vit.pt --channels 1 --heads 2 --json',
    ),
)
@click.argument('source', metavar='CHECKPOINT', type=SOURCE)
@click.argument('folder', metavar='[OUT]', required=False, type=click.Path(path_type=Path))
@click.option('--images', metavar='FOLDER', type=click.Path(path_type=Path), help='Use these images, not random ones.')
@click.option('--count', metavar='N', type=click.IntRange(1), default=8, show_default=True, help='Number of images.')
@click.option('--seed', metavar='N', type=int, default=0, show_default=True, help='Seed of the random images.')
@click.option(
    '--dtype',
    type=click.Choice(['float32', 'bfloat16', 'float16', 'float64']),
    metavar='DTYPE',
    default='float32',
    show_default=True,
    help='Besides float64, compare in this: float32, bfloat16 or float16; or float64 alone. In it the port may be 3 '
    'times as far from the truth as PyTorch is.',
)
@click.option('--gradients', is_flag=True, help='Compare the gradient of every parameter, too.')
@click.option(
    '--reference',
    metavar='FILE',
    type=click.Path(path_type=Path),
    help='Compare with images and logits of your own PyTorch model, saved as .npz. Needs no torch.',
)
@click.option(
    '--report',
    'page',
    metavar='FILE',
    type=click.Path(dir_okay=False, path_type=Path),
    help='Write the results as an HTML page.',
)
@click.option(
    '--json',
    'data',
    metavar='[FILE]',
    is_flag=False,
    flag_value='-',
    type=click.Path(dir_okay=False, path_type=Path, allow_dash=True),
    help='Write the figures as JSON; without FILE, or with -, print them and nothing else.',
)
@click.pass_context
def verify_command(context: click.RichContext, /, **arguments: Any) -> int:
    """Run vit-pytorch's module and the Flax model on the same images, and compare every block.

    With OUT, a folder that `convert` wrote, that folder is verified, and fields that you leave out are taken from it.
    This needs torch and vit-pytorch: pip install 'flax-vit[torch]'. The exit status is 0 if the port is right, else 1.

    Big_vision's weights are compared with numpy and need no torch. Nor does OUT alone, if `convert --verify` wrote it,
    nor CHECKPOINT or OUT with --reference, the outputs of your own model; that also shows whether heads or pool were
    assumed wrongly. All take --json.
    """
    written = {
        parameter.name: 'OUT' if parameter.name == 'folder' else parameter.opts[0]
        for parameter in context.command.params
        if parameter.name in arguments and context.get_parameter_source(parameter.name) != ParameterSource.DEFAULT
    }
    return RIGHT if work().verify(written, **arguments) else WRONG


@cli.command(
    'export',
    epilog=examples(
        'flax-vit convert deep_vit.pt digits --channels 1',
        'flax-vit export digits back.safetensors',
    ),
)
@click.argument('folder', metavar='OUT', type=click.Path(path_type=Path))
@click.argument('target', metavar='CHECKPOINT', type=click.Path(path_type=Path))
@click.option(
    '--layout', metavar='NAME', help="An older release's names: V7 to V0, S1, S0, D1, D0. The default is the newest's."
)
@click.option('--overwrite', is_flag=True, help='Replace CHECKPOINT if it exists.')
def export_command(**arguments: Any) -> None:
    """Write the parameters in the folder OUT back to CHECKPOINT, .safetensors or .pt (.npz for an OfficialSimpleViT).

    The tensors get the names that vit-pytorch, or the paper's own code, gives them: load_state_dict takes the file as
    it is. A .pt needs torch.
    """
    work().export_checkpoint(**arguments)


@cli.command(
    'serve-export',
    epilog=examples(
        'flax-vit convert deep_vit.pt digits --channels 1',
        'flax-vit serve-export digits digits.npz --platform cpu',
    ),
)
@click.argument('folder', metavar='OUT', type=click.Path(path_type=Path))
@click.argument('target', metavar='FILE', type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    '--platform',
    'platforms',
    type=click.Choice(['cpu', 'cuda', 'rocm', 'tpu']),
    multiple=True,
    default=['cpu', 'cuda', 'tpu'],
    show_default=True,
    help='Where it will run; repeat the option for several.',
)
@click.option('--image-size', metavar='SIZE', callback=size, help="Size of the images, if not the model's.")
@click.option('--dtype', metavar='DTYPE', help='Compute in it, say in bfloat16; the default is float32.')
@click.option('--param-dtype', metavar='DTYPE', help='Cast the parameters, say to bfloat16.')
@click.option('--overwrite', is_flag=True, help='Replace FILE if it exists.')
def serve_export_command(**arguments: Any) -> None:
    """Write the model in the folder OUT to FILE, an .npz of program and weights that runs with JAX alone.

    It takes any number of float32 images, channels last. Needs flatbuffers: pip install 'flax-vit[serving]'.
    """
    work().export_program(**arguments)


@cli.command('demo', epilog=examples('flax-vit demo'))
def demo_command() -> int:
    """Convert and verify three models that vit-pytorch trained on handwritten digits, and classify with them."""
    work()
    from convert.command_line import demo

    return RIGHT if demo.demo() else WRONG


@cli.command('doctor', epilog=examples('flax-vit doctor', 'flax-vit doctor --json'))
@click.option('--json', 'as_json', is_flag=True, help='Print everything as JSON, and nothing else.')
def doctor_command(as_json: bool) -> None:
    """Say what runs here: versions, JAX's devices, caches, and which optional packages are missing.

    Please add what it prints to your report of an error.
    """
    from convert.command_line import doctor

    with working('Importing JAX and torch'):
        facts = doctor.examine()
    print_json(facts) if as_json else show_facts(doctor.in_words(facts))


for command in (cli, *cli.commands.values()):
    command.params += EVERYWHERE


def main() -> None:
    """Run the command line; an error is one paragraph, and an exit status that `--help` explains."""
    print_anything()
    try:
        if COMPLETE in os.environ:  # a shell asks what the Tab key may put here
            sys.exit(shell_complete(cli, {}, 'flax-vit', COMPLETE, os.environ[COMPLETE]))
        # not cli.main, which gives 1 for what says nothing about a port
        with cli.make_context('flax-vit', sys.argv[1:]) as context:
            status = cli.invoke(context) or RIGHT
        if sys.stdout:  # it may be closed
            sys.stdout.flush()
    except Exit as ended:  # of --help and --version
        status = ended.exit_code
    except (Exception, KeyboardInterrupt) as error:
        status = next((status for kind, status in STATUSES if isinstance(error, kind)), UNFORESEEN)
        with suppress(OSError):  # there may be nothing to print to
            if '--debug' in sys.argv:  # also of what is wrong with the arguments
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
        err.print('[red]Unexpected error:[/]', escape(f'{type(error).__name__}: {error}'))
        err.print(
            'This says nothing about the port. Please report it to the authors of flax_vit: the command, what it '
            'prints with --debug, and what `flax-vit doctor` prints.'
        )
