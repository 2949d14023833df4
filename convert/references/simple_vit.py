"""big_vision's Simple ViT in PyTorch, under the names that the Flax model has. Imports torch."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from convert.references.parts import Patches, Transformer
from flax_vit.checks import pair

EPSILON = 1e-6


class ToHeads(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim // heads, heads, dim))  # Flax's axes from the last to the first
        self.bias = nn.Parameter(torch.randn(heads, dim // heads))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum('bni,dhi->bhnd', x, self.weight) + self.bias[:, None]


class FromHeads(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim, dim // heads, heads))
        self.bias = nn.Parameter(torch.randn(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum('bhnd,odh->bno', x, self.weight) + self.bias


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, EPSILON)
        self.query, self.key, self.value = ToHeads(dim, heads), ToHeads(dim, heads), ToHeads(dim, heads)
        self.attend = nn.Softmax(-1)
        self.out = FromHeads(dim, heads)
        self.scale = (dim // heads) ** -0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        attention = self.attend(self.query(x) * self.scale @ self.key(x).transpose(2, 3))
        return self.out(attention @ self.value(x))


class FeedForward(nn.Module):
    def __init__(self, dim: int, mlp_dim: int) -> None:
        super().__init__()
        layers = nn.LayerNorm(dim, EPSILON), nn.Linear(dim, mlp_dim), nn.GELU('tanh'), nn.Linear(mlp_dim, dim)
        self.net = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class SimpleViT(nn.Module):
    """The module of a Flax model, for images of its size."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        dim = model.dim
        self.positions = torch.from_numpy(model.pos_embedding())
        self.to_patch_embedding = nn.Sequential(nn.Identity(), Patches(model.channels, dim, pair(model.patch_size)))
        blocks = [(Attention(dim, model.heads), FeedForward(dim, model.mlp_dim)) for _ in range(model.depth)]
        self.transformer = Transformer(blocks, nn.LayerNorm(dim, EPSILON))
        self.to_latent = nn.Identity()
        self.pre_logits = nn.Linear(dim, model.rep_size) if model.rep_size else None
        self.head = nn.Linear(model.rep_size or dim, model.num_classes) if model.num_classes else None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.to_patch_embedding(images)
        x = self.transformer(x + self.positions.to(x.dtype))
        x = self.to_latent(x.mean(dim=1))
        if self.pre_logits:
            x = functional.tanh(self.pre_logits(x))
        return self.head(x) if self.head else x
