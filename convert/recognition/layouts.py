"""Which layout of which architecture fits the names and shapes of tensors. Imports architectures and names.

The names and shapes that a layout needs are read off the Flax model itself. `#` stands for the number of a block.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from convert.architectures import architecture_of
from convert.architectures.architecture import Axis, Layout, block_number, flax_name, pattern
from convert.recognition.names import Leaf, differences, leaf_shapes

Shapes = Mapping[str, tuple[Any, ...]]  # a size, or what it holds in words


def leaves(
    layout: Layout, depth: int, *, head: bool = True, told: Mapping[str, Any] | None = None
) -> dict[str, tuple[Leaf, tuple[Axis, ...]]]:
    """Every parameter of a model of `depth` blocks: by the layout's name, the rule it travels by and its axes.

    `told`: the fields that names tell, `Fit.told`.
    """
    architecture = architecture_of(layout.model)
    probe = layout.model(**architecture.fields_of_probe({**(told or {}), **layout.fields}, depth))
    quantities = architecture.quantities(probe)
    axes = {axis.size(quantities): axis for axis in architecture.axes}

    rules = {}
    for rule, shape in leaf_shapes(probe).items():
        name = layout.from_today(rule.name)
        if layout.flax:
            name, rule = flax_name(name, len(shape)), replace(rule, axes=tuple(range(len(shape))))
        elif rule.name in layout.batched:
            rule = replace(rule, batched=True)
        sizes = (*[1] * rule.batched, *rule.torch_shape(shape))
        assert axes.keys() >= {*sizes}, f'{name} of {layout} has axes of {sizes}; its record has an Axis for {[*axes]}'
        if head or not _is_part(name, _head(layout)):
            rules[name] = rule, tuple(axes[size] for size in sizes)
    return rules


@cache
def template(
    layout: Layout, *, head: bool = True, told: tuple[tuple[str, Any], ...] = ()
) -> dict[str, tuple[Axis, ...]]:
    """The layout's names, with `#` for the number of a block, and what the axes of each hold."""
    return {pattern(name): axes for name, (_, axes) in leaves(layout, 1, head=head, told=dict(told)).items()}


def _head(layout: Layout) -> str:
    """The name of the module that is the head; '' where there is none."""
    return architecture_of(layout.model).model.HEAD or ''


@cache
def _endings(layouts: tuple[Layout, ...]) -> tuple[frozenset[str], int]:
    """The names that the layouts have, and how many parts the longest has."""
    patterns = frozenset[str]().union(*(template(layout) for layout in layouts))
    return patterns, max(name.count('.') for name in patterns) + 1


def beginnings(name: str, layouts: tuple[Layout, ...]) -> Iterator[str]:
    """What stands before each ending of `name` that a layout has as a parameter: 'model.' of 'model.cls_token'."""
    known, most = _endings(layouts)
    parts = name.split('.')
    for position in range(max(0, len(parts) - most), len(parts)):
        ending = '.'.join(parts[position:])
        if pattern(ending) in known:
            yield name.removesuffix(ending)


@dataclass(frozen=True)
class Fit:
    """How a layout fits names and shapes: completely when nothing is different."""

    layout: Layout
    expected: Shapes  # by the layout's names, as many blocks as are there
    found: Shapes
    depth: int
    sizes: Mapping[str, int]  # of each quantity that the shapes tell
    different: Set[str]  # names that are missing, left over or misshapen
    body: bool  # all but the head fits
    told: Mapping[str, Any]  # fields of the model that the names tell
    alike: Sequence[Layout]  # those that fit as well: they have the same names and shapes, for another function

    @property
    def names(self) -> Set[str]:
        """Those of the layout."""
        return self.expected.keys()

    @property
    def problems(self) -> list[str]:
        """A line for each name that is missing, left over or misshapen."""
        return differences(self.expected, self.found)

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
        return '\n'.join(line[:MOST_LETTERS] for line in lines[:MOST_LINES] + more)

    @property
    def advice(self) -> str:
        """What to do about names that are missing or left over, or have another shape, where that can be told."""
        head = _head(self.layout)
        strangers = sorted({name.partition('.')[0] for name in self.different if not _is_part(name, head)})
        named = ', '.join(name[:MOST_LETTERS] for name in strangers[:MOST_LINES])
        if not strangers:
            cut_off = not any(_is_part(name, head) for name in self.found)
            is_there = 'missing: num_classes=0' if cut_off else 'another one: num_classes=0 leaves it out and'
            return f'Only the head, {head}, is {is_there} converts the rest, to give the pooled features.'
        extra = self.different - self.names
        if all(name in extra or _is_part(name, head) for name in self.different):
            headless = f' {head} is missing or another one: give num_classes=0 as well, for the pooled features.'
            return (
                f'The whole model is here, with unexpected keys: {named}. If they are no part of what it '
                'computes (a new head, a loss), remove them from the state dict and convert the rest.'
                f'{headless if self.different - extra else ""}'
            )
        return ''


MOST_LINES = 24
MOST_LETTERS = 200  # of a line, or a name in it
MOST_BLOCKS = 1000


def fit(layout: Layout, shapes: Shapes, patterns: Mapping[str, str], *, head: bool = True) -> Fit:
    """Hold `shapes` against the layout, with its head or as if it had none, whatever it may be.

    `patterns`: those of the names. The size of each quantity is what most of the axes that hold it say, so that an odd
    one out is what gets reported.
    """
    architecture = architecture_of(layout.model)
    told = architecture.told_by_names(layout, shapes)
    axes = template(layout, head=head, told=tuple(told.items()))
    beside = architecture.tables | (set() if head else {_head(layout)})
    found = {
        name: shape
        for name, shape in shapes.items()
        # what has no elements, and should not be there, is nothing
        if name.partition('.')[0] not in beside and (patterns[name] in axes or 0 not in shape)
    }
    depth = len({block_number(name) for name in found if patterns[name] in axes} - {None})
    votes: dict[str, Counter[int]] = defaultdict(Counter)
    for name, shape in found.items():
        if patterns[name] in axes and len(axes[patterns[name]]) == len(shape):
            for axis, size in zip(axes[patterns[name]], shape, strict=True):
                if (size - axis.offset) % axis.factor == 0:
                    votes[axis.quantity][(size - axis.offset) // axis.factor] += 1
    sizes = {quantity: counter.most_common(1)[0][0] for quantity, counter in votes.items()} | {'1': 1}
    expected = {
        wanted.replace('#', str(number)): tuple(axis.size(sizes) for axis in axes[wanted])
        for wanted in axes
        # a model without a block is none of ours, nor one with more than anybody trained (as a hostile file may have)
        for number in range(min(max(depth, 1), MOST_BLOCKS) if '#' in wanted else 1)
        if architecture.is_in_block(wanted, number, told)
    }
    different = {name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)}
    body = all(_is_part(name, _head(layout)) for name in different)
    return Fit(layout, expected, found, depth, sizes, different, body, told, [layout])


def _is_part(name: str, module: str) -> bool:
    return name.partition('.')[0] == module


def best_fit(shapes: Shapes, layouts: tuple[Layout, ...], *, head: bool = True) -> Fit:
    """The layout that fits but for the head, else the one with the fewest problems."""
    patterns = {name: pattern(name) for name in shapes}
    fits = [fit(layout, shapes, patterns, head=head) for layout in layouts]
    best = min(fits, key=lambda fit: (not fit.body, len(fit.different)))
    return best if best.different else replace(best, alike=[fit.layout for fit in fits if not fit.different])
