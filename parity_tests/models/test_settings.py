"""The models under JAX's own settings, and whether they compute with what somebody puts in a part's place."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_vit import DeepViT, SimpleViT, ViT, from_pretrained, save_pretrained, stack_layers
from parity_tests.support.compilations import compilations
from parity_tests.support.reference import quickly
from parity_tests.support.slow import slow_but
from parity_tests.support.small_models import variables_of as random_variables

SIZES: Any = {'image_size': 8, 'patch_size': 4, 'num_classes': 3, 'dim': 8, 'depth': 1, 'heads': 2, 'mlp_dim': 8}
MODELS = {'simple': SimpleViT(**SIZES), 'deep': DeepViT(**SIZES, dropout=0.5, emb_dropout=0.5)} | {
    'vit': ViT(**SIZES, dropout=0.5, emb_dropout=0.5)
}
WAYS: dict[str, Any] = {
    'plain': {},
    'in-chunks': {'query_chunk_size': 2},
    'scanned': {'scan_layers': True, 'remat': True},
}
TRACED: dict[str, Callable[[], AbstractContextManager[Any]]] = {  # what forbids something where a program is traced
    'rank promotion': lambda: jax.numpy_rank_promotion('raise'),
    'dtype promotion': lambda: jax.numpy_dtype_promotion('strict'),
    'leaks': lambda: jax.check_tracer_leaks(True),
}
RUN: dict[str, Callable[[], AbstractContextManager[Any]]] = {  # what changes how it runs
    'nans': lambda: jax.debug_nans(True),
    'x64': lambda: jax.enable_x64(True),
}
IMAGES = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
both_models = pytest.mark.parametrize('name', MODELS)
every_way = pytest.mark.parametrize('way', WAYS)
deep_first = pytest.mark.parametrize('name', slow_but('deep', MODELS))


@cache
def variables_of(name: str) -> Any:
    """Larger than at the start, so that attention matters."""
    variables = jax.jit(MODELS[name].init)(jax.random.key(1), IMAGES)
    return jax.tree.map(lambda array: 2 * array, variables)


def in_a_way(name: str, way: str, dtype: str | None = None) -> tuple[Any, Any]:
    variables = variables_of(name)
    model = MODELS[name].clone(**WAYS[way], dtype=dtype)
    return model, stack_layers(variables) if model.scan_layers else variables


@cache
def logits_of(name: str, dtype: str | None = None, values: bool = True) -> Any:
    """Of the model as it is, or one whose attention has zeros for values."""

    def without_values(path: Any, array: Any) -> Any:
        return array.at[:, array.shape[1] // 3 * 2 :].set(0) if path[-2].key == 'to_qkv' else array

    variables = variables_of(name)
    variables = variables if values else jax.tree_util.tree_map_with_path(without_values, variables)
    return np.asarray(jax.jit(MODELS[name].clone(dtype=dtype).apply)(variables, IMAGES), np.float32)


def dtypes(tree: Any) -> Any:
    return jax.tree.map(lambda array: array.dtype, tree)


def loss(model: Any, variables: Any) -> Any:
    logits: Any = model.apply(variables, IMAGES, train=True, rngs={'dropout': jax.random.key(2)})
    return (logits**2).sum(), logits


@pytest.mark.parametrize('setting', TRACED)
@every_way
@deep_first
def test_what_jax_can_forbid(name: str, way: str, setting: str) -> None:
    model, variables = in_a_way(name, way)
    with TRACED[setting]():
        gradients, _ = jax.eval_shape(jax.grad(partial(loss, model), has_aux=True), variables)
    assert dtypes(gradients) == dtypes(variables)


@pytest.mark.parametrize('setting', RUN)
@pytest.mark.parametrize('way', ['plain', 'scanned'])
@deep_first
def test_how_jax_can_run(name: str, way: str, setting: str) -> None:
    model, variables = in_a_way(name, way)
    with RUN[setting]():
        gradient = quickly(jax.grad(partial(loss, model), has_aux=True))
        gradients, logits = gradient(variables)
    assert logits.dtype == np.float32
    assert dtypes(gradients) == dtypes(variables)
    assert all(np.isfinite(array).all() for array in jax.tree.leaves((gradients, logits)))
    if name == 'simple':  # which has no dropout, whose masks x64 draws otherwise
        close(logits, logits_of(name))


def close(found: Any, expected: Any, dtype: str = 'float32') -> None:
    """Up to the rounding of the last sums, which may be fused otherwise."""
    bound = 8 * float(jnp.finfo(dtype).eps) * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, rtol=0, atol=bound)


POINTS = [('simple', 'attend'), ('deep', 'attention_dropout'), ('deep', 'reattn_norm_1')]


def is_call_of(point: str, context: Any) -> bool:
    return (context.module.name, context.method_name) == (point, '__call__')  # not of its `setup`


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@every_way
@pytest.mark.parametrize(('name', 'point'), POINTS)
def test_an_ablated_attention_map_attends_to_nothing(name: str, point: str, way: str, dtype: str) -> None:
    """As if all values were zero; DeepViT's re-attention has no bias here."""
    model, variables = in_a_way(name, way, dtype)

    def zeroed(method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        result = method(*args, **kwargs)
        return jnp.zeros_like(result) if is_call_of(point, context) else result

    with nn.intercept_methods(zeroed):
        ablated = jax.jit(lambda variables: model.apply(variables, IMAGES))(variables)
    expected = logits_of(name, dtype, values=False)
    close(ablated, expected, dtype)
    with pytest.raises(AssertionError):  # otherwise nothing would be shown
        close(logits_of(name, dtype), expected, dtype)


@pytest.mark.parametrize('way', [*WAYS, 'everything'])
@pytest.mark.parametrize(('name', 'point'), [POINTS[0], POINTS[2]])
def test_gradients_go_through_a_map_that_is_put_in_place(name: str, point: str, way: str) -> None:
    """A factor on the maps is one on the values, and so is its gradient; in float64, whose standard is 1e-11."""
    with jax.enable_x64(True):
        options = WAYS['in-chunks'] | WAYS['scanned'] if way == 'everything' else WAYS[way]
        model: Any = MODELS[name].clone(**options, dtype='float64')
        variables = jax.tree.map(lambda array: array.astype('float64'), variables_of(name))
        variables = stack_layers(variables) if model.scan_layers else variables

        def by_maps(factor: Any) -> Any:
            def weighed(method: Any, args: Any, kwargs: Any, context: Any) -> Any:
                result = method(*args, **kwargs)
                return result * factor if is_call_of(point, context) else result

            with nn.intercept_methods(weighed):
                return (model.apply(variables, IMAGES) ** 2).sum()

        def by_values(factor: Any) -> Any:
            def weighed(path: Any, array: Any) -> Any:
                values = array.shape[-1] // 3 * 2
                return array.at[..., values:].multiply(factor) if path[-2].key == 'to_qkv' else array

            return (model.apply(jax.tree_util.tree_map_with_path(weighed, variables), IMAGES) ** 2).sum()

        found, expected = (quickly(jax.value_and_grad(loss))(jnp.asarray(0.7)) for loss in (by_maps, by_values))
    assert float(expected[1]) != 0
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=0)


@both_models
def test_looking_at_a_map_changes_no_bit(name: str) -> None:
    def look(method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        return method(*args, **kwargs)

    with nn.intercept_methods(look):
        looked = jax.jit(lambda *given: MODELS[name].apply(*given))(variables_of(name), IMAGES)
    np.testing.assert_array_equal(looked, logits_of(name))


@pytest.mark.parametrize('way', [*WAYS, 'everything'])
@both_models
def test_without_jit_nothing_is_compiled_twice(name: str, way: str) -> None:
    """In bfloat16, which chooses its products by platform, as well."""
    options = WAYS['in-chunks'] | WAYS['scanned'] if way == 'everything' else WAYS[way]
    variables = stack_layers(variables_of(name)) if options.get('scan_layers') else variables_of(name)
    for dtype in ('float32', 'bfloat16'):
        model = MODELS[name].clone(**options, dtype=dtype)
        first = model.apply(variables, IMAGES)
        with compilations() as compiled:
            again = model.apply(variables, IMAGES)
            assert not compiled
            jax.jit(lambda x: x + 1)(again)
            assert len(compiled) == 1  # this is how it is heard
        np.testing.assert_array_equal(again, first)
        close(again, logits_of(name, dtype), dtype)


@both_models
def test_maps_are_captured_in_query_chunks_as_well(name: str) -> None:
    variables, point = variables_of(name), {'simple': 'attend', 'deep': 'reattn_norm_1', 'vit': 'attend'}[name]

    def maps(**options: Any) -> Any:
        model = MODELS[name].clone(**options)
        apply = jax.jit(lambda variables: model.apply(variables, IMAGES, capture_intermediates=True))
        return apply(variables)[1]['intermediates']['transformer']['layers_0_0'][point]['__call__'][0]

    whole = maps()
    tokens = 4 if name == 'simple' else 5
    assert whole.shape == (2, 2, tokens, tokens)
    np.testing.assert_allclose(maps(query_chunk_size=2), whole, rtol=0, atol=8 * 2**-23 * np.abs(whole).max())


@both_models
def test_train_by_position(name: str) -> None:
    model, variables, key = MODELS[name], variables_of(name), {'dropout': jax.random.key(2)}
    by_name = jax.jit(model.apply, static_argnames='train')(variables, IMAGES, train=True, rngs=key)
    checkpointed: Any = nn.remat(type(model), static_argnums=(2,))
    dropout = {'dropout': 0.5, 'emb_dropout': 0.5} if name != 'simple' else {}
    again = jax.jit(checkpointed(**SIZES, **dropout).apply, static_argnums=2)(variables, IMAGES, True, rngs=key)
    np.testing.assert_allclose(again, by_name, rtol=0, atol=8 * 2**-23 * np.abs(by_name).max())
    assert (np.abs(by_name - logits_of(name)).max() > 1e-3) == (name != 'simple')


# ---- the order of the axes of images


@pytest.mark.parametrize('model_class', [SimpleViT, DeepViT])
def test_ambiguous_images(model_class: Any, tmp_path: Path) -> None:
    """As many channels as pixels a side: taken as channels last, which is said, or as asked."""
    model: Any = model_class(
        image_size=8, patch_size=4, num_classes=3, dim=16, depth=1, heads=2, mlp_dim=20, channels=8
    )
    variables = random_variables(model)
    images = np.random.default_rng(0).standard_normal((2, 8, 8, 8), np.float32)
    first, last = (model.clone(image_format=name) for name in ('channels_first', 'channels_last'))
    with pytest.warns(UserWarning, match=r'\(2, 8, 8, 8\) may have their 8 channels last or first; .* image_format='):
        assumed = model.apply(variables, images)
    assert np.array_equal(assumed, last.apply(variables, images))
    turned = first.apply(variables, np.moveaxis(images, 3, 1))
    np.testing.assert_allclose(turned, assumed, rtol=1e-5, atol=1e-6)
    assert np.abs(first.apply(variables, images) - assumed).max() > 1e-3
    save_pretrained(tmp_path / 'saved', first, variables)
    again: Any
    again, kept = from_pretrained(tmp_path / 'saved')
    assert again == first
    assert np.array_equal(again.apply(kept, images), first.apply(variables, images))
    assert from_pretrained(tmp_path / 'saved', image_format='channels_last')[0] == last
    with pytest.warns(UserWarning, match='The head is new'):
        assert from_pretrained(tmp_path / 'saved', num_classes=4)[0].image_format == 'channels_first'


def test_images_of_the_other_format_are_refused() -> None:
    model = SimpleViT(image_size=(8, 12), patch_size=4, num_classes=3, dim=16, depth=1, heads=2, mlp_dim=20)
    variables = random_variables(model)
    first, last = (model.clone(image_format=name) for name in ('channels_first', 'channels_last'))
    images = np.zeros((1, 8, 12, 3), np.float32)
    last.apply(variables, images)
    first.apply(variables, np.moveaxis(images, 3, 1))
    with pytest.raises(ValueError, match=r'of shape \(batch, 3, height, width\), height and width'):
        first.apply(variables, images)
    with pytest.raises(ValueError, match=r'of shape \(batch, height, width, 3\), height'):
        last.apply(variables, np.moveaxis(images, 3, 1))
    with pytest.raises(ValueError, match="image_format must be 'channels_last' or 'channels_first', or None for"):
        model.clone(image_format='NCHW')
