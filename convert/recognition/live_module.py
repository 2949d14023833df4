"""A live torch module: is it one of those we port, and what does it tell beyond its weights?"""

import re
import warnings
from collections.abc import Iterable
from typing import Any

from convert.architectures import ARCHITECTURES, transformers
from convert.architectures.architecture import IDENTITY, Architecture, class_name, first_attention, full_name
from convert.errors import ConversionError, ConversionWarning
from convert.recognition.rewritten import refusal_of

# Modules that compute what the one inside them computes, and where it is.
WRAPPERS = {
    'torch.nn.parallel.data_parallel.DataParallel': 'module',
    'torch.nn.parallel.distributed.DistributedDataParallel': 'module',
    'torch.optim.swa_utils.AveragedModel': 'module',
    'torch._dynamo.eval_frame.OptimizedModule': '_orig_mod',
    'torch.distributed.algorithms._checkpoint.checkpoint_wrapper.CheckpointWrapper': '_checkpoint_wrapped_module',
}

FULLY_SHARDED = 'torch.distributed.fsdp.FSDPModule'

# Of torch's parts, what they compute depends on this beside their weights.
SETTINGS = {
    'torch.nn.modules.activation.GELU': 'approximate',
    'torch.nn.modules.activation.Softmax': 'dim',
    'torch.nn.modules.normalization.LayerNorm': 'eps',
    'einops.layers.torch.Rearrange': 'pattern',
}


def is_module(source: object) -> bool:
    """Whether `source` is a torch.nn.Module, or looks like one."""
    return hasattr(source, 'state_dict') and hasattr(source, 'named_modules')


def unwrapped(module: Any, part: str | None = None) -> Any:
    """The ported module without torch's wrappers round it and its parts, its tensors shared.

    With `part` 'transformer', the only Transformer in the module.

    Raises ConversionError when it, or a part of it, is another.
    """
    module = peeled(module)
    wanted = ported(ARCHITECTURES if part is None else transformers())
    if part:
        inside = [each for each in module.modules() if class_name(each) in wanted]
        module = inside[0] if len(inside) == 1 else module
    if class_name(module) not in {**wanted, **ported(transformers())}:
        inside = [name for name, each in module.named_modules() if class_name(each) in wanted]
        calls = [f'module.get_submodule({name!r})' for name in inside]
        advice = 'If it computes what one of those does, pass its state_dict().'
        if len(calls) == 1:
            if reason := refusal_of(module.get_submodule(inside[0]).state_dict()):
                raise ConversionError(reason)
            advice = f'It holds one; pass that: {calls[0]}.'
        elif calls:
            advice = f'It holds {len(calls)}, which may differ; pass the one that you want: {", ".join(calls)}.'
        raise ConversionError(
            f'This module is a {class_name(module)}, which is none of {", ".join(sorted(wanted))}. {advice}'
        )
    check_parts(module)
    return module


def peeled(module: Any) -> Any:
    """A copy of the module without wrappers, also of its parts; it has the same tensors."""
    while class_name(module) in WRAPPERS:
        module = getattr(module, WRAPPERS[class_name(module)])
    kind = type(module)
    if full_name(kind.__mro__[1]) == FULLY_SHARDED:  # fully_shard put a class of its own over the module's
        kind = kind.__mro__[2]
    plain = object.__new__(kind)
    plain.__dict__ = vars(module) | {
        '_modules': {name: part if part is None else peeled(part) for name, part in module._modules.items()}
    }
    return plain


def check_parts(module: Any) -> None:
    """Hold every part of a ported module against those of a new one of its class.

    Raises ConversionError where a part is missing, added, replaced or set otherwise. What hooks do can't be known, so
    they are a ConversionWarning.
    """
    import torch  # which is there already, as it made the module

    parts = dict(module.named_modules(remove_duplicate=False))
    depth = sum(re.fullmatch(r'(transformer\.)?layers\.\d+', name) is not None for name in parts)
    if depth == 0:
        raise ConversionError(f'This {class_name(module)} has no blocks: with depth=0 it is no transformer.')
    with torch.device('meta'):  # it takes no memory, and no numbers from the random generator
        new = type(module)(**architecture_of_module(module).smallest(module), depth=depth)
    expected = {name: signature(part) for name, part in new.named_modules(remove_duplicate=False)}
    found = {name: signature(part) for name, part in parts.items()}
    head = architecture_of_module(module).model.HEAD
    if found.get(head) == IDENTITY:  # a model for features
        expected = {name: part for name, part in expected.items() if name.partition('.')[0] != head} | {head: IDENTITY}
    what = f'a {class_name(module)}'
    for name in [*found, *expected.keys() - found.keys()]:
        if found.get(name) != expected.get(name):
            if reason := refusal_of(module.state_dict()):
                raise ConversionError(reason)
            is_there = f'{name} is a {found[name]}' if name in found else f'{name} is missing'
            should = f'{what} has a {expected[name]} there' if name in expected else f'{what} has no such part'
            advice = f' With {head} = torch.nn.Identity(), the rest converts.' if name.partition('.')[0] == head else ''
            raise ConversionError(f'{is_there}, but {should}: another function.{advice}')
    for name, part in parts.items():
        if 'forward' in vars(part):
            raise ConversionError(f'{name or "The module"} has a forward that is not of its class: another function.')
        if type(part).__name__ == 'Attention':
            heads = first_attention(module).heads
            dim_head = part.to_qkv.out_features // 3 / heads
            scale = getattr(part, 'scale', dim_head**-0.5)  # it has none where queries and keys are normalised
            if part.heads != heads or scale != dim_head**-0.5:
                raise ConversionError(
                    f'{name} has heads={part.heads} and scale={scale}, but in {what} whose first block has '
                    f'heads={heads} every block has these, and scale={dim_head**-0.5} ({dim_head:g}**-0.5): another '
                    'function.'
                )
    hooked = [
        name or 'the module'
        for name, part in parts.items()
        for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
        if not getattr(hook, '__module__', '').startswith('torch.distributed.')  # which gather what is sharded
    ]
    if hooked:
        warnings.warn(
            f'There are hooks on {", ".join(hooked)}, which are not converted. It matters only if one changes what the '
            'module computes.',
            ConversionWarning,
            stacklevel=4,
        )


def signature(part: Any) -> str:
    """The class of a part, with what its function depends on beside weights: '…LayerNorm(eps=1e-05)'."""
    name = class_name(part)
    return f'{name}({SETTINGS[name]}={getattr(part, SETTINGS[name])!r})' if name in SETTINGS else name


def ported(architectures: Iterable[Architecture]) -> dict[str, Architecture]:
    """The torch classes that are converted, by their full names; our own references are none."""
    return {
        name: architecture
        for architecture in architectures
        for name in architecture.torch_classes
        if not name.startswith('convert.references.')
    }


def architecture_of_module(module: Any) -> Architecture:
    """The architecture that a ported module is of."""
    return ported([*ARCHITECTURES, *transformers()])[class_name(module)]
