"""`flax-vit`: the command line."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import rich_click as click
from rich.markup import escape

from convert.conversion import inspect, place, provenance
from convert.display import (
    err,
    out,
    show_comparison,
    show_converted,
    show_inspection,
    show_plan,
    show_report,
    show_rows,
    track,
    verdict,
)
from convert.export import export
from convert.images import load_images
from convert.outputs import compare_outputs, golden_of, load_outputs, recheck
from convert.report import certificate, check_target, figures_of, write_json, write_page
from convert.verify import verify
from flax_vit import __version__, from_pretrained, save_pretrained
from flax_vit.pretrained import read_config

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
        click.option('--channels', type=click.IntRange(1), help='Of the images, when it is not 3.'),
        click.option('--num-classes', type=click.IntRange(0), help='0: without the head, for the pooled features.'),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.group(context_settings={'help_option_names': ['-h', '--help']})
@click.version_option(__version__)
@click.option('--debug', is_flag=True, help='Show the traceback of an error.')
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Turn vit-pytorch's DeepViT and SimpleViT checkpoints into Flax models, and prove that both compute the same.

    Begin with `flax-vit demo`, or with `flax-vit inspect CHECKPOINT` on your own file.

    Exit status: 0 all is right; 1 verify found the port wrong; 2 bad usage or input.
    """
    context.with_resource(jax.enable_x64(True))  # float64 weights keep their bits on the way through


@cli.command('inspect')
@click.argument('source', metavar='CHECKPOINT')
@model_options
def inspect_command(source: str, **options: Any) -> None:
    """Say what CHECKPOINT is, and how each of its tensors would be converted; nothing is written.

    CHECKPOINT is a file (.pt, .pth, .safetensors, …: the content tells) or a folder that holds one, or a folder that
    `convert` wrote.
    """
    if is_converted(source):
        show_converted(read_config(source))
        return
    inspection = inspect(source, **given(options))
    show_inspection(inspection)
    show_plan(inspection)


@cli.command('convert')
@click.argument('source', metavar='CHECKPOINT')
@click.argument('folder', metavar='OUT', type=click.Path(path_type=Path))
@model_options
@click.option('--param-dtype', help='Cast the parameters, say to bfloat16; without it they keep their bits.')
@click.option(
    '--verify', 'proven', is_flag=True, help="Verify first, and keep PyTorch's outputs in OUT to check it by, anywhere."
)
def convert_command(source: str, folder: Path, proven: bool, **options: Any) -> None:
    """Convert CHECKPOINT to the folder OUT, for flax_vit.from_pretrained(OUT); no torch is needed for that.

    With --verify, which needs torch and vit-pytorch, `flax-vit verify OUT` later checks OUT without either.
    """
    fields = given(options)
    inspection = inspect(source, **fields)
    variables = place(inspection, track=track)
    facts, golden = provenance(inspection), None
    if proven:
        with err.status('Running PyTorch and Flax, in float64 and float32 …'):
            report = verify(source, converted=(inspection.model, variables), count=4, **fields)
        show_report(report)
        if not report.right:
            sys.exit(WRONG)
        facts, golden = facts | {'verified': certificate(report)}, golden_of(report)
    save_pretrained(folder, inspection.model, variables, source=facts, golden=golden)
    show_inspection(inspection)
    out.print(f'[green]Converted[/] to {escape(str(folder))}')
    out.print(f'use it:   model, variables = flax_vit.from_pretrained({escape(repr(str(folder)))})')
    proof = [str(folder)] if proven else [source, str(folder)]
    out.print(f'prove it: flax-vit verify {escape(shlex.join(proof))}')


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
def verify_command(
    source: str,
    folder: Path | None,
    images: Path | None,
    count: int,
    seed: int,
    dtype: str,
    gradients: bool,
    reference: Path | None,
    page: Path | None,
    data: Path | None,
    **options: Any,
) -> None:
    """Run vit-pytorch's module and the Flax model on the same images; compare every block.

    With OUT, the folder that `convert` wrote is what gets verified; its fields are used where none are given. Needs
    torch and vit-pytorch: pip install 'flax-vit[torch]'. The exit status is 0 when the port is right, 1 when not.

    Without torch: give OUT alone, if `convert --verify` wrote it; or outputs of your own model with --reference, which
    also tells when heads or pool were assumed wrongly.
    """
    fields = given(options)
    if reference is not None:
        images_given, outputs = load_outputs(reference)
        model, variables = load_port(source, folder, fields)
        comparison = compare_outputs(model, variables, images_given, outputs)
        show_comparison(comparison)
        sys.exit(RIGHT if comparison.right else WRONG)
    if is_converted(source):
        row = recheck(Path(source))
        show_rows([row], 'float32')
        out.print(verdict(row.right))
        sys.exit(RIGHT if row.right else WRONG)
    for target in filter(None, (page, data)):
        check_target(target, page=target == page)
    inspection = inspect(source, **fields)
    converted = from_pretrained(folder) if folder is not None else None
    if converted is not None and isinstance(converted[0], inspection.layout.model):
        open_fields = [name for name, field in inspection.fields.items() if field.how in {'unknown', 'assumed'}]
        fields |= {name: getattr(converted[0], name) for name in open_fields}
        inspection = inspect(source, **fields)
    loaded = load_images(images, inspection.model, count) if images else None
    with err.status(f'Running PyTorch and Flax, in float64 and {dtype} …'):
        report = verify(
            source,
            converted=converted,
            images=loaded,
            count=count,
            seed=seed,
            dtype=dtype,
            gradients=gradients,
            attention=page is not None,
            **fields,
        )
    show_inspection(inspection)
    show_report(report)
    command = shlex.join(['flax-vit', *sys.argv[1:]])
    figures = figures_of(report, command=command, images=str(images) if images else None, converted=folder)
    if data:
        write_json(data, figures)
        out.print(f'figures: {escape(str(data))}')
    if page:
        write_page(page, report, figures)
        out.print(f'report:  {escape(str(page))}')
    sys.exit(RIGHT if report.right else WRONG)


@cli.command('export')
@click.argument('folder', metavar='OUT', type=click.Path(path_type=Path))
@click.argument('target', metavar='CHECKPOINT', type=click.Path(path_type=Path))
@click.option('--layout', help="An older release's names: S1, S0, D1, D0; without it, the newest that computes this.")
@click.option('--overwrite', is_flag=True, help='Replace CHECKPOINT if it exists.')
def export_command(folder: Path, target: Path, layout: str | None, overwrite: bool) -> None:
    """Write the parameters in the folder OUT back to a PyTorch CHECKPOINT, .safetensors or .pt.

    The names are vit-pytorch's, so that load_state_dict takes it as it is. A .pt needs torch.
    """
    export(folder, target, layout=layout, overwrite=overwrite)
    out.print(f'[green]Exported[/] to {escape(str(target))}')


@cli.command('demo')
def demo_command() -> None:
    """Convert, verify and compare, on two models that vit-pytorch trained on handwritten digits."""
    from convert.demo import demo

    sys.exit(RIGHT if demo() else WRONG)


def is_converted(source: str) -> bool:
    """Whether `source` is a folder that `convert` wrote."""
    try:
        read_config(source)
    except (OSError, ValueError):
        return False
    return True


def load_port(source: str, folder: Path | None, fields: dict[str, Any]) -> tuple[Any, Any]:
    """The model and variables of the folder, or of the source, which may be such a folder or a checkpoint."""
    if folder is not None or is_converted(source):
        return from_pretrained(folder or source)
    inspection = inspect(source, **fields)
    return inspection.model, place(inspection)


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


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
