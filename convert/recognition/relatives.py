"""Other models that share names with ours, or are taken for them: told by a name, to be refused by theirs."""

import re
from typing import NamedTuple

from convert.recognition.layouts import Shapes


class Relative(NamedTuple):
    """Another model, and the names that give it away."""

    what: str
    name: str  # an expression for the ending of a parameter's name, whole parts of it
    dimensions: int | None = None  # of that parameter, where they matter
    beside: str | None = None  # an expression for what another name must end in
    without: str | None = None  # an expression for what no name may end in


# Models of vit-pytorch and others that share names with ours, or are taken for them, and compute another function.
# The first that fits is named.
RELATIVES = (
    # vit-pytorch's variations on SimpleViT
    Relative('nViT (vit_pytorch.normalized_vit)', r'residual_lerp_scales\.\d+\.\d+'),
    Relative('NaViT (vit_pytorch.na_vit)', r'pos_embed_height|attn_pool_queries'),
    Relative('JumboViT (vit_pytorch.jumbo_vit)', r'jumbo_cls_token'),
    Relative('ViT-5 (vit_pytorch.vit_5)', r'rotary_emb\.(patch|reg)_inv_freq'),
    Relative('VAT (vit_pytorch.vat), or a VLA built of it', r'to_out_gates\.0\.weight'),
    Relative('SimpleUViT (vit_pytorch.simple_uvit)', r'layers\.\d+\.2\.1\.weight'),
    Relative('SimpleViT with hyper-connections (simple_vit_with_hyper_connections)', r'dynamic_alpha_fn'),
    Relative('SimpleViT with sparse gating (simple_vit_with_sparse_gating)', r'to_qkv_and_mask\.weight'),
    Relative(
        'SimpleViT with register tokens and query-key normalisation, which no release of vit-pytorch has',
        r'register_tokens',
        beside=r'q_norm\.gamma',
    ),
    Relative('SimpleViT with Fourier features (simple_vit_with_fft)', r'to_freq_embedding\.\d\.weight'),
    Relative('SimpleViT with value residuals (simple_vit_with_value_residual)', r'to_(value_)?residual_mix\.0\.weight'),
    Relative(
        'SimpleViT with orthogonal residual updates (simple_vit_orthog_residual_update)', r'\d\.block\.to_qkv\.weight'
    ),
    Relative('SimpleViT with attention residuals (simple_vit_attn_residual)', r'final_pool\.learned_query'),
    Relative('SimpleViT with attention residuals (attn_residual_with_dca_simple_vit)', r'attn_res\.pseudo_queries'),
    Relative(
        'SimpleViT with relative positions (simple_vit_with_relative_proj_pos_bias)', r'rel_pos_bias\.distance_banks'
    ),
    Relative('SimpleViT with specialised class norms (simple_vit_with_specialized_cls)', r'norm\.fns\.\d\.weight'),
    Relative(
        'SimpleViT of vit-pytorch 1.4.0, whose head is by mistake a LayerNorm and tells no classes (num_classes=0 '
        'leaves it out, to give the pooled features)',
        r'linear_head\.weight',
        dimensions=1,
        without=r'q_norm\.gamma',
    ),
    # of its ViT
    Relative('ViT (vit_pytorch.vit_with_keel_post_ln)', r'post_norms\.\d+\.weight'),
    Relative('CaiT (vit_pytorch.cait)', r'mix_heads_pre_attn'),
    Relative('ParallelViT (vit_pytorch.parallel_vit)', r'fns\.\d+\.(fn\.)?to_qkv\.weight'),
    Relative('RvT (vit_pytorch.rvt)', r'to_q\.cls_proj\.weight'),
    Relative('LocalViT (vit_pytorch.local_vit)', r'net\.\d\.net\.0\.weight'),
    Relative('ViT for small datasets (vit_for_small_dataset)', r'to_patch_tokens\.1\.weight'),
    Relative('ViT with a patch merger (vit_with_patch_merger)', r'patch_merger\.queries'),
    Relative('ViT with rotary positions (vit_nd_rotary, levjepa)', r'rotary_emb\.freqs'),
    Relative('ViT with polar positions (vit_nd_pope)', r'polar_emb\.freqs'),
    Relative('ViViT (vit_pytorch.vivit)', r'(spatial|temporal)_transformer\.norm\.weight'),
    Relative('ViT of one axis, or one that pools otherwise (vit_1d, vit_detpool)', r'cls_token', dimensions=1),
    Relative('ViT with queries apart from keys and values (learnable_memory_vit, mp3)', r'\d\.0\.to_kv\.weight'),
    Relative(
        'ViT with decorrelation (vit_with_decorr)', r'layers\.\d+\.1\.norm\.weight', without=r'1\.fn\.net\.0\.weight'
    ),
    Relative(
        'ViT for video, or one that drops patches (vit_3d, vit_with_patch_dropout)',
        r'layers\.\d+\.1\.net\.4\.weight',
        without=r'reattn_weights|transformer\.norm\.weight',
    ),
    # others
    Relative('another DeepViT than those of zhoudaquan/dvit_repo', r'attn\.(reatten_matrix|var_norm)\.weight'),
    Relative('a Vision Transformer of timm, or one built like it (DeiT, DINO, MAE)', r'blocks\.\d+\.attn\.qkv\.weight'),
    Relative('a Vision Transformer of torchvision', r'encoder_layer_\d+\.self_attention\.in_proj_weight'),
    Relative('a Vision Transformer of Hugging Face', r'attention\.attention\.query\.weight'),
    Relative('CLIP', r'resblocks\.\d+\.attn\.in_proj_weight'),
    Relative(
        'SimpleViT with a convolutional stem (vitc, B-cos/B-cos-v2)',
        r'to_patch_embedding\.conv_stem\.0\.(linear\.)?weight',
    ),
    Relative('a B-cos SimpleViT for 6 channels (bcos_*, B-cos/B-cos-v2)', r'linear[12]?\.linear\.weight'),
    Relative('a ResNet', r'layer1\.0\.conv1\.weight'),
    Relative(
        "another ViT of big_vision or Scenic (that with posemb='sincos2d' and pool_type='gap' is converted)",
        r'pos_embedding|cls|MAPHead_0\.probe|output_projection\.kernel',
        beside=r'MlpBlock_\d\.Dense_0\.kernel',
    ),
    Relative('the ViT of AlgoPerf (imagenet_vit)', r'conv_patch_extract\.(kernel|weight)'),
    Relative('a language model', r'(embed_tokens|tok_embeddings|word_embeddings|wte)\.weight'),
)

# Whatever comes before the ending is a wrapper's.
_ENDING = r'(?:^|\.)(?:{})\Z'
_ANY_RELATIVE = re.compile(_ENDING.format('|'.join(relative.name for relative in RELATIVES)))


def relative(shapes: Shapes) -> str | None:
    """Which other model these names are, if a name gives it away."""
    telling = [name for name in shapes if _ANY_RELATIVE.search(name)]
    for other in RELATIVES:
        ending = re.compile(_ENDING.format(other.name))
        name = next((n for n in telling if ending.search(n) and other.dimensions in (None, len(shapes[n]))), None)
        if name is None:
            continue
        present, absent = (re.compile(_ENDING.format(each)) if each else None for each in (other.beside, other.without))
        if (present is None or any(present.search(name) for name in shapes)) and (
            absent is None or not any(absent.search(name) for name in shapes)
        ):
            return f'This is {other.what}: another function, which is not converted (recognised by {name!r}).'
    return None
