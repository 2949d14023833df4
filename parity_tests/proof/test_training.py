"""Training goes the same way: the parameters after steps of the same optimizer, in float64."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen as nn

import convert
from parity_tests.support.reference import (
    CONFIGURATIONS,
    GRADIENT_BOUND,
    Configuration,
    Masks,
    channels_first,
    check,
    converted,
    quickly,
    random_images,
    relative_error,
)
from parity_tests.support.slow import slow_but

# A step moves a parameter by at most about the learning rate. What Adam divides by is at least its epsilon (1e-8), so
# a gradient's rounding (1e-16 where many cancel) moves it by 1e-8 of that at the most; the learning rate is 1e-3.
BOUND = 1e-11

TRAINED = ['deep-plain', 'deep-mean', 'simple-plain', 'simple-oblong-patches', 'vit-plain']
OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], optax.GradientTransformation]] = {
    'AdamW': (
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05),
        optax.adamw(1e-3, weight_decay=0.05),
    ),
    'SGD with momentum': (
        lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
        optax.sgd(1e-3, momentum=0.9),
    ),
}


def training_errors(configuration: Configuration, optimizer: str) -> dict[str, float]:
    """Relative error of every parameter after 1, 3 and 10 steps, by name: the largest of the three."""
    module, model, variables = converted(configuration)
    images = [random_images(configuration, seed=step, batch=4) for step in range(10)]
    labels = np.arange(4) % configuration.fields['num_classes']
    make, ours = OPTIMIZERS[optimizer]
    theirs = make(module.parameters())
    state = ours.init(variables)

    def loss(variables: Any, images: jax.Array) -> jax.Array:
        logits: Any = model.apply(variables, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @quickly
    def step(variables: Any, state: Any, images: jax.Array) -> tuple[Any, Any]:
        updates, state = ours.update(jax.grad(loss)(variables, images), state, variables)
        return optax.apply_updates(variables, updates), state

    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    errors = dict.fromkeys(before, 0.0)
    for number, batch in enumerate(images, start=1):
        theirs.zero_grad()
        torch.nn.functional.cross_entropy(module(channels_first(batch)), torch.tensor(labels)).backward()
        theirs.step()
        variables, state = step(variables, state, jnp.asarray(batch))
        if number in (1, 3, 10):
            arrays = convert.to_torch(model, variables)
            for name, parameter in module.named_parameters():
                errors[name] = max(errors[name], relative_error(arrays[name], parameter.detach().numpy()))
    assert all(not torch.equal(before[name], parameter) for name, parameter in module.named_parameters())
    return errors


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('name', slow_but(TRAINED[0], TRAINED))
def test_parameters_after_1_3_and_10_steps(name: str, optimizer: str, float64: None) -> None:
    check(training_errors(CONFIGURATIONS[name], optimizer), BOUND)


def test_gradients_with_the_same_dropout_masks(float64: None) -> None:
    configuration = CONFIGURATIONS['deep-dropout-at-rest']
    module, model, variables = converted(configuration)
    images = random_images(configuration)
    weights = np.random.default_rng(1).standard_normal((len(images), configuration.fields['num_classes']))
    theirs, ours = Masks(), Masks()
    for part in module.train().modules():
        if isinstance(part, torch.nn.Dropout):
            part.register_forward_hook(theirs.hook)
    (module(channels_first(images)) * torch.tensor(weights)).sum().backward()

    def loss(variables: Any) -> jax.Array:
        logits: Any = model.apply(variables, jnp.asarray(images), train=True)
        return (logits * weights).sum()

    with nn.intercept_methods(ours.intercept):
        gradients = convert.to_torch(model, quickly(jax.grad(loss))(variables))
    assert ours.asked == theirs.asked
    truth = {
        name: parameter.grad.numpy() for name, parameter in module.named_parameters() if parameter.grad is not None
    }
    assert truth.keys() == gradients.keys()
    check({name: relative_error(gradients[name], gradient) for name, gradient in truth.items()}, GRADIENT_BOUND)
