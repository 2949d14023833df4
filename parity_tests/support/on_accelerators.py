"""What a test runs in a process of its own, for an accelerator that is not here. Prints JSON.

python on_accelerators.py TARGET MODEL COMPILERS
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / 'benchmarks'))
from targets import devices

TOKENS = 4096  # patches, of which DeepViT has a token more


def main(target: str, name: str, compilers: str) -> None:
    there = devices(target, Path(compilers))
    chunked: list[dict[str, Any]] = [{'chunk': None}, {'chunk': 256}]
    facts = {'memory': memory(name, there[0], chunked), 'exchanged': exchanged(name, there)}
    if there[0].platform == 'gpu':
        ways = [{'attention': how, 'chunk': None, 'dtype': 'bfloat16'} for how in ('plain', 'fused')]
        facts['fused'] = memory(name, there[0], ways)
    print(json.dumps(facts))


def memory(name: str, device: Any, ways: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Bytes planned for temporaries of the forward and of the gradient, each of these ways."""
    from jax.sharding import SingleDeviceSharding
    from scaling import tokens

    side, sharding = round(TOKENS**0.5), SingleDeviceSharding(device)
    rows = [tokens(name, side, repetitions=1, sharding=sharding, **way) for way in ways]
    return {what: [row[f'{what}_bytes'] for row in rows] for what in ('forward', 'gradient')}


def exchanged(name: str, there: list[Any]) -> list[str]:
    """The lines of a forward of one block, on a mesh of 2 x 4, in which devices exchange something."""
    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    import flax_vit

    mesh = Mesh(np.array(there).reshape(2, 4), ('data', 'model'), axis_types=(AxisType.Auto,) * 2)
    model = getattr(flax_vit, name)(
        image_size=224, patch_size=16, num_classes=1000, dim=768, depth=1, heads=12, mlp_dim=3072, dtype='bfloat16'
    )
    on_data = NamedSharding(mesh, PartitionSpec('data'))
    images = jax.ShapeDtypeStruct((64, 224, 224, 3), 'float32', sharding=on_data)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    variables = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        flax_vit.shardings(shapes, mesh),
    )
    program: Any = jax.jit(model.apply).lower(variables, images).compile().as_text()
    kinds = ('all-gather', 'all-reduce', 'all-to-all', 'collective-permute', 'reduce-scatter')
    return [
        line.strip().split(', channel_id')[0]
        for line in program.splitlines()
        if any(f' {kind}(' in line or f' {kind}-start(' in line for kind in kinds)
    ]


if __name__ == '__main__':
    main(*sys.argv[1:])
