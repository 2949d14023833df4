"""Trainers' wrappers off: find, in a tree of containers, the one state dict that a layout fits completely.

No list of known words is searched for: wherever a dict holds tensors, and under every beginning of their names, the
layouts are tried. What is not part of the model is left aside and reported by group.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from convert.checkpoint import Foreign
from convert.errors import ConversionError
from convert.layouts import Fit, best_fit, is_known, relative

# Counters that profilers leave among the weights; they are no part of any model's function.
BOOKKEEPING = {'total_ops', 'total_params'}
MOST_PLACES = 64  # in one file that are held against the layouts, the likeliest first


class Leaf(NamedTuple):
    """Something in the tree that is no container, and the keys that lead to it."""

    container: tuple[str, ...]
    name: str
    value: Any


@dataclass(frozen=True)
class Candidate:
    """Tensors that may be a model's: where they are, and how the best layout fits them."""

    address: tuple[str, ...]  # the containers' keys, then the beginning of the names: ('model', 'module')
    tensors: Mapping[str, np.ndarray]  # by the rest of their names
    fit: Fit

    def __str__(self) -> str:
        size = sum(tensor.nbytes for tensor in self.tensors.values())
        return f'key={".".join(self.address)!r}: {self.fit.layout}; {len(self.tensors)} tensors, {size:,} bytes'


@dataclass(frozen=True)
class Unwrapped:
    """The model that was found, and what else there is."""

    address: str  # '' at the top
    tensors: Mapping[str, np.ndarray]  # in the layout's names, just the model's
    fit: Fit
    left_aside: Mapping[str, str]  # group -> what it holds


def unwrap(tree: Any, *, key: str | None = None, head: bool = True) -> Unwrapped:
    """The only model in `tree`, or the one whose address begins with `key`; without its head when `head` is False.

    Raises ConversionError when there is none, when several differ, or when the best is incomplete or has a name that
    no layout explains.
    """
    leaves = list(walk(tree))
    candidates = [
        Candidate(address, tensors, best_fit({name: tensor.shape for name, tensor in tensors.items()}, head=head))
        for address, tensors in places(leaves)
    ]
    if key is not None:
        wanted = tuple(key.split('.')) if key else ()
        chosen = [candidate for candidate in candidates if candidate.address[: len(wanted)] == wanted]
        if not chosen:
            raise ConversionError(f'There is no model at key={key!r}. {_list(candidates) or _contents(leaves)}')
        candidates = chosen
    complete = [candidate for candidate in candidates if not candidate.fit.problems]
    different = distinct(complete)
    if len(different) > 1:
        raise ConversionError(f'There are several different models here; choose one. {_list(different)}')
    if not different:
        raise ConversionError(refusal(leaves, candidates))
    chosen_one = different[0]
    names = frozenset(chosen_one.fit.names)
    tensors = {name: tensor for name, tensor in chosen_one.tensors.items() if name in names}
    return Unwrapped('.'.join(chosen_one.address), tensors, chosen_one.fit, left_aside(leaves, chosen_one))


def walk(tree: Any) -> Iterator[Leaf]:
    """Every leaf of the tree once, also where containers are shared or hold themselves."""
    seen: set[int] = set()
    stack: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    while stack:
        path, node = stack.pop()
        children: Iterable[tuple[Any, Any]]
        if isinstance(node, Mapping):
            children = node.items()
        elif isinstance(node, list | tuple | set | frozenset):
            children = enumerate(node)
        else:
            yield Leaf(path[:-1], path[-1] if path else '', node)
            continue
        if id(node) not in seen:
            seen.add(id(node))
            stack += reversed([((*path, str(name)), child) for name, child in children])


def places(leaves: Iterable[Leaf]) -> Iterator[tuple[tuple[str, ...], dict[str, np.ndarray]]]:
    """Where tensors have names that some layout knows, after a beginning of any length: address and tensors."""
    state_dicts: dict[tuple[str, ...], dict[str, np.ndarray]] = defaultdict(dict)
    for leaf in leaves:
        if isinstance(leaf.value, np.ndarray) and leaf.name.rpartition('.')[2] not in BOOKKEEPING:
            state_dicts[leaf.container][leaf.name] = leaf.value
    known: Counter[tuple[tuple[str, ...], str]] = Counter()
    for container, state_dict in state_dicts.items():
        for name in state_dict:
            starts = [0] + [position + 1 for position, character in enumerate(name) if character == '.']
            known.update((container, name[:start]) for start in starts if is_known(name[start:]))
    for (container, beginning), _ in known.most_common(MOST_PLACES):
        address = (*container, *beginning.split('.')[:-1])
        state_dict = state_dicts[container]
        yield address, {name[len(beginning) :]: state_dict[name] for name in state_dict if name.startswith(beginning)}


def distinct(candidates: Iterable[Candidate]) -> list[Candidate]:
    """One of each group of equal candidates, the shortest address first."""
    different: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda candidate: len(candidate.address)):
        if not any(equal(candidate, other) for other in different):
            different.append(candidate)
    return different


def equal(one: Candidate, other: Candidate) -> bool:
    """Whether two candidates are the same model, bit for bit (so that NaN equals itself)."""
    return one.fit.layout == other.fit.layout and all(
        name in other.tensors
        and one.tensors[name].dtype == other.tensors[name].dtype
        and one.tensors[name].shape == other.tensors[name].shape
        and one.tensors[name].tobytes() == other.tensors[name].tobytes()
        for name in one.fit.names
    )


def left_aside(leaves: Iterable[Leaf], chosen: Candidate) -> dict[str, str]:
    """What is not part of the chosen model, grouped where its address parts from the model's."""
    groups: dict[str, list[Any]] = defaultdict(list)
    model = {(*chosen.address, *name.split('.')) for name in chosen.fit.names}
    for leaf in leaves:
        path = (*leaf.container, *leaf.name.split('.'))
        if path not in model:
            shared = next(
                (i for i, (a, b) in enumerate(zip(path, chosen.address, strict=False)) if a != b),
                min(len(path) - 1, len(chosen.address)),
            )
            groups['.'.join(path[: shared + 1])].append(leaf.value)
    return {group: describe(values) for group, values in groups.items()}


def describe(values: list[Any]) -> str:
    """'34 tensors', the value itself where there is just one, or '34 tensors and 5 other values'."""
    tensors = sum(isinstance(value, np.ndarray) for value in values)
    others = len(values) - tensors
    if others == 1 and not tensors:
        value = values[0]
        return f'{value.name} (not read)' if isinstance(value, Foreign) else repr(value)[:60]
    counts = [(tensors, 'tensor'), (others, 'other value' if tensors else 'value')]
    return ' and '.join(f'{count} {what}{"s" if count > 1 else ""}' for count, what in counts if count)


def refusal(leaves: list[Leaf], candidates: list[Candidate]) -> str:
    """Why nothing here can be converted, and what to do."""
    names = [leaf.name for leaf in leaves if isinstance(leaf.value, np.ndarray)]
    for candidate in sorted(candidates, key=lambda candidate: len(candidate.fit.problems)):
        shapes = {name: tensor.shape for name, tensor in candidate.tensors.items()}
        if reason := relative(shapes):
            return reason
    if reason := relative({leaf.name: leaf.value.shape for leaf in leaves if isinstance(leaf.value, np.ndarray)}):
        return reason
    modules = sorted({leaf.value.name for leaf in leaves if isinstance(leaf.value, Foreign)})
    if not names and modules:
        return (
            f'There are no tensors here, only objects of {", ".join(modules)}, which are never unpickled. '
            "Save the state dict where those classes live: torch.save(model.state_dict(), 'weights.pt')."
        )
    if not candidates:
        return f'This is no SimpleViT or DeepViT of vit-pytorch. {_contents(leaves)}'
    best = min(candidates, key=lambda candidate: len(candidate.fit.problems) / len(candidate.fit.names))
    where = f' at {".".join(best.address)!r}' if best.address else ''
    problems = '\n'.join(best.fit.problems)
    advice = f'\n{best.fit.advice}' if best.fit.advice else ''
    return f'No layout fits. The nearest is {best.fit.layout}{where}; the difference:\n{problems}{advice}'


def _list(candidates: list[Candidate]) -> str:
    return 'Models here:\n' + '\n'.join(f'  {candidate}' for candidate in candidates) if candidates else ''


def _contents(leaves: list[Leaf]) -> str:
    names = ['.'.join((*leaf.container, leaf.name)) for leaf in leaves if isinstance(leaf.value, np.ndarray)]
    more = f' and {len(names) - 5} more' if len(names) > 5 else ''
    return f'Its tensors are {", ".join(map(repr, names[:5]))}{more}.' if names else 'There are no tensors here.'
