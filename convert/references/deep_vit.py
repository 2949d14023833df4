"""dvit_repo's DeepViT in PyTorch, evaluating, under the names that the Flax model has. Imports torch."""

from collections.abc import Collection, Sequence

import torch
from torch import nn

from convert.references.parts import Patches, Transformer


def stem(channels: int, dim: int, patch_size: Sequence[int], cnn: bool) -> nn.Sequential:
    """Tokens of images; what is an Identity has no parameters in Flax either."""
    rows, columns = patch_size
    if not cnn:
        return nn.Sequential(nn.Identity(), Patches(channels, dim, patch_size))
    half = rows // 2, columns // 2
    return nn.Sequential(
        nn.Identity(),
        nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Identity(),
        Patches(64, dim, half),
    )


class Attention(nn.Module):
    def __init__(
        self, dim: int, heads: int, epsilon: float, reattends: bool, *, transform_scale: bool, scale_adjustment: float,
        qk_scale: float | None, qkv_bias: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.scale_adjustment = heads, scale_adjustment
        self.scale = (dim // heads) ** -0.5 if qk_scale is None else qk_scale
        self.after = self.scale if transform_scale else 1.0
        self.norm = nn.LayerNorm(dim, epsilon)
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attention_drop = nn.Identity()
        if reattends:
            self.reatten_matrix = nn.Conv2d(heads, heads, 1)
            self.var_norm = nn.BatchNorm2d(heads)
        self.reattends = reattends
        self.to_out = nn.Linear(dim, dim)

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
    def __init__(self, dim: int, mlp_dim: int, epsilon: float, scale_adjustment: float) -> None:
        super().__init__()
        self.scale_adjustment = scale_adjustment
        self.net = nn.Sequential(
            nn.LayerNorm(dim, epsilon), nn.Linear(dim, mlp_dim), nn.GELU(), nn.Identity(), nn.Linear(mlp_dim, dim)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(self.scale_adjustment * x) / self.scale_adjustment


class DeepViT(nn.Module):
    def __init__(
        self, *, patches: int, patch_size: Sequence[int], num_classes: int, dim: int, depth: int, heads: int,
        mlp_dim: int, channels: int, cnn_stem: bool, reattention: Collection[int], transform_scale: bool,
        scale_adjustment: float, qk_scale: float | None, qkv_bias: bool, layer_norm_epsilon: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.to_patch_embedding = stem(channels, dim, patch_size, cnn_stem)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embedding = nn.Parameter(torch.randn(1, patches + 1, dim))
        blocks: list[tuple[nn.Module, nn.Module]] = []
        for block in range(depth):
            attention = Attention(
                dim, heads, layer_norm_epsilon, block in reattention, transform_scale=transform_scale,
                scale_adjustment=scale_adjustment, qk_scale=qk_scale, qkv_bias=qkv_bias,
            )  # fmt: skip
            feed_forward = FeedForward(dim, mlp_dim, layer_norm_epsilon, scale_adjustment)
            blocks.append((attention, feed_forward))
        self.transformer = Transformer(blocks, nn.LayerNorm(dim, layer_norm_epsilon))
        self.to_latent = nn.Identity()
        self.head = nn.Linear(dim, num_classes) if num_classes else None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.to_patch_embedding(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embedding
        x = self.to_latent(self.transformer(x)[:, 0])
        return self.head(x) if self.head else x
