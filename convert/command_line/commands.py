"""What the commands of `flax-vit` do. `cli.py` says what each takes, and imports this when there is work."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from flax import linen as nn
from rich.markup import escape

from convert import conversion
from convert.architectures import architecture_of
from convert.command_line import export
from convert.command_line.console import out, print_json, working
from convert.command_line.display import (
    show_comparison,
    show_converted,
    show_inspection,
    show_plan,
    show_report,
    show_rows,
    track,
    verdict,
    warn_of,
)
from convert.command_line.facts import command_line, convert_line, facts_of, figures_of, flag, this_command
from convert.command_line.images import load_images
from convert.command_line.options import MODEL
from convert.conversion import Inspection
from convert.errors import ConversionError
from convert.proof import parity, report, saved_outputs as outputs
from flax_vit import export_serving, from_pretrained, save_pretrained
from flax_vit.folders.config import origin, read_config

FIELDS = frozenset(str(option.name) for option in MODEL)
PRINTED = Path('-')  # not a file: standard output
RUN = frozenset({'images', 'count', 'seed', 'dtype', 'gradients', 'page'})


def inspect_checkpoint(source: str, *, as_json: bool, **options: Any) -> None:
    """Say what `source` is, in words or as JSON."""
    fields = given(options)
    if is_converted(source):
        if fields:
            raise ConversionError(
                f'{source} is a folder that convert wrote; it has all fields already: leave out '
                f'{", ".join(map(flag, fields))}.'
            )
        config = read_config(source)
        show_converted(config) if not as_json else print_json(config)
        return
    inspection = inspected(source, fields)
    if as_json:
        print_json(facts_of(inspection, fields))
        return
    show_inspection(inspection)
    show_plan(inspection)
    to_copy('\nconvert it:', convert_line(inspection, fields))


def convert_checkpoint(source: str, folder: Path, *, proven: bool, **options: Any) -> bool:
    """Convert `source` to `folder`; if it is to be proven, whether it was right: what is wrong is not written."""
    fields = given(options)
    inspection = inspected(source, fields)
    variables = conversion.place(inspection, track=track)
    told = {name: value for name, value in fields.items() if name != 'param_dtype'}  # of the source, not of the folder
    proof = None
    if proven:
        with working(f'Running {architecture_of(inspection.model).truth} and Flax, in float64 and float32'):
            proof = parity.verify(source, converted=(inspection.model, variables), count=4, **told)
        show_report(proof)
        if not proof.right:
            return False
    with working(f'Writing {folder}'):
        facts = conversion.provenance(inspection) | ({'verified': report.certificate(proof)} if proof else {})
        golden = outputs.golden_of(proof) if proof else None
        save_pretrained(folder, inspection.model, variables, source=facts, golden=golden)
    show_inspection(inspection)
    out.print(f'[green]Converted[/] to {escape(str(folder))}')
    if inspection.assumptions:
        out.print(
            f'[yellow]Assumed:[/] {escape(inspection.assumptions)}. Pass what you know as arguments.', soft_wrap=True
        )
    to_copy('use it:  ', f'model, variables = flax_vit.from_pretrained({str(folder)!r})')
    proof_of = command_line('verify', str(folder)) if proven else command_line('verify', source, str(folder), **told)
    to_copy('prove it:', proof_of)
    return True


def verify(written: Mapping[str, str], source: str, **arguments: Any) -> bool:
    """Compare with PyTorch, or with what it gave; whether the port is right.

    `written`: how those arguments are written that were given. Raises ConversionError when this way of verifying
    cannot use one of them.
    """
    way = WAYS[arguments['reference'] is not None, is_converted(source)]
    useless = ', '.join(text for name, text in written.items() if name not in {'source', *way.takes})
    if useless:
        hint = f' To check {arguments["folder"]}, give it alone.' if 'folder' in written else ''
        raise ConversionError(f'{way.words.format(source=source)}: {useless} has no effect here.{hint}')
    if arguments['images'] and not arguments['gradients'] and 'seed' in written:
        raise ConversionError('--seed is for random images: with --images it has no effect.')
    for name in {'page', 'data'} & way.takes:
        if target := arguments[name]:
            report.check_target(target, page=name == 'page')
    if arguments['data'] == PRINTED:
        out.quiet = True
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
    converted = None
    if folder is not None:
        converted = loaded_from(folder)
        if not fields.keys() - {'key', 'part', 'release'}:  # else one could contradict the other, as heads do dim_head
            fields |= told_when_converted(folder, converted[0])
    model = converted[0] if converted else inspected(source, fields).model
    loaded = None
    if images:
        with working(f'Reading {images}'):
            loaded = load_images(images, model, count)
    with working(f'Running {architecture_of(model).truth} and Flax, in float64 and {dtype}'):
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
        with working(f'Drawing {page}'):
            report.write_page(page, proof, figures)
        out.print(f'report:  {escape(str(page))}')
    return proof.right


def verify_kept(source: str, *, data: Path | None) -> bool:
    """Hold the folder `source` against the outputs of PyTorch that were kept there."""
    with working('Running Flax on the images that were kept'):
        row = outputs.recheck(Path(source))
    _, verified = origin(read_config(source))
    truth = verified.get('truth', 'PyTorch')
    show_rows([row], 'float32', truth)
    words = 'computes' if row.right else 'does not compute'
    out.print(verdict(row.right, f'the Flax model {words} what {truth} did when it was verified.'))
    if verified:  # it may stand on what was assumed
        out.print('Then it was said:', escape(verified['verdict']))
    keep_figures(data, figures_of(row))
    return row.right


def verify_reference(source: str, *, reference: Path, data: Path | None, **options: Any) -> bool:
    """Hold the checkpoint or folder `source` against outputs of the user's own PyTorch model."""
    images, saved = outputs.load_outputs(reference)
    if is_converted(source):
        model, variables = loaded_from(source)
    else:
        inspection = inspected(source, given(options))
        model, variables = inspection.model, conversion.place(inspection, track=track)
        warn_of(inspection)
    with working(f'Running Flax on the images of {reference}'):
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


def export_checkpoint(folder: Path, target: Path, *, layout: str | None, overwrite: bool) -> None:
    """Write the parameters in `folder` back to a PyTorch checkpoint, `target`."""
    with working(f'Writing {target}'):
        export.export(folder, target, layout=layout, overwrite=overwrite)
    out.print(f'[green]Exported[/] to {escape(str(target))}')


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
    model, variables = loaded_from(folder, **given(options))
    with working(f'Compiling for {", ".join(platforms)}'):
        export_serving(target, model, variables, platforms=platforms, image_size=image_size, overwrite=overwrite)
    out.print(f'[green]Exported[/] to {escape(str(target))}, for {", ".join(platforms)}')


def is_converted(source: str) -> bool:
    """Whether `source` is a folder that `convert` wrote."""
    try:
        read_config(source)
    except (OSError, ValueError):
        return False
    return True


def inspected(source: str, fields: Mapping[str, Any]) -> Inspection:
    """What `source` is."""
    with working(f'Reading {source}') if Path(source).exists() else nullcontext():  # what is fetched has its own bar
        return conversion.inspect(source, **fields)


def loaded_from(folder: str | Path, **fields: Any) -> tuple[nn.Module, Any]:
    """The model in a folder that `convert` wrote, and its variables."""
    with working(f'Reading {folder}'):
        return from_pretrained(folder, **fields)


def to_copy(label: str, text: str) -> None:
    """Print what people copy: on one line, however narrow the terminal is."""
    out.print(label, escape(text), soft_wrap=True)


def keep_figures(target: Path | None, figures: Mapping[str, Any]) -> None:
    """Write them where they were asked for."""
    if target == PRINTED:
        print_json(report.to_json(figures))
    elif target:
        report.write_json(target, figures)
        out.print(f'figures: {escape(str(target))}')


def told_when_converted(folder: Path, model: Any) -> dict[str, Any]:
    """The fields that `convert` was given for the model in the folder, and that have an option here."""
    facts, _ = origin(read_config(folder))
    hows = facts.get('fields')
    told = [name for name, how in hows.items() if how == 'given'] if isinstance(hows, dict) else []
    return {name: getattr(model, name) for name in FIELDS.intersection(told) if hasattr(model, name)}


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}
