"""The port's side of the comparison: a Flax model, at the highest precision of matrix products."""

from collections.abc import Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from convert.recognition.names import leaf, torch_module_name


class FlaxSide:
    """A model with its variables in any dtype.

    What was compiled once runs again, as long as this lives. Images are (batch, height, width, channels), and are
    rounded to the dtype that is computed in; what comes back is float64, by PyTorch's names.
    """

    def __init__(self, model: nn.Module, variables: Mapping[str, Any]) -> None:
        self.model, self.variables = model, variables
        self._outputs = jax.jit(self._traced_outputs, static_argnames=('dtype', 'names'))
        self._gradients = jax.jit(self._traced_gradients, static_argnames='dtype')

    def moved(self, moves: Mapping[str, np.ndarray]) -> 'FlaxSide':
        """The same model, its parameters moved by so much, by PyTorch's names and in its order of axes."""
        flat = flatten_dict(self.variables)
        for path, array in flat.items():
            rule = leaf(path, array.ndim)
            if rule.name in moves:
                flat[path] = (np.asarray(array, np.float64) + rule.to_flax(moves[rule.name])).astype(array.dtype)
        other = copy(self)  # with what is compiled
        other.variables = unflatten_dict(flat)
        return other

    def outputs(self, dtype: str, images: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
        """The outputs of the parts that PyTorch calls `names`, '' being the whole."""
        captured = self._outputs(*cast((self.variables, images), dtype), dtype=dtype, names=tuple(names))
        return {
            torch_module_name(path[:-1]): np.asarray(output, np.float64)
            for path, (output,) in flatten_dict(captured).items()
        }

    def gradients(self, dtype: str, images: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
        """The gradients of the sum of weights x logits with respect to every parameter, in PyTorch's order of axes."""
        flat = flatten_dict(self._gradients(*cast((self.variables, images, weights), dtype), dtype=dtype))
        rules = {path: leaf(path, gradient.ndim) for path, gradient in flat.items()}
        return {rule.name: rule.to_torch(np.asarray(flat[path], np.float64)) for path, rule in rules.items()}

    def _in(self, dtype: str) -> nn.Module:
        return self.model.clone(dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype), precision='highest')

    def _traced_outputs(
        self, variables: Mapping[str, Any], images: jax.Array, *, dtype: str, names: tuple[str, ...]
    ) -> Any:
        def wanted(module: nn.Module, method: str) -> bool:
            return method == '__call__' and torch_module_name(module.path) in names

        _, state = self._in(dtype).apply(variables, images, capture_intermediates=wanted, mutable=['intermediates'])
        return state['intermediates']

    def _traced_gradients(
        self, variables: Mapping[str, Any], images: jax.Array, weights: jax.Array, *, dtype: str
    ) -> Any:
        def loss(params: Mapping[str, Any]) -> jax.Array:
            logits: Any = self._in(dtype).apply({**variables, 'params': params}, images)
            return (logits * weights).sum()

        return {'params': jax.grad(loss)(variables['params'])}


@partial(jax.jit, static_argnums=1)  # one program for all arrays compiles sooner than one for each shape
def cast(tree: Any, dtype: str) -> Any:
    """Every array of the tree in `dtype`."""
    return jax.tree.map(lambda array: jnp.asarray(array, dtype), tree)
