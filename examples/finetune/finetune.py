"""Fine-tunes a converted model on another task: MNIST's digits, from weights that PyTorch trained on digits of 8x8.

No step needs torch. The recipe is that of "Better plain ViT baselines for ImageNet-1k" (Beyer et al. 2022,
arXiv:2205.01580), with other sizes for a smaller task; docs/finetuning.md has both side by side.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import rich_click as click
from flax import linen as nn
from flax.traverse_util import path_aware_map
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt8
from matplotlib import rc_context
from matplotlib.figure import Figure
from mnist import Images, Labels, batches, digits
from rich.console import Console
from rich.progress import BarColumn, Progress, TimeRemainingColumn

import convert
import flax_vit
from convert.command_line.demo import FIELDS, checkpoint_path

CLASSES = 10
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1e-4  # of a step at the full learning rate
WARM_UP = 0.1  # the share of the steps
CLIP = 1.0  # the largest norm of the gradients
MIXUP = 0.2

Variables = Any  # nested dicts of arrays
Metrics = dict[str, Float[Array, '']]
Curve = list[dict[str, float]]  # step, loss and accuracy of the batches since the last point, accuracy held out


class State(NamedTuple):
    """All that changes in training, and so all that a checkpoint holds."""

    step: Int[Array, '']
    variables: Variables
    optimizer: Any


def starting_point(name: str, start: str, image_size: int, folder: Path, seed: int) -> tuple[nn.Module, Variables]:
    """The model for the new task: with the weights converted from PyTorch, or with fresh ones."""
    model, variables = convert.from_torch(checkpoint_path(name), **FIELDS[name])
    if start == 'scratch':
        model = model.clone(num_classes=CLASSES, image_size=image_size)
        return model, jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, image_size, image_size, 1)))
    flax_vit.save_pretrained(folder, model, variables)
    return flax_vit.from_pretrained(folder, num_classes=CLASSES, image_size=image_size)


def optimizer_of(steps: int) -> optax.GradientTransformation:
    """AdamW after a linear warm-up, along a cosine to zero; only matrices decay."""
    schedule = optax.warmup_cosine_decay_schedule(0, LEARNING_RATE, round(WARM_UP * steps), steps)

    def matrices(tree: Variables) -> Variables:
        return path_aware_map(lambda path, _: path[-1] == 'kernel', tree)

    # optax multiplies the decay by the learning rate; the paper's is not
    adamw = optax.adamw(schedule, weight_decay=WEIGHT_DECAY / LEARNING_RATE, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(CLIP), adamw)


def normalised(images: UInt8[Array, '*shape']) -> Float[Array, '*shape']:
    """From -1 (paper) to 1 (ink), as the weights were trained."""
    return images.astype(jnp.float32) / 127.5 - 1


def train_step_of(
    model: nn.Module, optimizer: optax.GradientTransformation, seed: int
) -> Callable[[State, dict[str, Array]], tuple[State, Metrics]]:
    """The jitted step. Its random numbers come from the seed and the step, so they need no place in the state."""

    def train_step(state: State, batch: dict[str, Array]) -> tuple[State, Metrics]:
        share_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
        share = jax.random.beta(share_key, MIXUP, MIXUP)

        def mixed(x: Float[Array, 'batch ...']) -> Float[Array, 'batch ...']:
            """Mixup (Zhang et al. 2017, arXiv:1710.09412): each example with its neighbour in the batch."""
            return share * x + (1 - share) * jnp.roll(x, 1, axis=0)

        images = mixed(normalised(batch['images']))
        targets = mixed(jax.nn.one_hot(batch['labels'], CLASSES))

        def loss_of(variables: Variables) -> tuple[Array, Array]:
            logits: Any = model.apply(variables, images, train=True, rngs={'dropout': dropout_key})
            return optax.softmax_cross_entropy(logits, targets).mean(), logits

        (loss, logits), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.variables)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.variables)
        variables = optax.apply_updates(state.variables, updates)
        accuracy = (logits.argmax(axis=1) == targets.argmax(axis=1)).mean()
        return State(state.step + 1, variables, optimizer_state), {'loss': loss, 'accuracy': accuracy}

    return jax.jit(train_step, donate_argnums=0)


def evaluation_of(
    model: nn.Module, images: Images, labels: Labels, split: NamedSharding
) -> Callable[[Variables], float]:
    """A function that gives the share of the images that the variables name rightly, on all devices."""
    padding = -len(images) % split.mesh.size  # each device gets as many; no class is -1
    placed_images = jax.device_put(np.pad(images, [(0, padding), (0, 0), (0, 0), (0, 0)]), split)
    placed_labels = jax.device_put(np.pad(labels, (0, padding), constant_values=-1), split)

    @jax.jit
    def right(variables: Variables, images: Array, labels: Array) -> Array:
        logits: Any = model.apply(variables, normalised(images))
        return (logits.argmax(axis=1) == labels).sum()

    return lambda variables: int(right(variables, placed_images, placed_labels)) / len(images)


def fit(
    model: nn.Module,
    variables: Variables,
    data: tuple[Images, Labels, Images, Labels],
    folder: Path,
    settings: dict[str, Any],
    progress: Progress,
) -> tuple[Variables, Curve]:
    """The variables after training, and the figures on the way; from the newest checkpoint in the folder, if any.

    The settings are `steps`, `batch`, `every` and `seed`, and whatever else must not change when a run goes on.
    """
    images, labels, held_out_images, held_out_labels = data
    steps, every, seed = settings['steps'], settings['every'], settings['seed']
    mesh = Mesh(np.array(jax.devices()), ('data',))
    whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec('data'))

    optimizer = optimizer_of(steps)
    train_step = train_step_of(model, optimizer, seed)
    accuracy_of = evaluation_of(model, held_out_images, held_out_labels, split)
    state = jax.device_put(State(jnp.zeros((), int), variables, optimizer.init(variables)), whole)
    curve: Curve = []
    with ocp.CheckpointManager(folder.resolve(), options=ocp.CheckpointManagerOptions(max_to_keep=2)) as checkpoints:
        if (newest := checkpoints.latest_step()) is not None:
            run = checkpoints.restore(newest, args=ocp.args.Composite(run=ocp.args.JsonRestore())).run
            if run['settings'] != settings:
                raise click.UsageError(
                    f'{folder} holds a run with other settings, {run["settings"]} instead of {settings}: '
                    'go on with those, or give another folder.'
                )
            curve = run['curve']
            state = checkpoints.restore(newest, args=ocp.args.Composite(state=ocp.args.StandardRestore(state))).state

        start, window = int(state.step), []
        task = progress.add_task(folder.parent.name, total=steps, completed=start, figures=words(curve))
        dataset = batches(images, labels, size=settings['batch'], seed=seed)[start:steps].to_iter_dataset()
        for step, batch in enumerate(dataset, start + 1):
            state, metrics = train_step(state, jax.device_put(batch, split))
            window.append(metrics)  # on the devices: to read them now would make the devices wait
            if step % every == 0 or step == steps:
                mean = {name: float(np.mean([metrics[name] for metrics in window])) for name in metrics}
                curve.append({'step': step, **mean, 'held_out': accuracy_of(state.variables)})
                window = []
                run = {'settings': settings, 'curve': curve}
                if progress.disable:  # no bar, so a line
                    progress.console.print(f'{folder.parent.name}: step {step}, {words(curve)}', soft_wrap=True)
                checkpoints.save(  # in the background; whole or not at all
                    step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run))
                )
            progress.update(task, completed=step, figures=words(curve))
    return state.variables, curve


def words(curve: Curve) -> str:
    return ', '.join(f'{name} {value:.3f}' for name, value in curve[-1].items() if name != 'step') if curve else ''


def draw(curves: dict[str, Curve], file: Path) -> None:
    """The accuracy on the held-out digits against the steps, one line for each start."""
    figure = Figure(figsize=(6.4, 3.6), layout='constrained')
    axes = figure.subplots()
    for start, curve in curves.items():
        axes.plot([point['step'] for point in curve], [100 * point['held_out'] for point in curve], label=start)
    axes.set(xlabel='steps', ylabel='held-out digits right, %')
    axes.grid(alpha=0.3)
    axes.legend(loc='lower right')
    with rc_context({'svg.hashsalt': 'flax_vit'}):  # the same figures, the same bytes
        figure.savefig(file, metadata={'Date': None})


@click.command()
@click.argument('out', type=click.Path(path_type=Path, file_okay=False))
@click.option('--model', type=click.Choice(list(FIELDS)), default='deep_vit', show_default=True, help='Which to train.')
@click.option(
    '--start',
    'starts',
    type=click.Choice(['converted', 'scratch']),
    multiple=True,
    default=['converted'],
    show_default=True,
    help='From the weights that PyTorch trained, or from fresh ones. Give both to compare them.',
)
@click.option('--steps', type=click.IntRange(1), default=1000, show_default=True, help='Batches to train on.')
@click.option('--batch', type=click.IntRange(1, 4000), default=128, show_default=True, help='Images in a batch.')
@click.option('--every', type=click.IntRange(1), default=100, show_default=True, help='Steps between checkpoints.')
@click.option('--image-size', type=click.IntRange(4), default=16, show_default=True, help='MNIST has 28 pixels a side.')
@click.option('--seed', default=0, show_default=True, help='Of fresh weights, batches, augmentation, dropout.')
def main(out: Path, model: str, starts: tuple[str, ...], **settings: int) -> None:
    """Fine-tune a converted model on MNIST, and leave it in OUT/START/model for flax_vit.from_pretrained.

    The accuracy on the way goes to OUT/figures.json and OUT/accuracy.svg. After an interruption the same command goes
    on from the newest checkpoint: the weights come out the same, to the bit.
    """
    patch_size = FIELDS[model]['patch_size']
    if settings['image_size'] % patch_size:
        raise click.UsageError(f'--image-size {settings["image_size"]} is not a multiple of the patch, {patch_size}.')
    if settings['batch'] % jax.device_count():
        raise click.UsageError(f'--batch {settings["batch"]} is not a multiple of the {jax.device_count()} devices.')
    console = Console()
    columns = ('{task.description}', BarColumn(), '{task.fields[figures]}', TimeRemainingColumn())
    data = digits(settings['image_size'])
    curves = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for start in starts:
            folder = out / start
            vit, variables = starting_point(
                model, start, settings['image_size'], folder / 'converted', settings['seed']
            )
            variables, curves[start] = fit(
                vit, variables, data, folder / 'checkpoints', {'model': model, **settings}, progress
            )
            flax_vit.save_pretrained(folder / 'model', vit, variables)
            console.print(f'{start}: {curves[start][-1]["held_out"]:.1%} of {len(data[3])} held-out digits right')
    (out / 'figures.json').write_text(json.dumps({'model': model, **settings, 'curves': curves}, indent=2) + '\n')
    draw(curves, out / 'accuracy.svg')


if __name__ == '__main__':
    main()
