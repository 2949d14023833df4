"""What the commands of `flax-vit` do. `cli.py` says what each takes, and imports this when there is work."""

import shlex
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import jax
from rich.markup import escape

from convert import conversion, demo, export, outputs, parity, report
from convert.console import err, out
from convert.display import (
    show_comparison,
    show_converted,
    show_inspection,
    show_plan,
    show_report,
    show_rows,
    track,
    verdict,
)
from convert.images import load_images
from flax_vit import export_serving, from_pretrained, save_pretrained
from flax_vit.folder import read_config

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
def inspect_checkpoint(source: str, **options: Any) -> None:
    """Say what `source` is."""
    if is_converted(source):
        show_converted(read_config(source))
        return
    inspection = conversion.inspect(source, **given(options))
    show_inspection(inspection)
    show_plan(inspection)


@with_float64
def convert_checkpoint(source: str, folder: Path, *, proven: bool, **options: Any) -> bool:
    """Convert `source` to `folder`; if it is to be proven, whether it was right: what is wrong is not written."""
    fields = given(options)
    inspection = conversion.inspect(source, **fields)
    variables = conversion.place(inspection, track=track)
    facts, golden = conversion.provenance(inspection), None
    if proven:
        with err.status('Running PyTorch and Flax, in float64 and float32 …'):
            proof = parity.verify(source, converted=(inspection.model, variables), count=4, **fields)
        show_report(proof)
        if not proof.right:
            return False
        facts, golden = facts | {'verified': report.certificate(proof)}, outputs.golden_of(proof)
    save_pretrained(folder, inspection.model, variables, source=facts, golden=golden)
    show_inspection(inspection)
    out.print(f'[green]Converted[/] to {escape(str(folder))}')
    out.print(f'use it:   model, variables = flax_vit.from_pretrained({escape(repr(str(folder)))})')
    verified = [str(folder)] if proven else [source, str(folder)]
    out.print(f'prove it: flax-vit verify {escape(shlex.join(verified))}')
    return True


@with_float64
def verify_checkpoint(
    source: str,
    folder: Path | None,
    *,
    images: Path | None,
    count: int,
    seed: int,
    dtype: str,
    gradients: bool,
    reference: Path | None,
    page: Path | None,
    data: Path | None,
    **options: Any,
) -> bool:
    """Compare with PyTorch, or with what it gave; whether the port is right."""
    fields = given(options)
    if reference is not None:
        images_given, saved = outputs.load_outputs(reference)
        model, variables = load_port(source, folder, fields)
        comparison = outputs.compare_outputs(model, variables, images_given, saved)
        show_comparison(comparison)
        return comparison.right
    if is_converted(source):
        row = outputs.recheck(Path(source))
        show_rows([row], 'float32')
        out.print(
            verdict(row.right, f'the Flax model {"computes" if row.right else "does not compute"} what PyTorch does.')
        )
        return row.right
    for target in filter(None, (page, data)):
        report.check_target(target, page=target == page)
    inspection = conversion.inspect(source, **fields)
    converted = from_pretrained(folder) if folder is not None else None
    if converted is not None and isinstance(converted[0], inspection.layout.model):
        open_fields = [name for name, field in inspection.fields.items() if field.how in {'unknown', 'assumed'}]
        fields |= {name: getattr(converted[0], name) for name in open_fields}
        inspection = conversion.inspect(source, **fields)
    loaded = load_images(images, inspection.model, count) if images else None
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
    show_inspection(inspection)
    show_report(proof)
    command = shlex.join(['flax-vit', *sys.argv[1:]])
    figures = report.figures_of(proof, command=command, images=str(images) if images else None, converted=folder)
    if data:
        report.write_json(data, figures)
        out.print(f'figures: {escape(str(data))}')
    if page:
        report.write_page(page, proof, figures)
        out.print(f'report:  {escape(str(page))}')
    return proof.right


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
    """Convert, verify and compare, on two models; whether all is right."""
    return demo.demo()


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
    inspection = conversion.inspect(source, **fields)
    return inspection.model, conversion.place(inspection)


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}
