"""DeepViT's learned positions for another image size."""

import numpy as np
from jaxtyping import Float, Float64


def resize_positions(
    table: Float[np.ndarray, '1 old_tokens dim'], side: int
) -> Float64[np.ndarray, '1 new_tokens dim']:
    """The positions of a grid of `side` x `side` patches, from those of another square grid; the class token's is kept.

    Bicubic, as `torch.nn.functional.interpolate(grid, size=(side, side), mode='bicubic')` computes it: Keys' kernel
    with a = -0.75, the corners not aligned, the border repeated, no antialiasing; in float64.
    """
    table = table.astype(np.float64)
    old_side = round((table.shape[1] - 1) ** 0.5)
    grid = table[0, 1:].reshape(old_side, old_side, -1)
    weights = bicubic(old_side, side)
    grid = np.einsum('hi,wj,ijd->hwd', weights, weights, grid, optimize=True)
    return np.concatenate([table[:, :1], grid.reshape(1, side**2, -1)], axis=1)


def bicubic(old: int, new: int, a: float = -0.75) -> Float64[np.ndarray, '{new} {old}']:
    """The weight of each of `old` points of a line in each of `new` points that span the same length."""
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    weights = np.zeros((new, old))
    for offset in range(-1, 3):
        point = np.floor(centres) + offset
        x = np.abs(centres - point)
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * (x**3 - 5 * x**2 + 8 * x - 4)
        weights[np.arange(new), np.clip(point, 0, old - 1).astype(int)] += np.where(x <= 1, near, far)
    return weights
