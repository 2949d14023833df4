"""ViT (Dosovitskiy et al. 2020, arXiv:2010.11929) as vit-pytorch computes it: `vit_pytorch/vit.py`.

Submodules have the PyTorch names in the PyTorch order, so that PyTorch's `transformer.layers.3.1.net.4.weight`
is `transformer/layers_3_1/net_4/kernel` here.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax import Array

from flax_vit import layers
from flax_vit.checks import check_fields
from flax_vit.layers import (
    FeedForward,
    Identity,
    Images,
    Keys,
    Layer,
    Model,
    Outputs,
    Queries,
    Tokens,
    add,
    embedding_of_smaller_images,
    gelu,
    in_query_chunks,
    sequential,
    weigh_or_fuse,
    with_class_token,
)
from flax_vit.mesh import COLUMNS, ROWS, SHARED, Rules


class Attention(Layer):
    dim: int
    heads: int
    dim_head: int
    dropout: float
    scale: float
    project_out: bool
    attention: str
    query_chunk_size: int | None

    def setup(self) -> None:
        inner_dim = self.heads * self.dim_head
        self.norm = self.layer_norm()
        self.attend = Identity()  # names the attention map
        self.attention_dropout = nn.Dropout(self.dropout)
        self.to_qkv = self.linear(self.dim, 3 * inner_dim, bias=False)
        self.to_out = [self.linear(inner_dim, self.dim), nn.Dropout(self.dropout)] if self.project_out else []

    def __call__(self, x: Tokens, *, train: bool) -> Tokens:
        qkv = self.to_qkv(self.norm(x))
        q, k, v = jnp.unstack(rearrange(qkv, 'b n (qkv h d) -> qkv b h n d', qkv=3, h=self.heads))

        out = in_query_chunks(self, partial(Attention.weigh, train=train), q, k, v, self.query_chunk_size)
        return sequential(self.to_out, rearrange(out, 'b h n d -> b n (h d)'), train=train)

    @nn.nowrap
    def weigh(self, q: Queries, k: Keys, v: Keys, *, train: bool) -> Queries:
        def attend(softmax: Array) -> Array:
            return self.attention_dropout(self.attend(softmax), deterministic=not train)

        drops_out = train and self.dropout > 0
        return weigh_or_fuse(self, q, k, v, attend=attend, scale=self.scale, drops_out=drops_out)


class Transformer(layers.Transformer):
    """ViT's, of tokens (batch, tokens, dim)."""

    dropout: float = 0.0
    attention: str = 'plain'
    # What releases computed differently, see `ViT`.
    project_out: bool | None = None
    scale_by_dim: bool = False

    def __post_init__(self) -> None:
        settle_projection(self)
        super().__post_init__()

    @nn.nowrap
    def block(self) -> list[nn.Module]:
        attention = self.inner(Attention, scale=(self.dim if self.scale_by_dim else self.dim_head) ** -0.5)
        return [attention, self.inner(FeedForward, hidden_dim=self.mlp_dim)]


def settle_projection(model: Any) -> None:
    """A `project_out` of None becomes what today's vit-pytorch does. ValueError for False where it can't be."""
    full_width = model.heads == 1 and model.dim_head == model.dim
    if model.project_out is None:
        model.project_out = not full_width
    if not (model.project_out or full_width):
        raise ValueError(
            f'{type(model).__name__}: project_out=False is for one head of the full width, heads=1 and '
            f'dim_head={model.dim}, not for heads={model.heads} and dim_head={model.dim_head}.'
        )


class ViT(Model):
    """A vision transformer with learned positions, a class token and dropout: vit-pytorch's `ViT` of any release.

    The arguments are vit-pytorch's, with its defaults; `dtype`, `param_dtype` and `precision` are linen's.
    Those from `patch_norm` to `hidden_head` are what its releases computed differently; None is what today's does.

    Raises:
        ValueError: When the fields make no model.
    """

    HEAD: ClassVar[str] = 'mlp_head'
    TRANSFORMER: ClassVar[type[nn.Module]] = Transformer
    POSITIONS: ClassVar[str | None] = 'pos_embedding'
    # Fields that make other functions of them, and how its parameters are split over a mesh.
    SAME_WEIGHTS: ClassVar[Sequence[str]] = ('heads', 'dim_head', 'pool', 'scale_by_dim')
    SPLIT: ClassVar[Rules] = ((r'mlp_head(_1)?/kernel$', COLUMNS), (r'mlp_head_4/kernel$', ROWS), *SHARED)

    image_size: int | tuple[int, int]  # pixels, (height, width) when not square; smaller images use the first positions
    patch_size: int | tuple[int, int]  # pixels, likewise; it divides image_size
    num_classes: int  # 0: no head, the result is the pooled features (batch, dim)
    dim: int  # width of a token
    depth: int  # how many blocks, each of an attention and a feed-forward
    heads: int  # how many each attention has
    mlp_dim: int  # width of the hidden layer of a feed-forward
    pool: str = 'cls'  # 'cls': the class token; 'mean': the mean of all tokens
    channels: int = 3  # how many an image has
    dim_head: int = 64  # width of a query, key or value
    dropout: float = 0.0  # the share that drops out in training: of attention maps, in feed-forwards, before sums
    emb_dropout: float = 0.0  # likewise, of the tokens before the first block
    # What releases of vit-pytorch computed differently. None: as today's does.
    patch_norm: bool = True  # LayerNorms round the patch projection; before 1.0.0 none
    norm_after_mean: bool = False  # before 1.4.0: pooled first, then a LayerNorm in the head; all the same to 'cls'
    class_token: bool | None = None  # None: with pool 'cls' alone; before 1.16.0 always, and in the mean
    project_out: bool | None = None  # None: unless one head has the full width, dim; before 0.7.4 always
    scale_by_dim: bool = False  # before 0.6.7: the attention's scale was `dim**-0.5`, not `dim_head**-0.5`
    hidden_head: bool = False  # before 0.3.0: a hidden layer of mlp_dim in the head
    image_format: str | None = None  # 'channels_first' or 'channels_last'; None: what fits, the latter where both do
    attention: str = 'plain'  # 'fused': by cuDNN on NVIDIA GPUs in half precision, which holds no map; else plain
    query_chunk_size: int | None = None  # queries whose attention map is held at once; None: all. The same numbers
    remat: bool = False  # the backward pass computes each layer's inside anew, instead of keeping it
    scan_layers: bool = False  # one compiled block for any depth; parameters stacked, see `stack_layers`

    def __post_init__(self) -> None:
        if self.class_token is None:
            self.class_token = self.pool == 'cls'
        settle_projection(self)
        check_fields(self)
        if self.pool == 'cls' and not self.class_token:
            raise ValueError("ViT: pool='cls' takes the class token, so there must be one: class_token=True.")
        if self.hidden_head and not self.norm_after_mean:
            raise ValueError('ViT: hidden_head=True is of releases that had norm_after_mean=True.')
        super().__post_init__()

    def setup(self) -> None:
        self.to_patch_embedding = embedding_of_smaller_images(self)
        normal = nn.initializers.normal(1.0)
        tokens = math.prod(self.grid) + bool(self.class_token)
        if self.class_token:
            self.cls_token = self.param('cls_token', normal, (1, self.dim), self.param_dtype)
        self.pos_embedding = self.param('pos_embedding', normal, (tokens, self.dim), self.param_dtype)
        self.embedding_dropout = nn.Dropout(self.emb_dropout)
        self.transformer = self.transformer_alone()
        self.to_latent = Identity()
        if self.num_classes:
            hidden = [self.linear(self.dim, self.mlp_dim), gelu, nn.Dropout(self.dropout)] if self.hidden_head else []
            head = self.linear(self.mlp_dim if self.hidden_head else self.dim, self.num_classes)
            self.mlp_head: Any = [self.layer_norm(), *hidden, head] if self.norm_after_mean else head

    @nn.nowrap
    def transformer_alone(self) -> Transformer:
        """Its Transformer, nobody's child."""
        return self.inner(Transformer, final_norm=not self.norm_after_mean)

    @nn.nowrap
    def outputs(self, images: Images, train: bool) -> Outputs:
        x = sequential(self.to_patch_embedding, images, train=train)
        parameters = [self.cls_token, self.pos_embedding] if self.class_token else [self.pos_embedding]
        x = x.astype(nn.dtypes.canonicalize_dtype(x, *parameters, dtype=self.dtype))
        x = with_class_token(x, self.cls_token) if self.class_token else x
        x = add(x, self.pos_embedding[: x.shape[1]])
        x = self.embedding_dropout(x, deterministic=not train)
        x = self.transformer(x, train=train)
        x = self.to_latent(x.mean(axis=1) if self.pool == 'mean' else x[:, 0])
        return sequential(self.mlp_head, x, train=train) if self.num_classes else x
