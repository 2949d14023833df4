"""What is seen inside a model is what PyTorch computes there, and nothing is computed or kept that nobody asked for."""

from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
import torch

from flax_vit import DeepViT, Features, features, stack_layers, to_nnx
from flax_vit.architectures import defaults_of
from parity_tests.support.reference import (
    CONFIGURATIONS,
    FLOAT64_BOUND,
    QUICK,
    channels_first,
    check,
    converted,
    random_images,
    relative_error,
    to_numpy,
)

WAYS: dict[str, dict[str, Any]] = {
    'plain': {},
    'scanned': {'scan_layers': True},
    'in-chunks': {'query_chunk_size': 2, 'remat': True},
    'scanned-in-chunks': {'scan_layers': True, 'query_chunk_size': 2, 'remat': True},
}
MODELS = ['deep-mean', 'simple-oblong-patches']
CASES = [
    *((name, way) for name in MODELS for way in WAYS),
    ('deep-smaller-oblong', 'plain'),
    ('simple-one-of-each', 'plain'),
    ('registers-oblong', 'scanned-in-chunks'),
    ('qk-norm-oblong', 'scanned-in-chunks'),
    ('vit-oblong', 'plain'),
    ('vit-smaller-oblong', 'scanned-in-chunks'),
    ('vit-one-head-of-full-width', 'plain'),
]


def pytorch_features(module: Any, images: torch.Tensor) -> dict[str, np.ndarray]:
    """The same by forward hooks, the tokens as what each attention and the end of the transformer gets or gives."""
    found: dict[str, np.ndarray] = {}
    transformer = module.transformer
    deep = hasattr(transformer.layers[0][0], 'reattn_norm')

    def output(name: str) -> Any:
        return lambda _, inputs, output: found.update({name: to_numpy(output.clone())})

    def inputs(name: str) -> Any:
        return lambda _, inputs: found.update({name: to_numpy(inputs[0].clone())})

    transformer.register_forward_pre_hook(inputs('embedding'))
    for block, (attention, _) in enumerate(transformer.layers):
        if block:
            attention.register_forward_pre_hook(inputs(f'tokens {block - 1}'))
        (attention.dropout if deep else attention.attend).register_forward_hook(output(f'attention {block}'))
        if deep:
            attention.reattn_norm.register_forward_hook(output(f'reattention {block}'))
    last = f'tokens {len(transformer.layers) - 1}'
    if deep:
        transformer.register_forward_hook(output(last))
    else:
        transformer.norm.register_forward_pre_hook(inputs(last))
    module.to_latent.register_forward_hook(output('pooled'))
    module.register_forward_hook(output('logits'))
    with torch.no_grad():
        module(images)
    return found


def by_name(seen: Features) -> dict[str, Any]:
    """Features by the names that `pytorch_features` gives them."""
    named: dict[str, Any] = {}
    for kind, value in seen._asdict().items():
        named |= (
            {f'{kind} {block}': array for block, array in value.items()} if isinstance(value, dict) else {kind: value}
        )
    return named


def in_a_way(name: str, way: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Any, Any, np.ndarray]:
    """PyTorch's module, the port computed in one of `WAYS`, its variables, images."""
    module, model, variables = converted(CONFIGURATIONS[name], dtype)
    model = model.clone(**WAYS[way])
    variables = stack_layers(variables) if model.scan_layers else variables
    return (
        module,
        model,
        variables,
        random_images(CONFIGURATIONS[name]).astype(to_numpy(torch.ones(1, dtype=dtype)).dtype),
    )


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize(('name', 'way'), CASES)
def test_everything_is_what_pytorch_computes(name: str, way: str) -> None:
    module, model, variables, images = in_a_way(name, way)
    seen = jax.jit(partial(features, model, attention=True), compiler_options=QUICK)(variables, images)
    truth = pytorch_features(module, channels_first(images))
    assert by_name(seen).keys() == truth.keys()
    check({name: relative_error(array, truth[name]) for name, array in by_name(seen).items()}, FLOAT64_BOUND)


def memory_of(program: Any) -> Any:
    return program.memory_analysis()


@pytest.mark.parametrize('way', ['plain', 'scanned'])
@pytest.mark.parametrize('name', MODELS)
def test_only_what_is_asked_for_is_held(name: str, way: str) -> None:
    _, model, variables, images = in_a_way(name, way, torch.float32)

    def compiled(function: Any) -> tuple[Any, set[str], int]:
        """What it gives, the names of that, and the bytes taken on the way; it gives nothing without a name."""
        program = jax.jit(function, compiler_options=QUICK).lower(variables, images).compile()
        given, memory = program(variables, images), memory_of(program)
        arrays = jax.tree.leaves(given)
        names = {name for name, array in by_name(given).items() if array is not None}
        assert memory.output_size_in_bytes == sum(array.nbytes + 8 for array in arrays)  # 8: where it is
        return given, names, memory.temp_size_in_bytes

    plain = jax.jit(model.apply, compiler_options=QUICK).lower(variables, images).compile()
    least, names, held = compiled(partial(features, model, tokens=False))
    assert names == {'logits', 'pooled'}
    np.testing.assert_array_equal(least.logits, plain(variables, images))

    some, names, _ = compiled(partial(features, model, blocks=[1, -1]))
    assert names == {'logits', 'pooled', 'embedding', 'tokens 1', 'tokens -1'}
    assert held < memory_of(plain).temp_size_in_bytes + some.tokens[1].nbytes

    _, names, _ = compiled(partial(features, model, blocks=[0], tokens=False, attention=True))
    kinds = ['attention', 'reattention'] if isinstance(model, DeepViT) else ['attention']
    assert names == {'logits', 'pooled', *(f'{kind} 0' for kind in kinds)}


def test_blocks_that_are_not_there() -> None:
    _, model, variables, images = in_a_way('deep-mean', 'plain', torch.float32)
    for block in (3, -4):
        with pytest.raises(ValueError, match=rf'blocks 0 to 2, from the end -1 to -3; there is no block {block}'):
            features(model, variables, images, blocks=[0, block])


@pytest.mark.usefixtures('unchecked')
def test_maps_that_are_not_there_and_several(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, variables, images = in_a_way('deep-mean', 'plain', torch.float32)
    seen = features(model, variables, images, attention=True)
    monkeypatch.setattr(DeepViT, 'MAPS', {'attention': ('attention_dropout', 'reattn_norm_1')})
    for block, maps in features(model, variables, images, attention=True).attention.items():
        both = np.concatenate([seen.attention[block], seen.reattention[block]], axis=1)
        np.testing.assert_array_equal(maps, both)
    monkeypatch.setattr(DeepViT, 'MAPS', {'attention': 'attention/dropout'})
    with pytest.raises(ValueError, match="DeepViT: nothing is at 'attention/dropout', which MAPS names"):
        features(model, variables, images, attention=True)


class Wider(DeepViT):
    pass


@pytest.mark.usefixtures('unchecked')
def test_what_are_no_blocks_and_no_model() -> None:
    _, model, variables, images = in_a_way('deep-mean', 'plain', torch.float32)
    for blocks in (0, 'last', b'1'):
        with pytest.raises(ValueError, match=r'blocks must be several numbers, such as \[0, -1\], not '):
            features(model, variables, images, blocks=blocks)  # type: ignore[arg-type]
    for block in (1.0, '1', None):
        with pytest.raises(ValueError, match=rf'there is no block {block!r}'):
            features(model, variables, images, blocks=[block])  # type: ignore[list-item]
    fields = {name: getattr(model, name) for name in defaults_of(DeepViT)}
    for stranger in (Wider(**fields), to_nnx(model, variables)):
        with pytest.raises(ValueError, match=r'features looks into one of .*SimpleViT, ViT itself, not a '):
            features(stranger, variables, images)
