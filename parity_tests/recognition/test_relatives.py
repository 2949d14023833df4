"""Models that share names with ours, and compute something else: none gets through, and each is told what it is.

Every model of vit-pytorch is built here, so a new one in a later release is held against the layouts as well.
"""

import importlib
import inspect as introspection
import pkgutil
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vit_pytorch

import convert
from convert import ConversionError, inspect
from convert.architectures import ARCHITECTURES, layouts_of_all, model_names
from convert.architectures.architecture import Layout
from convert.recognition.layouts import best_fit, leaves
from convert.recognition.live_module import ported
from convert.recognition.relatives import RELATIVES, relative
from parity_tests.support.reference import CONFIGURATIONS, pytorch

SIZES: dict[str, Any] = {
    'image_size': 32, 'image_height': 32, 'image_width': 32, 'input_shape': (32, 32), 'seq_len': 16, 'frames': 4,
    'patch_size': 4, 'image_patch_size': 4, 'frame_patch_size': 2, 'freq_patch_size': 4, 'channels': 3,
    'num_classes': 5, 'dim': 16, 'depth': 2, 'heads': 2, 'mlp_dim': 24, 'mlp_mult': 2, 'sm_dim': 16, 'lg_dim': 16,
    'cls_depth': 2, 'spatial_depth': 2, 'temporal_depth': 2, 'ndim': 2, 'num_register_tokens': 4,
    'num_residual_streams': 2, 'max_tokens_per_depth': (4, 2), 'num_slots': 3, 'max_frames': 4, 'dims': (8, 8, 8),
    'num_hierarchies': 2, 'block_repeats': (1, 1), 'reduction_factor': (2, 2), 'num_latents': 4,
}  # fmt: skip
# Beyond or instead of those, where a class asks for it.
SPECIAL: dict[str, dict[str, Any]] = {
    'cct.TransformerClassifier': {'sequence_length': 16},
    'cct_3d.TransformerClassifier': {'sequence_length': 16},
    'cross_vit.CrossViT': {'image_size': 48},
    'jet_vit.JetViT': {'dim': 64},
    'look_vit.LookViT': {'image_size': 48},
    'looped_vit.LoopedViT': {'image_size': 32, 'patch_size': 4},
    'max_vit.MaxViT': {'depth': (1, 1), 'dim': 32},
    'max_vit_with_registers.MaxViT': {'depth': (1, 1), 'dim': 32},
    'mobile_vit.MobileViT': {'image_size': (32, 32), 'channels': (8,) * 11},
    'pit.PiT': {'depth': (1, 1)},
    'rvt.Transformer': {'dim_head': 8},
    'scalable_vit.ScalableViT': {'depth': (1, 1)},
    'sep_vit.SepViT': {'depth': (1, 1)},
    't2t.T2TViT': {'depth': 2, 'heads': 2, 'mlp_dim': 24},
}
# Around a model that is given to them (test_unwrap.py), or not to be imported with what the tests install.
AROUND = {
    'dino.Dino', 'lejepa.LeJEPA', 'levjepa.LeVJEPA', 'es_vit.EsViTTrainer', 'efficient.ViT',
    'learnable_memory_vit.Adapter',
}  # fmt: skip
NOT_IMPORTED = {'vaat'}  # it needs torchaudio
# The same names and shapes as SimpleViT, computed with other patches and positions: weights can't tell.
ALIKE = {'simple_vit_1d.SimpleViT', 'simple_vit_3d.SimpleViT'}


def classes() -> Iterator[tuple[str, type[torch.nn.Module]]]:
    for info in pkgutil.iter_modules(vit_pytorch.__path__):
        if info.name in NOT_IMPORTED:
            continue
        module = importlib.import_module(f'vit_pytorch.{info.name}')
        for name, value in vars(module).items():
            if not introspection.isclass(value) or not issubclass(value, torch.nn.Module):
                continue
            asks = introspection.signature(value).parameters.keys()
            if value.__module__ == module.__name__ and asks & {'num_classes', 'image_size'}:
                yield f'{info.name}.{name}', value


CLASSES = dict(classes())
OTHERS = [name for name in CLASSES if f'vit_pytorch.{name}' not in ported(ARCHITECTURES) and name not in AROUND | ALIKE]


def build(name: str) -> torch.nn.Module:
    """A small one, which takes no memory where it can do without numbers."""
    special = SPECIAL.get(name, {})
    parameters = introspection.signature(CLASSES[name]).parameters.values()
    needed = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    needed = [parameter for parameter in needed if parameter not in {'args', 'kwargs'}]
    with torch.device('cpu' if name.startswith('cct') else 'meta'):
        return CLASSES[name](**{parameter: SIZES[parameter] for parameter in needed if parameter in SIZES} | special)


@cache
def weights(name: str) -> dict[str, np.ndarray]:
    """A state dict of it, of zeros that take no memory."""
    return {key: np.broadcast_to(np.float32(0), tensor.shape) for key, tensor in build(name).state_dict().items()}


def refusal(source: Any, **options: Any) -> str:
    with pytest.raises(ConversionError) as caught:
        inspect(source, **options)
    return str(caught.value)


# ---- vit-pytorch's models


@pytest.mark.parametrize('name', OTHERS)
def test_no_other_model_of_vit_pytorch_converts(name: str) -> None:
    assert refusal(build(name)).startswith(f'This module is a vit_pytorch.{name}, which is none of')
    tensors = weights(name)
    message = refusal(tensors)
    assert message.startswith(
        (
            'This is ',
            'No layout fits. The nearest is ',
            f'This is not a {model_names()}',
            'There are no tensors here',
        )
    )
    wrapped = {'state_dict': {f'module.{name}': tensor for name, tensor in tensors.items()}, 'epoch': 3}
    assert refusal(wrapped)[:16] == message[:16]
    if name != 'simple_flash_attn_vit_3d.SimpleViT':  # without its head it is like ALIKE
        assert refusal(tensors, num_classes=0)[:16] == message[:16]


TOLD = {
    'attn_residual_with_dca_simple_vit.SimpleViT': 'attn_residual_with_dca_simple_vit',
    'cait.CaiT': 'CaiT',
    'jumbo_vit.JumboViT': 'JumboViT',
    'learnable_memory_vit.ViT': 'learnable_memory_vit',
    'local_vit.LocalViT': 'LocalViT',
    'mp3.ViT': 'mp3',
    'na_vit.NaViT': 'NaViT',
    'normalized_vit.nViT': 'nViT',
    'parallel_vit.ViT': 'ParallelViT',
    'rvt.RvT': 'RvT',
    'simple_uvit.SimpleUViT': 'SimpleUViT',
    'simple_vit_attn_residual.SimpleViTAttnResidual': 'simple_vit_attn_residual',
    'simple_vit_orthog_residual_update.SimpleViT': 'simple_vit_orthog_residual_update',
    'simple_vit_with_fft.SimpleViT': 'simple_vit_with_fft',
    'simple_vit_with_hyper_connections.SimpleViT': 'simple_vit_with_hyper_connections',
    'simple_vit_with_relative_proj_pos_bias.SimpleViT': 'simple_vit_with_relative_proj_pos_bias',
    'simple_vit_with_sparse_gating.SimpleViTWithSparseGating': 'simple_vit_with_sparse_gating',
    'simple_vit_with_specialized_cls.SimpleViT': 'simple_vit_with_specialized_cls',
    'simple_vit_with_value_residual.SimpleViT': 'simple_vit_with_value_residual',
    'vat.ViT': 'VAT',
    'vit_1d.ViT': 'vit_1d',
    'vit_3d.ViT': 'vit_3d',
    'vit_5.ViT': 'ViT-5',
    'vit_detpool.ViTDetPool': 'vit_detpool',
    'vit_for_small_dataset.ViT': 'vit_for_small_dataset',
    'vit_nd_pope.ViTND': 'vit_nd_pope',
    'vit_nd_rotary.ViTND': 'vit_nd_rotary',
    'vit_with_decorr.ViT': 'vit_with_decorr',
    'vit_with_keel_post_ln.ViT': 'vit_with_keel_post_ln',
    'vit_with_patch_dropout.ViT': 'vit_with_patch_dropout',
    'vit_with_patch_merger.ViT': 'vit_with_patch_merger',
    'vivit.ViViT': 'ViViT',
}


@pytest.mark.parametrize('name', TOLD)
def test_a_relative_is_refused_by_its_name(name: str) -> None:
    for prefix in ('', 'model.module.'):
        tensors = {prefix + key: tensor for key, tensor in weights(name).items()}
        message = refusal(tensors)
        told = re.match(
            r"This is (.*): another function, .* \(recognised by '(.*)'\)\.(\nA Transformer is complete|$)",
            message,
        )
        assert told
        assert TOLD[name] in told[1]
        assert any(key.endswith(told[2]) for key in tensors)


def test_3d_flash_attention_is_told_from_simple_vit_by_what_it_lacks() -> None:
    message = refusal(weights('simple_flash_attn_vit_3d.SimpleViT'))
    assert 'The nearest is SimpleViT of vit-pytorch 1.' in message
    assert '- linear_head.0.weight 16: missing' in message


@pytest.mark.parametrize('name', sorted(ALIKE))
def test_where_names_and_shapes_are_simple_vits_the_module_tells(name: str) -> None:
    """From weights alone nothing is made unless the caller says that they are of images of some size."""
    assert refusal(build(name)).startswith(f'This module is a vit_pytorch.{name}, which is none of')
    assert not best_fit({key: tensor.shape for key, tensor in weights(name).items()}, layouts_of_all()).problems
    with pytest.raises(ConversionError, match='image_size'):
        convert.from_torch(weights(name))


def test_every_class_that_is_not_built_is_accounted_for() -> None:
    assert AROUND | ALIKE | set(TOLD) <= CLASSES.keys()
    assert {f'vit_pytorch.{name}' for name in CLASSES} >= set(ported(ARCHITECTURES)) - {
        'vit_pytorch.distill.DistillableViT'
    }
    assert len(OTHERS) > 60


# ---- the two relatives of SimpleViT that are converted


@pytest.mark.parametrize('name', ['registers-oblong', 'qk-norm-oblong'])
def test_from_a_module_a_state_dict_and_a_file_and_back(name: str, tmp_path: Path) -> None:
    """The module tells all; what is written back, PyTorch's class loads strictly, with every bit."""
    configuration = CONFIGURATIONS[name]
    module = pytorch(configuration, torch.float32)
    model, variables = convert.from_torch(module)
    names = ['image_size', 'patch_size', 'channels', *([] if model.qk_norm else ['heads'])]
    told = {field: configuration.fields[field] for field in names}
    wrapped = {'epoch': 3, 'state_dict': {f'module.{key}': tensor for key, tensor in module.state_dict().items()}}
    torch.save(wrapped, tmp_path / 'a.pt')
    for source in (module.state_dict(), tmp_path / 'a.pt'):
        assert inspect(source, **told).model == model
    assert inspect(module, part='transformer').model == model.transformer_alone()
    back = {key: torch.from_numpy(array) for key, array in convert.to_torch(model, variables).items()}
    new = type(module)(**configuration.fields)
    new.load_state_dict(back)
    assert all(torch.equal(tensor, back[key]) for key, tensor in module.state_dict().items())


def test_qk_norm_tells_the_heads_and_no_classes() -> None:
    tensors = pytorch(CONFIGURATIONS['qk-norm-oblong'], torch.float32).state_dict()
    assert 'heads=7 contradicts the weights: it is 5 by their shapes' in refusal(tensors, heads=7)
    told: dict[str, Any] = {'image_size': (12, 20), 'patch_size': (3, 5), 'channels': 2}
    with pytest.raises(ConversionError, match=r'the head is a LayerNorm, .* must be dim, 24, or 0 .* not 5'):
        convert.from_torch(tensors, **told, num_classes=5)
    tensors['linear_head.weight'], tensors['linear_head.bias'] = torch.zeros(5, 24), torch.zeros(5)
    assert 'Only the head, linear_head, is another one: num_classes=0' in refusal(tensors)
    assert convert.inspect(tensors, **told, num_classes=0).model.num_classes == 0


QK = weights('simple_vit_with_qk_norm.SimpleViT')
BOTH = QK | {'register_tokens': np.zeros((4, 16), np.float32)}


def test_both_at_once_are_of_no_release() -> None:
    assert refusal(BOTH).startswith('This is SimpleViT with register tokens and query-key normalisation, which no rel')
    model, variables = convert.from_torch(QK, image_size=32, patch_size=4)
    variables = {'params': {**variables['params'], 'register_tokens': np.zeros((4, 16), np.float32)}}
    with pytest.raises(ConversionError, match='No release of vit-pytorch computes what this SimpleViT does'):
        convert.to_torch(model.clone(num_register_tokens=4), variables)


# ---- others' models


def names(*patterns: str, blocks: int = 2) -> dict[str, np.ndarray]:
    """Tensors of these names, `#` replaced by the number of each block, and one where dimensions don't matter."""
    return {
        pattern.replace('#', str(number)): np.ones((4, 4), np.float32)
        for pattern in patterns
        for number in range(blocks if '#' in pattern else 1)
    }


TIMM = names(
    'cls_token', 'pos_embed', 'patch_embed.proj.weight', 'patch_embed.proj.bias', 'blocks.#.norm1.weight',
    'blocks.#.attn.qkv.weight', 'blocks.#.attn.proj.weight', 'blocks.#.mlp.fc1.weight', 'norm.weight', 'head.weight',
)  # fmt: skip
B_COS = names(
    'to_patch_embedding.linear.linear.weight', 'transformer.encoder_#.attn.norm.weight',
    'transformer.encoder_#.attn.to_qkv.weight', 'transformer.encoder_#.attn.to_out.linear.weight',
    'transformer.encoder_#.ff.net.norm.weight', 'transformer.encoder_#.ff.net.linear1.linear.weight',
    'transformer.encoder_#.ff.net.linear2.linear.weight', 'linear_head.norm.weight',
    'linear_head.linear.linear.weight',
)  # fmt: skip
OTHER_MODELS = {
    'another DeepViT than those of zhoudaquan/dvit_repo': TIMM
    | names('blocks.#.attn.reatten_matrix.weight', 'blocks.#.attn.var_norm.running_mean'),
    'the ViT of AlgoPerf': names('conv_patch_extract.weight', 'encoder.encoder_blocks.#.layer_norm1.weight'),
    'another ViT of big_vision or Scenic': names(
        'Transformer.encoderblock_#.MlpBlock_0.Dense_0.kernel', 'MAPHead_0.probe'
    ),
    'a Vision Transformer of timm': TIMM,
    'a Vision Transformer of torchvision': names(
        'class_token', 'conv_proj.weight', 'encoder.pos_embedding', 'heads.head.weight',
        'encoder.layers.encoder_layer_#.self_attention.in_proj_weight',
        'encoder.layers.encoder_layer_#.mlp.linear_1.weight',
    ),
    'a Vision Transformer of Hugging Face': names(
        'vit.embeddings.cls_token', 'vit.embeddings.position_embeddings', 'classifier.weight',
        'vit.encoder.layer.#.attention.attention.query.weight', 'vit.encoder.layer.#.output.dense.weight',
    ),
    'CLIP': names('visual.class_embedding', 'visual.transformer.resblocks.#.attn.in_proj_weight', 'logit_scale'),
    'a B-cos SimpleViT for 6 channels': B_COS,
    'SimpleViT with a convolutional stem': B_COS | names(
        'to_patch_embedding.conv_stem.0.linear.weight', 'to_patch_embedding.conv_stem.1.weight'
    ),
    'a ResNet': names('conv1.weight', 'bn1.running_mean', 'layer1.0.conv1.weight', 'layer4.1.bn2.bias', 'fc.weight'),
    'a language model': names('model.embed_tokens.weight', 'model.layers.#.self_attn.q_proj.weight', 'lm_head.weight'),
}  # fmt: skip


@pytest.mark.parametrize('prefix', ['', 'module.', '0.'])
@pytest.mark.parametrize('what', OTHER_MODELS)
def test_another_architecture_is_refused_by_its_name(what: str, prefix: str) -> None:
    tensors = {prefix + name: tensor for name, tensor in OTHER_MODELS[what].items()}
    for tree in (tensors, {'model': tensors, 'epoch': 3}):
        message = refusal(tree)
        assert message.startswith(f'This is {what}')
        assert 'another function, which is not converted' in message


def test_what_nothing_tells_is_shown() -> None:
    tensors = names('a.weight', 'b.weight', 'c.0.weight', 'd', 'e', 'f', 'g')
    assert refusal({'net': tensors, 'epoch': 3}) == (
        f"This is not a {model_names()}. Its tensors are 'net.a.weight', 'net.b.weight', "
        "'net.c.0.weight', 'net.d', 'net.e' and 2 more."
    )
    assert len(refusal({'x.' * 100_000: np.ones(1)})) < 300
    assert len(refusal({'cls_token': np.ones((1, 1, 4)), 'x.' * 100_000: np.ones(1)})) < 5000
    assert refusal({'epoch': 3}) == f'This is not a {model_names()}. There are no tensors here.'


def test_a_relative_beside_a_model_does_not_hide_what_the_model_lacks() -> None:
    """A teacher of another architecture is in the file; the student's head was cut off."""
    student = vit_pytorch.SimpleViT(image_size=8, patch_size=4, num_classes=3, dim=8, depth=1, heads=1, mlp_dim=4)
    tensors = {f'student.{name}': tensor for name, tensor in student.state_dict().items()}
    teacher = {f'teacher.{name}': tensor for name, tensor in OTHER_MODELS['a ResNet'].items()}
    assert inspect(tensors | teacher).unwrapped.address == 'student'
    del tensors['student.linear_head.weight'], tensors['student.linear_head.bias']
    assert 'Only the head, linear_head, is missing' in refusal(tensors | teacher)


OF_VIT_PYTORCH = [layout for layout in layouts_of_all() if layout.source == 'vit-pytorch']


@pytest.mark.parametrize('layout', OF_VIT_PYTORCH, ids=lambda layout: layout.id)
def test_what_is_converted_is_no_relative(layout: Layout) -> None:
    """Else a model that lacks something would be called another."""
    assert relative({name: (2,) * len(axes) for name, (_, axes) in leaves(layout, depth=2).items()}) is None


@pytest.mark.parametrize('row', RELATIVES, ids=lambda row: row.what[:40])
def test_every_row_of_the_table_is_shown_by_a_test(row: Any) -> None:
    shown = [weights(name) for name in TOLD] + list(OTHER_MODELS.values())
    shown += [{'linear_head.weight': np.ones(3)}, BOTH]
    assert any(row.what in (relative({name: t.shape for name, t in tensors.items()}) or '') for tensors in shown)
