"""Run by test_advice.py, where peft and loralib are: what has adapters, merged as the errors advise, converts.

`python -m parity_tests.support.adapters FOLDER`; the folder is for what is saved.
"""

import copy
import re
import sys
from pathlib import Path
from typing import Any

import jax
import loralib
import peft
import pytest
import torch

import convert
from convert import ConversionError
from parity_tests.support.reference import (
    CONFIGURATIONS,
    FLOAT64_BOUND,
    Configuration,
    channels_first,
    perturbed,
    pytorch,
    random_images,
    relative_error,
)


def told(configuration: Configuration) -> dict[str, Any]:
    """What a state dict of the configuration leaves open."""
    return {name: configuration.fields[name] for name in ('image_size', 'patch_size', 'heads')}


def lines_of(source: Any, **fields: Any) -> list[str]:
    """The lines of code in the error that refuses it."""
    with pytest.raises(ConversionError, match='There are LoRA adapters here') as refused:
        convert.from_torch(source, **fields)
    return re.findall(r'^ {4}(.*)$', str(refused.value), re.MULTILINE)


def computes_the_same(state_dict: Any, truth: torch.nn.Module, configuration: Configuration) -> None:
    port, variables = convert.from_torch(state_dict, **told(configuration))
    images = random_images(configuration)
    with torch.no_grad():
        expected = truth(channels_first(images)).numpy()
    assert relative_error(jax.jit(port.apply)(variables, images), expected) <= FLOAT64_BOUND


def with_peft(configuration: Configuration, folder: Path, **options: Any) -> None:
    """The PeftModel, the model in it, its state dict, and what it saves."""
    plain = pytorch(configuration)
    config = peft.LoraConfig(r=4, lora_alpha=3, **options)
    adapted: Any = peft.get_peft_model(copy.deepcopy(plain), config).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) / 4
    adapted.save_pretrained(folder)
    for source in (adapted, adapted.get_base_model(), adapted.state_dict(), folder):
        live = isinstance(source, torch.nn.Module)
        lines = lines_of(source, **configuration.told if live else told(configuration))
        alone = source is folder
        names = {'peft': peft, 'folder': folder, 'model': copy.deepcopy(plain if alone else adapted)}
        exec('\n'.join(lines if alone else lines[1:]), names)
        computes_the_same(names['model'].state_dict(), adapted, configuration)


def with_loralib(configuration: Configuration) -> None:
    adapted: Any = pytorch(configuration)
    for block in adapted.transformer.layers:
        weight = block[0].to_qkv.weight
        block[0].to_qkv = loralib.Linear(*weight.shape[::-1], r=4, lora_alpha=3, bias=False).to(weight)
    perturbed(adapted.train())  # ends with eval()
    state_dict = adapted.state_dict()
    assert lines_of(adapted, **configuration.told) == lines_of(state_dict, **told(configuration))
    plain = {name: tensor for name, tensor in state_dict.items() if 'lora_' not in name}
    computes_the_same(plain, adapted, configuration)


if __name__ == '__main__':
    jax.config.update('jax_enable_x64', True)
    torch.manual_seed(0)
    simple, deep = CONFIGURATIONS['simple-plain'], CONFIGURATIONS['deep-plain']
    with_peft(simple, Path(sys.argv[1]) / 'lora', target_modules=['to_qkv', 'to_out'])
    dora: dict[str, Any] = {'use_dora': True, 'modules_to_save': ['mlp_head']}
    with_peft(deep, Path(sys.argv[1]) / 'dora', target_modules=['to_qkv', 'to_out.0'], **dora)
    with_loralib(simple)
