"""Trainers' wrappers off: find, in a tree of containers, the one state dict that a layout fits completely.

No list of known words is searched for: wherever a dict holds tensors, and under every beginning of their names, the
layouts are tried. What is not part of the model is left aside and reported by group.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from convert.architectures import architecture_of, layouts_of_all, model_names
from convert.architectures.architecture import Layout, pattern
from convert.errors import ConversionError, printable
from convert.files.pickle_reader import Foreign
from convert.files.tensors import words_for
from convert.files.zip_directory import quote
from convert.recognition.layouts import MOST_BLOCKS, Fit, beginnings, best_fit
from convert.recognition.relatives import relative
from convert.recognition.rewritten import refusal_of, warning_of

# Counters that profilers and BatchNorms keep among the weights; they are no part of any model's function.
PROFILED = {'total_ops', 'total_params'}
COUNTED = 'num_batches_tracked'
BOOKKEEPING = {*PROFILED, COUNTED}
# What torch puts into the middle of names where it wraps a part of a model; the part computes the same.
INSERTED = re.compile(r'(?<=\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.')
# The blocks of one that Flax scanned over, in one array.
SCANNED = re.compile(r'(?<=\bencoderblock)(?=\.)')
# What big_vision keeps of its optimizer, by the parameters' names; in its older files they are at opt.target.
OF_TRAINING = re.compile(r'opt\.(?!target\.)|chrono\.')
# What torch.save, or another pickle, begins with.
FILES = (b'PK\3\4', b'\x80\2', b'\x80\3', b'\x80\4', b'\x80\5')
MOST_OBJECTS = 8  # that a message names
MOST_PLACES = 64  # in one file that are held against the layouts, the likeliest first ...
MOST_TIMES = 4  # ... as long as all together have no more than so many times the file's tensors


class Item(NamedTuple):
    """Something in the tree that is no container, and the keys that lead to it."""

    container: tuple[str, ...]
    name: str
    value: Any
    keys: tuple[Any, ...]  # as they are, to be written down

    @property
    def key(self) -> str:
        return '.'.join((*self.container, self.name))


class Place(NamedTuple):
    """Where a model may be: in a dict, under the names that begin alike."""

    container: tuple[str, ...]
    beginning: str  # '' or 'module.'

    @property
    def address(self) -> tuple[str, ...]:
        return (*self.container, *self.beginning.split('.')[:-1])

    @property
    def key(self) -> str:
        return '.'.join(self.address)


@dataclass(frozen=True)
class Candidate:
    """Tensors that may be a model's: where they are, and how the best layout fits them."""

    place: Place
    tensors: Mapping[str, np.ndarray]  # by the rest of their names
    fit: Fit

    def __str__(self) -> str:
        size = sum(tensor.nbytes for tensor in self.tensors.values())
        return f'key={self.place.key!r}: {self.fit.layout}; {len(self.tensors)} tensors, {size:,} bytes'


@dataclass(frozen=True)
class Unwrapped:
    """The model that was found, and what else there is."""

    address: str  # '' at the top
    tensors: Mapping[str, np.ndarray]  # in the layout's names, just the model's
    fit: Fit
    left_aside: Mapping[str, str]  # group -> what it holds


def unwrap(
    tree: Any, *, key: str | None = None, part: str | None = None, release: str | None = None, head: bool = True
) -> Unwrapped:
    """The only model in `tree`, or the one at the address `key` or inside it; without its head if `head` is False.

    With `part` 'transformer' it is the only Transformer; it need not be said where there is nothing else. With
    `release`, only the layouts of that release are tried.

    Raises ConversionError when there is none, when several differ, or when the best is incomplete or has a name that
    no layout explains.
    """
    leaves = list(walk(tree))
    layouts = tuple(
        layout for layout in layouts_of_all(part, release) if any(layout.mark in leaf.name for leaf in leaves)
    )
    if any(layout.flax for layout in layouts):
        leaves = list(of_flax(leaves))
    names = {pattern(leaf.name) for leaf in leaves}
    # A layout's names are read off a model, which takes time. Those that can't fit are for what no other fits.
    likely = tuple(layout for layout in layouts if is_likely(layout, names))
    found = candidates(leaves, key, likely, head=head) if likely else []
    if not any(_is_at(each.place, key or '') and not each.fit.different for each in found):
        found = candidates(leaves, key, layouts, head=head)
    if key is not None:
        chosen = [candidate for candidate in found if _is_at(candidate.place, key)]
        chosen = [candidate for candidate in chosen if candidate.place.key == key] or chosen
        if not chosen:
            raise ConversionError(f'There is no model at key={key!r}. {_list(found) or _contents(leaves)}')
        found = chosen
    whole = [candidate for candidate in found if not candidate.fit.different]
    different = distinct(whole)
    if len(different) > 1:
        raise ConversionError(f'There are several different models here; choose one. {_list(different)}')
    alone: list[Candidate] = []
    if not different and part is None:
        alone = distinct(
            candidate
            for candidate in candidates(leaves, key, layouts_of_all('transformer', release), head=head)
            if not candidate.fit.different and (key is None or _is_at(candidate.place, key))
        )
        different = [each for each in alone if not left_aside(leaves, each, each.fit.names)]
    if not different:
        raise ConversionError(refusal(leaves, found, alone))
    model = different[0]
    tensors = {name: tensor for name, tensor in model.tensors.items() if name in model.fit.names}
    architecture = architecture_of(model.fit.layout.model)
    tables = {name: model.tensors[name] for name in architecture.tables if name in model.tensors}
    fit = replace(model.fit, sizes={**model.fit.sizes, **architecture.told_by_tables(tables)})
    return Unwrapped(model.place.key, tensors, fit, left_aside(leaves, model, {*tensors, *tables}))


def is_likely(layout: Layout, names: Collection[str]) -> bool:
    """Whether the words that are certain are among the `names`, and a name that it has for another, if it has any."""
    certain = all(any(word in name for name in names) for word in architecture_of(layout.model).certain)
    other = [theirs for theirs, ours in layout.renames.items() if theirs != ours]
    return certain and (not other or any(word in name for word in other for name in names))


def walk(tree: Any) -> Iterator[Item]:
    """Every item of the tree, by every way that leads to it; containers that hold themselves are entered once."""
    stack: list[tuple[tuple[Any, ...], Any, tuple[int, ...]]] = [((), tree, ())]
    while stack:
        path, node, parents = stack.pop()
        if not isinstance(node, Mapping | list | tuple | set | frozenset):
            *container, name = map(str, path or ('',))
            yield Item(tuple(container), INSERTED.sub('', name), node, path)
        elif id(node) not in parents:
            children = node.items() if isinstance(node, Mapping) else enumerate(node)
            stack += reversed([((*path, name), child, (*parents, id(node))) for name, child in children])


def of_flax(leaves: Iterable[Item]) -> Iterator[Item]:
    """big_vision's arrays by names with dots, not slashes; one for each block, where one array has them all."""
    for leaf in leaves:
        name, value = leaf.name.replace('/', '.'), leaf.value
        if SCANNED.search(name) and isinstance(value, np.ndarray) and value.ndim and len(value) <= MOST_BLOCKS:
            yield from (leaf._replace(name=SCANNED.sub(f'_{i}', name), value=block) for i, block in enumerate(value))
        else:
            yield leaf._replace(name=name)


def candidates(leaves: Iterable[Item], key: str | None, layouts: tuple[Layout, ...], *, head: bool) -> list[Candidate]:
    """What is found where tensors have names that one of the layouts knows, after a beginning of any length.

    A complete model among the names of another (an average that a model keeps of itself) is none of the other's.
    Raises ConversionError when two tensors have one name.
    """
    in_flax = any(layout.flax for layout in layouts)
    state_dicts: dict[tuple[str, ...], dict[str, np.ndarray]] = defaultdict(dict)
    for leaf in leaves:
        of_training = leaf.name.rpartition('.')[2] in BOOKKEEPING or (in_flax and OF_TRAINING.match(leaf.name))
        if isinstance(leaf.value, np.ndarray) and not of_training:
            if leaf.name in state_dicts[leaf.container]:
                raise ConversionError(f'Two tensors have the name {leaf.key!r}.')
            state_dicts[leaf.container][leaf.name] = leaf.value
    known = Counter(
        Place(container, beginning)
        for container, state_dict in state_dicts.items()
        for name in state_dict
        for beginning in beginnings(name, layouts)
    )
    likeliest = sorted(known, key=lambda place: (key is None or not _is_at(place, key), -known[place]))[:MOST_PLACES]
    tried: dict[Place, list[str]] = {}
    left = MOST_TIMES * sum(map(len, state_dicts.values()))
    for place in likeliest:
        names = [name for name in state_dicts[place.container] if name.startswith(place.beginning)]
        if len(names) <= left:
            tried[place] = names
            left -= len(names)
    found: list[Candidate] = []
    for place in sorted(tried, key=lambda place: -len(place.beginning)):
        inside = tuple(
            other.place.beginning
            for other in found
            if other.place.container == place.container and not other.fit.different
        )
        tensors = {
            name.removeprefix(place.beginning): state_dicts[place.container][name]
            for name in tried[place]
            if not name.startswith(inside)
        }
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        found.append(Candidate(place, tensors, best_fit(shapes, layouts, head=head)))
    return found


def _is_at(place: Place, key: str) -> bool:
    """Whether the place is at that address, or inside it."""
    return key in ('', place.key) or place.key.startswith(f'{key}.')


def distinct(found: Iterable[Candidate]) -> list[Candidate]:
    """One of each group of equal candidates, that of the shortest address."""
    different: list[Candidate] = []
    for candidate in sorted(found, key=lambda candidate: len(candidate.place.address)):
        if not any(equal(candidate, other) for other in different):
            different.append(candidate)
    return different


def equal(one: Candidate, other: Candidate) -> bool:
    """Bit for bit (so that NaN equals itself), the smallest tensor first: those that differ are soon parted."""
    pairs = sorted(
        ((one.tensors[name], other.tensors[name]) for name in one.fit.names & other.fit.names),
        key=lambda pair: pair[0].nbytes,
    )
    return (one.fit.layout, one.fit.expected) == (other.fit.layout, other.fit.expected) and all(
        mine.dtype == theirs.dtype and mine.tobytes() == theirs.tobytes() for mine, theirs in pairs
    )


def left_aside(leaves: Iterable[Item], model: Candidate, used: Iterable[str]) -> dict[str, str]:
    """What is not among the names that are used of the model, grouped where its address parts from the model's."""
    groups: dict[str, list[Any]] = defaultdict(list)
    tensors: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    address = model.place.address
    parts = {(*address, *name.split('.')) for name in used}
    modules = {path[:-1] for path in parts}
    for leaf in leaves:
        path = (*leaf.container, *leaf.name.split('.'))
        if path[-1] in PROFILED or (path[-1] == COUNTED and path[:-1] in modules):
            groups[path[-1]].append(leaf.value)
        elif path not in parts and not (isinstance(leaf.value, np.ndarray) and leaf.value.size == 0):
            shared = next(
                (i for i, (a, b) in enumerate(zip(path, address, strict=False)) if a != b),
                min(len(path) - 1, len(address)),
            )
            group = '.'.join(path[: shared + 1])
            groups[group].append(leaf.value)
            if isinstance(leaf.value, np.ndarray):
                tensors[group]['.'.join(path[shared:])] = leaf.value
    return {
        printable(group): printable(describe(values) + warning_of(tensors[group])) for group, values in groups.items()
    }


def describe(values: list[Any]) -> str:
    """'34 tensors', the value itself where there is just one, or '34 tensors and 5 other values'."""
    tensors = sum(isinstance(value, np.ndarray) for value in values)
    others = len(values) - tensors
    if others == 1 and not tensors:
        value = values[0]
        return f'{value.name} (not read)' if isinstance(value, Foreign) else repr(value)[:60]
    counts = [(tensors, 'tensor'), (others, 'other value' if tensors else 'value')]
    return ' and '.join(f'{count} {what}{"s" if count > 1 else ""}' for count, what in counts if count)


def refusal(leaves: list[Item], found: list[Candidate], alone: Sequence[Candidate] = ()) -> str:
    """Why nothing here can be converted, and what to do; `alone`: the Transformers that are complete."""
    shapes = {leaf.key: leaf.value.shape for leaf in leaves if isinstance(leaf.value, np.ndarray)}
    objects = [leaf for leaf in leaves if isinstance(leaf.value, Foreign)]
    for leaf in objects:
        if (words := words_for(leaf.value.name)) and next(beginnings(leaf.key, layouts_of_all()), None) is not None:
            return f'{leaf.key} is {words}'
    if not shapes and objects:
        kinds = ', '.join(sorted({quote(leaf.value.name) for leaf in objects})[:MOST_OBJECTS])
        return (
            f'There are no tensors here, only objects of {kinds}, which are never unpickled. If '
            f'{quote(objects[0].key)} is a model, save its state dict where its class is:\n'
            "    checkpoint = torch.load('x.pt', map_location='cpu', weights_only=False)\n"
            f"    torch.save(checkpoint{written(objects[0])}.state_dict(), 'weights.pt')"
        )
    files = [leaf for leaf in leaves if isinstance(leaf.value, bytes) and leaf.value.startswith(FILES)]
    if not shapes and files:
        return (
            f'There are no tensors here, but {quote(files[0].key)} holds the bytes of a file. Write it, and convert '
            'that:\n'
            "    checkpoint = torch.load('x.pt', map_location='cpu', weights_only=False)\n"
            f"    pathlib.Path('inner.pt').write_bytes(checkpoint{written(files[0])})"
        )
    hint = ''
    if alone:
        hint = f"\nA Transformer is complete here; part='transformer' converts it alone, for tokens. {_list(alone)}"
    best = min(found, key=lambda each: len(each.fit.different) / len(each.fit.names), default=None)
    near = {name: tensor.shape for name, tensor in best.tensors.items()} if best else shapes
    if reason := relative(near):
        return reason + hint
    if reason := refusal_of(near):
        return reason
    if not best:
        return f'This is not a {model_names()}. {_contents(leaves)}{hint}'
    if not best.fit.advice and (reason := relative(shapes)):
        return reason + hint
    where = f' at {best.place.key!r}' if best.place.key else ''
    advice = f'\n{best.fit.advice}' if best.fit.advice else hint
    return f'No layout fits. The nearest is {best.fit.layout}{where}; the difference:\n{best.fit.difference}{advice}'


def written(leaf: Item) -> str:
    """The keys that lead to it, as Python has them: "['models'][0]"."""
    return ''.join(f'[{key!r}]' for key in leaf.keys)


def _list(found: Sequence[Candidate]) -> str:
    return 'Models here:\n' + '\n'.join(f'  {candidate}' for candidate in found) if found else ''


def _contents(leaves: list[Item]) -> str:
    names = [leaf.key for leaf in leaves if isinstance(leaf.value, np.ndarray)]
    more = f' and {len(names) - 5} more' if len(names) > 5 else ''
    shown = ', '.join(repr(name)[:100] for name in names[:5])
    return f'Its tensors are {shown}{more}.' if names else 'There are no tensors here.'
