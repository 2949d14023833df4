"""A third architecture, in PyTorch, in Flax, and its record: SimpleViT with learned positions."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from flax import linen as nn
from vit_pytorch import simple_vit

from convert.architectures.architecture import Architecture, Axis, Layout
from flax_vit.checks import pair
from flax_vit.layers import Identity, Images, Model, Outputs, add, sequential, to_patches
from flax_vit.mesh import COLUMNS, SHARED, Rules
from flax_vit.simple_vit import Transformer


class TorchThirdViT(torch.nn.Module):
    def __init__(
        self, *, image_size: Any, patch_size: Any, num_classes: int, dim: int, depth: int, heads: int, mlp_dim: int,
        channels: int = 3, dim_head: int = 64,
    ) -> None:  # fmt: skip
        super().__init__()
        whole = simple_vit.SimpleViT(
            image_size=image_size, patch_size=patch_size, num_classes=num_classes, dim=dim, depth=depth, heads=heads,
            mlp_dim=mlp_dim, channels=channels, dim_head=dim_head,
        )  # fmt: skip
        self.to_patch_embedding = whole.to_patch_embedding
        self.pos_embedding = torch.nn.Parameter(torch.randn(1, *whole.pos_embedding.shape))
        self.transformer = whole.transformer
        self.to_latent = torch.nn.Identity()
        self.classifier = torch.nn.Linear(dim, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.to_patch_embedding(images) + self.pos_embedding
        return self.classifier(self.to_latent(self.transformer(x).mean(dim=1)))


class ThirdViT(Model):
    HEAD: ClassVar[str] = 'classifier'
    POSITIONS: ClassVar[str | None] = 'pos_embedding'
    SAME_WEIGHTS: ClassVar[Sequence[str]] = ('heads', 'dim_head')
    SPLIT: ClassVar[Rules] = ((r'classifier/kernel$', COLUMNS), *SHARED)

    image_size: int | tuple[int, int]
    patch_size: int | tuple[int, int]
    num_classes: int
    dim: int
    depth: int
    heads: int
    mlp_dim: int
    channels: int = 3
    dim_head: int = 64
    image_format: str | None = None  # 'channels_first' or 'channels_last'; None: what fits, the latter where both do
    query_chunk_size: int | None = None
    remat: bool = False
    scan_layers: bool = False

    def setup(self) -> None:
        image_size, patch_size = pair(self.image_size), pair(self.patch_size)
        tokens = math.prod(image_size) // math.prod(patch_size)

        cut = partial(to_patches, self, sizes=f'of {image_size}', fits=lambda *size: size == image_size)
        projection = self.linear(self.channels * math.prod(patch_size), self.dim)
        self.to_patch_embedding = [cut, self.layer_norm(), projection, self.layer_norm()]
        shape = 1, tokens, self.dim
        self.pos_embedding = self.param('pos_embedding', nn.initializers.normal(1.0), shape, self.param_dtype)
        self.transformer = self.inner(Transformer)
        self.to_latent = Identity()
        if self.num_classes:
            self.classifier = self.linear(self.dim, self.num_classes)

    @nn.nowrap
    def outputs(self, images: Images, train: bool) -> Outputs:
        x = add(sequential(self.to_patch_embedding, images, train=train), self.pos_embedding)
        x = self.to_latent(self.transformer(x, train=train).mean(axis=1))
        return self.classifier(x) if self.num_classes else x


class ThirdViTArchitecture(Architecture):
    model = ThirdViT
    torch_classes = ('parity_tests.support.third_vit.TorchThirdViT',)
    layouts = (Layout('T0', ThirdViT, '(not yet)'),)
    axes = (*Architecture.axes, Axis('patches'))
