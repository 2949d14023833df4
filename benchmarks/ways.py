"""The ways to run a model that `benchmarks/speed.py` compares; each is run in a process of its own.

A way is a function of a case that returns `call`, which does the work once and waits for its end. The work is a
forward, or a training step: forward, cross-entropy, backward, AdamW. All ways have the same weights' shapes, the same
images and the default settings of their frameworks, but for JAX's precision on a GPU.
"""

import gc
import os
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import rich_click as click

from flax_vit.sizes import FIELDS

SIZES = {'README': FIELDS['readme'], 'Ti/16': FIELDS['ti16'], 'S/16': FIELDS['s16'], 'B/16': FIELDS['b16']}
CLASSES = 1000
BURST = 0.25  # seconds of calls at a stretch

# Before the frameworks are imported. JAX would take most of a GPU's memory at its start, but several processes share it
# here; what either keeps on disk of what it compiled would hide what compiling takes.
os.environ |= {
    'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
    'JAX_ENABLE_COMPILATION_CACHE': 'false',
    'TORCHINDUCTOR_FORCE_DISABLE_CACHES': '1',
}


@dataclass(frozen=True)
class Case:
    """What is run."""

    model: str  # SimpleViT, DeepViT, ViT
    size: str
    batch: int
    dtype: str
    training: bool

    def __str__(self) -> str:
        work = 'training step' if self.training else 'forward'
        return f'{self.model} {self.size}, batch {self.batch}, {self.dtype}, {work}'

    @property
    def flops(self) -> float:
        """Floating-point operations of the matrix products; of a training step three times the forward's."""
        size = SIZES[self.size]
        dim, heads, patch = size['dim'], size['heads'], size['patch_size']
        deep = self.model == 'DeepViT'
        patches = (size['image_size'] // patch) ** 2
        tokens = patches + (self.model != 'SimpleViT')
        inner_dim = 64 * heads
        linear = tokens * dim * (4 * inner_dim + 2 * size['mlp_dim'])
        attention = tokens**2 * (2 * inner_dim + deep * heads**2)
        forward = 2 * self.batch * (size['depth'] * (linear + attention) + patches * 3 * patch**2 * dim + dim * CLASSES)
        return forward * (3 if self.training else 1)


def torch_module(case: Case) -> Any:
    """vit-pytorch's module and the images (batch, channels, height, width), on the GPU if there is one."""
    import torch
    from vit_pytorch import deepvit, simple_vit, vit

    torch.manual_seed(0)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    models = {'SimpleViT': simple_vit.SimpleViT, 'DeepViT': deepvit.DeepViT, 'ViT': vit.ViT}
    dtype = getattr(torch, case.dtype)
    module = models[case.model](num_classes=CLASSES, **SIZES[case.size]).to(device, dtype)
    side = SIZES[case.size]['image_size']
    return module, torch.randn(case.batch, 3, side, side, device=device, dtype=dtype)


def torch_work(case: Case, prepare: Callable[[Any], Any]) -> Callable[[], None]:
    """The case in PyTorch; `prepare` makes the module into what is called."""
    import torch

    module, images = torch_module(case)
    with torch.inference_mode():
        module(images)  # what einops remembers of its first call would have torch.compile compile again at the second
    model = prepare(module.train(case.training))
    labels = torch.zeros(case.batch, dtype=torch.long, device=images.device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    if case.training:  # the moments exist before the first step, as optax's do: their memory is not counted either
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()

    def forward() -> None:
        with torch.inference_mode():
            model(images)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    def call() -> None:
        step() if case.training else forward()
        if images.is_cuda:
            torch.cuda.synchronize()

    return call


def eager(case: Case) -> Callable[[], None]:
    """PyTorch, as vit-pytorch comes."""
    return torch_work(case, lambda module: module)


def compiled(case: Case) -> Callable[[], None]:
    """PyTorch with `torch.compile`."""
    import torch

    return torch_work(case, torch.compile)


def fused(case: Case) -> Callable[[], None]:
    """PyTorch with its fused attention, which can replace all but DeepViT's: re-attention needs the maps."""
    import torch
    from einops import rearrange

    def prepare(module: Any) -> Any:
        def forward(self: Any, x: Any) -> Any:
            qkv = self.to_qkv(self.norm(x)).chunk(3, dim=-1)
            q, k, v = (rearrange(part, 'b n (h d) -> b h n d', h=self.heads) for part in qkv)
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return self.to_out(rearrange(out, 'b h n d -> b n (h d)'))

        for attention, _ in module.transformer.layers:
            attention.forward = forward.__get__(attention)
        return module

    return torch_work(case, prepare)


def precision(case: Case) -> str | None:
    """Of JAX's matrix products: on a GPU what PyTorch's default is, float32, which for JAX is not the default."""
    import jax

    return 'highest' if case.dtype == 'float32' and jax.default_backend() != 'cpu' else None


def flax_program(case: Case) -> tuple[Callable[..., Any], list[Any]]:
    """The case in Flax, to be jitted, and what to call it with."""
    import jax

    import flax_vit

    model = getattr(flax_vit, case.model)(
        num_classes=CLASSES, dtype=case.dtype, param_dtype=case.dtype, precision=precision(case), **SIZES[case.size]
    )
    side = SIZES[case.size]['image_size']
    images = jax.random.normal(jax.random.key(0), (case.batch, side, side, 3), case.dtype)
    apply = partial(model.apply, train=True) if case.training else model.apply
    return jax_program(case, apply, variables_of(model, images), images)


def variables_of(model: Any, images: Any) -> Any:
    """Random ones, of the shapes that the model has. Its own `init` would be compiled for some seconds."""
    import jax

    return filled(jax.eval_shape(model.init, jax.random.key(1), images))


def filled(shapes: Any) -> Any:
    """Random arrays of these shapes; vectors, of which the scales of a LayerNorm are some, of numbers about 1."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    generator = np.random.default_rng(0)

    def array(shape: jax.ShapeDtypeStruct) -> jax.Array:
        values = generator.standard_normal(shape.shape, np.float32) / 50
        return jnp.asarray(values + (len(shape.shape) == 1), shape.dtype)

    return jax.tree.map(array, shapes)


def jax_program(
    case: Case, apply: Callable[..., Any], variables: Any, images: Any
) -> tuple[Callable[..., Any], list[Any]]:
    """The case with any model that JAX can run; of a training step, its results are the next one's arguments."""
    import jax
    import jax.numpy as jnp
    import optax

    if not case.training:
        return apply, [variables, images]
    labels = jnp.zeros(case.batch, int)
    optimizer = optax.adamw(1e-4)

    def loss(variables: Any, images: jax.Array) -> jax.Array:
        logits = apply(variables, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(variables: Any, moments: Any, images: jax.Array) -> Any:
        updates, moments = optimizer.update(jax.grad(loss)(variables, images), moments, variables)
        return optax.apply_updates(variables, updates), moments

    return step, [variables, optimizer.init(variables), images]


def flax(case: Case) -> Callable[[], None]:
    """The port, under `jax.jit`."""
    return jitted(case, *flax_program(case))


def linen(case: Case) -> Callable[[], None]:
    """A ViT as people write it in linen, of its own layers; a DeepViT besides mixes heads and normalises over them."""
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    size = SIZES[case.size]
    dim, heads, patch = size['dim'], size['heads'], (size['patch_size'],) * 2
    of_dtype: Any = {'dtype': case.dtype, 'param_dtype': case.dtype, 'precision': precision(case)}
    plain: Any = {name: of_dtype[name] for name in ('dtype', 'param_dtype')}

    class Attention(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            qkv = nn.DenseGeneral((3, heads, 64), use_bias=False, **of_dtype)(x)
            q, k, v = jnp.moveaxis(qkv, 2, 0)
            attention = nn.softmax(jnp.einsum('bihd,bjhd->bhij', q, k, precision=precision(case)) / 8)
            if case.model == 'DeepViT':
                mix = self.param('mix', nn.initializers.normal(1.0), (heads, heads), case.dtype)
                attention = jnp.einsum('bhij,hg->bijg', attention, mix, precision=precision(case))
                attention = jnp.moveaxis(nn.LayerNorm(**plain)(attention), -1, 1)
            x = jnp.einsum('bhij,bjhd->bihd', attention, v, precision=precision(case))
            return nn.DenseGeneral(dim, axis=(-2, -1), **of_dtype)(x)

    class ViT(nn.Module):
        @nn.compact
        def __call__(self, images: Any) -> Any:
            x = nn.Conv(dim, patch, patch, **of_dtype)(images).reshape(case.batch, -1, dim)
            if case.model != 'SimpleViT':
                first = self.param('cls', nn.initializers.zeros, (1, 1, dim), case.dtype)
                x = jnp.concatenate([jnp.tile(first, (case.batch, 1, 1)), x], axis=1)
            x = x + self.param('positions', nn.initializers.normal(1.0), (1, x.shape[1], dim), case.dtype)
            for _ in range(size['depth']):
                x = x + Attention()(nn.LayerNorm(**plain)(x))
                hidden = nn.gelu(nn.Dense(size['mlp_dim'], **of_dtype)(nn.LayerNorm(**plain)(x)))
                x = x + nn.Dense(dim, **of_dtype)(hidden)
            x = x.mean(axis=1) if case.model == 'SimpleViT' else x[:, 0]
            return nn.Dense(CLASSES, **of_dtype)(nn.LayerNorm(**plain)(x))

    images = jax.random.normal(jax.random.key(0), (case.batch, *[size['image_size']] * 2, 3), case.dtype)
    model = ViT()
    return jitted(case, *jax_program(case, model.apply, variables_of(model, images), images))


def jitted(case: Case, function: Callable[..., Any], arguments: list[Any]) -> Callable[[], None]:
    """What JAX runs, compiled."""
    import jax

    jax.block_until_ready(arguments)  # what makes them takes memory, too
    step = jax.jit(function, donate_argnums=(0, 1) if case.training else ())

    def call() -> None:
        results = jax.block_until_ready(step(*arguments))
        if case.training:
            arguments[:2] = results

    return call


def torchax(case: Case) -> Callable[[], None]:
    """vit-pytorch's own module, run in JAX by the bridge torchax."""
    import torchax as bridge

    module, images = torch_module(case)
    states, function = bridge.extract_jax(module.train(case.training))
    pixels = bridge.default_env().t2j_copy(images)
    return jitted(case, *jax_program(case, lambda states, images: function(states, (images,)), states, pixels))


# Of the square matrices that the ceiling is measured with: a GPU does small ones before the next is asked for.
SIDE = {'cpu': 2048, 'gpu': 8192}


def torch_product(case: Case) -> Callable[[], None]:
    """A large matrix product in PyTorch."""
    import torch

    device, side = ('cuda', SIDE['gpu']) if torch.cuda.is_available() else ('cpu', SIDE['cpu'])
    square = torch.randn(side, side, device=device, dtype=getattr(torch, case.dtype))

    def call() -> None:
        square @ square
        if square.is_cuda:
            torch.cuda.synchronize()

    return call


def jax_product(case: Case) -> Callable[[], None]:
    """A large matrix product in JAX."""
    import jax

    side = SIDE[jax.default_backend()]
    square = jax.random.normal(jax.random.key(0), (side, side), case.dtype)
    product = jax.jit(lambda square: jax.numpy.matmul(square, square, precision=precision(case)))
    return lambda: product(square).block_until_ready()


WAYS: dict[str, Callable[[Case], Callable[[], None]]] = {
    'PyTorch eager': eager,
    'torch.compile': compiled,
    'fused attention': fused,
    'plain linen': linen,
    'Flax': flax,
    'PyTorch eager, huge pages': eager,
    'Flax, huge pages': flax,
}
# What the C library of Linux reads when a process starts: large pieces of memory come in pages of 2 MiB.
ENVIRONMENTS = {
    name: {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'} for name in ('PyTorch eager, huge pages', 'Flax, huge pages')
}
# It does not install beside today's PyTorch: docs/bridge.md has the environment.
if find_spec('torchax'):
    WAYS['torchax'] = torchax
PRODUCTS = {'product, PyTorch': torch_product, 'product, JAX': jax_product}


def ways_of(case: Case) -> list[str]:
    """Those that the case is run in. It is training on a CPU that asks the system for much memory in every call."""
    left_out = {'fused attention'} if case.model == 'DeepViT' else set()
    if not case.training or on_gpu():
        left_out |= ENVIRONMENTS.keys()
    return [name for name in WAYS if name not in left_out]


def forget_memory_peak() -> None:
    """What was in use up to now does not count. (JAX cannot forget a GPU's peak; that of preparing a case is small.)"""
    import ctypes
    import sys

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that is free in the process is given back, not used again unseen
    torch = sys.modules.get('torch')
    if torch is not None and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    Path('/proc/self/clear_refs').write_text('5')


def memory(*, peak: bool) -> int:
    """Bytes in use, or at most so far: of the GPU where there is one, else of the process, resident."""
    import sys

    torch, jax = sys.modules.get('torch'), sys.modules.get('jax')
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    statistics_of_device = jax.devices()[0].memory_stats() if jax is not None else None
    if statistics_of_device:
        return statistics_of_device['peak_bytes_in_use' if peak else 'bytes_in_use']
    status = Path('/proc/self/status').read_text()
    return 1024 * int(re.search(rf'{"VmHWM" if peak else "VmRSS"}:\s*(\d+)', status)[1])  # type: ignore[index]


def work(connection: Connection, way: str, case: Case) -> None:
    """Serve one way: report its first calls, then a burst each time one is asked for, until None is."""
    call = {**WAYS, **PRODUCTS}[way](case)
    forget_memory_peak()
    before = memory(peak=False)
    start = time.perf_counter()
    call()
    first = time.perf_counter() - start
    start = time.perf_counter()
    call()
    second = time.perf_counter() - start
    connection.send({'compile_seconds': max(first - second, 0.0), 'memory_bytes': memory(peak=True) - before})
    while connection.recv():
        call()  # not counted: meets the caches that another way left, and memory that a virtual machine took back
        times: list[float] = []
        end = time.perf_counter() + BURST
        while not times or time.perf_counter() < end:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        connection.send(statistics.median(times))


def on_gpu() -> bool:
    """Whether both frameworks run on a GPU. ClickException where only one does: that would be no comparison."""
    import jax
    import torch

    seen = {'PyTorch': torch.cuda.is_available(), 'JAX': jax.default_backend() != 'cpu'}
    if len(set(seen.values())) > 1:
        one, other = sorted(seen, key=lambda name: seen[name], reverse=True)
        raise click.ClickException(
            f'{one} would run on an accelerator, {other} on the CPU. Install what {other} needs for it (for JAX and '
            "NVIDIA GPUs: `pip install '.[gpu]'`), or compare both on the CPU, with JAX_PLATFORMS=cpu and "
            'CUDA_VISIBLE_DEVICES=-1 in the environment.'
        )
    return all(seen.values())


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import importlib.metadata
    import platform

    import jax

    lines = Path('/proc/cpuinfo').read_text()
    info = dict(re.findall(r'^(model name|cpu family|flags)\s*: (.*)$', lines, re.MULTILINE))
    flags = info.get('flags', '').split()
    vectors = {'AMX': 'amx_tile', 'AVX-512': 'avx512f', 'AVX2': 'avx2'}  # the best first
    versions = {name: importlib.metadata.version(name) for name in ('jax', 'flax', 'torch', 'vit-pytorch', 'numpy')}
    return {
        'processor': info.get('model name', platform.processor()),
        'family': info.get('cpu family'),  # of AMD's, which virtual machines often give no other name
        'vectors': next((name for name, flag in vectors.items() if flag in flags), None),
        'cores': os.cpu_count(),
        'accelerator': jax.devices()[0].device_kind if jax.default_backend() != 'cpu' else None,
        'python': platform.python_version(),
        'versions': versions,
    }


def as_json(case: Case) -> dict[str, Any]:
    """A case and its operations."""
    return {**asdict(case), 'flops': case.flops}
