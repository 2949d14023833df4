"""What the reference modules share. Imports torch."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn


class Patches(nn.Conv2d):
    """A token for each patch, row by row."""

    def __init__(self, channels: int, dim: int, patch_size: Sequence[int]) -> None:
        rows, columns = patch_size
        super().__init__(channels, dim, (rows, columns), (rows, columns))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images).flatten(2).transpose(1, 2)


class Transformer(nn.Module):
    """Pairs of an attention and a feed-forward, each added to its input, then a norm."""

    def __init__(self, blocks: Iterable[Sequence[nn.Module]], norm: nn.Module) -> None:
        super().__init__()
        self.layers: Any = nn.ModuleList(nn.ModuleList(block) for block in blocks)
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for attention, feed_forward in self.layers:
            x = x + attention(x)
            x = x + feed_forward(x)
        return self.norm(x)
