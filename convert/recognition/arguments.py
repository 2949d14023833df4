"""The constructor's arguments that a source holds beside its weights: hyper_parameters, config, args, a config.json.

They fill the fields that the weights leave open, if they fit the weights. Only plain values count.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from convert.architectures import architecture_of
from convert.architectures.architecture import Field, one_or_pair
from convert.errors import ConversionError, printable
from convert.recognition.fields import resolve
from convert.recognition.layouts import MOST_LINES, Fit
from flax_vit.checks import COMPUTATION, TRAINING

# Keys under which trainers keep the arguments of what they train. What stands elsewhere is this model's if it agrees
# with the weights in as many fields as AGREE.
WORDS = frozenset(
    (
        'hyper_parameters', 'hparams', 'config', 'config.json', 'cfg', 'args', 'arguments', 'model_args',
        'model_config', 'model_cfg', 'model_kwargs', 'init_args', 'options', 'opt',
    )
)  # fmt: skip
AGREE = 2
NAMES = frozenset({'arch', 'model', 'model_name'})  # under which trainers keep the name of a model


@dataclass(frozen=True)
class Arguments:
    """Values of a model's fields that stand together."""

    where: str  # 'hyper_parameters.model'
    values: Mapping[str, Any]
    named: bool  # so that they are the arguments of something


def read_arguments(
    tree: Mapping[Any, Any], fit: Fit, given: Mapping[str, Any], known: Mapping[str, Any], fields: Mapping[str, Field]
) -> dict[str, Field]:
    """`fields`, with what the source's tree says of those that are unknown or assumed.

    Raises ConversionError, showing both, when what it says of one differs, or contradicts the weights and nothing else
    that is there fits.
    """
    still = {name for name, field in fields.items() if field.how in {'unknown', 'assumed'}}
    names = [name for name in fields if name not in COMPUTATION and name != 'param_dtype']
    found: dict[str, Any] = {}
    places: dict[str, str] = {}
    contradictions: list[str] = []
    for arguments in groups(tree, names, architecture_of(fit.layout.model).variants()):
        values = {
            name: value
            for name, value in arguments.values.items()
            if name in still and all(isinstance(value, t) == isinstance(fields[name].value, t) for t in (str, bool))
        }
        told = [name for name in arguments.values if fields[name].how == 'inferred']
        wrong = [name for name in told if arguments.values[name] != fields[name].value]
        if not values or not (arguments.named or len(told) - len(wrong) >= AGREE):
            continue
        if wrong:
            name = wrong[0]
            reason = f'{name}={arguments.values[name]!r}, but by {fields[name].why} it is {fields[name].value!r}'
            contradictions += [f'{arguments.where} says {reason}'] if values.keys() - TRAINING else []
            continue
        try:
            resolve(fit, {**given, **values}, known)
        except ConversionError as error:
            contradictions.append(f'{arguments.where}: {error}')
            continue
        for name, value in values.items():
            if name in found and found[name] != value:
                raise ConversionError(
                    f'{name} is {found[name]!r} by {places[name]}, but {value!r} by {arguments.where}: give the right '
                    f'one, {name}=….'
                )
            found[name], places[name] = value, arguments.where
    if contradictions and not found:
        needed = ', '.join(f'{name}=…' for name in fields if name in still - TRAINING)
        raise ConversionError(
            'What the source says about its model does not fit its weights:\n'
            + '\n'.join(f'  {contradiction}' for contradiction in contradictions[:MOST_LINES])
            + f'\nIf that is about another model, give what cannot be inferred from the weights: {needed}.'
        )
    resolved = resolve(fit, {**given, **found}, known)
    read = {name: replace(resolved[name], how='read', why=places[name]) for name in found}
    return {**resolved, **read}


def groups(tree: Mapping[Any, Any], names: list[str], variants: Mapping[str, Mapping[str, Any]]) -> Iterator[Arguments]:
    """The arguments in every dict of the tree: under their names, or all under names with one beginning.

    `variants`: those of models with a name of their own, which stands in for them.
    """
    longest_first = sorted(names, key=len, reverse=True)  # mlp_dim before dim
    waiting: list[tuple[tuple[str, ...], Mapping[Any, Any]]] = [((), tree)]
    entered = set()  # a dict may hold itself
    while waiting:
        path, node = waiting.pop()
        if id(node) in entered:
            continue
        entered.add(id(node))
        waiting += [((*path, str(key)), value) for key, value in node.items() if isinstance(value, Mapping)]
        for key in NAMES & node.keys():
            if isinstance(node[key], str) and node[key] in variants:
                where = printable('.'.join(filter(None, (*path, key))))
                yield Arguments(where, {n: value for n, value in variants[node[key]].items() if n in names}, True)
        by_beginning: dict[str, dict[str, Any]] = {}
        for key, value in node.items():
            usable = plain(value)
            name = None if usable is None else next((name for name in longest_first if ends_in(key, name)), None)
            if name:
                by_beginning.setdefault(key.removesuffix(name), {})[name] = usable
        for beginning, values in by_beginning.items():
            if not beginning or beginning[-1] in './' or len(values) > AGREE:
                place = [*path, *beginning.strip('._/').replace('/', '.').split('.')]
                where = printable('.'.join(filter(None, place))) or 'the source'
                yield Arguments(where, values, not WORDS.isdisjoint(place))


def ends_in(key: Any, name: str) -> bool:
    """Whether a key is the name, or the name after a beginning: 'model.heads', 'vit_heads'."""
    return isinstance(key, str) and (key == name or (key.endswith(name) and key[-len(name) - 1] in './_'))


def plain(value: Any) -> int | float | str | bool | tuple[int, int] | None:
    """A field's value: a number, a word, a pair, yes or no; None for whatever else."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, list | tuple) and len(value) == 2 and all(type(item) is int for item in value):
        return one_or_pair((value[0], value[1]))
    return value if type(value) in {int, float, str, bool} else None
