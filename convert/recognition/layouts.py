"""Which vit-pytorch release wrote these names, and what the model must be to compute what that release computed.

A layout is data. The names and shapes it needs are read off the Flax model itself (the names are the map), so a new
architecture is a row here. `#` stands for the number of a transformer block.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from flax import linen as nn

from convert.recognition.names import Leaf, differences, leaf
from flax_vit import DeepViT, SimpleViT
from flax_vit.parameters import param_shapes

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Layout:
    """The names that a range of releases gave to the parameters of one model."""

    id: str
    model: type[nn.Module]
    releases: str
    fields: Mapping[str, Any] = field(default_factory=dict)  # of the model, where they are not its defaults
    renames: Mapping[str, str] = field(default_factory=dict)  # beginnings of its names -> of the Flax model's

    def __str__(self) -> str:
        return f'{self.model.__name__} of vit-pytorch {self.releases}'

    def computes(self, model: nn.Module) -> bool:
        """Whether the layout's releases compute what `model` does."""
        return type(model) is self.model and all(
            getattr(model, name) == self.fields.get(name, getattr(self.model, name))
            for name in ('patch_norm', 'norm_after_mean')
            if hasattr(model, name)
        )

    def to_today(self, name: str) -> str:
        """The Flax model's PyTorch name of what this layout calls `name`."""
        return rename(name, self.renames)

    def from_today(self, name: str) -> str:
        """What this layout calls the parameter with the Flax model's PyTorch name `name`."""
        return rename(name, {ours: theirs for theirs, ours in self.renames.items()})


_PRENORM = {
    'transformer.layers.#.0.fn.norm.': 'transformer.layers.#.0.norm.',
    'transformer.layers.#.0.fn.fn.': 'transformer.layers.#.0.',
    'transformer.layers.#.1.fn.norm.': 'transformer.layers.#.1.net.0.',
    'transformer.layers.#.1.fn.fn.net.0.': 'transformer.layers.#.1.net.1.',
    'transformer.layers.#.1.fn.fn.net.3.': 'transformer.layers.#.1.net.4.',
}
_B_COS = {
    'to_patch_embedding.linear.': 'to_patch_embedding.1.',
    'transformer.encoder_#.attn.': 'transformer.layers.#.0.',
    'transformer.encoder_#.ff.net.norm.': 'transformer.layers.#.1.net.0.',
    'transformer.encoder_#.ff.net.linear1.': 'transformer.layers.#.1.net.1.',
    'transformer.encoder_#.ff.net.linear2.': 'transformer.layers.#.1.net.3.',
    'linear_head.norm.': 'linear_head.0.',
    'linear_head.linear.': 'linear_head.1.',
}
_BEFORE_1_0 = {'patch_norm': False}
_BEFORE_1_4 = {'norm_after_mean': True}

# The newest layout of each function comes first: it is the one that `to_torch` writes.
LAYOUTS = (
    Layout('S3', SimpleViT, '1.4.1 and later'),
    Layout('S1', SimpleViT, '1.0.0 to 1.2.9', _BEFORE_1_4),
    Layout('S0', SimpleViT, '0.35.0 to 0.40.2', _BEFORE_1_0 | _BEFORE_1_4),
    Layout(
        'B-cos', SimpleViT, '0.35.0 to 0.40.2, under the names of B-cos/B-cos-v2', _BEFORE_1_0 | _BEFORE_1_4, _B_COS
    ),
    Layout('D2', DeepViT, '1.4.3 and later'),
    Layout('D1', DeepViT, '1.0.0 to 1.4.2', {}, _PRENORM),
    Layout('D0', DeepViT, '0.9.0 to 0.40.2', _BEFORE_1_0, _PRENORM),
)

_NUMBER = re.compile(r'(?<=\.layers\.|encoder_)\d+(?=\.)')


def pattern(name: str) -> str:
    """`name` with `#` for the number of its block."""
    return _NUMBER.sub('#', name, count=1)


def rename(name: str, renames: Mapping[str, str]) -> str:
    """`name` with the longest beginning that has another name replaced by it."""
    number, general = _NUMBER.search(name), pattern(name)
    for old, new in sorted(renames.items(), key=lambda rule: -len(rule[0])):
        if general.startswith(old):
            renamed = new + general.removeprefix(old)
            return renamed.replace('#', number[0], 1) if number else renamed
    return name


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


# A small model in which every quantity has a size of its own, so that a size tells what an axis holds.
_PROBE = {'image_size': 10, 'patch_size': 2, 'channels': 3, 'dim': 20, 'mlp_dim': 29, 'num_classes': 31}
_PROBE |= {'heads': 7, 'dim_head': 11}
_AXES = {
    1: Axis('1'),
    7: Axis('heads'),
    12: Axis('channels x patch area'),
    20: Axis('dim'),
    26: Axis('patches', offset=1),
    29: Axis('mlp_dim'),
    31: Axis('num_classes'),
    77: Axis('heads x dim_head'),
    231: Axis('heads x dim_head', factor=3),
}


def leaves(layout: Layout, depth: int, *, head: bool = True) -> dict[str, tuple[Leaf, tuple[Axis, ...]]]:
    """Every parameter of a model of `depth` blocks: by the layout's name, the rule it travels by and its axes."""
    shapes = _shapes(layout.model(**{**_PROBE, **layout.fields, 'depth': depth}))
    rules = {layout.from_today(rule.name): (rule, shape) for rule, shape in shapes.items()}
    return {
        name: (rule, tuple(_AXES[size] for size in rule.torch_shape(shape)))
        for name, (rule, shape) in rules.items()
        if head or not _is_part(name, _head(layout))
    }


@cache  # the model is traced once for all layouts that are names of it
def _shapes(probe: nn.Module) -> dict[Leaf, tuple[int, ...]]:
    return {leaf(path, len(shape.shape)): shape.shape for path, shape in param_shapes(probe).items()}


@cache
def template(layout: Layout, *, head: bool = True) -> dict[str, tuple[Axis, ...]]:
    """The layout's names, with `#` for the number of a block, and what the axes of each hold."""
    return {pattern(name): axes for name, (_, axes) in leaves(layout, depth=1, head=head).items()}


@cache
def _head(layout: Layout) -> str:
    """The name of the module that is the head."""
    (last,) = [name for name, axes in template(layout).items() if len(axes) == 2 and Axis('num_classes') in axes]
    return last.partition('.')[0]


@cache
def _known_patterns() -> frozenset[str]:
    return frozenset().union(*(template(layout) for layout in LAYOUTS))


@cache
def _most_parts() -> int:
    return max(name.count('.') for name in _known_patterns()) + 1


def beginnings(name: str) -> Iterator[str]:
    """What stands before each ending of `name` that some layout has as a parameter: 'model.' of 'model.cls_token'."""
    parts = name.split('.')
    for position in range(max(0, len(parts) - _most_parts()), len(parts)):
        ending = '.'.join(parts[position:])
        if pattern(ending) in _known_patterns():
            yield name.removesuffix(ending)


@dataclass(frozen=True)
class Fit:
    """How a layout fits names and shapes: completely when there are no problems."""

    layout: Layout
    names: Sequence[str]  # those of the layout, with as many blocks as the names tell
    depth: int
    sizes: Mapping[str, int]  # of each quantity that the shapes tell
    problems: Sequence[str]  # a line for each name that is missing, left over or misshapen
    body: bool  # all but the head fits
    advice: str  # what to do about the problems, where that can be told

    @property
    def difference(self) -> str:
        """The problems for people: what several blocks have in common is said once, with `#` for their number."""
        alike = defaultdict(list)
        for problem in self.problems:
            alike[pattern(problem)].append(problem)
        lines: list[str] = []
        for common, group in alike.items():
            lines += [f'{common} (each block #)'] if len(group) == self.depth > 1 else group
        more = [f'  ... and {len(lines) - MOST_LINES} more'] if len(lines) > MOST_LINES else []
        return '\n'.join(line[:200] for line in lines[:MOST_LINES] + more)


MOST_LINES = 24
MOST_BLOCKS = 1000


def fit(layout: Layout, shapes: Shapes, *, head: bool = True) -> Fit:
    """Hold `shapes` against the layout, with its head or as if it had none, whatever it may be.

    The size of each quantity is what most of the axes that hold it say, so that an odd one out is what gets reported.
    """
    axes = template(layout, head=head)
    patterns = {name: pattern(name) for name in shapes if head or not _is_part(name, _head(layout))}
    numbers = (_NUMBER.search(name) for name, found in patterns.items() if found in axes)
    depth = len({number[0] for number in numbers if number})
    votes: dict[str, Counter[int]] = defaultdict(Counter)
    for name, found in patterns.items():
        if found in axes and len(axes[found]) == len(shapes[name]):
            for axis, size in zip(axes[found], shapes[name], strict=True):
                if (size - axis.offset) % axis.factor == 0:
                    votes[axis.quantity][(size - axis.offset) // axis.factor] += 1
    sizes = {quantity: counter.most_common(1)[0][0] for quantity, counter in votes.items()} | {'1': 1}
    expected = {
        wanted.replace('#', str(number)): tuple(axis.size(sizes) for axis in axes[wanted])
        for wanted in axes
        # a model without a block is none of ours, nor one with more than anybody trained (as a hostile file may have)
        for number in range(min(max(depth, 1), MOST_BLOCKS) if '#' in wanted else 1)
    }
    found_shapes = {name: tuple(shapes[name]) for name in patterns}
    problems = differences(expected, found_shapes)
    different = {name for name in expected.keys() | patterns.keys() if expected.get(name) != found_shapes.get(name)}
    body = all(_is_part(name, _head(layout)) for name in different)
    advice = _advice(layout, expected.keys(), different) if problems else ''
    return Fit(layout, list(expected), depth, sizes, problems, body, advice)


def _advice(layout: Layout, expected: Set[str], different: Set[str]) -> str:
    """What to do about names that are missing or left over, or have another shape, where that can be told."""
    head = _head(layout)
    strangers = {name.partition('.')[0] for name in different if not _is_part(name, head)}
    if not strangers:
        cut_off = different == {name for name in expected if _is_part(name, head)}
        is_there = 'missing: num_classes=0' if cut_off else 'another one: num_classes=0 leaves it out and'
        return f'Only the head, {head}, is {is_there} converts the rest, to give the pooled features.'
    extra = different - expected
    if all(name in extra or _is_part(name, head) for name in different):
        headless = f' {head} is missing or another one: give num_classes=0 as well, for the pooled features.'
        return (
            f'All of the model is here, and more: {", ".join(sorted(strangers))}. If that is no part of what it '
            'computes (a new head, a loss), take it out of the state dict and convert the rest.'
            f'{headless if different - extra else ""}'
        )
    if not any(_is_part(name, 'transformer') for name in different):
        return (
            f'Only the Transformer is here; of the model round it these are missing or different: '
            f'{", ".join(sorted(strangers))}. In PyTorch, load the Transformer into the whole model that it was '
            "trained in, and convert that model's state dict."
        )
    return ''


def _is_part(name: str, module: str) -> bool:
    return name.partition('.')[0] == module


def best_fit(shapes: Shapes, *, head: bool = True) -> Fit:
    """The layout that fits but for the head, else the one with the fewest problems."""
    fits = [fit(layout, shapes, head=head) for layout in LAYOUTS]
    return min(fits, key=lambda fit: (not fit.body, len(fit.problems)))
