"""What the commands of `flax-vit` do. `cli.py` says what each takes, and imports this when there is work."""

import json
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
from rich.markup import escape

from convert import conversion
from convert.command_line import demo, export
from convert.command_line.console import err, out
from convert.command_line.display import (
    show_comparison,
    show_converted,
    show_inspection,
    show_plan,
    show_report,
    show_rows,
    track,
    verdict,
)
from convert.command_line.facts import command_line, convert_line, facts_of, flag
from convert.command_line.images import load_images
from convert.errors import ConversionError
from convert.proof import parity, report
from convert.proof import saved_outputs as outputs
from convert.proof.measure import Row
from convert.proof.saved_outputs import Comparison
from flax_vit import export_serving, from_pretrained, save_pretrained
from flax_vit.folders.config import read_config

FIELDS = frozenset({'key', 'part', 'release', 'image_size', 'patch_size', 'heads', 'dim_head', 'pool', 'dropout'})
FIELDS |= {'emb_dropout', 'channels', 'image_format', 'num_classes'}
RUN = frozenset({'images', 'count', 'seed', 'dtype', 'gradients', 'page'})

Arguments = ParamSpec('Arguments')
Result = TypeVar('Result')


def with_float64(command: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The command in JAX's 64-bit mode: float64 weights keep their bits on the way through."""

    @wraps(command)
    def run(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        with jax.enable_x64(True):
            return command(*arguments, **options)

    return run


@with_float64
def inspect_checkpoint(source: str, *, as_json: bool, **options: Any) -> None:
    """Say what `source` is, in words or as JSON."""
    fields = given(options)
    if is_converted(source):
        if fields:
            raise ConversionError(
                f'{source} is a folder that convert wrote; it tells all itself, without {flags(fields)}.'
            )
        config = read_config(source)
        show_converted(config) if not as_json else print_json(config)
        return
    inspection = conversion.inspect(source, **fields)
    if as_json:
        print_json(facts_of(inspection, fields))
        return
    show_inspection(inspection)
    show_plan(inspection)
    to_copy('\nconvert it:', convert_line(inspection, fields))


@with_float64
def convert_checkpoint(source: str, folder: Path, *, proven: bool, **options: Any) -> bool:
    """Convert `source` to `folder`; if it is to be proven, whether it was right: what is wrong is not written."""
    fields = given(options)
    inspection = conversion.inspect(source, **fields)
    variables = conversion.place(inspection, track=track)
    facts, golden = conversion.provenance(inspection), None
    told = {name: value for name, value in fields.items() if name != 'param_dtype'}  # of the source, not of the folder
    if proven:
        with err.status('Running PyTorch and Flax, in float64 and float32 …'):
            proof = parity.verify(source, converted=(inspection.model, variables), count=4, **told)
        show_report(proof)
        if not proof.right:
            return False
        facts, golden = facts | {'verified': report.certificate(proof)}, outputs.golden_of(proof)
    save_pretrained(folder, inspection.model, variables, source=facts, golden=golden)
    show_inspection(inspection)
    out.print(f'[green]Converted[/] to {escape(str(folder))}')
    to_copy('use it:  ', f'model, variables = flax_vit.from_pretrained({str(folder)!r})')
    proof_of = command_line('verify', str(folder)) if proven else command_line('verify', source, str(folder), **told)
    to_copy('prove it:', proof_of)
    return True


@with_float64
def verify(written: Mapping[str, str], source: str, **arguments: Any) -> bool:
    """Compare with PyTorch, or with what it gave; whether the port is right.

    `written`: how those arguments are written that were given. Raises ConversionError when this way of verifying
    cannot use one of them.
    """
    way = WAYS[arguments['reference'] is not None, is_converted(source)]
    useless = ', '.join(text for name, text in written.items() if name not in {'source', *way.takes})
    if useless:
        raise ConversionError(f'{way.words.format(source=source)}: {useless} would change nothing.')
    if arguments['images'] and not arguments['gradients'] and 'seed' in written:
        raise ConversionError('--seed is of random images: beside --images it would change nothing.')
    for name in {'page', 'data'} & way.takes:
        if target := arguments[name]:
            report.check_target(target, page=name == 'page')
    return way.run(source, **{name: arguments[name] for name in way.takes})


def verify_checkpoint(
    source: str,
    *,
    folder: Path | None,
    images: Path | None,
    count: int,
    seed: int,
    dtype: str,
    gradients: bool,
    page: Path | None,
    data: Path | None,
    **options: Any,
) -> bool:
    """Run PyTorch on the checkpoint `source`, beside the model in `folder`, or what `source` converts to."""
    fields = given(options)
    converted = from_pretrained(folder) if folder is not None else None
    model = converted[0] if converted else conversion.inspect(source, **fields).model
    loaded = load_images(images, model, count) if images else None
    with err.status(f'Running PyTorch and Flax, in float64 and {dtype} …'):
        proof = parity.verify(
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
    show_inspection(proof.inspection)
    show_report(proof)
    figures = report.figures_of(proof, command=this_command(), images=str(images) if images else None, converted=folder)
    keep_figures(data, figures)
    if page:
        report.write_page(page, proof, figures)
        out.print(f'report:  {escape(str(page))}')
    return proof.right


def verify_kept(source: str, *, data: Path | None) -> bool:
    """Hold the folder `source` against the outputs of PyTorch that were kept there."""
    row = outputs.recheck(Path(source))
    show_rows([row], 'float32')
    words = 'computes' if row.right else 'does not compute'
    out.print(verdict(row.right, f'the Flax model {words} what PyTorch did when it was verified.'))
    keep_figures(data, figures_of(row))
    return row.right


def verify_reference(source: str, *, reference: Path, data: Path | None, **options: Any) -> bool:
    """Hold the checkpoint or folder `source` against outputs of the user's own PyTorch model."""
    images, saved = outputs.load_outputs(reference)
    if is_converted(source):
        model, variables = from_pretrained(source)
    else:
        inspection = conversion.inspect(source, **given(options))
        model, variables = inspection.model, conversion.place(inspection)
    comparison = outputs.compare_outputs(model, variables, images, saved)
    show_comparison(comparison)
    keep_figures(data, figures_of(comparison))
    return comparison.right


class Way(NamedTuple):
    """A way to verify: what is done, which arguments it takes, and why no others."""

    run: Callable[..., bool]
    takes: frozenset[str]
    words: str


# By whether a reference is given, and whether the source is a folder that `convert` wrote.
WAYS = {
    (False, False): Way(verify_checkpoint, FIELDS | RUN | {'folder', 'data'}, 'PyTorch runs on {source}'),
    (False, True): Way(
        verify_kept, frozenset({'data'}), '{source} is a folder that convert wrote, checked by what it keeps'
    ),
    (True, False): Way(
        verify_reference,
        FIELDS | {'reference', 'data'},
        '{source} is held against the images and logits of --reference',
    ),
    (True, True): Way(
        verify_reference,
        frozenset({'reference', 'data'}),
        '{source} is a folder that convert wrote, held as it is against the images and logits of --reference',
    ),
}


@with_float64
def export_checkpoint(folder: Path, target: Path, *, layout: str | None, overwrite: bool) -> None:
    """Write the parameters in `folder` back to a PyTorch checkpoint, `target`."""
    export.export(folder, target, layout=layout, overwrite=overwrite)
    out.print(f'[green]Exported[/] to {escape(str(target))}')


@with_float64
def export_program(
    folder: Path,
    target: Path,
    *,
    platforms: tuple[str, ...],
    image_size: int | tuple[int, int] | None,
    overwrite: bool,
    **options: Any,
) -> None:
    """Write the model in `folder` as one file that runs with JAX alone."""
    model, variables = from_pretrained(folder, **given(options))
    export_serving(target, model, variables, platforms=platforms, image_size=image_size, overwrite=overwrite)
    out.print(f'[green]Exported[/] to {escape(str(target))}, for {", ".join(platforms)}')


@with_float64
def run_demo() -> bool:
    """Convert, verify and compare, on three models; whether all is right."""
    return demo.demo()


def is_converted(source: str) -> bool:
    """Whether `source` is a folder that `convert` wrote."""
    try:
        read_config(source)
    except (OSError, ValueError):
        return False
    return True


def print_json(facts: Mapping[str, Any]) -> None:
    """Print facts for machines, and nothing else."""
    print(json.dumps(facts, indent=2))  # noqa: T201 - as it is, however narrow the terminal is


def to_copy(label: str, text: str) -> None:
    """Print what people copy: on one line, however narrow the terminal is."""
    out.print(label, escape(text), soft_wrap=True)


def flags(names: Iterable[str]) -> str:
    """Several of them."""
    return ', '.join(map(flag, names))


def this_command() -> str:
    """The command that runs."""
    return shlex.join(['flax-vit', *sys.argv[1:]])


def figures_of(result: Row | Comparison) -> dict[str, Any]:
    """The figures of a comparison with outputs that were kept."""
    when = datetime.now(UTC).isoformat(timespec='seconds')
    head = {'format': 'flax_vit outputs 1', 'time': when, 'command': this_command(), 'right': result.right}
    return head | asdict(result)


def keep_figures(target: Path | None, figures: Mapping[str, Any]) -> None:
    """Write them where they were asked for."""
    if target:
        report.write_json(target, figures)
        out.print(f'figures: {escape(str(target))}')


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}
