"""What the port is measured against: vit-pytorch's own modules, every parameter random, and the measures themselves."""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
from einops import rearrange
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

import convert
from convert.architectures import architecture_of
from flax_vit import unstack_layers
from flax_vit.architectures import MODELS
from flax_vit.checks import pair
from flax_vit.simple_vit import posemb_sincos_2d

FLOAT64_BOUND = 1e-12  # of outputs, relative
GRADIENT_BOUND = 1e-11
ROUNDING_RATIO = 3  # in less than float64: the port's error over PyTorch's

# Compiles in half the time, for float64; what measures rounding compiles as everybody does.
QUICK = {'xla_backend_optimization_level': 0}


# `jax.jit` for float64.
quickly: Any = partial(jax.jit, compiler_options=QUICK)


@dataclass(frozen=True, eq=False)
class Configuration:
    """A model to compare and the images to compare it on."""

    architecture: str
    fields: Mapping[str, Any]  # vit-pytorch's arguments
    image: tuple[int, int]  # height, width
    batch: int = 2
    torch_class: str = ''  # its full name, where it is not the first of the architecture's record

    @property
    def told(self) -> dict[str, Any]:
        """What not even the module tells: of how many rows and columns of patches the learned positions are."""
        image_size = self.fields['image_size']
        learned = MODELS[self.architecture].POSITIONS
        return {'image_size': image_size} if learned and isinstance(image_size, tuple) else {}


def deep_vit(image: tuple[int, int], **fields: Any) -> Configuration:
    return Configuration('DeepViT', fields, image)


def simple_vit(torch_class: str = '', **fields: Any) -> Configuration:
    return Configuration('SimpleViT', fields, pair(fields['image_size']), torch_class=torch_class)


REGISTERS = 'vit_pytorch.simple_vit_with_register_tokens.SimpleViT'
QK_NORM = 'vit_pytorch.simple_vit_with_qk_norm.SimpleViT'


def vit(image: tuple[int, int], **fields: Any) -> Configuration:
    return Configuration('ViT', fields, image)


# In every configuration the sizes that could be taken for each other differ; each has its own peculiarity besides.
CONFIGURATIONS = {
    'deep-plain': deep_vit(
        (21, 21), image_size=21, patch_size=7, num_classes=5, dim=18, depth=2, heads=3, mlp_dim=13, dim_head=4
    ),
    'deep-mean': deep_vit(
        (12, 12), image_size=12, patch_size=3, num_classes=7, dim=22, depth=3, heads=5, mlp_dim=9, dim_head=6,
        pool='mean', channels=2,
    ),
    'deep-one-of-each': deep_vit(
        (10, 10), image_size=10, patch_size=5, num_classes=1, dim=9, depth=1, heads=1, mlp_dim=11, dim_head=7,
        channels=1,
    ),
    'deep-twelve-layers': deep_vit(
        (16, 16), image_size=16, patch_size=4, num_classes=11, dim=40, depth=12, heads=4, mlp_dim=56
    ),
    'deep-smaller-oblong': deep_vit(
        (8, 20), image_size=24, patch_size=4, num_classes=6, dim=15, depth=2, heads=5, mlp_dim=21, dim_head=3
    ),
    'deep-longer-oblong': deep_vit(
        (30, 6), image_size=18, patch_size=6, num_classes=4, dim=14, depth=2, heads=2, mlp_dim=17, dim_head=5,
        pool='mean',
    ),
    'deep-dropout-at-rest': deep_vit(
        (8, 8), image_size=8, patch_size=2, num_classes=9, dim=23, depth=2, heads=3, mlp_dim=10, dim_head=8,
        dropout=0.3, emb_dropout=0.2,
    ),
    'deep-wide': deep_vit(
        (32, 32), image_size=32, patch_size=8, num_classes=100, dim=128, depth=4, heads=8, mlp_dim=192, dim_head=24
    ),
    'simple-plain': simple_vit(
        image_size=21, patch_size=7, num_classes=5, dim=20, depth=2, heads=3, mlp_dim=13, dim_head=4
    ),
    'simple-oblong-patches': simple_vit(
        image_size=(12, 20), patch_size=(3, 5), num_classes=7, dim=24, depth=3, heads=5, mlp_dim=9, dim_head=7,
        channels=2,
    ),
    'simple-oblong-image': simple_vit(
        image_size=(20, 8), patch_size=4, num_classes=6, dim=16, depth=2, heads=2, mlp_dim=21, dim_head=9
    ),
    'simple-one-of-each': simple_vit(
        image_size=10, patch_size=5, num_classes=1, dim=8, depth=1, heads=1, mlp_dim=11, dim_head=6, channels=1
    ),
    'simple-twelve-layers': simple_vit(
        image_size=(16, 12), patch_size=4, num_classes=11, dim=40, depth=12, heads=4, mlp_dim=56
    ),
    'simple-one-patch': simple_vit(
        image_size=(6, 9), patch_size=(6, 9), num_classes=3, dim=12, depth=2, heads=5, mlp_dim=10, dim_head=2
    ),
    'simple-wide': simple_vit(
        image_size=(32, 48), patch_size=8, num_classes=100, dim=128, depth=4, heads=8, mlp_dim=192, dim_head=24
    ),
    'registers-oblong': simple_vit(
        REGISTERS, image_size=(12, 20), patch_size=(3, 5), num_classes=7, dim=24, depth=3, heads=5, mlp_dim=9,
        dim_head=8, channels=2, num_register_tokens=6,
    ),
    'qk-norm-oblong': simple_vit(
        QK_NORM, image_size=(12, 20), patch_size=(3, 5), num_classes=7, dim=24, depth=3, heads=5, mlp_dim=9,
        dim_head=6, channels=2,
    ),
    'qk-norm-one-of-each': simple_vit(
        QK_NORM, image_size=10, patch_size=5, num_classes=2, dim=8, depth=1, heads=1, mlp_dim=11, dim_head=8,
        channels=1,
    ),
    'vit-plain': vit(
        (21, 21), image_size=21, patch_size=7, num_classes=5, dim=18, depth=2, heads=3, mlp_dim=13, dim_head=4
    ),
    'vit-oblong': vit(
        (12, 20), image_size=(12, 20), patch_size=(3, 5), num_classes=7, dim=22, depth=2, heads=5, mlp_dim=9,
        dim_head=6, channels=2, pool='mean',
    ),
    'vit-one-of-each': vit(
        (10, 10), image_size=10, patch_size=5, num_classes=1, dim=9, depth=1, heads=1, mlp_dim=11, dim_head=7,
        channels=1,
    ),
    'vit-one-head-of-full-width': vit(
        (8, 8), image_size=8, patch_size=2, num_classes=9, dim=23, depth=2, heads=1, mlp_dim=10, dim_head=23,
        dropout=0.3, emb_dropout=0.2,
    ),
    'vit-smaller-oblong': vit(
        (8, 18), image_size=(20, 24), patch_size=(4, 6), num_classes=6, dim=15, depth=2, heads=5, mlp_dim=21,
        dim_head=3, pool='mean',
    ),
    'vit-wide': vit(
        (32, 32), image_size=32, patch_size=8, num_classes=100, dim=128, depth=4, heads=8, mlp_dim=192, dim_head=24
    ),
}  # fmt: skip


def random_configuration(seed: int, *, vit: bool = False) -> Configuration:
    """Any configuration that vit-pytorch takes, of a ViT or of one of the others.

    Of up to about a million multiplications per image.
    """
    generator = np.random.default_rng(seed)

    def draw(low: int, high: int) -> int:
        return int(generator.integers(low, high, endpoint=True))

    fields: dict[str, Any] = {
        'num_classes': draw(1, 12),
        'dim': draw(2, 10) * 4,
        'depth': draw(1, 3),
        'heads': draw(1, 6),
        'mlp_dim': draw(1, 40),
        'channels': draw(1, 4),
        'dim_head': draw(1, 20),
    }
    if not vit and generator.random() < 0.5:
        patch, side = draw(1, 6), draw(2, 5)
        height = draw(1, side**2)
        width = draw(1, side**2 // height)
        pool = str(generator.choice(['cls', 'mean']))
        fields |= {'image_size': patch * side, 'patch_size': patch, 'pool': pool}
        return Configuration('DeepViT', fields, (patch * height, patch * width), batch=draw(1, 3))
    patches, grid = (draw(1, 6), draw(1, 6)), (draw(1, 5), draw(1, 5))
    image = (patches[0] * grid[0], patches[1] * grid[1])
    fields |= {'image_size': image, 'patch_size': patches}
    if vit:
        full_width = {'heads': 1, 'dim_head': fields['dim']} if generator.random() < 0.5 else {}
        fields |= {'pool': str(generator.choice(['cls', 'mean'])), **full_width}
    return Configuration('ViT' if vit else 'SimpleViT', fields, image, batch=draw(1, 3))


def perturbed(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The module with every parameter drawn anew, in its own dtype: nothing is left at the 0 or 1 it started from.

    Matrices keep the size of their products at 1, which keeps attention and GELU away from both the linear and the
    saturated; a norm's scale has a mean of 1 and its bias a mean of 0.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if name.endswith('weight'):
            noise = noise * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1 + 0.5 * noise
        elif name.endswith('bias'):
            noise = 0.5 * noise
        parameter.data.copy_(noise)
    return module.eval()


def pytorch(configuration: Configuration, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.nn.Module:
    """vit-pytorch's module, perturbed. In float64 it gets the port's sincos table; the tables are compared apart."""
    record = architecture_of(MODELS[configuration.architecture])
    package, _, name = (configuration.torch_class or record.torch_classes[0]).rpartition('.')
    module = getattr(import_module(package), name)(**configuration.fields).to(dtype)
    if record.tables and dtype == torch.float64:
        module.pos_embedding = port_table(configuration)
    return perturbed(module, seed)


def converted(
    configuration: Configuration, dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any
) -> tuple[torch.nn.Module, nn.Module, Any]:
    """The perturbed module, and the port with its weights, whose matrix products are exact on any device."""
    module = pytorch(configuration, dtype, seed)
    return module, *convert.from_torch(module, precision='highest', **configuration.told, **options)


def port_table(configuration: Configuration) -> torch.Tensor:
    """The port's sincos table of a SimpleViT."""
    sides = pair(configuration.fields['patch_size'])
    height, width = (pixels // side for pixels, side in zip(configuration.image, sides, strict=True))
    return torch.tensor(posemb_sincos_2d(height, width, configuration.fields['dim']))


def random_images(configuration: Configuration, seed: int = 0, batch: int | None = None) -> np.ndarray:
    """Standard normal images (batch, height, width, channels) in float64."""
    shape = (batch or configuration.batch, *configuration.image, configuration.fields.get('channels', 3))
    return np.random.default_rng(seed).standard_normal(shape)


def channels_first(images: np.ndarray, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(rearrange(images, 'b h w c -> b c h w')).to(dtype)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The same bits; numpy knows bfloat16 by ml_dtypes only."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def pytorch_outputs(module: torch.nn.Module, images: torch.Tensor) -> dict[str, np.ndarray]:
    """The output of every submodule that has a tensor for output, by its name; the logits are at ''."""
    outputs: dict[str, np.ndarray] = {}

    def keep(name: str) -> Any:
        return lambda _, arguments, output: outputs.update({name: to_numpy(output.clone())})

    hooks = [part.register_forward_hook(keep(name)) for name, part in module.named_modules()]
    with torch.no_grad():
        module(images)
    for hook in hooks:
        hook.remove()
    return outputs


def port_outputs(model: nn.Module, variables: Any, images: Any, *, train: bool = False) -> dict[str, np.ndarray]:
    """The same of the port, by PyTorch's names."""

    def apply(variables: Any, images: Any) -> Any:
        return model.apply(variables, images, train=train, capture_intermediates=True, mutable=['intermediates'])

    _, state = quickly(apply)(variables, images)
    flat = {path: np.asarray(output) for path, (output,) in flatten_dict(state['intermediates']).items()}
    if model.scan_layers:
        flat = flatten_dict(unstack_layers(unflatten_dict(flat)))
    outputs = {re.sub(r'_(?=\d)', '.', '.'.join(path[:-1])): output for path, output in flat.items()}
    # PyTorch brings the heads to the last axis for this norm
    return {
        name: rearrange(output, 'b h i j -> b i j h') if name.endswith('reattn_norm.1') else output
        for name, output in outputs.items()
    }


def relative_error(port: Any, truth: Any, least: float = 0.0) -> float:
    """Largest difference over the largest magnitude, or over `least` if that is more; infinite if shapes differ."""
    port, truth = np.asarray(port, np.float64), np.asarray(truth, np.float64)
    if port.shape != truth.shape:
        return float('inf')
    difference = np.abs(port - truth).max()
    return float(difference / max(np.abs(truth).max(), least)) if difference else 0.0


def rms(array: Any) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(array, np.float64)))))


def rounding_ratio(port: np.ndarray, pytorch: np.ndarray, truth: np.ndarray) -> float:
    """The port's rms error over PyTorch's, both against the truth in float64.

    PyTorch's error counts as at least half a unit in the last place of the truth's rms, where nothing is left to
    compare.
    """
    floor = rms(truth) * float(jnp.finfo(pytorch.dtype).eps) / 2
    return rms(port.astype(np.float64) - truth) / max(rms(pytorch.astype(np.float64) - truth), floor)


def rounding_error(configuration: Configuration, dtype: torch.dtype, *, batch: int = 16, **options: Any) -> float:
    """`rounding_ratio` of the logits in `dtype`: the modules as they come, each with its own sincos table.

    Of 16 images unless told otherwise, for errors that chance does not decide.
    """
    module, model, variables = converted(configuration, dtype, **options)
    images = channels_first(random_images(configuration, batch=batch), dtype)
    truth = to_numpy(copy.deepcopy(module).double()(images.double()))
    logits = np.asarray(jax.jit(model.apply)(variables, to_numpy(images)))
    theirs = to_numpy(module(images))
    assert logits.dtype == theirs.dtype
    return rounding_ratio(logits, theirs, truth)


def output_errors(
    module: torch.nn.Module, model: nn.Module, variables: Any, images: np.ndarray, *, train: bool = False
) -> dict[str, float]:
    """Relative error of every intermediate that has a name in both frameworks, and of the logits, at ''."""
    theirs = pytorch_outputs(module, channels_first(images))
    ours = port_outputs(model, variables, images, train=train)
    return {name: relative_error(ours[name], truth) for name, truth in theirs.items() if name in ours}


def gradient_errors(module: torch.nn.Module, model: nn.Module, variables: Any, images: np.ndarray) -> dict[str, float]:
    """Relative error of the gradient of every parameter, by name, and of the images.

    The loss is the sum of the logits times random numbers, which gives every logit a gradient of its own. A gradient
    less than a thousandth of the model's largest counts as that: it is what a cancellation has left (the norm of one
    or two heads hardly depends on `reattn_weights`), exact only in proportion to what cancelled.
    """
    inputs = channels_first(images).requires_grad_()
    logits = module(inputs)
    weights = np.random.default_rng(1).standard_normal(logits.shape)
    (logits * torch.tensor(weights)).sum().backward()
    theirs = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.numel()}
    truth = {name: to_numpy(grad) for name, grad in (theirs | {'images': inputs.grad}).items() if grad is not None}
    truth['images'] = rearrange(truth['images'], 'b c h w -> b h w c')

    def loss(variables: Any, images: Any) -> jax.Array:
        return (model.apply(variables, images) * weights).sum()

    gradient = quickly(jax.grad(loss, argnums=(0, 1)))
    gradients, image_gradient = gradient(variables, jnp.asarray(images))
    ours = convert.to_torch(model, gradients) | {'images': np.asarray(image_gradient)}
    ours = {name: gradient for name, gradient in ours.items() if gradient.size}
    assert ours.keys() == truth.keys()
    least = 1e-3 * max(np.abs(gradient).max() for gradient in truth.values())
    return {name: relative_error(ours[name], gradient, least) for name, gradient in truth.items()}


def check(errors: Mapping[str, float], bound: float) -> None:
    """AssertionError, worst first, for every error that is not within the bound."""
    wrong = {name: error for name, error in errors.items() if not error <= bound}
    if wrong:
        worst = sorted(wrong.items(), key=lambda item: -item[1])
        lines = [f'  {error:.1e}  {name or "logits"}' for name, error in worst[:8]]
        raise AssertionError(f'{len(wrong)} of {len(errors)} differ by more than {bound:g}:\n' + '\n'.join(lines))


class Masks:
    """A sequence of dropout masks that can be forced on either framework, and what asked for them."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)
        self.asked: list[tuple[tuple[int, ...], float]] = []

    def next(self, shape: Sequence[int], rate: float) -> np.ndarray:
        self.asked.append((tuple(shape), rate))
        return (self.generator.random(shape) >= rate) / (1 - rate)

    def hook(self, dropout: torch.nn.Dropout, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        """For `register_forward_hook` of every Dropout."""
        return inputs[0] * torch.tensor(self.next(inputs[0].shape, dropout.p)) if dropout.training else output

    def intercept(self, function: Any, arguments: Any, keywords: Any, context: nn.module.InterceptorContext) -> Any:
        """For `nn.intercept_methods`."""
        if isinstance(context.module, nn.Dropout) and not keywords['deterministic']:
            return arguments[0] * self.next(arguments[0].shape, context.module.rate)
        return function(*arguments, **keywords)


def dropout_errors(module: torch.nn.Module, model: nn.Module, variables: Any, images: np.ndarray) -> dict[str, float]:
    """`output_errors` in training, with the same masks, asked for by the same layers in the same order."""
    theirs, ours = Masks(), Masks()
    dropouts = [part for part in module.train().modules() if isinstance(part, torch.nn.Dropout)]
    hooks = [part.register_forward_hook(theirs.hook) for part in dropouts]
    with nn.intercept_methods(ours.intercept):
        errors = output_errors(module, model, variables, images, train=True)
    for hook in hooks:
        hook.remove()
    module.eval()
    assert ours.asked == theirs.asked
    return errors
