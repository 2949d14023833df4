"""For users of flax.nnx: a model with its variables as one nnx module, and back."""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn, nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_vit.architectures import MODELS, classes
from flax_vit.parameters import check_variables, collections_of

KINDS = {'params': nnx.Param, 'batch_stats': nnx.BatchStat}


class NNXModel(nnx.bridge.ToNNX):
    """A model as an nnx module: `train()` and `eval()` say whether dropout acts, unless the call does."""

    def __init__(self, module: nn.Module, rngs: nnx.Rngs | None = None) -> None:
        super().__init__(module, rngs)
        self.to_nnx__deterministic = True  # ToNNX takes what is called otherwise for the model's variables

    @property
    def deterministic(self) -> bool:
        """What nnx.Module's `train` and `eval` set."""
        return self.to_nnx__deterministic

    @deterministic.setter
    def deterministic(self, value: bool) -> None:
        self.to_nnx__deterministic = value

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        if keywords.get('method') is None and len(arguments) < 2:
            keywords.setdefault('train', not self.deterministic)
        if keywords.get('train') and 'batch_stats' in collections_of(self.to_nnx__module):
            keywords.setdefault('mutable', 'batch_stats')  # the running statistics move
        return super().__call__(*arguments, **keywords)


def to_nnx(model: nn.Module, variables: Mapping[str, Any], rngs: nnx.Rngs | None = None) -> NNXModel:
    """The model as an nnx module that holds the variables, as `nnx.Param`s in linen's tree; the arrays are shared.

    Call it with images, as the model: `module(images)`. After `module.train()`, until `module.eval()`, dropout acts,
    as it does in one call with `train=True`.

    Args:
        model: One of the models.
        variables: Its variables, {'params': ...}.
        rngs: Where dropout takes its keys from, nnx.Rngs(dropout=seed), unless the call gives others, `rngs=`.

    Returns:
        The module.

    Raises:
        ValueError: When the variables are not the model's.
    """
    check_variables(model, variables)
    module = NNXModel(model, rngs)
    flat = {path[1:]: KINDS[path[0]](array) for path, array in flatten_dict(variables).items()}
    for name, tree in unflatten_dict(flat).items():
        setattr(module, name, nnx.data(tree))
    return module


def from_nnx(module: nnx.bridge.ToNNX) -> dict[str, Any]:
    """The variables of such a module: what `model.apply`, `save_pretrained` and `to_torch` take.

    Args:
        module: What `to_nnx` made, trained or not.

    Returns:
        {'params': ...}, of plain arrays.

    Raises:
        ValueError: For another module.
    """
    inner: Any = module.to_nnx__module if isinstance(module, nnx.bridge.ToNNX) else module
    if inner is module or not isinstance(inner, tuple(classes().values())):
        raise ValueError(
            f'from_nnx takes what to_nnx made of one of {", ".join(MODELS)}, not a {type(inner).__name__}.'
        )
    found = {name: nnx.to_pure_dict(nnx.state(module, kind)) for name, kind in KINDS.items()}
    return {name: tree for name, tree in found.items() if tree}
