"""What XLA makes of the models: memory that `query_chunk_size` saves, programs that `scan_layers` keeps small."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from flax_vit import DeepViT, SimpleViT

both_models = pytest.mark.parametrize('model_class', [DeepViT, SimpleViT])


def compiled(model: Any, *, gradient: bool) -> Any:
    """The forward of one image, or the gradient of its logits' sum, ready to run."""
    images = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)

    def total(variables: Any, images: Any) -> jax.Array:
        return model.apply(variables, images, train=True).sum()

    return jax.jit(jax.grad(total) if gradient else model.apply).lower(variables, images).compile()


MAPS = 4096**2 * 6 * 4  # bytes of the attention maps of six heads at 4,096 patches: 384 MiB


def memory(model_class: Any, *, gradient: bool) -> tuple[int, int]:
    """Bytes that XLA plans for temporaries at 4,096 patches, with whole maps and with 256 queries at once."""
    model = model_class(image_size=128, patch_size=2, num_classes=10, dim=384, depth=1, heads=6, mlp_dim=1536)
    whole, chunked = (
        compiled(model.clone(query_chunk_size=size), gradient=gradient).memory_analysis().temp_size_in_bytes
        for size in (None, 256)
    )
    return whole, chunked


@pytest.mark.parametrize('gradient', [False, True], ids=['forward', 'gradient'])
def test_chunks_of_queries_take_a_quarter_of_the_memory(gradient: bool) -> None:
    whole, chunked = memory(DeepViT, gradient=gradient)
    assert whole > 2 * MAPS
    assert chunked < whole / 4


def test_chunks_of_queries_hold_no_whole_map_of_plain_attention() -> None:
    whole, chunked = memory(SimpleViT, gradient=True)
    assert whole > 2 * MAPS
    assert chunked < MAPS


def lines(model_class: Any, depth: int, **options: Any) -> int:
    """The length of the compiled gradient."""
    sizes = {'image_size': 16, 'patch_size': 4, 'num_classes': 3, 'dim': 16, 'heads': 2, 'mlp_dim': 24}
    return compiled(model_class(**sizes, depth=depth, **options), gradient=True).as_text().count('\n')


@pytest.mark.slow
@both_models
def test_programs_grow_with_the_depth_and_not_with_its_square(model_class: Any) -> None:
    four, eight, sixteen = (lines(model_class, depth) for depth in (4, 8, 16))
    assert sixteen - eight < 2.2 * (eight - four)


@both_models
def test_scanned_programs_do_not_grow(model_class: Any) -> None:
    assert lines(model_class, 64, scan_layers=True) < 1.05 * lines(model_class, 8, scan_layers=True)


@pytest.mark.parametrize(('platform', 'result'), [('cpu', 'f32'), ('cuda', 'bf16'), ('tpu', 'bf16')])
@both_models
def test_bfloat16_products_are_asked_for_in_float32_on_cpus_only(model_class: Any, platform: str, result: str) -> None:
    """There a CPU's own units for bfloat16 are used; elsewhere the result would take twice the memory."""
    model = model_class(
        image_size=8, patch_size=4, num_classes=3, dim=16, depth=1, heads=2, mlp_dim=24, dtype=jnp.bfloat16
    )
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.bfloat16)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    program = jax.jit(model.apply).trace(variables, images).lower(lowering_platforms=(platform,)).as_text()
    products = re.findall(
        r'dot_general .*: \(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\) -> tensor<[\dx]*x(\w+)>', program
    )
    assert len(products) == program.count('dot_general') >= 8
    assert set(products) == {('bf16', 'bf16', result)}
