"""The other side of the comparison where the source is no PyTorch: its forward pass in plain numpy, no torch needed."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from convert.architectures import architecture_of
from convert.architectures.way import ROUNDINGS, part_inputs
from convert.proof.torch_side import TorchSide


class NumpySide(TorchSide):
    """The architecture's `way`, part by part; gradients are those of the project's own PyTorch module."""

    def outputs(self, dtype: str, images: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
        architecture = architecture_of(self.inspection.model)
        kind: Any = architecture.way
        exact = {name: np.asarray(tensor, np.float64) for name, tensor in self.tensors.items()}
        right = kind.right(self.inspection.model, kind.in_matrices(exact))
        tensors = {name: ROUNDINGS[dtype](tensor) for name, tensor in right.tensors.items()}
        way = replace(right, tensors=tensors, dtype=dtype)
        maps = {f'.{kind.torch}' for kind in architecture.maps_of_block(self.inspection.model, 0)}

        def of_one(image: np.ndarray) -> dict[str, np.ndarray]:
            outputs = dict.fromkeys(architecture.parts(self.inspection.model), np.empty(0))  # to be filled
            for part in list(outputs):
                inputs = part_inputs(way, image, outputs, part)
                for name in names:
                    if any(name == part + end for end in maps):
                        q, k, _ = way.queries_keys_values(way.joined(part, inputs), part)
                        outputs[name] = way.attention_map(q, k)
                outputs[part] = way.compute(part, inputs)
            return outputs

        with np.errstate(all='ignore'):  # infinity and NaN are results to be compared, as in PyTorch
            batch = [of_one(image) for image in images]
        return {name: np.stack([np.asarray(outputs[name], np.float64) for outputs in batch]) for name in names}
