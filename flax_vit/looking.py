"""Looking inside a model: tokens after any block, pooled features, attention maps.

The models have no code for it: linen lets a caller stand between its modules and keep what passes by.
"""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax import Array
from jaxtyping import Float, Shaped

from flax_vit.architectures import MODELS, is_ours
from flax_vit.stacking import Path, is_stacked, stacked_path, unstack_layers


class Features(NamedTuple):
    """What a model computes on the way, in its own dtype; a pytree. Mappings have the blocks' numbers as asked for.

    In ViT, where it has one, and in DeepViT the first of the tokens, of the queries and of the keys is the class token;
    in a SimpleViT with register tokens the last are these.
    """

    logits: Float[Array, 'batch outputs']  # what the model gives
    pooled: Float[Array, 'batch dim']  # what the head gets
    embedding: Float[Array, 'batch tokens dim'] | None  # what the first block gets; None without `tokens`
    tokens: dict[int, Float[Array, 'batch tokens dim']]  # after the block
    attention: dict[int, Float[Array, 'batch heads queries keys']]  # the softmax
    reattention: dict[int, Float[Array, 'batch heads queries keys']]  # DeepViT's, of any sign and sum; else empty


def features(
    model: Any,
    variables: Mapping[str, Any],
    images: Shaped[Array | np.ndarray, 'batch ...'],
    *,
    blocks: Iterable[int] | None = None,
    tokens: bool = True,
    attention: bool = False,
) -> Features:
    """Logits and pooled features of images and, when asked for, tokens and attention maps of blocks.

    The numbers are those the model itself computes with, at rest. Without `scan_layers` nothing else is kept; with it,
    what is asked for of one block is held of all until the scan is over.

    Args:
        model: One of the models.
        variables: Its variables, {'params': ...}.
        images: As the model takes them, (batch, height, width, channels) or (batch, channels, height, width).
        blocks: Their numbers, counted from 0, or from the end when negative; None: all.
        tokens: Whether to give those after each of the blocks, and those before the first.
        attention: Whether to give the maps. They are held whole, whatever `query_chunk_size` says.

    Returns:
        A pytree, in the model's dtype.

    Raises:
        ValueError: For a block that is not there, another model, and images that don't fit.
    """
    if not is_ours(model):
        raise ValueError(f'features looks into one of {", ".join(MODELS)} itself, not a {type(model).__name__}.')
    if isinstance(blocks, str | bytes) or not isinstance(blocks, Iterable | None):
        raise ValueError(f'blocks must be several numbers, such as [0, -1], not {blocks!r}.')
    numbers = {block: _number(model, block) for block in (range(model.depth) if blocks is None else blocks)}
    places: dict[str, Any] = {
        'pooled': ('to_latent', 'output'),
        'embedding': None,
        'tokens': {},
        'attention': {},
        'reattention': {},
    }
    if tokens:
        places['embedding'] = _after(model, -1)
        places['tokens'] = {block: _after(model, number) for block, number in numbers.items()}
    if attention and not model.MAPS:
        raise ValueError(f'{type(model).__name__} does not say what puts out its attention maps, in MAPS.')
    if attention:
        model = with_whole_maps(model)
        for kind, names in model.MAPS.items():
            places[kind] = {
                block: [('transformer', f'layers_{number}_0', *name.split('/'), 'output') for name in modules(names)]
                for block, number in numbers.items()
            }

    def is_place(node: Any) -> bool:
        return isinstance(node, tuple)

    wanted = set(jax.tree.leaves(places, is_leaf=is_place))
    if is_stacked(model):
        wanted = {stacked_path(place)[1] for place in wanted}

    def keep(function: Any, arguments: Any, keywords: Any, context: nn.module.InterceptorContext) -> Any:
        output = function(*arguments, **keywords)
        if context.method_name == '__call__':
            for end, value in (('input', arguments[0]), ('output', output)):
                if (*context.module.path, end) in wanted:
                    context.module.sow('intermediates', end, value, lambda _, new: new, lambda: None)
        return output

    with nn.intercept_methods(keep):
        logits, state = model.apply(variables, images, mutable=['intermediates'])
    kept = flatten_dict(unstack_layers(state['intermediates']))
    for kind in model.MAPS if attention else ():  # of an OfficialDeepViT, some blocks have no re-attention
        there = {block: maps for block, maps in places[kind].items() if kept.keys() >= {*maps}}
        if kind == 'attention' and len(there) < len(numbers):
            raise ValueError(f'{type(model).__name__}: nothing is at {model.MAPS[kind]!r}, which MAPS names.')
        places[kind] = there
    found = jax.tree.map(kept.__getitem__, places, is_leaf=is_place)
    for kind in model.MAPS if attention else ():
        found[kind] = {block: jnp.concatenate(maps, 1) if maps[1:] else maps[0] for block, maps in found[kind].items()}
    return Features(logits, **found)


def modules(names: str | Sequence[str]) -> Sequence[str]:
    """The modules that a model's MAPS names for one kind of map: one, or several, whose heads follow one another."""
    return [names] if isinstance(names, str) else names


def with_whole_maps(model: Any) -> Any:
    """The model that computes its attention maps all at once."""
    return model.clone(query_chunk_size=None) if getattr(model, 'query_chunk_size', None) else model


def _number(model: Any, block: int) -> int:
    """The block counted from 0."""
    if not isinstance(block, Integral) or not -model.depth <= block < model.depth:
        raise ValueError(
            f'This {type(model).__name__} has the blocks 0 to {model.depth - 1}, from the end -1 to {-model.depth}; '
            f'there is no block {block!r}.'
        )
    return block % model.depth


def _after(model: Any, number: int) -> Path:
    """Where the tokens after a block are: in front of what gets them next."""
    return ('transformer', f'layers_{number + 1}_0' if number + 1 < model.depth else 'norm', 'input')
