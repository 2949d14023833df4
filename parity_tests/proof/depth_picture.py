"""Draws docs/figures/depth.svg: how far a port is from PyTorch after every part, right and with each of three slips.

python -m parity_tests.proof.depth_picture
"""

from pathlib import Path

import jax
import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from convert.proof.measure import OUTPUT_LIMIT
from convert.proof.plots import COLOURS
from convert.proof.report import figures_of
from parity_tests.proof.test_causes import run
from parity_tests.proof.test_slips import SLIPS, Port, Slip
from parity_tests.support.reference import random_images, simple_vit

# S/16's proportions at a quarter of its width: the errors are those of twelve blocks, in seconds.
MODEL = simple_vit(
    image_size=96, patch_size=16, num_classes=10, dim=96, depth=12, heads=4, mlp_dim=384, dim_head=24, channels=3
)
CURVES: dict[str, Slip] = {
    'heads=6 for 4': lambda port: setattr(port, 'model', port.model.clone(heads=6, dim_head=16)),
    'tanh GELU (flax’s default)': SLIPS['SimpleViT', 'tanh_gelu'],
    'epsilon 1e-6 (flax’s default)': SLIPS['SimpleViT', 'epsilon_of_flax'],
    'the port': lambda port: None,
}


def errors(slip: Slip) -> list[float]:
    """The largest difference of every part, in float64, as `verify --json` writes it."""

    def slip_on_usual_images(port: Port) -> None:
        port.images = random_images(MODEL)  # a slip's test has them far from zero mean
        slip(port)

    with pytest.MonkeyPatch.context() as monkeypatch, jax.enable_x64(True):
        return [part['float64'] for part in figures_of(run(MODEL, slip_on_usual_images, monkeypatch))['parts']]


def draw(curves: dict[str, list[float]], target: Path) -> None:
    """One line for each, its name at its end, on a ground that is seen in light and in dark surroundings."""
    ink, line, flax, slips = (COLOURS[name][0] for name in ('ink', 'line', 'flax', 'torch'))
    # The same figures, the same bytes.
    with matplotlib.rc_context({'svg.hashsalt': 'flax_vit', 'font.size': 11}):
        figure = Figure(figsize=(9.6, 4.2), layout='constrained')
        axes = figure.subplots()
        count = len(next(iter(curves.values())))
        axes.hlines(OUTPUT_LIMIT, 0, count - 1, color=ink, linestyle=':', linewidth=1.4)
        names = {f'limit, {OUTPUT_LIMIT:.0e}': (OUTPUT_LIMIT, ink)}
        for name, values in curves.items():
            colour = flax if name == 'the port' else slips
            axes.plot(np.maximum(values, 1e-16), color=colour, marker='o', markersize=3.5, linewidth=1.6)
            names[name] = (values[-1], colour)
        for name, (height, colour) in names.items():
            axes.annotate(name, (count - 1, height), (9, 0), textcoords='offset points', color=colour, va='center')
        axes.set(yscale='log', ylim=(1e-17, 10), xlim=(-0.7, count + 6))
        axes.set_ylabel('difference from PyTorch, relative')
        blocks = range(0, 12, 2)
        axes.set_xticks([*(1.5 + 2 * block for block in blocks), count - 1])
        axes.set_xticklabels([*(f'block {block}' for block in blocks), 'logits'])
        axes.grid(axis='y', color=line, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[['top', 'right']].set_visible(False)
        figure.savefig(target, metadata={'Date': None}, facecolor='white')


if __name__ == '__main__':
    draw({name: errors(slip) for name, slip in CURVES.items()}, Path(__file__).parents[2] / 'docs/figures/depth.svg')
