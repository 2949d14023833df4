"""Parameters stacked over the depth and back, in memory and in folders."""

from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
import torch
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AxisType

import convert
from flax_vit import DeepViT, SimpleViT, ViT, from_pretrained, save_pretrained, stack_layers, unstack_layers
from flax_vit.checks import pair
from flax_vit.parameters import variable_shapes
from parity_tests.support.reference import CONFIGURATIONS, QUICK, converted, pytorch
from parity_tests.support.slow import slow_but


def assert_same_bits(one: Any, other: Any) -> None:
    one, other = flatten_dict(one), flatten_dict(other)
    assert one.keys() == other.keys()
    for path, array in one.items():
        assert array.dtype == other[path].dtype
        np.testing.assert_array_equal(np.asarray(array).view(np.uint8), np.asarray(other[path]).view(np.uint8), path)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('name', ['deep-twelve-layers', 'simple-twelve-layers'])
def test_there_and_back(name: str, dtype: torch.dtype) -> None:
    _, model, variables = converted(CONFIGURATIONS[name], dtype)
    stacked = stack_layers(variables)
    shapes = jax.eval_shape(model.clone(scan_layers=True).init, jax.random.key(0), images_of(model))
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, shapes)
    np.testing.assert_array_equal(
        stacked['params']['transformer']['blocks']['layers_1']['net_1']['kernel'][7],
        variables['params']['transformer']['layers_7_1']['net_1']['kernel'],
    )
    assert_same_bits(unstack_layers(stacked), variables)
    on_the_host = jax.tree.map(np.asarray, variables)
    assert all(isinstance(array, np.ndarray) for array in jax.tree.leaves(stack_layers(on_the_host)))
    assert_same_bits(stack_layers(on_the_host), stacked)


@pytest.mark.parametrize('scan_layers', [False, True])
@pytest.mark.parametrize('name', ['deep-twelve-layers', 'simple-twelve-layers', 'vit-wide'])
def test_one_block_is_traced_for_all(name: str, scan_layers: bool) -> None:
    model = converted(CONFIGURATIONS[name], torch.float32)[1].clone(scan_layers=scan_layers)
    traced = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), images_of(model)))
    assert list(variable_shapes(model).items()) == list(traced.items())


def images_of(model: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, *pair(model.image_size), model.channels), jnp.float32)


def test_a_tree_that_cannot_be_stacked() -> None:
    _, _, variables = converted(CONFIGURATIONS['deep-mean'], torch.float32)
    transformer = variables['params']['transformer']
    for gap in ('layers_1_0', 'layers_2_1'):
        rest = {name: layer for name, layer in transformer.items() if name != gap}
        with pytest.raises(ValueError, match=r'blocks/layers_. cannot be stacked|blocks/layers_./.* cannot be stacked'):
            stack_layers({'params': {'transformer': rest}})
    wider = {
        **transformer,
        'layers_1_1': jax.tree.map(lambda array: array.astype(jnp.bfloat16), transformer['layers_1_1']),
    }
    with pytest.raises(
        ValueError, match=r'layers_1/net_0/bias of the blocks cannot be stacked: it is .*bfloat16, .*float32'
    ):
        stack_layers({'params': {'transformer': wider}})


@pytest.mark.parametrize('name', ['deep-mean', 'simple-oblong-patches', 'vit-oblong'])
def test_converted_scanned_and_exported(name: str) -> None:
    module = pytorch(CONFIGURATIONS[name], torch.float32)
    _, plain = convert.from_torch(module)
    model, variables = convert.from_torch(module, scan_layers=True)
    assert_same_bits(variables, stack_layers(plain))
    back = convert.to_torch(model, variables)
    for key, tensor in module.state_dict().items():
        np.testing.assert_array_equal(back[key], tensor.numpy())
    assert convert.verify(module, converted=(model, variables)).right


@pytest.mark.parametrize('name', ['deep-mean', 'simple-oblong-patches', 'vit-oblong'])
def test_folders_hold_block_after_block(name: str, tmp_path: Path) -> None:
    _, model, variables = converted(CONFIGURATIONS[name], torch.float32)
    save_pretrained(tmp_path / 'plain', model, variables)
    scanned, stacked = from_pretrained(tmp_path / 'plain', scan_layers=True)
    assert scanned.scan_layers
    assert_same_bits(stacked, stack_layers(variables))

    save_pretrained(tmp_path / 'scanned', scanned, stacked)
    files = [next((tmp_path / kind).glob('model-*')) for kind in ('plain', 'scanned')]
    assert files[0].read_bytes() == files[1].read_bytes()
    model, read = from_pretrained(tmp_path / 'scanned')
    assert model.scan_layers
    assert_same_bits(read, stacked)
    model, read = from_pretrained(tmp_path / 'scanned', scan_layers=False)
    assert_same_bits(read, variables)


def test_read_onto_a_mesh(tmp_path: Path) -> None:
    _, model, variables = converted(CONFIGURATIONS['deep-mean'], torch.float32)
    save_pretrained(tmp_path, model, variables)
    mesh = jax.make_mesh((1, 1), ('data', 'model'), axis_types=(AxisType.Auto,) * 2)
    _, read = from_pretrained(tmp_path, mesh=mesh, scan_layers=True)
    assert_same_bits(read, stack_layers(variables))
    kernel = read['params']['transformer']['blocks']['layers_1']['net_1']['kernel']
    assert kernel.sharding.spec[-1] == 'model'


def test_empty_collections_stay() -> None:
    _, _, variables = converted(CONFIGURATIONS['deep-mean'], torch.float32)
    tree = {**variables, 'batch_stats': {}}
    assert stack_layers(tree)['batch_stats'] == {}
    assert structure(unstack_layers(stack_layers(tree))) == structure(tree)


def test_shapes_alone() -> None:
    _, _, variables = converted(CONFIGURATIONS['deep-mean'], torch.float32)
    shapes = jax.eval_shape(lambda: variables)
    stacked = stack_layers(shapes)
    assert stacked == jax.eval_shape(lambda: stack_layers(variables))
    assert unstack_layers(stacked) == shapes
    transformer = shapes['params']['transformer']
    other = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), transformer['layers_1_1'])
    with pytest.raises(ValueError, match=r'cannot be stacked: it is .*bfloat16, .*float32'):
        stack_layers({'params': {'transformer': {**transformer, 'layers_1_1': other}}})


# How a model is computed, and with it which dropout masks a key draws.
DRAWS: list[dict[str, Any]] = [
    {},
    {'scan_layers': True},
    {'query_chunk_size': 20},
    {'scan_layers': True, 'query_chunk_size': 20},
]


@cache
def trained(**fields: Any) -> tuple[Any, set[bytes], float]:
    """Loss and gradients of a DeepViT in training; what dropout left of the attention maps, and what share."""
    plain = DeepViT(
        image_size=24, patch_size=4, num_classes=5, dim=12, depth=2, heads=3, mlp_dim=10, dim_head=4, dropout=0.3
    )
    images = jax.random.normal(jax.random.key(0), (2, 24, 24, 3))
    variables = jax.jit(plain.init)(jax.random.key(1), images)
    model = plain.clone(**fields)
    masks: list[np.ndarray] = []

    def see(left: np.ndarray) -> np.ndarray:
        masks.append(np.asarray(left))
        return np.zeros((), np.float32)

    def look(call: Any, arguments: Any, keywords: Any, context: nn.module.InterceptorContext) -> Any:
        result = call(*arguments, **keywords)
        if (context.module.name, context.method_name) == ('attention_dropout', '__call__'):
            # adds a zero that comes from a look: linen's scan takes pure calls alone, in every version of JAX
            result += jax.pure_callback(see, jax.ShapeDtypeStruct((), result.dtype), result != 0)
        return result

    @partial(jax.jit, compiler_options=QUICK)
    @jax.value_and_grad
    def loss(variables: Any) -> Any:
        with nn.intercept_methods(look):
            logits: Any = model.apply(variables, images, train=True, rngs={'dropout': jax.random.key(2)})
        return (logits**2).sum()

    value, gradients = loss(stack_layers(variables) if model.scan_layers else variables)
    jax.effects_barrier()
    different = {mask.tobytes(): mask for mask in masks}  # the backward pass may compute one again
    gradients = unstack_layers(gradients) if model.scan_layers else gradients
    return (value, gradients), set(different), float(np.mean(list(different.values())))


@pytest.mark.parametrize('fields', slow_but(DRAWS[-1], DRAWS), ids=lambda fields: '-'.join(fields) or 'plain')
def test_dropout_in_every_way(fields: dict[str, Any]) -> None:
    """`remat` draws the same masks; the other ways draw their own, at the same rate, and none twice."""
    results, masks, left = trained(**fields)
    again, same_masks, _ = trained(**fields, remat=True)
    assert same_masks == masks
    # the same sums, fused in other ways
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), again, results)

    chunks = 2 if 'query_chunk_size' in fields else 1  # of 37 queries, 19 at a time
    assert len(masks) == 2 * chunks
    numbers = 2 * 2 * 3 * 37**2  # blocks, images, heads
    assert abs(left - 0.7) < 5 * (0.3 * 0.7 / numbers) ** 0.5  # five standard deviations
    assert not fields or not np.isclose(results[0], trained()[0][0], rtol=1e-4)


@pytest.mark.parametrize(
    ('field', 'value'),
    [
        ('query_chunk_size', 0),
        ('query_chunk_size', 2.5),
        ('query_chunk_size', (2, 2)),
        ('remat', 1),
        ('scan_layers', None),
    ],
)
def test_options_that_make_no_sense(field: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, 'jaxtyping_disable', True)  # as users have it
    _, model, _ = converted(CONFIGURATIONS['deep-mean'], torch.float32)
    with pytest.raises(ValueError, match=f'{field} must be'):
        model.clone(**{field: value})


@pytest.mark.parametrize('model_class', [DeepViT, SimpleViT, ViT])
def test_parameters_of_several_dtypes(model_class: Any) -> None:
    """Norms wide, the rest and the images half: every layer's result is of what they promote to."""
    model = model_class(
        image_size=8, patch_size=4, num_classes=3, dim=16, depth=2, heads=2, mlp_dim=24, patch_norm=False
    )
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3), jnp.bfloat16)
    flat = flatten_dict(model.init(jax.random.key(1), images))
    norms = ('scale', 'norm', 'net_0')
    variables = unflatten_dict(
        {path: array if set(norms) & set(path) else array.astype(jnp.bfloat16) for path, array in flat.items()}
    )
    logits = model.apply(variables, images)
    stacked = model.clone(scan_layers=True).apply(stack_layers(variables), images)
    assert logits.dtype == stacked.dtype == jnp.float32
    np.testing.assert_allclose(stacked, logits, rtol=1e-4, atol=1e-6)
    half = model.clone(scan_layers=True, dtype=jnp.bfloat16)
    assert half.apply(stack_layers(variables), images).dtype == jnp.bfloat16


def test_the_state_of_an_optimizer_and_a_mask() -> None:
    """Dicts with the parameters' names inside of optax's own tuples; and what says something of each parameter."""
    _, _, variables = converted(CONFIGURATIONS['deep-mean'], torch.float32)
    mask = jax.tree.map(lambda array: array.ndim > 1, variables)
    adam = optax.masked(optax.adam(1e-3), mask)
    groups = optax.multi_transform({True: adam, False: optax.sgd(1e-3, momentum=0.9)}, mask)
    for state in (adam.init(variables), groups.init(variables), optax.adamw(1e-3).init(variables)):
        again = jax.tree.map(lambda array: array + 1, state)
        stacked = stack_layers(again)
        assert structure(unstack_layers(stacked)) == structure(again)
        for one, other in zip(jax.tree.leaves(unstack_layers(stacked)), jax.tree.leaves(again), strict=True):
            np.testing.assert_array_equal(one, other)
        assert len(jax.tree.leaves(stacked)) < len(jax.tree.leaves(again))
    gradients, adamw = jax.tree.map(jnp.cos, variables), optax.adamw(1e-3)
    updates, _ = adamw.update(gradients, adamw.init(variables), variables)
    ours, _ = adamw.update(stack_layers(gradients), stack_layers(adamw.init(variables)), stack_layers(variables))
    assert_same_bits(unstack_layers(ours), updates)
    assert jax.tree.leaves(stack_layers(mask))[0] in (True, False)
    assert structure(stack_layers(mask)) == structure(stack_layers(variables))
    with pytest.raises(ValueError, match='number of blocks is unknown'):
        unstack_layers(stack_layers(mask))
    mask['params']['transformer']['layers_0_0']['norm']['scale'] = True
    with pytest.raises(ValueError, match=r'layers_0/norm/scale of the blocks cannot be stacked: it is True, False'):
        stack_layers(mask)


def structure(tree: Any) -> str:
    return str(jax.tree.structure(tree))
