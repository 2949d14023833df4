"""The models by themselves: what they take, what they refuse, how they start, in which precision they compute."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import torch
import vit_pytorch.deepvit
import vit_pytorch.simple_vit
import vit_pytorch.vit
from flax import linen as nn
from jaxtyping import TypeCheckError
from scipy import stats

import convert
from flax_vit import DeepViT, SimpleViT, ViT
from flax_vit.deep_vit import HeadNorm
from flax_vit.layers import FeedForward, Linear, gelu, softmax
from flax_vit.official_simple_vit import tanh_gelu
from flax_vit.simple_vit import Attention
from parity_tests.support.reference import (
    CONFIGURATIONS,
    FLOAT64_BOUND,
    channels_first,
    check,
    converted,
    output_errors,
    random_images,
    relative_error,
    to_numpy,
)

every_model = pytest.mark.parametrize('name', ['deep-plain', 'simple-oblong-patches', 'vit-oblong'])
THEIRS = {
    DeepViT: vit_pytorch.deepvit.DeepViT,
    SimpleViT: vit_pytorch.simple_vit.SimpleViT,
    ViT: vit_pytorch.vit.ViT,
}
Fields = dict[str, Any]
SIZES = ('image_size', 'patch_size', 'num_classes', 'dim', 'depth', 'heads', 'mlp_dim')
SMALL: Fields = dict(zip(SIZES, (12, 4, 3, 8, 1, 2, 5), strict=True))
README: Fields = dict(zip(SIZES, (256, 32, 1000, 1024, 6, 16, 2048), strict=True))


def pytorch_parameter_count(ours: Any, fields: Fields) -> int:
    with torch.device('meta'):
        return sum(parameter.numel() for parameter in THEIRS[ours](**fields).parameters())


def parameter_count(variables: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(variables['params']))


def test_readme_deep_vit() -> None:
    key = jax.random.PRNGKey(0)
    img = jax.random.normal(key, (1, 256, 256, 3))
    v: Any = DeepViT(
        image_size=256,
        patch_size=32,
        num_classes=1000,
        dim=1024,
        depth=6,
        heads=16,
        mlp_dim=2048,
        dropout=0.1,
        emb_dropout=0.1,
    )
    rngs = {
        'params': jax.random.PRNGKey(1),
        'dropout': jax.random.PRNGKey(2),
        'emb_dropout': jax.random.PRNGKey(3),
    }
    params = v.init(rngs, img)
    preds = v.apply(params, img, rngs=rngs)
    assert preds.shape == (1, 1000)
    assert jnp.isfinite(preds).all()
    assert parameter_count(params) == pytorch_parameter_count(DeepViT, README)


def test_readme_simple_vit() -> None:
    key = jax.random.PRNGKey(0)
    img = jax.random.normal(key, (1, 3, 256, 256))
    v: Any = SimpleViT(
        image_size=256,
        patch_size=32,
        num_classes=1000,
        dim=1024,
        depth=6,
        heads=16,
        mlp_dim=2048,
    )
    params = v.init({'params': jax.random.PRNGKey(1)}, img)
    preds = v.apply(params, img)
    assert preds.shape == (1, 1000)
    assert jnp.isfinite(preds).all()
    assert parameter_count(params) == pytorch_parameter_count(SimpleViT, README)


def test_readme_vit() -> None:
    key = jax.random.PRNGKey(0)
    img = jax.random.normal(key, (1, 256, 256, 3))
    v: Any = ViT(**README, dropout=0.1, emb_dropout=0.1)
    params = jax.eval_shape(v.init, {'params': jax.random.PRNGKey(1), 'dropout': jax.random.PRNGKey(2)}, img)
    assert jax.eval_shape(v.apply, params, img).shape == (1, 1000)
    assert parameter_count(params) == pytorch_parameter_count(ViT, README)


@every_model
def test_both_orders_of_the_axes_give_the_same(name: str) -> None:
    _, model, variables = converted(CONFIGURATIONS[name], torch.float32)
    images = jnp.asarray(random_images(CONFIGURATIONS[name]), jnp.float32)
    apply = jax.jit(model.apply)
    np.testing.assert_array_equal(apply(variables, images), apply(variables, images.transpose(0, 3, 1, 2)))


@every_model
def test_numpy_images(name: str) -> None:
    _, model, variables = converted(CONFIGURATIONS[name], torch.float32)
    images = random_images(CONFIGURATIONS[name]).astype(np.float32)
    np.testing.assert_array_equal(model.apply(variables, images), model.apply(variables, jnp.asarray(images)))


@pytest.mark.parametrize('model_class', [DeepViT, SimpleViT, ViT])
def test_where_both_orders_fit_the_channels_are_last_unless_told(model_class: Any, float64: None) -> None:
    fields: dict[str, Any] = {
        'image_size': 4,
        'patch_size': 2,
        'num_classes': 3,
        'dim': 8,
        'depth': 1,
        'heads': 2,
        'mlp_dim': 5,
    }
    module = THEIRS[model_class](**fields, channels=4).double()
    model, variables = convert.from_torch(module)
    images = np.random.default_rng(0).standard_normal((2, 4, 4, 4))
    truth = to_numpy(module.eval()(channels_first(images)))
    turned = images.transpose(0, 3, 1, 2)
    near = 1e-6  # the sincos table is PyTorch's own
    for known, given in (('channels_last', images), ('channels_first', turned)):
        assert relative_error(jax.jit(model.clone(image_format=known).apply)(variables, given), truth) <= near
    apply = jax.jit(model.apply)
    with pytest.warns(UserWarning, match="image_format='channels_first' or 'channels_last' settles it"):
        assert relative_error(apply(variables, images), truth) <= near
    assert relative_error(apply(variables, turned), truth) > 1e-2  # compiled, it warns no more


@pytest.mark.parametrize(
    ('wrong', 'words'),
    [
        *(
            ({name: value}, (name, str(value)))
            for name in ('image_size', 'patch_size', 'dim', 'depth', 'heads', 'mlp_dim', 'channels', 'dim_head')
            for value in (0, -3)
        ),
        ({'num_classes': -1}, ('num_classes', '-1')),
        ({'image_size': 13}, ('image_size', '13', 'patch_size', '4')),
    ],
    ids=str,
)
@pytest.mark.parametrize('model_class', [DeepViT, SimpleViT, ViT])
def test_wrong_fields(model_class: Any, wrong: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=model_class.__name__) as error:
        model_class(**SMALL | wrong)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ('model_class', 'wrong', 'words'),
    [
        (DeepViT, {'pool': 'max'}, ('pool', "'max'", "'cls'", "'mean'")),
        (DeepViT, {'dropout': 1.5}, ('dropout', '1.5')),
        (DeepViT, {'emb_dropout': -0.1}, ('emb_dropout', '-0.1')),
        (SimpleViT, {'dim': 10}, ('dim', '10', '4')),
        (SimpleViT, {'dim': 4}, ('dim', '4', '8')),  # vit-pytorch divides 0 by 0
        (SimpleViT, {'image_size': (12, 20), 'patch_size': (4, 6)}, ('(12, 20)', '(4, 6)')),
        (SimpleViT, {'image_size': (12, 0)}, ('image_size', '(12, 0)')),
        (SimpleViT, {'patch_size': (5, 4)}, ('(12, 12)', '(5, 4)')),
        (SimpleViT, {'qk_norm': True}, ('qk_norm', 'LayerNorm', 'num_classes')),
        (ViT, {'pool': 'max'}, ('pool', "'max'", "'cls'", "'mean'")),
        (ViT, {'dropout': 1.5}, ('dropout', '1.5')),
        (ViT, {'patch_size': (5, 4)}, ('(12, 12)', '(5, 4)')),
        (ViT, {'class_token': False}, ("pool='cls'", 'class_token=True')),
        (ViT, {'project_out': False}, ('project_out=False', 'heads=1', 'dim_head=8', 'heads=2', 'dim_head=64')),
        (ViT, {'hidden_head': True}, ('hidden_head=True', 'norm_after_mean=True')),
    ],
    ids=str,
)
def test_wrong_fields_of_one_model(model_class: Any, wrong: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=model_class.__name__) as error:
        model_class(**SMALL | wrong)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ('model_class', 'name', 'value'),
    [
        (DeepViT, 'dropout', 'a'),
        (DeepViT, 'image_size', (12, 12)),
        (DeepViT, 'patch_size', (4, 4)),
        (DeepViT, 'heads', (2, 2)),
        (SimpleViT, 'dim', (8, 8)),
        (SimpleViT, 'depth', 1.5),
        (SimpleViT, 'image_size', (12, 12, 12)),
        (SimpleViT, 'num_register_tokens', -1),
        (SimpleViT, 'qk_norm', 1),
        (ViT, 'scale_by_dim', 1),
        (ViT, 'class_token', 'yes'),
    ],
)
def test_fields_of_the_wrong_type(model_class: Any, name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, 'jaxtyping_disable', True)  # as users have it, who meet our own checks
    with pytest.raises(ValueError, match=f'{model_class.__name__}: {name} must be .*{re.escape(repr(value))}'):
        model_class(**SMALL | {name: value})


@pytest.mark.parametrize(
    'shape',
    [
        (12, 12, 3),  # no batch
        (2, 12, 12),
        (2, 1, 12, 12, 3),
        (2, 12, 12, 4),
        (2, 4, 12, 12),
        (2, 12, 10, 3),
        (2, 3, 10, 12),
        (2, 16, 12, 3),  # twelve patches, positions for nine
        (2, 3, 12, 16),
        (2, 0, 12, 3),
    ],
    ids=str,
)
@pytest.mark.parametrize('model_class', [DeepViT, SimpleViT, ViT])
def test_images_of_a_wrong_shape(model_class: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=model_class.__name__) as error:
        jax.eval_shape(model_class(**SMALL).init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))
    expected = '12, 12' if model_class is SimpleViT else 'multiples of 4, at most 9 patches'
    for word in ('(batch, height, width, 3)', '(batch, 3, height, width)', expected, str(shape)):
        assert word in str(error.value)


@pytest.mark.parametrize('model_class', [DeepViT, SimpleViT, ViT])
def test_images_of_whole_numbers(model_class: Any) -> None:
    with pytest.raises(ValueError, match='uint8'):
        jax.eval_shape(model_class(**SMALL).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 12, 12, 3), jnp.uint8))


def test_simple_vit_takes_no_smaller_image() -> None:
    with pytest.raises(ValueError, match=r'\(12, 12\).*\(1, 8, 8, 3\)'):
        jax.eval_shape(SimpleViT(**SMALL).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32))


@pytest.mark.parametrize('model_class', [DeepViT, SimpleViT, ViT])
def test_initial_values_have_pytorchs_distributions(model_class: Any) -> None:
    fields = dict(zip(SIZES, (64, 8, 300, 128, 1, 24, 400), strict=True)) | {'channels': 2, 'dim_head': 4}
    model = model_class(**fields)
    ours = convert.to_torch(model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 64, 64, 2))))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = THEIRS[model_class](**fields)
    linear = {name for name, part in module.named_modules() if isinstance(part, torch.nn.Linear)}
    for name, parameter in module.named_parameters():
        theirs, values, (owner, _, kind) = to_numpy(parameter), ours[name], name.rpartition('.')
        assert values.shape == theirs.shape
        if owner in linear:
            bound = np.float32(module.get_submodule(owner).in_features ** -0.5)
            assert np.abs(values).max() <= bound
            assert values.size < 1000 or np.abs(values).max() > 0.99 * bound
            expected = stats.uniform(-bound, 2 * bound)
        elif name in ('pos_embedding', 'cls_token') or kind == 'reattn_weights':
            expected = stats.norm()
        else:
            np.testing.assert_array_equal(values, 1 if kind == 'weight' else 0)
            np.testing.assert_array_equal(values, theirs)
            continue
        assert stats.ks_2samp(values.ravel(), theirs.ravel()).pvalue > 1e-3, name
        assert stats.kstest(values.ravel(), expected.cdf).pvalue > 1e-3, name


def equations(jaxpr: Any) -> Iterator[Any]:
    """The equations of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda value: hasattr(value, 'jaxpr')):
            inner = getattr(inner, 'jaxpr', inner)
            if hasattr(inner, 'eqns'):
                yield from equations(inner)


def traced(model: Any, dtype: Any = jnp.float32) -> list[Any]:
    """The equations of an application to images of `dtype`."""
    images = jnp.zeros((1, 12, 12, 3), dtype)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return list(equations(jax.make_jaxpr(model.apply)(variables, images).jaxpr))


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
@pytest.mark.parametrize('model_class', [DeepViT, SimpleViT, ViT])
def test_softmax_and_norm_statistics_are_in_float32(model_class: Any, dtype: str) -> None:
    found = traced(model_class(**SMALL, dtype=dtype, param_dtype=dtype), dtype)
    products = 'bfloat16_product' if dtype == 'bfloat16' else 'dot_general'
    dtypes = {
        primitive: {equation.invars[0].aval.dtype.name for equation in found if equation.primitive.name == primitive}
        for primitive in ('exp', 'rsqrt', 'reduce_sum', products)
    }
    assert dtypes == {
        'exp': {'float32'},  # of softmax
        'rsqrt': {'float32'},  # of the norms
        'reduce_sum': {'float32'},  # of both, and of the mean over tokens
        products: {dtype},  # the matrix products are what the narrow dtype is for
    }


@pytest.mark.parametrize('model_class', [DeepViT, SimpleViT, ViT])
def test_dtype_is_of_the_computation_and_param_dtype_of_the_parameters(model_class: Any) -> None:
    def dtypes(images: str, **numerics: str) -> tuple[set[str], str]:
        shape = jax.ShapeDtypeStruct((1, 12, 12, 3), images)
        logits, variables = jax.eval_shape(model_class(**SMALL, **numerics).init_with_output, jax.random.key(0), shape)
        return {leaf.dtype.name for leaf in jax.tree.leaves(variables)}, logits.dtype.name

    assert dtypes('float32') == ({'float32'}, 'float32')
    assert dtypes('float32', param_dtype='bfloat16') == ({'bfloat16'}, 'float32')
    assert dtypes('float32', dtype='bfloat16') == ({'float32'}, 'bfloat16')
    assert dtypes('float32', dtype='float16', param_dtype='bfloat16') == ({'bfloat16'}, 'float16')
    assert dtypes('bfloat16', param_dtype='bfloat16') == ({'bfloat16'}, 'bfloat16')
    assert dtypes('bfloat16') == ({'float32'}, 'float32')
    assert dtypes('bfloat16', dtype='float32') == ({'float32'}, 'float32')


@pytest.mark.parametrize('model_class', [DeepViT, SimpleViT, ViT])
def test_dtype_reaches_every_matrix_product_and_precision_too(model_class: Any) -> None:
    def products(**numerics: Any) -> set[Any]:
        every = traced(model_class(**SMALL, **numerics))
        found = [equation for equation in every if equation.primitive.name in ('dot_general', 'bfloat16_product')]
        # patches, q k v, q · k, attn · v, to_out, two of feed-forward, head; DeepViT mixes heads as well
        assert len(found) == (9 if model_class is DeepViT else 8)
        return {(*(variable.aval.dtype.name for variable in eqn.invars), eqn.params['precision']) for eqn in found}

    highest = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
    assert products() == {('float32', 'float32', None)}
    assert products(precision='highest') == {('float32', 'float32', highest)}
    assert products(dtype=jnp.bfloat16) == {('bfloat16', 'bfloat16', None)}


@pytest.mark.parametrize('model_class', [DeepViT, SimpleViT, ViT])
def test_what_a_model_cannot_be_computed_in(model_class: Any) -> None:
    for name in ('dtype', 'param_dtype'):
        for dtype in ('foo', 'bf16', 'int32', bool, np.dtype('complex64'), 7):
            words = f'{model_class.__name__}: {name} must be float64, float32, float16 or bfloat16, not '
            with pytest.raises(ValueError, match=words):
                model_class(**SMALL, **{name: dtype})
    with pytest.raises(ValueError, match='param_dtype must be'):
        model_class(**SMALL, param_dtype=None)
    known: list[Any] = ['fastest', 'bfloat16_3x', 'highest', ('high', 'highest'), 'BF16_BF16_F32']
    for precision in known:
        model_class(**SMALL, precision=precision)
    for precision in ('foo', ('high', 'foo')):
        with pytest.raises(ValueError, match=r'precision=.* is not valid: '):
            model_class(**SMALL, precision=precision)


@pytest.mark.usefixtures('unchecked')
@pytest.mark.parametrize('model_class', [DeepViT, SimpleViT, ViT])
def test_what_is_no_number_and_no_image(model_class: Any) -> None:
    with pytest.raises(ValueError, match='heads must be a whole number from 1 up, not True'):
        model_class(**SMALL | {'heads': True})
    for images, kind in ((torch.zeros(1, 12, 12, 3), r'torch\.Tensor'), ([[0.0]], 'list')):
        with pytest.raises(ValueError, match=f'takes images as an array of JAX or NumPy, not a {kind}: numpy'):
            jax.eval_shape(lambda key, images=images: model_class(**SMALL).init(key, images), jax.random.key(0))
    preset = jax.lax.DotAlgorithmPreset.DEFAULT
    with pytest.raises(ValueError, match=r'precision=.* is not valid: '):
        model_class(**SMALL, precision=(preset, preset))
    for strange in (0, ('high',), ('high', 'high', 'high')):
        with pytest.raises(ValueError, match=r'precision=.* is not valid: '):
            model_class(**SMALL, precision=strange)
    with pytest.raises(ValueError, match=r"pool must be 'cls' .* not \['cls'\]"):
        DeepViT(**SMALL, pool=['cls'])  # type: ignore[arg-type]


@pytest.mark.parametrize('model_class', [DeepViT, SimpleViT, ViT])
def test_however_a_dtype_is_given_the_model_is_the_same(model_class: Any) -> None:
    ways = [model_class(**SMALL, dtype=dtype) for dtype in ('bfloat16', jnp.bfloat16, jnp.dtype('bfloat16'))]
    assert len(set(ways)) == 1
    assert ways[0].dtype == jnp.bfloat16
    assert hash(model_class(**SMALL)) == hash(model_class(**SMALL, param_dtype=np.dtype('float32')))


@every_model
def test_without_classes_the_features_come_out(name: str, float64: None) -> None:
    module, model, variables = converted(CONFIGURATIONS[name])
    head = model.HEAD
    setattr(module, head, torch.nn.Identity())
    params = {part: values for part, values in variables['params'].items() if not part.startswith(head)}
    images = random_images(CONFIGURATIONS[name])
    check(output_errors(module, model.clone(num_classes=0), {'params': params}, images), FLOAT64_BOUND)


@every_model
def test_without_patch_norm(name: str, float64: None) -> None:
    """As vit-pytorch before 1.0.0: patches, then Linear."""
    module, model, variables = converted(CONFIGURATIONS[name])
    cut, _, projection, _ = module.get_submodule('to_patch_embedding').children()
    module.to_patch_embedding = torch.nn.Sequential(cut, projection)
    params = dict(variables['params'])
    params['to_patch_embedding_1'] = params.pop('to_patch_embedding_2')
    del params['to_patch_embedding_3']
    images = random_images(CONFIGURATIONS[name])
    errors = output_errors(module, model.clone(patch_norm=False), {'params': params}, images)
    check(errors, FLOAT64_BOUND)


def test_norm_after_mean(float64: None) -> None:
    """As vit-pytorch before 1.4.0: the mean over tokens, then a head of LayerNorm and Linear."""
    configuration = CONFIGURATIONS['simple-oblong-patches']
    module, model, variables = converted(configuration)
    module.linear_head = torch.nn.Sequential(
        module.get_submodule('transformer.norm'), module.get_submodule('linear_head')
    )
    module.set_submodule('transformer.norm', torch.nn.Identity())
    params = {**variables['params'], 'transformer': dict(variables['params']['transformer'])}
    params['linear_head_0'] = params['transformer'].pop('norm')
    params['linear_head_1'] = params.pop('linear_head')
    errors = output_errors(module, model.clone(norm_after_mean=True), {'params': params}, random_images(configuration))
    check(errors, FLOAT64_BOUND)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_gelu_in_half_precision_is_rounded_once(dtype: Any) -> None:
    x = jnp.linspace(-4, 4, 1001).astype(dtype)
    exact = torch.nn.functional.gelu(torch.from_numpy(np.asarray(x, np.float64))).numpy()
    assert gelu(x).dtype == dtype
    error = np.abs(np.asarray(gelu(x), np.float64) - exact)
    assert (error <= jnp.finfo(dtype).eps / 2 * np.abs(exact) + 1e-6).all()  # 1e-6: what float32 leaves of 1 + erf


@pytest.mark.parametrize('activation', [gelu, tanh_gelu])
def test_gelu_keeps_its_input_alone_for_the_backward_pass(activation: Callable[[Any], Any]) -> None:
    x = jnp.linspace(-4, 4, 9)
    kept = jax.tree.leaves(jax.vjp(activation, x)[1])
    assert [array.shape for array in kept] == [x.shape]


def test_attention_in_float16_sums_no_undivided_weights() -> None:
    """512 equal weights of values of 200 sum to more than float16 holds; their mean is 200."""
    fields: Any = {'qk_norm': False, 'attention': 'plain', 'query_chunk_size': None}
    attention = Attention(dim=8, heads=1, dim_head=8, **fields, dtype=jnp.float16)
    params: Any = {
        'norm': {'scale': jnp.zeros(8), 'bias': jnp.ones(8)},
        'to_qkv': {'kernel': jnp.zeros((8, 24)).at[:, 16:].set(25)},
        'to_out': {'kernel': jnp.eye(8)},
    }
    tokens = jnp.zeros((1, 512, 8), jnp.float16)
    np.testing.assert_array_equal(attention.apply({'params': params}, tokens, train=False), np.full_like(tokens, 200))


def test_shape_annotations_are_checked_while_tests_run(checked: None) -> None:
    with pytest.raises(TypeCheckError, match='batch heads i j'):
        HeadNorm(heads=3).init(jax.random.key(0), jnp.zeros((2, 3, 4)), mix=jnp.eye(3))
    with pytest.raises(TypeCheckError, match='shape'):
        softmax(jnp.zeros((2, 3), jnp.int32))
    with pytest.raises(TypeCheckError, match='batch tokens dim'):
        FeedForward(dim=4, hidden_dim=6, dropout=0.0).init(jax.random.key(0), jnp.zeros((2, 4)), train=False)


BLOCK_TORCH = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('torch', 'vit_pytorch'):
            raise ImportError(f'{name} is blocked')

sys.meta_path.insert(0, Blocked())
"""
USE = """
import sys
import flax_vit, jax, jax.numpy as jnp
model = flax_vit.SimpleViT(image_size=4, patch_size=2, num_classes=3, dim=8, depth=1, heads=1, mlp_dim=2)
model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
assert 'torch' not in sys.modules
assert 'convert' not in sys.modules
"""


@pytest.mark.parametrize('program', [USE, BLOCK_TORCH + USE], ids=['installed', 'blocked'])
def test_the_models_need_no_torch(program: str) -> None:
    done = subprocess.run([sys.executable, '-W', 'error', '-c', program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('kernel', [jnp.bfloat16, jnp.float32, jnp.float64], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize('bias', [jnp.bfloat16, jnp.float32, jnp.float64], ids=lambda dtype: dtype.__name__)
def test_a_layer_computes_in_what_its_parameters_promote_to(kernel: Any, bias: Any, float64: None) -> None:
    """As linen's Dense, with the same names of parameters."""
    params = {'kernel': jnp.linspace(-1, 1, 6, dtype=kernel).reshape(2, 3), 'bias': jnp.linspace(0, 1, 3, dtype=bias)}
    x = jnp.linspace(-1, 1, 8, dtype=jnp.bfloat16).reshape(4, 2)
    ours: Any = Linear(in_features=2, features=3).apply({'params': params}, x)
    theirs: Any = nn.Dense(3).apply({'params': params}, x)
    assert ours.dtype == theirs.dtype
    np.testing.assert_allclose(ours.astype(float), theirs.astype(float), rtol=float(jnp.finfo(ours.dtype).eps))
