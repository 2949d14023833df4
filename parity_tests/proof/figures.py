"""The figures of the README's parity section: the largest over every configuration.

python -m parity_tests.proof.figures
"""

from collections.abc import Callable

import jax
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from parity_tests.proof.test_training import TRAINED, training_errors
from parity_tests.support.reference import (
    CONFIGURATIONS,
    Configuration,
    converted,
    gradient_errors,
    output_errors,
    random_configuration,
    random_images,
    rounding_error,
)

MODELS = ('DeepViT', 'SimpleViT', 'ViT')
ALL = [*CONFIGURATIONS.values(), *map(random_configuration, range(8))]
ALL += [random_configuration(seed, vit=True) for seed in range(3)]
TABLE = list(CONFIGURATIONS.values())


def logits(configuration: Configuration) -> float:
    return output_errors(*converted(configuration), random_images(configuration))['']


def blocks(configuration: Configuration) -> float:
    errors = output_errors(*converted(configuration), random_images(configuration))
    return max(error for name, error in errors.items() if name.rpartition('.')[0].startswith('transformer.layers.'))


def gradients(configuration: Configuration) -> float:
    return max(gradient_errors(*converted(configuration), random_images(configuration)).values())


FIGURES: dict[str, tuple[Callable[[Configuration], float], list[Configuration], str]] = {
    'float64, logits': (logits, ALL, '.1e'),
    'float64, every part of a block': (blocks, ALL, '.1e'),
    'float64, gradients of parameters and images': (gradients, ALL, '.1e'),
    'float64, parameters after 10 steps of AdamW': (
        lambda configuration: max(training_errors(configuration, 'AdamW').values()),
        [CONFIGURATIONS[name] for name in TRAINED],
        '.1e',
    ),
    "float32, in PyTorch's own errors": (lambda each: rounding_error(each, torch.float32), TABLE, '.1f'),
    "bfloat16, in PyTorch's own errors": (lambda each: rounding_error(each, torch.bfloat16), TABLE, '.1f'),
    "float16, in PyTorch's own errors": (lambda each: rounding_error(each, torch.float16), TABLE, '.1f'),
}

if __name__ == '__main__':
    table = Table('the largest', *MODELS)
    for label, (measure, configurations, form) in FIGURES.items():
        with jax.enable_x64('float64' in label):
            measured = [(each.architecture, measure(each)) for each in track(configurations, label, transient=True)]
        worst = [max(error for name, error in measured if name == model) for model in MODELS]
        table.add_row(label, *(format(error, form) for error in worst))
    Console().print(table)
