"""Does attention collapse with depth, and does re-attention cure it? The measure of the DeepViT paper, on own weights.

"DeepViT: Towards Deeper Vision Transformer" (Zhou et al. 2021, arXiv:2103.11886) says in section 3 that the attention
maps of a deep plain model become nearly the same from block to block. Here SimpleViT (plain attention) and DeepViT
(re-attention) are trained at several depths on the same digits with the same recipe; docs/attention.md has the result.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich_click as click
from flax import linen as nn
from jaxtyping import Array, Float, Int
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TimeRemainingColumn

from convert.command_line.demo import digits
from flax_vit import DeepViT, SimpleViT, features

LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
CLIP = 1.0  # the largest norm of the gradients
SIMILAR = 0.9  # the cosine above which two attention vectors count as similar
PICTURES = 128  # held-out digits whose attention maps are compared

# 16 patches, as they are: vit-pytorch's LayerNorm of each patch would hide how much ink a patch has
FIELDS: dict[str, Any] = {
    'image_size': 8,
    'patch_size': 2,
    'channels': 1,
    'num_classes': 10,
    'dim': 32,
    'heads': 4,
    'dim_head': 8,
    'mlp_dim': 64,
    'patch_norm': False,
    'scan_layers': True,  # compiles in the same time at any depth
}
MODELS: dict[str, Callable[..., nn.Module]] = {
    'plain': lambda depth: SimpleViT(**FIELDS, depth=depth),
    're-attention': lambda depth: DeepViT(**FIELDS, depth=depth, pool='mean'),
}

Variables = Any  # nested dicts of arrays
Images = Float[np.ndarray, 'batch 8 8 1']
Labels = Int[np.ndarray, ' batch']
Similarity = dict[str, Float[np.ndarray, 'layers layers']]  # 'share' and 'cosine'
Run = dict[str, Any]  # see `measure`


def cosines(
    maps: Float[Array, 'layers batch heads queries keys'],
) -> Float[Array, 'layers layers batch heads keys']:
    """The paper's M: for layers p and q, the cosine of their attention vectors of the same image, head h and token t.

    A token's attention vector is its column of the map, what it contributes to every query.
    """
    unit = maps / jnp.linalg.norm(maps, axis=3, keepdims=True)
    return jnp.einsum('pbhit,qbhit->pqbht', unit, unit, precision='highest')


def similarity(maps: Float[Array, 'layers batch heads queries keys']) -> dict[str, Float[Array, 'layers layers']]:
    """For every two layers, the share of all images' heads' tokens whose vectors are similar, and the mean cosine."""
    cosine = cosines(maps)
    return {'share': (cosine > SIMILAR).mean(axis=(2, 3, 4)), 'cosine': cosine.mean(axis=(2, 3, 4))}


def similarities(model: Any, variables: Variables, images: Array) -> dict[str, dict[str, Array]]:
    """`similarity` of a model's softmax maps and, of DeepViT, of what re-attention makes of them."""
    seen = features(model, variables, images, tokens=False, attention=True)
    kinds = {'softmax': seen.attention, 're-attention': seen.reattention}
    return {kind: similarity(jnp.stack([*maps.values()])) for kind, maps in kinds.items() if maps}


def train(
    model: nn.Module,
    variables: Variables,
    images: Images,
    labels: Labels,
    tick: Callable[[], None],
    *,
    steps: int,
    batch: int,
    seed: int,
) -> Variables:
    """The variables after training with AdamW, after a warm-up along a cosine to zero; `tick` is called each step."""
    schedule = optax.warmup_cosine_decay_schedule(0, LEARNING_RATE, steps // 10, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(schedule, weight_decay=WEIGHT_DECAY))

    def train_step(variables: Variables, state: Any, images: Array, labels: Array) -> tuple[Variables, Any]:
        def loss_of(variables: Variables) -> Array:
            logits: Any = model.apply(variables, images, train=True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, state = optimizer.update(jax.grad(loss_of)(variables), state, variables)
        return optax.apply_updates(variables, updates), state

    step, state, generator = jax.jit(train_step), optimizer.init(variables), np.random.default_rng(seed)
    for _ in range(steps):
        chosen = generator.choice(len(images), batch, replace=False)
        variables, state = step(variables, state, images[chosen], labels[chosen])
        tick()
    return variables


def measure(kind: str, depth: int, tick: Callable[[], None], *, steps: int, batch: int, seed: int) -> Run:
    """Trains one model: its accuracy on the held-out digits, and the similarity of its layers before and after."""
    images, labels, held_out_images, held_out_labels = digits()
    model = MODELS[kind](depth)
    variables = jax.jit(model.init)(jax.random.key(seed), images[:1])
    look = jax.jit(partial(similarities, model))
    untrained = jax.tree.map(np.asarray, look(variables, held_out_images[:PICTURES]))
    variables = train(model, variables, images, labels, tick, steps=steps, batch=batch, seed=seed)
    logits: Any = jax.jit(model.apply)(variables, held_out_images)
    accuracy = float((logits.argmax(axis=1) == held_out_labels).mean())
    trained = jax.tree.map(np.asarray, look(variables, held_out_images[:PICTURES]))
    return {'model': kind, 'depth': depth, 'accuracy': accuracy, 'untrained': untrained, 'trained': trained}


def neighbours(pairs: Float[np.ndarray, 'layers layers']) -> list[float]:
    """Of each layer and the next."""
    return [round(float(value), 4) for value in np.diagonal(pairs, 1)]


def lines(run: Run) -> dict[str, str]:
    """What is drawn of a run: the kinds of its maps, with the words for them."""
    if run['model'] == 'plain':
        return {'softmax': 'plain attention'}
    return {'softmax': 'DeepViT, before re-attention', 're-attention': 'DeepViT, after re-attention'}


def draw(runs: list[Run], file: Path) -> None:
    """Layer by layer in the deepest models, the mean against the depth, and every pair of layers of the deepest."""
    deepest = max(run['depth'] for run in runs)
    figure = Figure(figsize=(9, 6.4), layout='constrained')
    (by_layer, by_depth, accuracy), pictures = figure.subplots(2, 3)
    means: dict[str, list[tuple[int, float]]] = {}
    panels = iter(pictures)
    for run in runs:
        for kind, label in lines(run).items():
            share = 100 * run['trained'][kind]['share']
            means.setdefault(label, []).append((run['depth'], float(np.diagonal(share, 1).mean())))
            if run['depth'] == deepest:
                by_layer.plot(range(1, deepest), np.diagonal(share, 1), label=label)
                panel = next(panels)
                picture = panel.imshow(share, vmin=0, vmax=100, origin='lower')
                panel.set(title=label, xlabel='layer', ylabel='layer')
    figure.colorbar(picture, ax=pictures, label='similar vectors, %', location='right')
    for label, points in means.items():
        by_depth.plot(*zip(*points, strict=True), marker='o', label=label)
    for kind in MODELS:
        points = [(run['depth'], 100 * run['accuracy']) for run in runs if run['model'] == kind]
        accuracy.plot(*zip(*points, strict=True), marker='o', label='plain' if kind == 'plain' else 'DeepViT')
    by_layer.set(xlabel=f'layer, of {deepest}', ylabel='similar to the layer before, %', ylim=(-3, 103))
    by_depth.set(xlabel='depth', ylabel='mean over the layers, %', ylim=(-3, 103))
    accuracy.set(xlabel='depth', ylabel='held-out digits right, %')
    by_layer.legend(fontsize='x-small')
    accuracy.legend(fontsize='x-small')
    with rc_context({'svg.hashsalt': 'flax_vit'}):  # the same figures, the same bytes
        figure.savefig(file, metadata={'Date': None})


@click.command()
@click.argument('out', type=click.Path(path_type=Path, file_okay=False))
@click.option(
    '--depth',
    'depths',
    type=click.IntRange(2),
    multiple=True,
    default=[8, 16, 24],
    show_default=True,
    help='Layers of a model of each kind; give it several times.',
)
@click.option('--steps', type=click.IntRange(1), default=600, show_default=True, help='Batches to train each model on.')
@click.option('--batch', type=click.IntRange(1), default=32, show_default=True, help='Images in a batch.')
@click.option('--seed', default=0, show_default=True, help='Of the fresh weights and the batches.')
def main(out: Path, depths: tuple[int, ...], **settings: int) -> None:
    """Train plain attention and re-attention at several depths, and compare the attention maps of their layers.

    The figures go to OUT/collapse.json and OUT/collapse.svg.
    """
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    runs = []
    with Progress(
        '{task.description}', BarColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as progress:
        for depth in depths:
            for kind in MODELS:
                task = progress.add_task(f'{kind}, {depth} layers', total=settings['steps'])
                run = measure(kind, depth, partial(progress.advance, task), **settings)
                runs.append(run)
                share = {name: np.mean(neighbours(each['share'])) for name, each in run['trained'].items()}
                words = ', '.join(f'{name} {value:.1%}' for name, value in share.items())
                line = f'{kind}, {depth} layers: {run["accuracy"]:.1%} right; similar to the next layer: {words}'
                console.print(line, highlight=False, soft_wrap=True)
    figures = [run | {when: jax.tree.map(neighbours, run[when]) for when in ('untrained', 'trained')} for run in runs]
    (out / 'collapse.json').write_text(json.dumps({**settings, 'similar': SIMILAR, 'runs': figures}) + '\n')
    draw(runs, out / 'collapse.svg')


if __name__ == '__main__':
    main()
