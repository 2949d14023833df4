"""The way from a checkpoint to a Flax model, and back."""

import os
import re
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
from flax import linen as nn

import flax_vit
from convert.architectures import architecture_of
from convert.architectures.architecture import Field, Layout, class_name
from convert.errors import ConversionError, ConversionWarning, with_article
from convert.files import checkpoint
from convert.files.dtypes import native
from convert.files.tensors import array
from convert.recognition import live_module, names
from convert.recognition.arguments import read_arguments
from convert.recognition.fields import resolve
from convert.recognition.layouts import leaves
from convert.recognition.names import Leaf
from convert.recognition.unwrap import Unwrapped, unwrap
from flax_vit import checks
from flax_vit.folders.whole_files import sha256

# How the arrays of a model's folder, or of what serve-export wrote, are named.
OWN = re.compile(r'params/(transformer|to_patch_embedding_\d)/')


@dataclass(frozen=True, repr=False)
class Inspection:
    """What a source is, before anything is converted."""

    source: str  # a file's name, an address, the torch class of a live module
    format: str  # of the file, in words
    files: tuple[Path, ...]  # those that were read
    unwrapped: Unwrapped  # the tensors as they were found: under which address, and what was left aside
    fields: Mapping[str, Field]  # of the model, by name: the `value`, `how` it is known, and `why`

    @property
    def layout(self) -> Layout:
        """Of those that have these names, the one that computes what the fields say."""
        alike = self.unwrapped.fit.alike
        computing = (
            layout for layout in alike if all(self.fields[name].value == value for name, value in layout.fields.items())
        )
        return next(computing, self.unwrapped.fit.layout)

    @property
    def origin(self) -> str:
        """What it is, and which releases may have written it."""
        alike, layout = self.unwrapped.fit.alike, self.layout
        open_fields = [name for name in layout.fields if self.fields[name].how == 'assumed']
        return ' or '.join(map(str, alike)) if open_fields else str(layout)

    @property
    def tensors(self) -> Mapping[str, np.ndarray]:
        """The model's tensors, in the layout's names."""
        return self.unwrapped.tensors

    @property
    def parameters(self) -> int:
        """How many numbers the tensors have together."""
        return sum(tensor.size for tensor in self.tensors.values())

    @property
    def dtypes(self) -> list[str]:
        """Those of the tensors, by name."""
        return sorted({str(tensor.dtype) for tensor in self.tensors.values()})

    @property
    def plan(self) -> list[tuple[str, Leaf]]:
        """Every tensor's name in the source, and how it becomes a parameter."""
        rules = leaves(self.layout, self.unwrapped.fit.depth, told=self.unwrapped.fit.told)
        return [(name, rules[name][0]) for name in self.tensors]

    @property
    def assumptions(self) -> str:
        """What was assumed, as arguments: "pool='cls', dropout=0.0"."""
        return self.assumed()

    def assumed(self, without: frozenset[str] = frozenset()) -> str:
        """Likewise, but for the fields `without`."""
        assumed = {name: field for name, field in self.fields.items() if field.how == 'assumed' and name not in without}
        return ', '.join(f'{name}={field.value!r}' for name, field in assumed.items())

    def __repr__(self) -> str:
        fields = ', '.join(
            f'{name}={"?" if field.how == "unknown" else repr(field.value)} ({field.how})'
            for name, field in self.fields.items()
            if name not in checks.COMPUTATION
        )
        return f'<Inspection of {self.source}: {self.origin}; {self.parameters:,} parameters; {fields}>'

    @cached_property
    def model(self) -> nn.Module:
        """The Flax model.

        Raises:
            ConversionError: When a field is known from nowhere, naming every argument that is needed.
        """
        unknown = [
            f'  {name}: {field.why}' for name, field in self.fields.items() if field.how == 'unknown' and field.why
        ]
        if unknown:
            raise ConversionError(
                f'This is {with_article(str(self.layout))}; the weights are not enough. Give these arguments:\n'
                + '\n'.join(unknown)
            )
        try:
            return self.layout.model(**{name: field.value for name, field in self.fields.items()})
        except ValueError as error:
            raise ConversionError(str(error)) from error


def inspect(
    source: Any, *, key: str | None = None, part: str | None = None, release: str | None = None, **overrides: Any
) -> Inspection:
    """What `source` is: its layout, its fields, what is left aside. Nothing is converted; unknown fields are allowed.

    Args:
        source: A path, an address ('hf://owner/name', 'https://…'), a state dict (of torch tensors or arrays, or
            whatever a trainer wrapped it in), or a live torch.nn.Module.
        key: Which of several models in the source, by its address: 'ema.model'.
        part: 'transformer' for the Transformer alone, whatever the rest of the model is.
        release: The vit-pytorch that wrote it, '0.6.5', where the weights alone fit several that computed differently.
        **overrides: Fields of the Flax model. What the weights tell otherwise, they can't be.

    Returns:
        The layout, every field with how it is known, and the tensors by their names in the layout.

    Raises:
        ConversionError: When there is no model here that a layout fits, or several, or a field contradicts the
            weights.
        OSError: When the source cannot be read; FileNotFoundError when it is not there.
    """
    if part not in (None, 'transformer'):
        raise ConversionError(f"part must be 'transformer', or left out for a whole model, not {part!r}.")
    known: Mapping[str, Any] = {}
    files: tuple[Path, ...] = ()
    read = None
    if isinstance(source, str | os.PathLike):
        read = checkpoint.read(source)
        name, form, files, tree = str(source), read.format, read.files, read.tree
        if isinstance(tree, Mapping) and any(OWN.match(str(key)) for key in tree):
            raise ConversionError(
                f"{source} is flax_vit's own, converted already: flax_vit.from_pretrained reads the folder it is in; "
                'a program that serve-export wrote is run as docs/serving.md says.'
            )
    elif isinstance(source, type):
        raise ConversionError(
            f'This is the class {source.__name__}, not a model of it: build one, load its weights, and pass that.'
        )
    elif live_module.is_module(source):
        inner = live_module.unwrapped(source, part)
        name, form, tree = class_name(inner), 'live module', arrays(inner.state_dict())
        known = live_module.architecture_of_module(inner).known_fields(inner)
    elif isinstance(source, Mapping):
        name, form, tree = 'a state dict', 'in memory', arrays(source)
    else:
        raise ConversionError(
            f'A source is a path, an address, a state dict or a torch.nn.Module, not a {type(source).__name__}.'
        )
    if 'param_dtype' in overrides:
        overrides['param_dtype'] = floating_dtype(overrides['param_dtype'])
    num_classes = overrides.get('num_classes', known.get('num_classes'))
    found = unwrap(tree, key=key, part=part, release=release, head=num_classes != 0)
    if found.fit.sizes.get('num_classes') == 0:  # vit-pytorch's own num_classes=0
        known = {**known, 'num_classes': 0}
        found = unwrap(tree, key=key, part=part, release=release, head=False)
    check_dtypes(found.tensors)
    fields = resolve(found.fit, overrides, known)
    if any(field.how in {'unknown', 'assumed'} for field in fields.values()):
        said = {'': tree} | (checkpoint.read_beside(read) if read else {})
        fields = read_arguments(said, found.fit, overrides, known, fields)
    if 'param_dtype' not in overrides:
        dtypes = {jax.dtypes.canonicalize_dtype(tensor.dtype) for tensor in found.tensors.values()}
        if len(dtypes) == 1:
            fields['param_dtype'] = Field(dtypes.pop(), 'inferred', 'the tensors')
    return Inspection(name, form, files, found, fields)


def from_torch(
    source: Any,
    *,
    key: str | None = None,
    part: str | None = None,
    release: str | None = None,
    track: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    **overrides: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """The Flax model that computes what `source` computes, and its variables, bits and dtypes kept.

    What was assumed, tensors that were left aside and rounded dtypes are reported by a ConversionWarning.

    Args:
        source: A path, a state dict or a live torch.nn.Module, as of `inspect`.
        key: Which of several models in the source, by its address.
        part: 'transformer' for the Transformer alone, whatever the rest of the model is: a module that takes tokens
            (batch, tokens, dim) and gives tokens.
        release: The vit-pytorch that wrote it, '0.6.5', where the weights alone fit several that computed differently.
        track: Wraps the loop over the parameters, to show progress.
        **overrides: Fields of the Flax model that the weights don't tell (image_size, heads, ...); `param_dtype`
            casts.

    Returns:
        The model, and its variables {'params': ...} in the shapes of linen: a matrix is (in, out), PyTorch's
            transposed.

    Raises:
        ConversionError: As of `inspect`; and when a field is known from nowhere, naming the argument that tells it.
        OSError: When the source cannot be read; FileNotFoundError when it is not there.
    """
    inspection = inspect(source, key=key, part=part, release=release, **overrides)
    model = inspection.model
    for message in notes(inspection):
        warnings.warn(message, ConversionWarning, stacklevel=2)
    return model, place(inspection, track=track)


def place(inspection: Inspection, *, track: Callable[[Iterable[Any]], Iterable[Any]] = iter) -> dict[str, Any]:
    """The variables for the model of an inspection."""
    today = inspection.layout.tensors_of_today(inspection.tensors)
    asked = inspection.fields['param_dtype']
    return names.to_flax(
        inspection.model, today, param_dtype=asked.value if asked.how == 'given' else None, track=track
    )


def notes(inspection: Inspection) -> list[str]:
    """What a caller should know of a conversion."""
    messages = []
    if inspection.assumptions:
        messages.append(
            f'Not everything can be inferred from the weights; assumed, as in {inspection.layout.source}: '
            f'{inspection.assumptions}. '
            'Pass what you know as arguments.'
        )
    if inspection.unwrapped.left_aside:
        groups = '; '.join(f'{group}: {what}' for group, what in inspection.unwrapped.left_aside.items())
        messages.append(f'Left aside, as no part of the model: {groups}.')
    asked = inspection.fields['param_dtype'].how == 'given'
    if 'float64' in inspection.dtypes and not jax.config.read('jax_enable_x64') and not asked:
        messages.append(
            "The float64 weights are rounded to float32, because JAX's 64-bit mode is off; "
            "jax.config.update('jax_enable_x64', True) keeps them."
        )
    return messages


def to_torch(model: nn.Module, variables: Mapping[str, Any], *, layout: str | None = None) -> dict[str, np.ndarray]:
    """The parameters by the names of vit-pytorch's newest release that computes what `model` does, bits kept.

    Args:
        model: One of the models.
        variables: Its variables, {'params': ...}.
        layout: Asks for an older release's names, by the layout's id ('D1').

    Returns:
        Arrays in PyTorch's shapes, for `load_state_dict` after torch.from_numpy of each; of an OfficialSimpleViT by
            big_vision's names and in Flax's shapes, for numpy.savez.

    Raises:
        ConversionError: When no release computes this, and when the variables are not the model's.
    """
    architecture = architecture_of(model)
    able = architecture.layouts_of(model)
    chosen = [candidate for candidate in able if layout in (None, candidate.id)]
    if not chosen:
        ids = ', '.join(f'{candidate.id} ({candidate})' for candidate in able)
        asked = (
            f'layout={layout!r} does not compute'
            if layout
            else f'No release of {architecture.layouts[0].source} computes'
        )
        raise ConversionError(f'{asked} what this {type(model).__name__} does. Layouts that do: {ids or "none"}.')
    tensors = names.to_torch(model, variables)
    empty = {name: np.zeros(shape, model.param_dtype) for name, shape in architecture.empty(model).items()}
    return chosen[0].tensors_from_today(tensors | empty)


def floating_dtype(dtype: Any) -> np.dtype[Any]:
    """The dtype of a name or type. Raises ConversionError when weights can't have it."""
    try:
        found = checks.floating_dtype('param_dtype', dtype)
    except ValueError as error:
        raise ConversionError(str(error)) from error
    if found != jax.dtypes.canonicalize_dtype(found):
        raise ConversionError(f"param_dtype={found} needs 64-bit mode: jax.config.update('jax_enable_x64', True).")
    return found


def check_dtypes(tensors: Mapping[str, np.ndarray]) -> None:
    """ConversionError unless all are floating-point numbers that can be computed with."""
    wrong = [f'  {name}: {tensor.dtype}' for name, tensor in tensors.items() if tensor.dtype.name not in checks.FLOATS]
    if wrong:
        raise ConversionError(
            'Weights must be float64, float32, float16 or bfloat16; these are not (quantised? convert them in PyTorch, '
            'with .float()):\n' + '\n'.join(wrong)
        )


def arrays(tree: Any) -> Any:
    """The tree with arrays for torch tensors; views, where the tensors are on the CPU.

    Raises ConversionError, with the address, for tensors that hold no plain numbers.
    """
    made: dict[int, Any] = {}  # by the id of the container: some hold themselves
    held = []  # all of these, so that no id is given again: some make what they hold when they are asked for it

    def made_of(node: Any, address: tuple[str, ...]) -> Any:
        if isinstance(node, Namespace):  # a trainer's arguments, which are plain values in a file, too
            node = vars(node)
        if id(node) in made:
            return made[id(node)]
        held.append(node)
        if isinstance(node, Mapping):
            named: dict[Any, Any] = {}
            made[id(node)] = named
            named |= {name: made_of(part, (*address, str(name))) for name, part in node.items()}
            return named
        if isinstance(node, list | tuple):
            numbered: list[Any] = []
            made[id(node)] = numbered
            numbered += [made_of(part, (*address, str(number))) for number, part in enumerate(node)]
            return numbered
        if hasattr(node, 'detach'):
            try:
                return array(node)
            except ConversionError as error:
                raise ConversionError(f'{".".join(address) or "The source"}: {error}') from error
        if isinstance(node, np.ndarray):
            return native(node)
        return np.asarray(node) if isinstance(node, jax.Array) else node

    return made_of(tree, ())


def provenance(inspection: Inspection) -> dict[str, Any]:
    """Where a converted model comes from, in plain JSON, to be kept beside its parameters."""
    preprocessing = architecture_of(inspection.model).preprocessing(inspection.layout, inspection.model)
    return {
        'files': {file.name: sha256(file) for file in inspection.files},
        'format': inspection.format,
        'key': inspection.unwrapped.address,
        'layout': {'id': inspection.layout.id, 'wrote it': str(inspection.layout)},
        'dtypes': inspection.dtypes,
        'fields': {
            name: field.how
            for name, field in inspection.fields.items()
            if name not in checks.COMPUTATION or field.how == 'given'
        },
        'left aside': dict(inspection.unwrapped.left_aside),
        **({'preprocessing': preprocessing} if preprocessing else {}),
        'versions': {package.__name__: package.__version__ for package in (flax_vit, flax, jax, np)},
    }
