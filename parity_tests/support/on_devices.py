"""What tests run in processes of their own: one with 8 devices, or two with 2 each. Prints JSON.

python on_devices.py eight FOLDER
python on_devices.py explicit FOLDER
python on_devices.py process NUMBER PORT FOLDER
python on_devices.py restore CHECKPOINTS FOLDER
"""

import json
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from orbax.checkpoint import v1 as orbax
from safetensors import safe_open

from flax_vit import features, from_pretrained, save_pretrained, shardings
from flax_vit.sharding import default_rules

OTHER_FIELDS: Any = {'num_classes': 8, 'image_size': 24, 'param_dtype': 'bfloat16'}


def main(task: str, *arguments: str) -> None:
    if task == 'eight':
        jax.config.update('jax_num_cpu_devices', 8)
        jax.config.update('jax_enable_x64', True)
        facts = eight(*arguments)
    elif task == 'explicit':
        jax.config.update('jax_num_cpu_devices', 8)
        jax.config.update('jax_enable_x64', True)
        facts = explicit(*arguments)
    elif task == 'restore':
        jax.config.update('jax_num_cpu_devices', 8)
        facts = restore(*arguments)
    else:
        number, port, folder = arguments
        jax.config.update('jax_num_cpu_devices', 2)
        jax.config.update('jax_enable_x64', True)
        jax.config.update('jax_cpu_collectives_implementation', 'gloo')
        jax.distributed.initialize(f'127.0.0.1:{port}', num_processes=2, process_id=int(number))
        facts = process(folder)
    print(json.dumps(facts))


MESHES: Any = (((8,), ('data',)), ((2, 4), ('data', 'model')))


def mesh_of(data: int, model: int) -> jax.sharding.Mesh:
    return jax.make_mesh((data, model), ('data', 'model'), axis_types=(AxisType.Auto, AxisType.Auto))


def eight(folder: str) -> dict[str, Any]:
    """A model on a mesh of 2 x 4 beside the same on one device, in float64."""
    mesh = mesh_of(2, 4)
    model, alone = from_pretrained(folder)
    with counted() as read:
        _, spread = from_pretrained(folder, mesh=mesh)
    images = jax.random.normal(jax.random.key(0), (8, 16, 16, 3))
    labels = jnp.arange(8) % 3
    on_data = NamedSharding(mesh, P('data'))
    batch = jax.device_put((images, labels), on_data)
    apply = jax.jit(model.apply)
    logits = apply(spread, batch[0])
    expected_logits = apply(alone, images)
    compiled: Any = apply.lower(spread, batch[0]).compile().as_text()
    half = jax.jit(from_pretrained(folder, dtype='bfloat16')[0].apply)

    optimizer = optax.adam(1e-2)

    def step(variables: Any, state: Any, images: Any, labels: Any) -> Any:
        def loss(variables: Any) -> Any:
            logits = model.apply(variables, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, state = optimizer.update(jax.grad(loss)(variables), state)
        return optax.apply_updates(variables, updates), state

    kept = shardings(jax.eval_shape(lambda: (alone, optimizer.init(alone))), mesh)
    init = jax.jit(optimizer.init)
    trained, state = jax.jit(step, out_shardings=kept)(spread, jax.device_put(init(alone), kept[1]), *batch)
    expected, _ = jax.jit(step)(alone, init(alone), images, labels)
    return {
        'parameters': placement(spread),
        'trained': placement(trained),
        'moments': placement(state[0].mu),
        'same bits': same(alone, spread),
        'read': sum(read.values()),
        'logits': relative(logits, expected_logits),
        'bfloat16': [relative(half(*where), expected_logits) for where in ((spread, batch[0]), (alone, images))],
        'step': max(jax.tree.leaves(jax.tree.map(relative, trained, expected))),
        'exchanged': {
            kind: re.findall(rf'f64\[([\d,]+)\]\S* {kind}\(', compiled)
            for kind in ('all-gather', 'all-reduce', 'all-to-all', 'collective-permute')
        },
        'changed': changed(folder),
    }


def explicit(folder: str) -> dict[str, Any]:
    """Logits and gradients on meshes as `jax.make_mesh` gives them beside those on one device, in float64."""
    images = jax.random.normal(jax.random.key(0), (8, 16, 16, 3))
    facts = {}
    every: Any = {'query_chunk_size': 6, 'remat': True, 'scan_layers': True}
    for options, on_meshes in (({}, MESHES), (every, MESHES[1:])):
        model: Any
        model, alone = from_pretrained(folder, **options)
        for shape, names in on_meshes:
            mesh = jax.make_mesh(shape, names)
            rules = default_rules() if 'model' in names else ()
            on_data = jax.device_put(images, NamedSharding(mesh, P('data')))
            _, spread = from_pretrained(folder, mesh=mesh, sharding_rules=rules, **options)
            apply = jax.jit(model.apply)
            gradient = jax.jit(jax.grad(partial(sum_of_squares, model)))
            seen, seen_alone = (
                jax.jit(partial(features, model, attention=True))(*given)
                for given in ((spread, on_data), (alone, images))
            )
            logits, gradients = apply(spread, on_data), gradient(spread, on_data)
            facts[f'{names} {options}'] = {
                'axes': [kind.name for kind in mesh.axis_types] * (2 // len(names)),
                'split': [*logits.sharding.spec],
                'logits': relative(logits, apply(alone, images)),
                'gradients': max(jax.tree.leaves(jax.tree.map(relative, gradients, gradient(alone, images)))),
                'in the mesh': [relative(logits, other) for other in in_the_mesh(mesh, model, spread, on_data)],
                'features': max(jax.tree.leaves(jax.tree.map(relative, seen, seen_alone))),
                'features split': sorted({str(array.sharding.spec[0]) for array in jax.tree.leaves(seen)}),
                'gradients lie as parameters': jax.tree.all(
                    jax.tree.map(lambda one, other: one.sharding == other.sharding, gradients, spread)
                ),
            }
    return facts


def in_the_mesh(mesh: jax.sharding.Mesh, model: Any, spread: Any, images: Any) -> list[Any]:
    """The logits where the mesh is set, compiled and at once; parameters that `init` makes there have their shapes."""
    with jax.set_mesh(mesh):
        made = jax.device_get(jax.jit(model.init)(jax.random.key(0), images))
        assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, spread)
        return [jax.jit(model.apply)(spread, images), model.apply(spread, images)]


def sum_of_squares(model: Any, variables: Any, images: Any) -> Any:
    return (model.apply(variables, images) ** 2).sum()


def changed(folder: str) -> dict[str, Any]:
    """The same with a new head, resized positions and in bfloat16: on the mesh and on one device."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        alone, spread = (from_pretrained(folder, mesh=mesh, **OTHER_FIELDS)[1] for mesh in (None, mesh_of(2, 4)))
    return {'same bits': same(alone, spread), 'parameters': placement(spread)}


def process(folder: str) -> dict[str, Any]:
    """One of two processes; each has half of every split parameter, and reads no more than that."""
    mesh = mesh_of(1, 4)
    with counted() as read:
        model, variables = from_pretrained(folder, mesh=mesh)
    try:
        from_pretrained(folder, mesh=mesh, check=True)
    except ValueError as error:
        checked = str(error)
    try:
        save_pretrained(f'{folder}-split', model, variables)
    except ValueError as error:
        split = str(error)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        other, fitted = from_pretrained(folder, mesh=mesh, **OTHER_FIELDS)
    gathered, gathered_fitted = process_allgather((variables, fitted), tiled=True)
    if jax.process_index() == 0:
        save_pretrained(f'{folder}-again', model, gathered)
        save_pretrained(f'{folder}-fitted', other, gathered_fitted)
    images = np.load(f'{folder}/../images.npy')
    whole = NamedSharding(mesh, P())
    spread = jax.make_array_from_callback(images.shape, whole, lambda index: images[index])
    logits = jax.jit(model.apply, out_shardings=whole)(variables, spread)
    return {
        'devices': [jax.device_count(), jax.local_device_count()],
        'read': read,
        'parameters': placement(variables),
        'fitted': placement(fitted),
        'checked': checked,
        'split': split,
        'logits': np.asarray(logits).tolist(),
    }


def restore(checkpoints: str, folder: str) -> dict[str, Any]:
    """The latest training state onto a mesh of 2 x 4; saved again from there, as the next step."""
    mesh = mesh_of(2, 4)
    model, _ = from_pretrained(folder)
    shapes = jax.eval_shape(lambda: training_state(model))
    placed = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings(shapes, mesh),
    )
    with orbax.training.Checkpointer(checkpoints) as checkpointer:
        state = checkpointer.load(abstract_state=placed)
        checkpointer.save_async(2, state)
    return {'parameters': placement(state['variables']), 'moments': placement(state['optimizer'][0].mu)}


def training_state(model: Any) -> dict[str, Any]:
    """All there is to go on with: variables, moments (after one step, so that they are not zero), step, random key."""
    variables = model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    optimizer = optax.adamw(1e-3)
    _, state = optimizer.update(variables, optimizer.init(variables), variables)
    return {'variables': variables, 'optimizer': state, 'step': jnp.asarray(1), 'key': jax.random.key(5)}


class Counting:
    """A file of weights, or a slice of it, that notes in `read` how many bytes it gives of which array."""

    def __init__(self, inner: Any, read: dict[str, int], name: str = '') -> None:
        self.inner, self.read, self.name = inner, read, name

    def __enter__(self) -> 'Counting':
        return Counting(self.inner.__enter__(), self.read)

    def __exit__(self, *error: Any) -> Any:
        return self.inner.__exit__(*error)

    def get_slice(self, name: str) -> 'Counting':
        return Counting(self.inner.get_slice(name), self.read, name)

    def __getitem__(self, index: Any) -> Any:
        array = self.inner[index]
        self.read[self.name] = self.read.get(self.name, 0) + array.nbytes
        return array

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """The bytes that from_pretrained reads meanwhile, by array."""
    read: dict[str, int] = {}
    with patch('flax_vit.folders.pretrained.safe_open', lambda *a, **more: Counting(safe_open(*a, **more), read)):
        yield read


def flat(tree: Any) -> dict[str, Any]:
    return {'/'.join(path): leaf for path, leaf in flatten_dict(tree).items()}


def placement(tree: Any) -> dict[str, Any]:
    """Of each array its shape, the shape of its pieces, and how many pieces are different."""
    return {
        path: {
            'shape': leaf.shape,
            'piece': sorted({shard.data.shape for shard in leaf.addressable_shards}),
            'pieces': len({str(shard.index) for shard in leaf.addressable_shards}),
            'devices': len(leaf.addressable_shards),
        }
        for path, leaf in flat(tree).items()
    }


def same(one: Any, other: Any) -> bool:
    equal = jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b)), one, other)
    return all(jax.tree.leaves(equal))


def relative(one: Any, other: Any) -> float:
    one, other = np.asarray(one), np.asarray(other)
    return float(np.abs(one - other).max() / np.abs(other).max())


if __name__ == '__main__':
    main(*sys.argv[1:])
