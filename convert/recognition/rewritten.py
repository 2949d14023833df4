"""Weights that a library has taken apart (adapters, masks, parametrisations, quantisation), and how to undo it."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np


class Rewriting(NamedTuple):
    """What was done, the parts of names that tell it, and what undoes it, in PyTorch."""

    what: str
    name: str  # an expression for whole parts of a name
    undo: str


REWRITINGS = (
    Rewriting(
        'LoRA adapters',
        r'lora_(embedding_)?[AB]|lora_magnitude_vector|base_layer',
        'Merge them with peft, and convert model.state_dict() afterwards:\n'
        '    model = peft.PeftModel.from_pretrained(model, folder)  # only for adapters saved without their model\n'
        '    model = model.merge_and_unload()  # where model is the PeftModel\n'
        'With loralib, convert model.eval().state_dict() without the names that contain lora_. By hand, add lora_alpha '
        '/ r * lora_B @ lora_A to each weight that has them, drop the names that contain lora_, and remove base_layer. '
        'from the others.',
    ),
    Rewriting(
        'masks of pruning',
        r'(weight|bias)_(orig|mask)',
        "Make it final, torch.nn.utils.prune.remove(part, 'weight') for each part that has a weight_mask, and convert "
        'the state_dict() afterwards.',
    ),
    Rewriting(
        'parametrised weights',
        r'parametrizations',
        "Make them plain, torch.nn.utils.parametrize.remove_parametrizations(part, 'weight') for each part that has "
        'them, and convert the state_dict() afterwards.',
    ),
    Rewriting(
        'weights under weight_norm or spectral_norm',
        r'weight_[guv]',
        'Make them plain, torch.nn.utils.remove_weight_norm(part), or remove_spectral_norm(part), for each part that '
        'has them, and convert the state_dict() afterwards.',
    ),
    Rewriting(
        'quantised weights',
        r'_packed_params|zero_points?|qweight|qzeros|SCB|absmax|quant_map|quant_state',
        'Convert the weights of before the quantisation.',
    ),
)
_NORMALISATION = re.compile(r'(^|[._])(?P<kind>mean|std)$')


def rewriting_of(names: Iterable[str]) -> tuple[Rewriting, list[str]] | None:
    """The first of them that names tell, and these names."""
    names = list(names)
    for rewriting in REWRITINGS:
        part = re.compile(rf'(^|\.)({rewriting.name})(\.|$)')
        if telling := [name for name in names if part.search(name)]:
            return rewriting, telling
    return None


def refusal_of(names: Iterable[str]) -> str | None:
    """Why such weights are not converted, and what to do."""
    found = rewriting_of(names)
    if found is None:
        return None
    rewriting, telling = found
    more = f' and {len(telling) - 1} more' if len(telling) > 1 else ''
    return (
        f'There are {rewriting.what} here ({telling[0]}{more}), without which the model computes another function. '
        f'{rewriting.undo}'
    )


def warning_of(tensors: Mapping[str, np.ndarray]) -> str:
    """What tensors that are left aside may do to the function, in words to be put behind their number."""
    if found := rewriting_of(tensors):
        rewriting, telling = found
        return (
            f' ({rewriting.what}, {telling[0]}, …: if they belong to this model, it computes another function without)'
        )
    small = {name: _NORMALISATION.search(name) for name, tensor in tensors.items() if 0 < tensor.size <= 4}
    kinds = {name: found['kind'] for name, found in small.items() if found}
    if set(kinds.values()) == {'mean', 'std'}:
        shown = ', '.join(kinds)
        return f' ({shown}: a normalisation in front of the model? Then images need it before they come here)'
    return ''
