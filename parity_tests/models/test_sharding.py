"""Models on many devices: where the parameters lie, what is read for them, and that the results are the same."""

import functools
import json
import math
import os
import pathlib
import re
import socket
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from orbax.checkpoint import v1 as orbax

from flax_vit import (
    DeepViT,
    PretrainedWarning,
    SimpleViT,
    ViT,
    features,
    from_nnx,
    from_pretrained,
    save_pretrained,
    shardings,
    to_nnx,
)
from flax_vit.parameters import variable_shapes
from parity_tests.support.on_devices import OTHER_FIELDS, training_state
from parity_tests.support.pages import ROOT, blocks
from parity_tests.support.slow import slow_but
from parity_tests.support.small_models import assert_equal, variables_of

SIZES: Any = {'image_size': 16, 'patch_size': 4, 'dim': 32, 'depth': 1, 'heads': 4, 'dim_head': 8, 'mlp_dim': 64}
SIZES |= {'num_classes': 12, 'param_dtype': np.dtype('float64')}
MODELS = {'simple': SimpleViT(**SIZES), 'deep': DeepViT(**SIZES), 'vit': ViT(**SIZES)}
HEADS = {'simple': 'linear_head', 'deep': 'mlp_head_1', 'vit': 'mlp_head'}
SCRIPT = ROOT / 'parity_tests' / 'support' / 'on_devices.py'


def start(*arguments: str) -> 'subprocess.Popen[str]':
    environment = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'} | {'JAX_PLATFORMS': 'cpu'}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, SCRIPT, *arguments], stdout=pipe, stderr=pipe, text=True, env=environment)


def result(process: 'subprocess.Popen[str]') -> Any:
    printed, complaint = process.communicate(timeout=1800)
    assert process.returncode == 0, complaint
    return json.loads(printed.splitlines()[-1])


@pytest.fixture(scope='module')
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    root = tmp_path_factory.mktemp('folders')
    with jax.enable_x64(True):
        for name, model in MODELS.items():
            save_pretrained(root / name, model, variables_of(model), max_shard_size=30_000)
    return {name: root / name for name in MODELS}


@pytest.mark.parametrize('name', slow_but('deep', MODELS))
def test_on_eight_devices(name: str, folders: dict[str, pathlib.Path]) -> None:
    facts = result(start('eight', str(folders[name])))
    every_large_parameter_is_split(name, facts)
    # Float64's standard in this project: sums in another order, relative errors of some 1e-16 each.
    assert facts['logits'] <= 1e-12
    assert facts['step'] <= 1e-11
    spread, alone = facts['bfloat16']
    assert 0 < spread <= 3 * alone  # the standard for bfloat16, beside one device instead of PyTorch
    for tree in ('trained', 'moments'):  # training leaves everything where it is
        assert facts[tree] == facts['parameters']
    what_the_devices_exchange(name, facts['exchanged'])
    changed_fields(name, facts['changed'])


@pytest.mark.parametrize('name', slow_but('simple', MODELS))
def test_a_mesh_with_explicit_axes(name: str, folders: dict[str, pathlib.Path]) -> None:
    """jax.make_mesh's default: the same numbers as on one device, lying where the images and the parameters do."""
    facts = result(start('explicit', str(folders[name])))
    assert len(facts) == 3
    for way, found in facts.items():
        assert found['axes'] == ['Explicit', 'Explicit']
        assert found['logits'] <= 1e-12, way  # as above
        assert found['gradients'] <= 1e-11, way
        assert found['split'] == ['data', None], way
        assert max(found['in the mesh']) <= 1e-12, way
        assert found['features'] <= 1e-11, way  # of attention maps too, whose entries are small beside their softmax
        assert found['features split'] == ['data'], way
        assert found['gradients lie as parameters'], way


def every_large_parameter_is_split(name: str, facts: Any) -> None:
    assert facts['same bits']
    for path, lies in facts['parameters'].items():
        (piece,) = lies['piece']
        assert lies['devices'] == 8
        assert math.prod(piece) * lies['pieces'] == math.prod(lies['shape']), path
        if path.endswith('/kernel'):
            assert lies['pieces'] == 4, path
    assert facts['read'] == sum(8 * math.prod(lies['shape']) for lies in facts['parameters'].values())  # nothing twice
    pieces = {path.split('/', 1)[1]: lies['piece'][0] for path, lies in facts['parameters'].items()}
    out, second = ('to_out', 'net_3') if name == 'simple' else ('to_out_0', 'net_4')
    expected = {
        'to_patch_embedding_2/kernel': [12, 32],
        'transformer/layers_0_0/to_qkv/kernel': [32, 24],
        f'transformer/layers_0_0/{out}/kernel': [8, 32],
        'transformer/layers_0_1/net_1/kernel': [32, 16],
        'transformer/layers_0_1/net_1/bias': [16],
        f'transformer/layers_0_1/{second}/kernel': [16, 32],
        f'{HEADS[name]}/kernel': [32, 3],
    }
    assert {path: pieces[path] for path in expected} == expected
    split = sum(math.prod(piece) for piece in pieces.values())
    assert split < 0.35 * sum(math.prod(lies['shape']) for lies in facts['parameters'].values())


def what_the_devices_exchange(name: str, exchanged: Any) -> None:
    """As sharding.py says, or less: a block gathers to_qkv's activations and takes two sums, DeepViT more."""
    assert len(exchanged['all-gather']) <= (1 if name == 'simple' else 2)
    tokens = 16 if name == 'simple' else 17
    activations = [shape for shape in exchanged['all-reduce'] if shape == f'4,{tokens},32']
    assert 1 <= len(activations) <= 3  # the third is the patch projection's
    assert not exchanged['all-to-all']
    # DeepViT's variance is a sum over heads, which lie on different devices: one head's map at a time
    assert set(exchanged['collective-permute']) <= (set() if name == 'simple' else {'4,1,17,17'})


def changed_fields(name: str, changed: Any) -> None:
    assert changed['same bits']
    assert changed['parameters'][f'params/{HEADS[name]}/kernel']['piece'] == [[32, 2]]
    if name == 'deep':
        assert changed['parameters']['params/pos_embedding']['shape'] == [1, 37, 32]


def test_two_processes_read_only_their_slices(folders: dict[str, pathlib.Path], threefry: None) -> None:
    folder = folders['deep']
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3))
    np.save(folder.parent / 'images.npy', images)
    config = json.loads((folder / 'config.json').read_text())
    wrong = config | {'weights': [file | {'sha256': '0' * 64} for file in config['weights']]}
    with jax.enable_x64(True):
        model, variables = from_pretrained(folder)
        expected = np.asarray(jax.jit(model.apply)(variables, images))
    port = free_port()
    (folder / 'config.json').write_text(json.dumps(wrong))  # the files are not read whole, so nobody minds
    try:
        processes = [start('process', str(number), port, str(folder)) for number in range(2)]
        both = [result(process) for process in processes]
    finally:
        (folder / 'config.json').write_text(json.dumps(config))

    whole = {'/'.join(path): 8 * math.prod(shape.shape) for path, shape in variable_shapes(model).items()}
    for facts in both:
        assert facts['devices'] == [4, 2]
        assert 'is damaged' in facts['checked']  # unless they are asked to
        assert np.abs(np.array(facts['logits']) - expected).max() <= 1e-12 * np.abs(expected).max()
        assert 'lie on several hosts (params/' in facts['split']
        assert 'docs/devices.md' in facts['split']
        kernels = [path for path in whole if path.endswith('/kernel')]
        assert {path: facts['read'][path] for path in kernels} == {path: whole[path] // 2 for path in kernels}
        assert facts['read'].keys() == whole.keys()  # nothing else, such as golden arrays
    assert not pathlib.Path(f'{folder}-split').exists()
    with jax.enable_x64(True):
        assert_equal(from_pretrained(f'{folder}-again')[1], variables)
        with pytest.warns(PretrainedWarning):
            _, fitted = from_pretrained(folder, **OTHER_FIELDS)
        assert_equal(from_pretrained(f'{folder}-fitted')[1], fitted)  # a new head, resized positions


def free_port() -> str:
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return str(free.getsockname()[1])


def test_the_page_on_two_processes(tmp_path: pathlib.Path) -> None:
    """The blocks of docs/devices.md under "Several hosts", the pod's as well, in turn in each of two processes."""
    texts = [text for _, text in blocks(ROOT / 'docs' / 'devices.md', 'python')]
    (first,) = (number for number, text in enumerate(texts) if 'sys.argv' in text)
    here = {  # two processes of two devices, instead of a pod whose hosts have four
        "'127.0.0.1:1234'": f"'127.0.0.1:{free_port()}'",
        'jax.distributed.initialize()\n': '',
        '// 4, 4)': '// 2, 2)',
        "'owner/vit'": "'tuned-vit'",
        'images_of_this_process': "__import__('numpy').ones((2, 32, 32, 3), 'float32')",
    }
    script = '\n'.join(texts[first:])
    for words, others in here.items():
        assert script.count(words) == 1
        script = script.replace(words, others)
    script += 'assert logits.shape == (4, 10), logits.shape'
    model = DeepViT(image_size=32, patch_size=8, num_classes=10, dim=16, depth=1, heads=4, mlp_dim=32)
    save_pretrained(tmp_path / 'spread-vit', model, variables_of(model))
    run_twice(script, tmp_path)


def run_twice(script: str, folder: pathlib.Path) -> None:
    """In two processes at once, which it tells apart by its argument."""
    complaints = [folder / f'{number}.txt' for number in '01']
    processes = []
    for complaint in complaints:
        with complaint.open('w') as file:
            processes.append(subprocess.Popen([sys.executable, '-c', script, complaint.stem], cwd=folder, stderr=file))
    try:
        for process in processes:
            process.wait(timeout=1800)
    finally:
        for process in processes:
            process.kill()  # one that waits for another that has died
        ended = [process.wait() for process in processes]
        assert ended == [0, 0], '\n'.join(file.read_text() for file in complaints)


JOINED = """
import sys
import jax
jax.config.update('jax_num_cpu_devices', 2)
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
jax.distributed.initialize('127.0.0.1:PORT', num_processes=2, process_id=int(sys.argv[1]))
"""


def test_the_way_to_a_pod_on_two_processes(tmp_path: pathlib.Path) -> None:
    """docs/tpu.md from the loading on; what stands before it is done beforehand."""
    texts = [text for _, text in blocks(ROOT / 'docs' / 'tpu.md', 'python')]
    imports, *others = texts[0].partition('\nwith')[0], *(text for text in texts[1:] if 'verify' not in text)
    model = DeepViT(
        image_size=8, patch_size=4, num_classes=10, dim=16, depth=1, heads=4, mlp_dim=32, channels=1, dropout=0.1
    )
    save_pretrained(tmp_path / 'digits-on-tpu', model, variables_of(model))
    run_twice('\n'.join([JOINED.replace('PORT', free_port()), imports, *others]), tmp_path)


@pytest.fixture
def one() -> Mesh:
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ('data', 'model'))


def test_rules(one: Mesh) -> None:
    tree = {
        'transformer': {'layers_0': {'to_qkv': {'kernel': jax.ShapeDtypeStruct((6, 16, 48), np.float32)}}},
        'mu': [{'net_1': {'bias': np.zeros(4)}}, np.zeros(())],
        'v_row': {'net_1': {'kernel': np.zeros(4)}},
    }
    spec = functools.partial(jax.tree.map, lambda sharding: sharding.spec)
    found = spec(shardings(tree, one))
    assert found['transformer']['layers_0']['to_qkv']['kernel'] == P(None, None, 'model')  # blocks in a stack
    assert found['mu'] == [{'net_1': {'bias': P('model')}}, P()]  # of an optimizer
    assert found['v_row']['net_1']['kernel'] == P()  # of another one, which keeps sums of rows
    rules: Any = [('net_1', P(('data', 'model'))), (re.compile('kernel'), P('data'))]
    assert spec(shardings(tree, one, rules))['mu'][0]['net_1']['bias'] == P(('data', 'model'))
    assert spec(shardings(tree, one, ()))['mu'][0]['net_1']['bias'] == P(None)


def test_a_training_state_with_a_number_in_it(one: Mesh, float64: None) -> None:
    """flax's TrainState counts its steps in an int; and a rule may leave an axis to the compiler."""
    model, variables = MODELS['deep'], variables_of(MODELS['deep'])
    state = TrainState.create(apply_fn=model.apply, params=variables['params'], tx=optax.adam(1e-3))
    found = shardings(state, one)
    assert found.step.spec == P()
    assert found.params['transformer']['layers_0_1']['net_1']['kernel'].spec == P(None, 'model')
    assert found.opt_state[0].mu['transformer']['layers_0_1']['net_1']['kernel'].spec == P(None, 'model')
    open_axis = shardings(variables, one, [('net_1/kernel$', P(P.UNCONSTRAINED, 'model'))])
    spec = open_axis['params']['transformer']['layers_0_1']['net_1']['kernel'].spec
    assert spec == P(P.UNCONSTRAINED, 'model')


def test_a_mesh_that_does_not_fit(one: Mesh, folders: dict[str, pathlib.Path]) -> None:
    named = Mesh(one.devices, ('x', 'y'))
    with pytest.raises(ValueError, match=r"split over \['model'\]; the axes of this mesh are \['x', 'y'\]"):
        from_pretrained(folders['simple'], mesh=named)


@pytest.mark.usefixtures('unchecked')
def test_what_is_no_mesh_and_no_rule(one: Mesh, folders: dict[str, pathlib.Path]) -> None:
    folder, no_mesh = folders['simple'], (2, 4)
    with pytest.raises(ValueError, match=r'mesh must be a jax\.sharding\.Mesh, such as .*, not \(2, 4\)'):
        from_pretrained(folder, mesh=no_mesh)  # type: ignore[arg-type]
    wrong: list[Any] = [[('kernel', 'model')], {'kernel': P('model')}, [P('model')], [('kernel', P('model'), 1)]]
    for rules in wrong:
        with pytest.raises(ValueError, match=r'A rule is a pair of a pattern and a PartitionSpec, .* not '):
            from_pretrained(folder, mesh=one, sharding_rules=rules)
    with pytest.raises(
        ValueError, match=r"The pattern of the rule \('kernel\(', .* is no regular expression: missing \)"
    ):
        from_pretrained(folder, mesh=one, sharding_rules=[('kernel(', P('model'))])
    with pytest.raises(ValueError, match=r'sharding_rules say .*: give mesh, too'):
        from_pretrained(folder, sharding_rules=())


def test_as_many_images_as_blocks() -> None:
    """Scanned blocks have an axis in front of the images, which is not theirs to split."""
    mesh = jax.make_mesh((1,), ('data',))
    model = SimpleViT(image_size=8, patch_size=4, num_classes=3, dim=8, depth=2, heads=2, mlp_dim=8, scan_layers=True)
    images = jax.device_put(np.ones((2, 8, 8, 3), np.float32), NamedSharding(mesh, P('data')))
    seen = features(model, variables_of(model), images, attention=True)
    for array in jax.tree.leaves((seen.tokens, seen.attention)):
        assert array.sharding.spec[0] == 'data'


def test_the_state_of_an_nnx_module(one: Mesh) -> None:
    model = MODELS['deep'].clone(param_dtype=np.dtype('float32'))
    variables = variables_of(model)
    module = to_nnx(model, variables)
    state = nnx.state(module, nnx.Param)
    found = shardings(state, one)
    assert_equal_specs(nnx.to_pure_dict(found), shardings(variables, one)['params'])
    nnx.update(module, jax.device_put(state, found))
    assert_equal(from_nnx(module), variables)
    kernel = from_nnx(module)['params']['transformer']['layers_0_0']['to_qkv']['kernel']
    assert kernel.sharding.spec == P(None, 'model')


def assert_equal_specs(one: Any, other: Any) -> None:
    assert jax.tree.map(lambda sharding: sharding.spec, one) == jax.tree.map(lambda sharding: sharding.spec, other)


def test_a_training_state_moves_between_one_device_and_eight(tmp_path: pathlib.Path, threefry: None) -> None:
    model = MODELS['deep'].clone(param_dtype=np.dtype('float32'))
    save_pretrained(tmp_path / 'vit', model, variables_of(model))
    state = jax.jit(training_state, static_argnums=0)(model)
    with orbax.training.Checkpointer(tmp_path / 'states') as checkpointer:
        checkpointer.save_async(1, state)
    facts = result(start('restore', str(tmp_path / 'states'), str(tmp_path / 'vit')))
    for tree in ('parameters', 'moments'):
        assert facts[tree]['params/transformer/layers_0_0/to_qkv/kernel']['piece'] == [[32, 24]]
        assert facts[tree]['params/transformer/layers_0_1/net_1/bias']['pieces'] == 4

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), state)
    with orbax.training.Checkpointer(tmp_path / 'states') as checkpointer:
        assert checkpointer.latest.step == 2
        back = checkpointer.load(abstract_state=shapes)
    assert jax.random.key_data(back.pop('key')).tolist() == jax.random.key_data(state.pop('key')).tolist()
    assert_equal(back, state)
