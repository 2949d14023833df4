"""Every slip we know of, put into the port, breaks the comparison that should catch it."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import flax.errors
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from einops import rearrange
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

import flax_vit.deep_vit
import flax_vit.layers
import flax_vit.simple_vit
import flax_vit.vit
from parity_tests.support.reference import (
    FLOAT64_BOUND,
    QK_NORM,
    REGISTERS,
    Configuration,
    check,
    converted,
    deep_vit,
    dropout_errors,
    output_errors,
    random_images,
    simple_vit,
    vit,
)

# Square where a slip needs it: heads x dim_head is dim, so that `to_out` may be transposed; DeepViT has as many
# tokens as heads, so that any axis of the attention map may be taken for any other. Otherwise all sizes differ.
DEEP = deep_vit(
    (6, 6), image_size=6, patch_size=3, num_classes=7, dim=30, depth=1, heads=5, mlp_dim=11, dim_head=6,
    channels=2, pool='mean', dropout=0.3, emb_dropout=0.2,
)  # fmt: skip
SIMPLE = simple_vit(
    image_size=(6, 15), patch_size=(3, 5), num_classes=7, dim=24, depth=1, heads=4, mlp_dim=11, dim_head=6, channels=2
)
SIMPLE_WITH_REGISTERS = replace(SIMPLE, fields={**SIMPLE.fields, 'num_register_tokens': 5}, torch_class=REGISTERS)
SIMPLE_WITH_QK_NORM = replace(SIMPLE, torch_class=QK_NORM)
VIT = vit(
    (6, 15), image_size=(6, 15), patch_size=(3, 5), num_classes=7, dim=24, depth=1, heads=4, mlp_dim=11, dim_head=6,
    channels=2, dropout=0.3, emb_dropout=0.2,
)  # fmt: skip
VIT_MEAN = replace(VIT, fields={**VIT.fields, 'pool': 'mean'})  # without a class token
MODELS = {'DeepViT': DEEP, 'SimpleViT': SIMPLE, 'ViT': VIT}


@dataclass
class Port:
    """A ported model, for a slip to be put into."""

    monkeypatch: pytest.MonkeyPatch
    module: torch.nn.Module
    model: Any
    params: dict[str, Any]  # by path
    images: np.ndarray
    interceptors: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, configuration: Configuration, monkeypatch: pytest.MonkeyPatch) -> 'Port':
        # Images far from zero mean, as they are before anybody normalises them: what the fast variance can't bear.
        module, model, variables = converted(configuration)
        params = flatten_dict(variables['params'], sep='/')
        return cls(monkeypatch, module, model, params, 1000 + random_images(configuration))

    @property
    def file(self) -> ModuleType:
        return {'DeepViT': flax_vit.deep_vit, 'SimpleViT': flax_vit.simple_vit, 'ViT': flax_vit.vit}[self.name]

    @property
    def name(self) -> str:
        return type(self.model).__name__

    def substitute(self, name: str, value: Any, where: Any = None) -> None:
        self.monkeypatch.setattr(where or self.file, name, value)

    def substitute_softmax(self, softmax: Callable[[Any], Any]) -> None:
        if self.file is flax_vit.deep_vit:
            self.substitute('softmax', softmax)
        else:

            def exponentials(x: Any) -> tuple[Any, Any]:
                return softmax(x), jnp.ones((*x.shape[:-1], 1), x.dtype)

            self.substitute('exponentials', exponentials, flax_vit.layers)

    def substitute_gelu(self, gelu: Callable[[Any], Any]) -> None:
        self.substitute('ACTIVATION', staticmethod(gelu), flax_vit.layers.FeedForward)

    def respell(self, right: str, wrong: str, where: ModuleType | None = None) -> None:
        """`wrong` for `right` in every einops pattern of the module."""

        def respelled(x: Any, pattern: str, **sizes: int) -> Any:
            return rearrange(x, pattern.replace(right, wrong), **sizes)

        self.substitute('rearrange', respelled, where)

    def change(self, ending: str, function: Callable[[Any], Any]) -> None:
        """`function` of every parameter the path of which ends so."""
        names = [name for name in self.params if name.endswith(ending)]
        assert names
        self.params |= {name: function(self.params[name]) for name in names}

    def intercept(self, layer: str, function: Callable[[Callable[..., Any], Any, dict[str, Any]], Any]) -> None:
        """`function(call, x, keywords)` for every call of a layer of that name."""

        def interceptor(call: Any, arguments: Any, keywords: Any, context: nn.module.InterceptorContext) -> Any:
            if (context.module.name, context.method_name) == (layer, '__call__'):
                return function(call, arguments[0], keywords)
            return call(*arguments, **keywords)

        self.interceptors.append(interceptor)

    def errors(self, compare: Callable[..., dict[str, float]] = output_errors) -> dict[str, float]:
        variables = {'params': unflatten_dict(self.params, sep='/')}
        with ExitStack() as stack:
            for interceptor in self.interceptors:
                stack.enter_context(nn.intercept_methods(interceptor))
            return compare(self.module, self.model, variables, self.images)


Slip = Callable[[Port], None]
SLIPS: dict[tuple[str, str], Slip] = {}
CASES: dict[tuple[str, str], Configuration] = {}  # what each is put into


def slip(*configurations: Configuration) -> Callable[[Slip], Slip]:
    """Registers a slip, and for which models."""

    def register(function: Slip) -> Slip:
        for configuration in configurations:
            SLIPS[configuration.architecture, function.__name__] = function
            CASES[configuration.architecture, function.__name__] = configuration
        return function

    return register


@slip(DEEP, SIMPLE, VIT)
def tanh_gelu(port: Port) -> None:
    port.substitute_gelu(nn.gelu)


@slip(DEEP, SIMPLE)
def epsilon_of_flax(port: Port) -> None:
    port.substitute('layer_norm', lambda self: nn.LayerNorm(use_fast_variance=False), flax_vit.layers.Layer)


@slip(DEEP, SIMPLE)
def fast_variance(port: Port) -> None:
    port.substitute('layer_norm', lambda self: nn.LayerNorm(epsilon=1e-5), flax_vit.layers.Layer)


@slip(DEEP, SIMPLE)
def softmax_in_float32(port: Port) -> None:
    port.substitute_softmax(lambda x: nn.softmax(x.astype(jnp.float32)).astype(x.dtype))


@slip(DEEP)
def softmax_over_queries(port: Port) -> None:
    port.substitute_softmax(lambda x: nn.softmax(x, axis=-2))


@slip(DEEP, SIMPLE)
def square_kernel_not_transposed(port: Port) -> None:
    port.change('/to_out_0/kernel' if port.file is flax_vit.deep_vit else '/to_out/kernel', np.transpose)


@slip(DEEP, SIMPLE)
def values_first_then_queries_and_keys(port: Port) -> None:
    port.change('to_qkv/kernel', lambda kernel: jnp.roll(kernel, kernel.shape[1] // 3, axis=1))


@slip(DEEP, SIMPLE, VIT)
def queries_and_keys_swapped(port: Port) -> None:
    port.change('to_qkv/kernel', lambda kernel: jnp.concatenate([jnp.split(kernel, 3, 1)[i] for i in (1, 0, 2)], 1))


@slip(DEEP, SIMPLE, VIT)
def queries_keys_and_values_per_head(port: Port) -> None:
    port.respell('(qkv h d)', '(h qkv d)')


@slip(DEEP, SIMPLE)
def heads_inside_their_dimensions(port: Port) -> None:
    port.respell('(qkv h d)', '(qkv d h)')


@slip(DEEP, SIMPLE, VIT)
def heads_joined_the_wrong_way(port: Port) -> None:
    port.respell('-> b n (h d)', '-> b n (d h)')


@slip(SIMPLE, VIT)
def heads_wrong(port: Port) -> None:
    port.model = port.model.clone(heads=6, dim_head=4)


@slip(DEEP, SIMPLE, VIT)
def scale_missing(port: Port) -> None:
    inner_dim, root = port.model.heads * port.model.dim_head, port.model.dim_head**0.5
    # larger queries are what dots without their scale come to
    port.change('to_qkv/kernel', lambda kernel: kernel.at[:, :inner_dim].multiply(root))


@slip(DEEP, SIMPLE, VIT)
def channels_before_the_pixels_of_a_patch(port: Port) -> None:
    port.respell('(p1 p2 c)', '(c p1 p2)', flax_vit.layers)


@slip(DEEP, SIMPLE)
def columns_of_a_patch_before_its_rows(port: Port) -> None:
    port.respell('(p1 p2 c)', '(p2 p1 c)', flax_vit.layers)


@slip(DEEP, SIMPLE)
def patches_column_by_column(port: Port) -> None:
    port.respell('-> b (h w)', '-> b (w h)', flax_vit.layers)


@slip(VIT)
def scale_of_releases_before_0_6_7(port: Port) -> None:
    port.model = port.model.clone(scale_by_dim=True)


@slip(DEEP)
def reattention_transposed(port: Port) -> None:
    port.change('reattn_weights', np.transpose)


def reattend(port: Port, *, axis: int, epsilon: float) -> None:
    """Re-attention as it is written in the paper, normalised over `axis` of (batch, heads, queries, keys)."""

    norm = nn.LayerNorm(epsilon=epsilon, use_fast_variance=False)

    def wrong(call: Any, attn: Any, keywords: Any) -> Any:
        scale, bias = (port.params[f'transformer/layers_0_0/reattn_norm_1/{kind}'] for kind in ('scale', 'bias'))
        mixed = jnp.moveaxis(jnp.einsum('bhij,hg->bgij', attn, keywords['mix']), axis, -1)
        normed: Any = norm.apply({'params': {'scale': scale, 'bias': bias}}, mixed)
        return jnp.moveaxis(normed, -1, axis)

    port.intercept('reattn_norm_1', wrong)


@slip(DEEP)
def reattention_normalised_over_keys(port: Port) -> None:
    reattend(port, axis=3, epsilon=1e-5)


@slip(DEEP)
def epsilon_of_flax_in_reattention(port: Port) -> None:
    reattend(port, axis=1, epsilon=1e-6)


@slip(DEEP, VIT)
def class_token_takes_the_last_position(port: Port) -> None:
    port.change('pos_embedding', lambda table: jnp.roll(table, 1, axis=-2))


@slip(DEEP, VIT)
def class_token_without_position(port: Port) -> None:
    port.change('pos_embedding', lambda table: table.at[..., 0, :].set(0))


@slip(VIT)
def class_token_last(port: Port) -> None:
    def last(x: Any, cls_token: Any) -> Any:
        return jnp.concatenate([x, jnp.broadcast_to(cls_token, (len(x), *cls_token.shape))], axis=1)

    port.substitute('with_class_token', last)


@slip(VIT)
def pooled_by_the_mean(port: Port) -> None:
    port.model = port.model.clone(pool='mean')


@slip(DEEP)
def pooled_by_the_class_token(port: Port) -> None:
    port.model = port.model.clone(pool='cls')


@slip(SIMPLE, VIT_MEAN)
def pooled_by_the_first_token(port: Port) -> None:
    def first(call: Any, x: Any, keywords: Any) -> Any:
        x = call(x, **keywords)
        return jnp.broadcast_to(x[:, :1], x.shape)

    port.intercept('transformer', first)


@slip(DEEP)
def norm_before_pooling(port: Port) -> None:
    head = {kind: port.params[f'mlp_head_0/{kind}'] for kind in ('scale', 'bias')}
    norm = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False)
    port.intercept('transformer', lambda call, x, keywords: norm.apply({'params': head}, call(x, **keywords)))
    port.intercept('mlp_head_0', lambda call, x, keywords: x)


@slip(SIMPLE, VIT_MEAN)
def norm_after_pooling(port: Port) -> None:
    port.model = port.model.clone(norm_after_mean=True)
    head = port.model.HEAD
    moved = {'transformer/norm': f'{head}_0', head: f'{head}_1'}
    for old, new in moved.items():
        for name in [name for name in port.params if name.startswith(f'{old}/')]:
            port.params[name.replace(old, new)] = port.params.pop(name)


@slip(SIMPLE)
def sincos_axes_swapped(port: Port) -> None:
    table = flax_vit.simple_vit.posemb_sincos_2d
    port.substitute('posemb_sincos_2d', lambda height, width, dim: np.roll(table(height, width, dim), dim // 2, axis=1))


@slip(SIMPLE)
def sincos_steps_in_float64(port: Port) -> None:
    def table(height: int, width: int, dim: int) -> np.ndarray:
        y, x = (axis.reshape(-1, 1) for axis in np.mgrid[:height, :width])
        omega = 10_000.0 ** -np.linspace(0, 1, dim // 4)
        angles = [x * omega, y * omega]
        return np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1).astype(np.float32)

    port.substitute('posemb_sincos_2d', table)


# Seen in training only, with the same masks on both sides.
DROPOUT_SLIPS: dict[tuple[str, str], Slip] = {}


def dropout_slip(function: Slip) -> Slip:
    """Registers a slip of DeepViT's dropout."""
    DROPOUT_SLIPS['DeepViT', function.__name__] = function
    return function


@dropout_slip
def dropout_after_reattention(port: Port) -> None:
    later: list[Any] = []

    def put_off(call: Any, x: Any, keywords: Any) -> Any:
        later.append(lambda attn: call(attn, **keywords))
        return x

    def catch_up(call: Any, x: Any, keywords: Any) -> Any:
        return later.pop()(call(x, **keywords))

    port.intercept('attention_dropout', put_off)
    port.intercept('reattn_norm_1', catch_up)


@dropout_slip
def dropout_of_embeddings_missing(port: Port) -> None:
    port.intercept('embedding_dropout', lambda call, x, keywords: (call(x, **keywords), x)[1])


def assert_broken(errors: dict[str, float]) -> None:
    """The comparison fails, and the slip is no subtlety inside: the logits are wrong, by ten times the bound."""
    with pytest.raises(AssertionError, match='differ by more than'):
        check(errors, FLOAT64_BOUND)
    assert errors[''] > 10 * FLOAT64_BOUND


@pytest.mark.parametrize('configuration', [DEEP, SIMPLE, VIT, VIT_MEAN], ids=['DeepViT', 'SimpleViT', 'ViT', 'mean'])
def test_control(configuration: Configuration, monkeypatch: pytest.MonkeyPatch, float64: None) -> None:
    check(Port.of(configuration, monkeypatch).errors(), FLOAT64_BOUND)


@pytest.mark.slow
@pytest.mark.parametrize(('architecture', 'name'), SLIPS, ids=map('-'.join, SLIPS))
def test_slip(architecture: str, name: str, monkeypatch: pytest.MonkeyPatch, float64: None) -> None:
    port = Port.of(CASES[architecture, name], monkeypatch)
    SLIPS[architecture, name](port)
    assert_broken(port.errors())


def test_control_of_reattention(monkeypatch: pytest.MonkeyPatch, float64: None) -> None:
    port = Port.of(DEEP, monkeypatch)
    reattend(port, axis=1, epsilon=1e-5)
    check(port.errors(), FLOAT64_BOUND)


def test_control_of_dropout(monkeypatch: pytest.MonkeyPatch, float64: None) -> None:
    check(Port.of(DEEP, monkeypatch).errors(dropout_errors), FLOAT64_BOUND)


@pytest.mark.parametrize(('architecture', 'name'), DROPOUT_SLIPS, ids=map('-'.join, DROPOUT_SLIPS))
def test_slip_of_dropout(architecture: str, name: str, monkeypatch: pytest.MonkeyPatch, float64: None) -> None:
    port = Port.of(DEEP, monkeypatch)
    DROPOUT_SLIPS[architecture, name](port)
    assert_broken(port.errors(dropout_errors))


def test_wrong_heads_do_not_fit_deep_vit(monkeypatch: pytest.MonkeyPatch, float64: None) -> None:
    port = Port.of(DEEP, monkeypatch)
    port.model = port.model.clone(heads=6, dim_head=5)
    with pytest.raises(flax.errors.ScopeParamShapeError, match='reattn_weights'):
        port.errors()
