"""What the options are for: memory against the number of tokens, compile time against the depth.

    python benchmarks/scaling.py [--target 'TPU v5e'] [--only PART] [--json FILE] [--picture FILE]

Tokens: one S/16-wide block of each model; the memory that XLA plans for temporaries of the compiled forward and of its
gradient, with the attention map held whole and in chunks of queries, and the time: of the forward wherever its memory
is there, of the gradient up to 4,096 patches. Depth: the time to compile the forward and the training step of small
models, layer by layer, scanned, and scanned with remat. For a target that is not here everything is only compiled,
and the plain and the fused attention besides, in bfloat16.
"""

import json
import statistics
import time
from pathlib import Path
from typing import Any

import rich_click as click
from rich.console import Console
from rich.progress import track
from rich.table import Table
from targets import TARGETS, devices
from ways import filled, machine

CHUNK = 256  # queries
SIDES = (16, 32, 64, 128)  # of the grid of patches: 256 to 16,384 patches
TIMED = 64  # the largest grid of which the gradient is run, too, and not only compiled: it would take minutes
FITS = 4 * 2**30  # bytes; a forward that needs more is only compiled
DEPTHS = (8, 64)
ATTENTION = ('plain', 'fused')
PARTS = ('tokens', 'fused', 'depth')


def build(name: str, sharding: Any, **fields: Any) -> Any:
    """A model, the shapes of its variables and of one image; on the device of `sharding`, None: of this machine."""
    import jax

    import flax_vit

    model = getattr(flax_vit, name)(num_classes=10, **fields)
    images = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), 'float32', sharding=sharding)
    return model, placed(jax.eval_shape(model.init, jax.random.key(0), images), sharding), images


def placed(shapes: Any, sharding: Any) -> Any:
    """These shapes on that device."""
    import jax

    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)


def gradient(model: Any) -> Any:
    """The gradient of a loss by the variables."""
    import jax
    import jax.numpy as jnp
    import optax

    def loss(variables: Any, images: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(
            model.apply(variables, images, train=True), jnp.zeros(len(images), int)
        ).mean()

    return jax.grad(loss)


def tokens(name: str, side: int, chunk: int | None, repetitions: int, sharding: Any, **options: Any) -> dict[str, Any]:
    """Memory and seconds of the forward and its gradient, with `side` x `side` patches; None where there are none."""
    import jax

    fields = {'image_size': 2 * side, 'patch_size': 2, 'dim': 384, 'depth': 1, 'heads': 6, 'mlp_dim': 1536}
    model, variables, images = build(name, sharding, **fields, query_chunk_size=chunk, **options)
    row: dict[str, Any] = {'model': name, 'tokens': side**2 + (name != 'SimpleViT'), 'chunk': chunk, **options}
    for what, function in {'forward': model.apply, 'gradient': gradient(model)}.items():
        row |= {f'{what}_bytes': None, f'{what}_seconds': None}
        try:
            compiled = jax.jit(function).lower(variables, images).compile()
        except jax.errors.JaxRuntimeError as error:  # the compiler for TPUs refuses what does not fit
            if 'RESOURCE_EXHAUSTED' not in str(error):
                raise
            continue
        plan: Any = compiled.memory_analysis()
        memory = plan.temp_size_in_bytes
        row[f'{what}_bytes'] = memory
        if not sharding and (side <= TIMED or (what == 'forward' and memory <= FITS)):
            arguments = filled((variables, images))
            seconds = []
            for _ in range(repetitions + 1 if side <= TIMED else 1):  # the first is not counted if there are others
                start = time.perf_counter()
                jax.block_until_ready(compiled(*arguments))
                seconds.append(time.perf_counter() - start)
            row[f'{what}_seconds'] = statistics.median(seconds[1:] or seconds)
    return row


def compilation(name: str, depth: int, sharding: Any, **options: bool) -> dict[str, Any]:
    """Seconds to trace and compile the forward and the training step at a depth."""
    import jax
    import optax

    fields = {'image_size': 32, 'patch_size': 8, 'dim': 64, 'depth': depth, 'heads': 4, 'mlp_dim': 128}
    model, variables, images = build(name, sharding, **fields, **options)
    optimizer = optax.adamw(1e-4)

    def step(variables: Any, moments: Any, images: Any) -> Any:
        updates, moments = optimizer.update(gradient(model)(variables, images), moments, variables)
        return optax.apply_updates(variables, updates), moments

    moments = placed(jax.eval_shape(optimizer.init, variables), sharding)
    row: dict[str, Any] = {'model': name, 'depth': depth, **options}
    for what, function, arguments in (
        ('forward', model.apply, (variables, images)),
        ('step', step, (variables, moments, images)),
    ):
        start = time.perf_counter()
        jax.jit(function).lower(*arguments).compile()
        row[f'{what}_seconds'] = time.perf_counter() - start
    return row


def show(console: Console, by_tokens: list[dict[str, Any]], by_depth: list[dict[str, Any]]) -> None:
    """Two tables."""

    def cell(value: float | None, form: str) -> str:
        return '-' if value is None else form.format(value)

    memory = Table('model', 'tokens', 'queries at once', 'forward MiB', 'forward s', 'gradient MiB', 'gradient s')
    for row in by_tokens:
        figures = [
            cell(row[f'{what}_{kind}'] and row[f'{what}_{kind}'] / unit, form)
            for what in ('forward', 'gradient')
            for kind, unit, form in (('bytes', 2**20, '{:,.0f}'), ('seconds', 1, '{:.2f}'))
        ]
        at_once = ', '.join(filter(None, (str(row['chunk'] or 'all'), row.get('attention'))))
        memory.add_row(row['model'], f'{row["tokens"]:,}', at_once, *figures)
    console.print(memory)
    depth = Table('model', 'depth', 'options', 'forward: compile s', 'training step: compile s')
    for row in by_depth:
        options = ', '.join(name for name in ('scan_layers', 'remat') if row.get(name)) or 'none'
        times = [f'{row[f"{what}_seconds"]:.2f}' for what in ('forward', 'step')]
        depth.add_row(row['model'], str(row['depth']), options, *times)
    console.print(depth)


def draw(by_tokens: list[dict[str, Any]], target: Path) -> None:
    """Memory against tokens, both axes by powers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout='constrained')
    axes = figure.subplots()
    for name, colour in {'DeepViT': '#2563eb', 'SimpleViT': '#7d8aa0'}.items():
        for chunk, style in ((None, '--'), (CHUNK, '-')):
            rows = [row for row in by_tokens if (row['model'], row['chunk']) == (name, chunk)]
            label = f'{name}, {"whole map" if chunk is None else f"query_chunk_size={chunk}"}'
            sizes = [(row['forward_bytes'] or float('nan')) / 2**20 for row in rows]
            axes.loglog([row['tokens'] for row in rows], sizes, style, marker='o', color=colour, label=label)
    axes.set_xlabel('tokens')
    axes.set_ylabel('temporary memory of a forward, MiB')
    axes.legend()
    axes.spines[['top', 'right']].set_visible(False)
    figure.savefig(target, dpi=110)


@click.command()
@click.option('--quick', is_flag=True, help='Few tokens, little depth, to see that it runs.')
@click.option('--repetitions', type=click.IntRange(1), default=3, show_default=True)
@click.option(
    '--target', type=click.Choice(list(TARGETS)), help='Compile for this accelerator, which need not be here.'
)
@click.option(
    '--compilers',
    type=click.Path(path_type=Path),
    default=Path('build/compilers'),
    show_default=True,
    help="Where accelerators' compilers are, or come, from the package index.",
)
@click.option('--only', type=click.Choice(PARTS), help='One part; of a file that is there, the others stay.')
@click.option('--json', 'data', type=click.Path(path_type=Path), help='Write every measurement here.')
@click.option('--picture', type=click.Path(path_type=Path), help='Write memory against tokens here (.png, .svg).')
def main(
    quick: bool,
    repetitions: int,
    target: str | None,
    compilers: Path,
    only: str | None,
    data: Path | None,
    picture: Path | None,
) -> None:
    """Measure memory against tokens, and compile time against depth."""
    sharding = None
    if target:
        device = devices(target, compilers)[0]
        from jax.sharding import SingleDeviceSharding

        sharding = SingleDeviceSharding(device)
    sides, depths = (SIDES[:1], (1, 2)) if quick else (SIDES, DEPTHS)
    models = ('SimpleViT', 'DeepViT')
    console = Console(stderr=True)
    grid = [(name, side, chunk) for name in models for side in sides for chunk in (None, CHUNK)]
    about = {**machine(), 'target': target}
    measured: dict[str, Any] = {'machine': about, **{part: [] for part in PARTS}}
    if only and data and data.exists():
        measured = {**json.loads(data.read_text()), only: []}
    parts = [only] if only else PARTS

    def keep(what: str, row: dict[str, Any]) -> None:
        measured[what].append({**row, 'versions': about['versions']})
        if data:  # after every row: nothing measured is lost
            data.write_text(json.dumps(measured, indent=1))

    for which in track(grid if 'tokens' in parts else [], 'Tokens …', console=console):
        keep('tokens', tokens(*which, repetitions, sharding))
    soon = [side for side in sides if side <= TIMED or target != 'TPU v5e']  # whose compiler takes minutes for more
    ways_to_attend = [(name, side, how) for name in ('SimpleViT', 'ViT') for side in soon for how in ATTENTION]
    for name, side, how in track(ways_to_attend if target and 'fused' in parts else [], 'Fused …', console=console):
        keep('fused', tokens(name, side, None, repetitions, sharding, attention=how, dtype='bfloat16'))
    ways: list[dict[str, bool]] = [{}, {'scan_layers': True}, {'scan_layers': True, 'remat': True}]
    stack = [(name, depth, options) for name in models for options in ways for depth in depths if 'depth' in parts]
    for name, depth, options in track(stack, 'Depth …', console=console):
        keep('depth', compilation(name, depth, sharding, **options))
    show(Console(), measured['tokens'] + measured['fused'], measured['depth'])
    if picture:
        draw(measured['tokens'], picture)


if __name__ == '__main__':
    main()
