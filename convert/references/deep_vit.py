"""dvit_repo's DeepViT in PyTorch, evaluating, under the names that the Flax model has. Imports torch."""

import math
from typing import Any

import torch
from torch import nn

from convert.references.parts import Patches, Transformer
from flax_vit.checks import pair


def stem(model: Any) -> nn.Sequential:
    """Tokens of images; what is an Identity has no parameters in Flax either."""
    rows, columns = pair(model.patch_size)
    if not model.cnn_stem:
        return nn.Sequential(nn.Identity(), Patches(model.channels, model.dim, (rows, columns)))
    return nn.Sequential(
        nn.Identity(),
        nn.Conv2d(model.channels, 64, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Identity(),
        Patches(64, model.dim, (rows // 2, columns // 2)),
    )


class Attention(nn.Module):
    def __init__(self, model: Any, reattends: bool) -> None:
        super().__init__()
        self.heads, self.scale_adjustment, self.reattends = model.heads, model.scale_adjustment, reattends
        self.scale = (model.dim // model.heads) ** -0.5 if model.qk_scale is None else model.qk_scale
        self.after = self.scale if model.transform_scale else 1.0
        self.norm = nn.LayerNorm(model.dim, model.layer_norm_epsilon)
        self.to_qkv = nn.Linear(model.dim, 3 * model.dim, bias=model.qkv_bias)
        self.attention_drop = nn.Identity()
        if reattends:
            self.reatten_matrix = nn.Conv2d(model.heads, model.heads, 1)
            self.var_norm = nn.BatchNorm2d(model.heads)
        self.to_out = nn.Linear(model.dim, model.dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, dim = x.shape
        qkv = self.to_qkv(self.norm(self.scale_adjustment * x))
        q, k, v = qkv.reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attention = self.attention_drop((q @ k.transpose(2, 3) * self.scale).softmax(dim=-1))
        if self.reattends:
            attention = self.var_norm(self.reatten_matrix(attention)) * self.after
        out = (attention @ v).transpose(1, 2).reshape(batch, tokens, dim)
        return self.to_out(out) / self.scale_adjustment


class FeedForward(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.scale_adjustment = model.scale_adjustment
        norm = nn.LayerNorm(model.dim, model.layer_norm_epsilon)
        first, last = nn.Linear(model.dim, model.mlp_dim), nn.Linear(model.mlp_dim, model.dim)
        self.net = nn.Sequential(norm, first, nn.GELU(), nn.Identity(), last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(self.scale_adjustment * x) / self.scale_adjustment


class DeepViT(nn.Module):
    """The module of a Flax model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.to_patch_embedding = stem(model)
        self.cls_token = nn.Parameter(torch.randn(1, 1, model.dim))
        self.pos_embedding = nn.Parameter(torch.randn(1, math.prod(model.grid) + 1, model.dim))
        blocks = [(Attention(model, block in model.reattention), FeedForward(model)) for block in range(model.depth)]
        self.transformer = Transformer(blocks, nn.LayerNorm(model.dim, model.layer_norm_epsilon))
        self.to_latent = nn.Identity()
        self.head = nn.Linear(model.dim, model.num_classes) if model.num_classes else None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.to_patch_embedding(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embedding
        x = self.to_latent(self.transformer(x)[:, 0])
        return self.head(x) if self.head else x
