"""What the converter knows of an architecture: the record that each file beside this one fills. Imports flax_vit."""

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any, Literal, NamedTuple

import numpy as np
from flax import linen as nn

from convert.architectures.way import Way
from convert.errors import ConversionError, ConversionWarning
from flax_vit.checks import pair
from flax_vit.looking import modules

IDENTITY = 'torch.nn.modules.linear.Identity'
MOST_SHOWN = 4  # of rates that differ
FOLLOWS: Mapping[str, Callable[[Any], int]] = {  # what axes hold that is no field of a model
    '1': lambda model: 1,
    'channels x patch area': lambda model: model.channels * math.prod(pair(model.patch_size)),
    'dim_head': lambda model: getattr(model, 'dim_head', model.dim // model.heads),
    'heads x dim_head': lambda model: model.heads * model.dim_head,
    'patches': lambda model: math.prod(model.grid),
    'patch height': lambda model: pair(model.patch_size)[0],
    'patch width': lambda model: pair(model.patch_size)[1],
    'half of it': lambda model: pair(model.patch_size)[0] // 2,
    'half its width': lambda model: pair(model.patch_size)[1] // 2,
}
_RANGE = re.compile(r'(?P<first>[\d.]+)(?: to (?P<last>[\d.]+)|(?P<later> and later))?')
_NUMBER = re.compile(
    r'(?:(?<=\blayers\.)|(?<=encoder_)|(?<=encoderblock_)|(?<=\bblocks\.))\d+(?=\.)'
)  # of a block, in a name


@dataclass(frozen=True)
class Field:
    """The value of a model's field and how it came about."""

    value: Any  # None when unknown
    how: Literal['given', 'read', 'inferred', 'assumed', 'unknown']  # by the caller, beside the weights, from them, …
    why: str = ''  # empty where an unknown follows from another


@dataclass(frozen=True, eq=False)
class Layout:
    """The names that a range of releases gave to the parameters of one model."""

    id: str
    model: type[nn.Module]
    releases: str
    fields: Mapping[str, Any] = field(default_factory=dict)  # of the model, where they are not its defaults
    renames: Mapping[str, str] = field(default_factory=dict)  # beginnings of its names -> of the Flax model's
    batched: frozenset[str] = frozenset()  # the Flax model's names of what has an axis more here, 1, in front
    of: str = ''  # 'the ViT of ' where it is the Transformer of one
    source: str = 'vit-pytorch'
    mark: str = ''  # in a name that the others have not; where it is in none, this layout need not be tried
    flax: bool = False  # whether it is Flax that wrote it: a Dense's `kernel` (in, out), a norm's `scale`

    def __str__(self) -> str:
        return f'{self.model.__name__} of {self.of}{self.source} {self.releases}'

    def to_today(self, name: str) -> str:
        """The Flax model's PyTorch name of what this layout calls `name`."""
        return rename(name, self.renames)

    def from_today(self, name: str) -> str:
        """What this layout calls the parameter with the Flax model's PyTorch name `name`."""
        return rename(name, {ours: theirs for theirs, ours in self.renames.items()})

    def tensors_of_today(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Tensors with this layout's names and shapes, by the Flax model's PyTorch names and in its shapes."""
        if self.flax:
            tensors = {
                FLAX_ENDING.sub('.weight', name): tensor.transpose(np.argsort(flax_axes(name, tensor.ndim)))
                for name, tensor in tensors.items()
            }
        today = {self.to_today(name): tensor for name, tensor in tensors.items()}
        return {name: tensor[0] if name in self.batched else tensor for name, tensor in today.items()}

    def tensors_from_today(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """And back."""
        named = {
            self.from_today(name): tensor[None] if name in self.batched else tensor for name, tensor in tensors.items()
        }
        if not self.flax:
            return named
        flax = {flax_name(name, tensor.ndim): tensor for name, tensor in named.items()}
        return {
            name.replace('.', '/'): np.ascontiguousarray(tensor.transpose(flax_axes(name, tensor.ndim)))
            for name, tensor in flax.items()
        }

    def wrote(self, release: str) -> bool:
        """Whether that release of vit-pytorch, '0.6.5', wrote these names."""
        found = _RANGE.match(self.releases)
        if not found:
            return False
        first, last = found['first'], found['last'] or found['first']
        return version(first) <= version(release) and (bool(found['later']) or version(release) <= version(last))


FLAX_ENDING = re.compile(r'\.(kernel|scale)\Z')


def flax_name(name: str, dimensions: int) -> str:
    """What Flax calls a parameter that PyTorch calls `name`, a 'weight' where it is one."""
    return re.sub(r'(?<=\.)weight\Z', 'kernel' if dimensions > 1 else 'scale', name)


def flax_axes(name: str, dimensions: int) -> tuple[int, ...]:
    """PyTorch's axes of a parameter that Flax calls `name`, in Flax's order.

    A Dense kernel (in, out) is PyTorch's weight (out, in), a Conv kernel (height, width, in, out) its weight (out, in,
    height, width).
    """
    axes = tuple(range(dimensions))
    return (*axes[2:], 1, 0) if name.endswith('kernel') else axes


def version(release: str) -> tuple[int, ...]:
    """A release as numbers, to be compared. Raises ConversionError when it is none."""
    if not re.fullmatch(r'\d+(\.\d+)*', release):
        raise ConversionError(f"release must be that of a vit-pytorch, such as '0.6.5', not {release!r}.")
    return tuple(map(int, f'{release}.0.0'.split('.')[:3]))


def pattern(name: str) -> str:
    """`name` with `#` for the number of its block."""
    return _NUMBER.sub('#', name, count=1)


def block_number(name: str) -> str | None:
    """The number of the block in `name`."""
    number = _NUMBER.search(name)
    return number[0] if number else None


def rename(name: str, renames: Mapping[str, str]) -> str:
    """`name` with the longest beginning that has another name replaced by it; a `#` in it stands for any number."""
    for old, new in sorted(renames.items(), key=lambda rule: -len(rule[0])):
        if found := _beginning(old).match(name):
            return new.replace('#', '{}').format(*found.groups()) + name[found.end() :]
    return name


@cache
def _beginning(old: str) -> re.Pattern[str]:
    return re.compile(re.escape(old).replace(r'\#', r'(\d+)'))


@dataclass(frozen=True)
class Axis:
    """The size of an axis in terms of the model's fields: factor x value + offset."""

    quantity: str
    factor: int = 1
    offset: int = 0

    def size(self, sizes: Mapping[str, int]) -> int | str:
        """The axis's size, or what it holds in words where `sizes` doesn't tell."""
        return self.factor * sizes[self.quantity] + self.offset if self.quantity in sizes else str(self)

    def __str__(self) -> str:
        scaled = f'{self.factor} x {self.quantity}' if self.factor > 1 else self.quantity
        return f'{scaled} + {self.offset}' if self.offset else scaled


@dataclass(frozen=True)
class AttentionMap:
    """Which modules of an attention put out its map, in PyTorch and here."""

    torch: str
    flax: str
    words: str = ''  # what tells it from the block's other maps
    heads_last: bool = False  # in PyTorch; here the axes are heads, queries, keys


class ComputedTable(NamedTuple):
    """How far a table that is no parameter is from the true one."""

    difference: float  # the largest
    limit: float  # what it may be
    truth: str  # in words
    name: str = 'sincos table'

    @property
    def right(self) -> bool:
        return self.difference <= self.limit


class Architecture:
    """What the converter knows of a model beyond the names of its parameters, which are the Flax model's own.

    What an architecture doesn't say is as in vit-pytorch's vision transformers: `transformer.layers.#` are the blocks,
    attention and feed-forward in turn, behind `to_patch_embedding`.
    """

    model: Any  # the Flax model's class
    torch_classes: tuple[str, ...]  # those that compute it; a port is compared with the first, see `torch_name`
    layouts: tuple[Layout, ...]  # the newest of each function first: it is the one that `to_torch` writes
    axes: tuple[Axis, ...] = (  # what those of the parameters hold; of two that are alike, the last
        Axis('1'),
        Axis('channels x patch area'),
        Axis('heads x dim_head'),
        Axis('heads x dim_head', factor=3),
        Axis('num_classes'),
        Axis('dim'),
        Axis('mlp_dim'),
    )
    # A small model in which no two axes are alike, as a test holds, so that a size tells what an axis holds.
    probe: Mapping[str, Any] = {
        'image_size': 10,
        'patch_size': 2,
        'channels': 3,
        'dim': 20,
        'mlp_dim': 29,
        'num_classes': 31,
        'heads': 7,
        'dim_head': 11,
    }
    certain: tuple[str, ...] = ()  # words that are among the names of each layout; it is tried last where one isn't
    assumed: frozenset[str] = frozenset()  # fields that no weights tell, and vit-pytorch has a default for
    tables: frozenset[str] = frozenset()  # tensors that are computed, and may be in a checkpoint all the same
    blocks: str = 'transformer.layers'  # PyTorch's name of their list, of pairs of attention and feed-forward
    way: type[Way] | None = None  # its parts in numpy, to tell causes; None: no cause is known
    truth: str = 'PyTorch'  # what a port must compute; where it is no PyTorch, `way` computes that

    @property
    def release_fields(self) -> frozenset[str]:
        """The fields for what releases computed differently."""
        return frozenset().union(*(layout.fields for layout in self.layouts))

    def layouts_of(self, model: Any) -> list[Layout]:
        """The layouts whose releases compute what `model` does, the newest first."""
        return [layout for layout in self.layouts if self.computes(layout, model)]

    def computes(self, layout: Layout, model: Any) -> bool:
        """Whether the layout's releases compute what `model` does."""
        released = {**self.today(model), **layout.fields}
        return all(getattr(model, name) == released[name] for name in self.release_fields)

    def today(self, model: Any) -> dict[str, Any]:
        """The `release_fields` that today's release computes with, in a model that is like `model` in the rest."""
        return {name: getattr(self.model, name) for name in self.release_fields}

    def told_by_names(self, layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """Fields that say which parameters there are, as tensors of these names and shapes tell them."""
        return {}

    def fields_of_probe(self, told: Mapping[str, Any], depth: int) -> dict[str, Any]:
        """The fields of a small model of `depth` blocks that has all parameters which any of the blocks has."""
        return {**self.probe, **told, 'depth': depth}

    def is_in_block(self, name: str, block: int, told: Mapping[str, Any]) -> bool:
        """Whether that block has what the layout calls `name`, `#` for the block's number, as names tell fields."""
        return True

    def empty(self, model: Any) -> dict[str, tuple[int, ...]]:
        """The shapes of parameters that PyTorch's module has and that hold nothing, by today's names."""
        return {}

    def quantities(self, model: Any) -> dict[str, int]:
        """What the axes are made of, for a model: its fields, and what follows from them."""
        names = {axis.quantity for axis in self.axes}
        return {name: FOLLOWS[name](model) if name in FOLLOWS else getattr(model, name) for name in names}

    def told_by_tables(self, tables: Mapping[str, np.ndarray]) -> dict[str, int]:
        """The sizes of quantities that computed tensors tell. Raises ConversionError when they are not as computed."""
        return {}

    def told_by_sizes(
        self, fields: Mapping[str, Field], sizes: Mapping[str, int], defaults: Mapping[str, Any]
    ) -> dict[str, Field]:
        """The fields that `sizes`, those of the quantities, tell together with the `fields` that are known.

        Raises ConversionError when they contradict each other.
        """
        found = dict(fields)
        found |= heads_of(found, sizes['heads x dim_head'], defaults['dim_head'])
        found |= patches_of(found, sizes['channels x patch area'], defaults['channels'])
        return found | self.image_size(found, sizes)

    def image_size(self, fields: Mapping[str, Field], sizes: Mapping[str, int]) -> dict[str, Field]:
        """image_size, if the weights tell it."""
        name = self.model.__name__
        why = f"the weights don't hold {name}'s image size: give image_size=224 (or a pair) as in training"
        return {} if 'image_size' in fields else {'image_size': Field(None, 'unknown', why)}

    def known_fields(self, module: Any) -> dict[str, Any]:
        """Fields that a live torch module tells, where the weights can't."""
        patch, attend = module.to_patch_embedding[0].axes_lengths, first_attention(module)
        fields = {'heads': attend.heads, 'patch_size': one_or_pair((patch['p1'], patch['p2']))}
        if 'pool' in self.assumed:
            fields['pool'] = module.pool
        if 'dropout' in self.assumed:
            fields |= {'dropout': dropout_rate(module.transformer), 'emb_dropout': module.dropout.p}
        return fields | ({'num_classes': 0} if class_name(getattr(module, self.model.HEAD)) == IDENTITY else {})

    def torch_name(self, model: Any) -> str:
        """The full name of the torch class that `model` is compared with."""
        return self.torch_classes[0]

    def torch_class(self, model: Any) -> Any:
        """That class."""
        package, _, name = self.torch_name(model).rpartition('.')
        return getattr(import_module(package), name)

    def smallest(self, module: Any) -> dict[str, Any]:
        """Arguments with which a small torch module has the same parts as `module`: also those that decide which.

        `module`: the whole, or its Transformer alone.
        """
        return {'image_size': 2, 'patch_size': 1, 'num_classes': 1, 'dim': 8, 'heads': 2, 'mlp_dim': 1}

    def torch_module(self, model: Any, arguments: Mapping[str, Any]) -> Any:
        """The torch module that computes what `model` does, with random weights; `arguments` are the fields' values."""
        import torch

        module = self.torch_class(model)(**{**arguments, 'num_classes': model.num_classes or 1})
        if not getattr(model, 'patch_norm', True) and len(module.to_patch_embedding) == 4:
            cut, _, linear, _ = module.to_patch_embedding
            module.to_patch_embedding = torch.nn.Sequential(cut, linear)
        if not model.num_classes:
            setattr(module, self.model.HEAD, torch.nn.Identity())
        if getattr(model, 'norm_after_mean', False):
            head = torch.nn.Sequential(module.transformer.norm, getattr(module, self.model.HEAD))
            if model.num_classes:
                setattr(module, self.model.HEAD, head)
            module.transformer.norm = torch.nn.Identity()
        return module

    def as_released(self, transformer: Any, model: Any) -> Any:
        """PyTorch's Transformer of today, changed where `model` computes what an older release did."""
        return transformer

    def block_parts(self, model: Any) -> dict[str, str]:
        """What is compared in the blocks, see `parts`."""
        return {
            f'{self.blocks}.{block}.{half}': f'block {block} {what}'
            for block in range(model.depth)
            for half, what in enumerate(('attention', 'feed-forward'))
        }

    def parts(self, model: Any) -> dict[str, str]:
        """What is compared, in the order of the computation: PyTorch's names of modules, and what they are."""
        first = {f'to_patch_embedding.{3 if getattr(model, "patch_norm", True) else 1}': 'patch embedding'}
        last = {'to_latent': 'pooled features', '': 'logits' if model.num_classes else 'features'}
        return first | self.block_parts(model) | last

    def maps_of_block(self, model: Any, block: int) -> tuple[AttentionMap, ...]:
        """Its attention maps: unless told otherwise, PyTorch's modules have the names in the model's MAPS."""
        names = [name.replace('/', '.') for names in self.model.MAPS.values() for name in modules(names)]
        return tuple(AttentionMap(name, name, f', {name}' if names[1:] else '') for name in names)

    def variants(self) -> Mapping[str, Mapping[str, Any]]:
        """The fields of models that have a name of their own, which a trainer may have kept as `arch`."""
        return {}

    def preprocessing(self, layout: Layout, model: Any) -> dict[str, Any] | None:
        """How pictures were prepared when the published accuracies were measured, as `flax_vit.preprocess` takes it."""
        return None

    def table(self, model: Any) -> ComputedTable | None:
        """How far positions that are no parameters are from what they should be, and how far they may be."""
        return None

    def table_and_mistakes(self, model: Any) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """The port's such positions, the exact ones, and wrong ones by the words for it."""
        raise NotImplementedError

    def alternatives(self, model: Any) -> Iterator[dict[str, Any]]:
        """Other values of the fields that weights can't tell, which take the same weights."""
        yield from ()


def heads_of(fields: Mapping[str, Field], inner_dim: int, default: int | None) -> dict[str, Field]:
    """Heads and dim_head, of which the weights hold the product; `default` is dim_head's."""
    heads, dim_head = fields.get('heads'), fields.get('dim_head')
    arithmetic = f'to_qkv holds 3 x {inner_dim}, that is 3 x heads x dim_head'
    if heads and dim_head:
        if heads.value * dim_head.value != inner_dim:
            raise ConversionError(f'heads={heads.value} x dim_head={dim_head.value} is not {inner_dim}: {arithmetic}.')
        return {}
    for known, name, other in ((heads, 'heads', 'dim_head'), (dim_head, 'dim_head', 'heads')):
        if known:
            if inner_dim % known.value:
                raise ConversionError(f'{name}={known.value} does not divide {inner_dim}: {arithmetic}.')
            return {other: Field(inner_dim // known.value, 'inferred', f'{inner_dim} / {name} {known.value}')}
    if default and inner_dim % default == 0:
        why = f"{arithmetic}; dim_head {default} is vit-pytorch's default"
        return {
            'dim_head': Field(default, 'assumed', why),
            'heads': Field(inner_dim // default, 'assumed', why),
        }
    fails = f"vit-pytorch's default dim_head {default} does not divide it" if default else 'dim_head has no default'
    return unknown_heads(inner_dim, fails)


def unknown_heads(inner_dim: int, fails: str, fewest: int = 1) -> dict[str, Field]:
    """Heads and dim_head have to be asked for, because vit-pytorch's default `fails`, in words."""
    factors = (n for n in range(fewest, 33) if inner_dim % n == 0)
    choices = ', '.join(f'heads={n} if dim_head is {inner_dim // n}' for n in factors)
    why = f'to_qkv holds 3 x {inner_dim}, that is 3 x heads x dim_head, and {fails}: {choices}'
    return {'heads': Field(None, 'unknown', why), 'dim_head': Field(None, 'unknown')}


def patches_of(fields: Mapping[str, Field], patch_dim: int, default: int) -> dict[str, Field]:
    """Channels and patch_size, of which the weights hold channels x patch height x patch width."""
    channels, patch_size = fields.get('channels'), fields.get('patch_size')
    arithmetic = f'a patch holds {patch_dim} values, that is channels x patch height x patch width'
    if patch_size:
        area = math.prod(pair(patch_size.value))
        if patch_dim % area or (channels and channels.value * area != patch_dim):
            shown = f'patch_size={patch_size.value}' + (f' with channels={channels.value}' if channels else '')
            raise ConversionError(f'{shown} does not fit: {arithmetic}.')
        return {'channels': Field(patch_dim // area, 'inferred', f'{patch_dim} / {area}')} if not channels else {}
    if channels:
        if patch_dim % channels.value:
            raise ConversionError(f'channels={channels.value} does not divide {patch_dim}: {arithmetic}.')
        side = math.isqrt(patch_dim // channels.value)
        if side**2 * channels.value == patch_dim:
            return {'patch_size': Field(side, 'inferred', f'{patch_dim} = {channels.value} x {side}²')}
        return {'patch_size': Field(None, 'unknown', f'{arithmetic}; give patch_size=(height, width)')}
    side = math.isqrt(patch_dim // default)
    if default * side**2 == patch_dim:
        why = f"{arithmetic}; {default} channels are vit-pytorch's default"
        return {'channels': Field(default, 'assumed', why), 'patch_size': Field(side, 'assumed', why)}
    choices = ', '.join(
        f'channels={patch_dim // n**2} if patch_size is {n}'
        for n in range(1, math.isqrt(patch_dim) + 1)
        if patch_dim % n**2 == 0
    )
    why = f"{arithmetic}, and vit-pytorch's default of {default} channels does not fit a square: {choices}"
    return {'channels': Field(None, 'unknown', why), 'patch_size': Field(None, 'unknown')}


def prepared(model: Any, resize: int, interpolation: str, mean: Any = 0.5, std: Any = 0.5) -> dict[str, Any] | None:
    """What `Architecture.preprocessing` says, where the model takes square pictures in colours."""
    if not isinstance(model.image_size, int) or model.channels != 3 or model.image_size > resize:
        return None
    mean, std = ([each] * 3 if isinstance(each, float) else list(each) for each in (mean, std))
    return {'resize': resize, 'crop': model.image_size, 'interpolation': interpolation, 'mean': mean, 'std': std}


def patch_of_kernel(fields: Mapping[str, Field], sides: tuple[int, int]) -> dict[str, Field]:
    """patch_size where the first kernel has its sides. Raises ConversionError when it was given as another."""
    told, given = one_or_pair(sides), fields.get('patch_size')
    if given and given.value != told:
        raise ConversionError(f'patch_size={given.value!r} contradicts the weights: it is {told!r} in them.')
    return {} if given else {'patch_size': Field(told, 'inferred', 'their shapes')}


def image_of_patches(
    fields: Mapping[str, Field], patches: int, how: Literal['inferred', 'assumed']
) -> dict[str, Field]:
    """image_size of a model whose pos_embedding has a row for each patch: that of a square if that can be."""
    image_size, patch_size = fields.get('image_size'), fields['patch_size']
    if patch_size.value is None:
        return {} if image_size else {'image_size': Field(None, 'unknown')}
    rows, columns = pair(patch_size.value)
    side = math.isqrt(patches)
    square = one_or_pair((side * rows, side * columns)) if side**2 == patches else None
    if image_size:
        height, width = pair(image_size.value)
        if height % rows or width % columns or (height // rows) * (width // columns) != patches:
            told = f', such as images of {square} have' if square else ''
            raise ConversionError(
                f'image_size={image_size.value!r} contradicts the weights: pos_embedding has {patches} patches of '
                f'{rows} x {columns}{told}. For another size, convert the model as it is, save it, and read it again: '
                f'flax_vit.from_pretrained(folder, image_size={image_size.value!r}).'
            )
        return {}
    if square:
        return {
            'image_size': Field(square, how, f'{side} x {side} patches of {patch_size.value}, if images are square')
        }
    choices = ', '.join(
        str((height * rows, patches // height * columns)) for height in range(1, patches + 1) if patches % height == 0
    )
    why = f'pos_embedding has {patches} patches, of {rows} x {columns}: (height, width) may be {choices}'
    return {'image_size': Field(None, 'unknown', why)}


def prenorm(residual: str = '') -> dict[str, str]:
    """The names of blocks that were wrapped in `PreNorm` (before 1.4), and with `residual` 'fn.' in `Residual`, too."""
    return {
        f'transformer.layers.#.0.{residual}norm.': 'transformer.layers.#.0.norm.',
        f'transformer.layers.#.0.{residual}fn.': 'transformer.layers.#.0.',
        f'transformer.layers.#.1.{residual}norm.': 'transformer.layers.#.1.net.0.',
        f'transformer.layers.#.1.{residual}fn.net.0.': 'transformer.layers.#.1.net.1.',
        f'transformer.layers.#.1.{residual}fn.net.3.': 'transformer.layers.#.1.net.4.',
    }


def other_heads(model: Any) -> Iterator[dict[str, Any]]:
    """Other values of heads and dim_head that take the same weights."""
    inner_dim, tokens = model.heads * model.dim_head, math.prod(model.grid)
    for heads in range(1, inner_dim + 1):
        if inner_dim % heads == 0 and heads != model.heads:
            # no more of the attention maps at once than of the model itself, however many heads there are
            chunk = max(1, tokens * model.heads // heads)
            yield {'heads': heads, 'dim_head': inner_dim // heads, 'query_chunk_size': chunk}


def first_attention(module: Any) -> Any:
    """The attention of a torch module's first block."""
    return next(part for _, part in module.named_modules() if type(part).__name__ == 'Attention')


def one_or_pair(sizes: tuple[int, int]) -> int | tuple[int, int]:
    """One number for both where they are the same."""
    return sizes[0] if sizes[0] == sizes[1] else sizes


def class_name(value: object) -> str:
    """The full name of the value's class, as imported."""
    return full_name(type(value))


def full_name(a_class: type) -> str:
    """The full name of a class, as imported."""
    return f'{a_class.__module__}.{a_class.__qualname__}'


def dropout_rate(transformer: Any) -> float:
    """That of a torch module's Dropouts; a warning where they differ, since there is but one here."""
    rates = {name: part.p for name, part in transformer.named_modules() if type(part).__name__ == 'Dropout'}
    first = next(iter(rates.values()))
    others = [f'{name}: {rate}' for name, rate in rates.items() if rate != first]
    if others:
        warnings.warn(
            f'The Dropouts of the module have several rates: {first}, but {", ".join(others[:MOST_SHOWN])}'
            f'{", …" if len(others) > MOST_SHOWN else ""}. Here all have one, {first}; it matters only in training.',
            ConversionWarning,
            stacklevel=2,
        )
    return first
