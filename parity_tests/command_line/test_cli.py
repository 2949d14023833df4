"""`flax-vit` as a user calls it: what it prints, what it writes, how it ends."""

import io
import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from vit_pytorch import deepvit, simple_vit

import convert.command_line.commands
import convert.command_line.demo
from convert.command_line.cli import cli
from convert.conversion import place
from convert.files import remote
from flax_vit import DeepViT, SimpleViT, from_pretrained, save_pretrained
from parity_tests.command_line.conftest import DIGITS, Run
from parity_tests.support.pages import ROOT
from parity_tests.support.reference import perturbed

FIELDS = ['--image-size', '8', '--patch-size', '4', '--heads', '3']


def test_help_teaches(flax_vit: Run) -> None:
    status, printed, _ = flax_vit('--help')
    assert status == 0
    for word in ('inspect', 'convert', 'verify', 'export', 'demo', 'Exit status', '--debug'):
        assert word in printed
    for command in ('inspect', 'convert', 'verify', 'export', 'demo'):
        assert flax_vit(command, '--help')[0] == 0


def test_inspect_says_what_it_is_and_the_whole_plan(flax_vit: Run) -> None:
    status, printed, _ = flax_vit('inspect', 'simple_vit.pt')
    assert status == 0
    for words in (
        'SimpleViT of vit-pytorch 1.4.1 and later',
        'torch zip archive',
        'model_state_dict',
        'float32',
        'left aside: optimizer_state_dict',
        'transformer.layers.3.1.net.1.weight',
        'transformer/layers_3_1/net_1/kernel',
        'transpose (1, 0)',
        'as it is',
        'unknown',
    ):
        assert words in printed, words


@pytest.mark.parametrize('given', [[], ['--heads', '3'], FIELDS, ['--image-size', '8x8', '--key', 'model_state_dict']])
def test_inspect_ends_with_the_command_that_converts(flax_vit: Run, given: list[str]) -> None:
    """As it is printed, once what is in capitals is filled in."""
    _, printed, _ = flax_vit('inspect', 'simple_vit.pt', *given)
    program, *words = shlex.split(printed.rstrip().rpartition('\n')[2].removeprefix('convert it:'))
    assert program == 'flax-vit'
    wanted = {'IMAGE_SIZE': '8', 'HEADS': '3', 'CHANNELS': '1'}
    assert {word for word in words if word.isupper()} == {
        name
        for name in wanted
        if f'--{name.lower().replace("_", "-")}' not in given and not (name == 'CHANNELS' and '--patch-size' in given)
    }
    status, _, problem = flax_vit(*(wanted.get(word, word) for word in words))
    assert status == 0, problem
    assert from_pretrained('simple_vit-flax')[0] == from_pretrained_with(flax_vit, FIELDS)


def test_what_only_training_tells_of_the_papers_deep_vit_has_options(flax_vit: Run) -> None:
    published = ('--key', 'state_dict_ema', str(ROOT / 'parity_tests/golden/official/dvit-patch.pth.tar'))
    _, printed, _ = flax_vit('inspect', *published)
    _, *words = shlex.split(printed.rstrip().rpartition('\n')[2].removeprefix('convert it:'))
    told = {'IMAGE_SIZE': '12x20', 'TRANSFORM_SCALE': 'true', 'SCALE_ADJUSTMENT': '0.5'}
    assert {word for word in words if word.isupper()} == told.keys()
    status, _, problem = flax_vit(*(told.get(word, word) for word in words))
    assert status == 0, problem
    model: Any = from_pretrained('dvit-patch-flax')[0]
    assert (model.transform_scale, model.scale_adjustment) == (True, 0.5)


@pytest.mark.parametrize('source', ['my notes', ['a'], {'verified': 'by hand'}, {'fields': 'x'}, 3, None], ids=str)
def test_a_folder_with_notes_of_any_kind(flax_vit: Run, source: Any) -> None:
    model = SimpleViT(image_size=8, patch_size=4, num_classes=3, dim=8, depth=1, heads=1, mlp_dim=4)
    variables = jax.jit(model.init)(jax.random.key(0), np.ones((1, 8, 8, 3), np.float32))
    save_pretrained('out', model, variables, source=source)
    status, printed, problem = flax_vit('inspect', 'out')
    assert status == 0, problem
    assert source is None or 'source: ' in printed
    status, _, problem = flax_vit('verify', 'out')
    assert (status, 'convert with --verify' in problem) == (2, True)
    status, _, problem = flax_vit('verify', 'simple_vit.pt', 'out')
    assert (status, 'Unexpected' in problem) == (2, False)


def from_pretrained_with(flax_vit: Run, fields: list[str]) -> Any:
    assert flax_vit('convert', 'simple_vit.pt', 'expected', *fields)[0] == 0
    return from_pretrained('expected')[0]


def test_inspect_for_machines(flax_vit: Run) -> None:
    status, printed, said = flax_vit('inspect', 'simple_vit.pt', '--json', '--heads', '3')
    facts = json.loads(printed)
    assert (status, said) == (0, '')
    assert facts['model'] == 'SimpleViT'
    assert facts['layout']['id'] == 'S3'
    assert facts['key'] == 'model_state_dict'
    assert facts['fields']['heads'] == {'value': 3, 'known by': 'given', 'because': ''}
    assert facts['fields']['image_size']['value'] is None
    assert facts['fields']['image_size']['known by'] == 'unknown'
    assert facts['fields']['param_dtype']['value'] == 'float32'
    assert facts['convert'] == (
        'flax-vit convert --heads 3 --image-size IMAGE_SIZE --channels CHANNELS simple_vit.pt simple_vit-flax'
    )
    assert {'name': 'linear_head.bias', 'shape': [10], 'dtype': 'float32', 'parameter': 'linear_head/bias'}.items() <= (
        facts['tensors'][-1].items()
    )
    assert 'optimizer_state_dict' in facts['left aside']
    assert sum(np.prod(tensor['shape']) for tensor in facts['tensors']) == facts['parameters']
    flax_vit('convert', 'simple_vit.pt', 'out', *FIELDS)
    assert json.loads(flax_vit('inspect', 'out', '--json')[1])['fields']['heads'] == 3


@pytest.mark.parametrize('ending', ['pt', 'safetensors'])
def test_convert_verify_export_and_back(flax_vit: Run, ending: str) -> None:
    source = f'simple_vit.{ending}'
    status, printed, _ = flax_vit('convert', source, 'out', *FIELDS)
    assert (status, 'Converted to out' in printed, 'verify' in printed) == (0, True, True)
    status, printed, _ = flax_vit('verify', source, 'out', '--count', '2')  # what `convert` was told, it knows
    assert (status, 'RIGHT: the Flax model computes what PyTorch does.' in printed) == (0, True)
    status, printed, _ = flax_vit('verify', source, 'out', '--count', '2', '--dim-head', '16')
    assert (status, 'RIGHT: the Flax model computes what PyTorch does, if image_size=8' in printed) == (0, True)
    for target in ('back.safetensors', 'back.pt'):
        assert flax_vit('export', 'out', target)[0] == 0
    original = load_file('simple_vit.safetensors')
    for written in (load_file('back.safetensors'), torch.load('back.pt')):
        assert set(written) == set(original)
        assert all(torch.equal(written[name], original[name]) for name in original)
    status, printed, _ = flax_vit('inspect', 'out')
    assert status == 0
    assert source in printed
    assert 'scan_layers: inferred' not in printed
    source_facts = json.loads(pathlib.Path('out/config.json').read_text())['source']
    assert source_facts['layout']['id'] == 'S3'
    assert source_facts['fields']['heads'] == 'given'


def test_bfloat16_goes_there_and_back_as_pt(flax_vit: Run) -> None:
    module = deepvit.DeepViT(image_size=8, patch_size=4, num_classes=3, dim=16, depth=1, heads=1, mlp_dim=8).bfloat16()
    torch.save(module.state_dict(), 'weights with spaces.pt')
    assert flax_vit('convert', 'weights with spaces.pt', 'out')[0] == 0
    assert flax_vit('export', 'out', 'back.pt')[0] == 0
    back = torch.load('back.pt')
    assert all(torch.equal(back[name], tensor) for name, tensor in module.state_dict().items())


def test_float64_keeps_its_bits(flax_vit: Run) -> None:
    module = deepvit.DeepViT(image_size=8, patch_size=4, num_classes=3, dim=16, depth=1, heads=1, mlp_dim=8).double()
    torch.save(module.state_dict(), 'wide.pt')
    assert flax_vit('convert', 'wide.pt', 'out')[0] == 0
    assert flax_vit('export', 'out', 'back.safetensors')[0] == 0
    back = load_file('back.safetensors')
    assert all(torch.equal(back[name], tensor) for name, tensor in module.state_dict().items())


def test_verify_tells_wrong_from_right(flax_vit: Run) -> None:
    """The same weights read with other heads: every shape fits, and the function is another."""
    assert flax_vit('convert', 'simple_vit.pt', 'out', '--image-size', '8', '--patch-size', '4', '--heads', '4')[0] == 0
    status, printed, _ = flax_vit('verify', 'simple_vit.pt', 'out', *FIELDS, '--count', '2')
    assert status == 1
    assert 'The first difference is in: block 0 attention' in printed


def test_verify_on_real_images(flax_vit: Run, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / 'images'
    folder.mkdir()
    for number, image in enumerate(convert.command_line.demo.digits()[2][:3]):
        Image.fromarray(((image[..., 0] + 1) * 127.5).astype(np.uint8)).resize((20, 30)).save(folder / f'{number}.png')
    (folder / 'notes.txt').write_text('no image')
    status, printed, _ = flax_vit('verify', 'deep_vit.pt', '--channels', '1', '--images', str(folder))
    assert (status, 'of 3 images' in printed) == (0, True)
    assert flax_vit('verify', 'deep_vit.pt', '--channels', '1', '--images', str(tmp_path))[0] == 2
    assert flax_vit('verify', 'deep_vit.pt', '--channels', '1', '--images', 'nowhere')[0] == 2
    (folder / '0.png').write_bytes((folder / '1.png').read_bytes()[:-60])
    status, _, complaint = flax_vit('verify', 'deep_vit.pt', '--channels', '1', '--images', str(folder))
    assert (status, '0.png is damaged' in complaint) == (2, True)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['inspect', 'missing.pt'], 'missing.pt: No such file'),
        (['inspect', 'notes.txt'], 'Error'),
        (['convert', 'simple_vit.pt', 'out'], 'Give these arguments:\n  image_size'),
        (['convert', 'simple_vit.pt', '.', *FIELDS], 'holds other files'),
        (['convert', 'simple_vit.pt', 'out', '--pool', 'cls'], 'SimpleViT has no pool'),
        (['verify', 'simple_vit.pt', 'nowhere'], 'nowhere'),
        (['export', 'nowhere', 'x.pt'], 'nowhere'),
        (['export', 'out', 'x.txt'], 'should end in .safetensors or .pt'),
        (['export', 'out', 'simple_vit.pt'], 'exists'),
        (['convert', 'simple_vit.pt', 'out', '--image-size', 'big'], 'is not a size'),
        (['convert', 'simple_vit.pt', 'out', '--heads', '0'], '--heads'),
        (['convert', 'deep_vit.pt', 'out', '--channels', '1', '--dropout', '2'], '--dropout'),
        (['convert', 'simple_vit.pt', 'out', *FIELDS, '--param-dtype', 'int8'], 'param_dtype must be float64'),
        (['frobnicate'], 'No such command'),
    ],
)
def test_bad_input_is_one_paragraph_and_status_2(
    flax_vit: Run, arguments: list[str], message: str, tmp_path: pathlib.Path
) -> None:
    (tmp_path / 'notes.txt').write_text('not a checkpoint')
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    status, printed, complaint = flax_vit(*arguments)
    assert status == 2
    assert message in complaint
    assert 'Traceback' not in printed + complaint
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_dropout_is_kept(flax_vit: Run) -> None:
    fields = ['--channels', '1', '--dropout', '0.1', '--emb-dropout', '0.2']
    assert flax_vit('convert', 'deep_vit.pt', 'out', *fields)[0] == 0
    model, _ = from_pretrained('out')
    assert (model.dropout, model.emb_dropout) == (0.1, 0.2)


def test_own_files_and_folders_that_are_not_there(flax_vit: Run) -> None:
    assert flax_vit('convert', 'simple_vit.pt', 'out', *FIELDS)[0] == 0
    assert flax_vit('serve-export', 'out', 'served.npz')[0] == 0
    (weights,) = pathlib.Path('out').glob('model-*')
    for source in (str(weights), 'out', 'served.npz'):
        status, _, complaint = flax_vit('convert', source, 'again', *FIELDS)
        assert status == 2
        assert "is flax_vit's own, converted already: flax_vit.from_pretrained reads" in ' '.join(complaint.split())
    others: dict[str, Any] = {'params/img/Transformer/encoderblock_0/LayerNorm_0/scale': np.ones(3)}
    np.savez('big_vision.npz', **others)
    status, _, complaint = flax_vit('convert', 'big_vision.npz', 'again', *FIELDS)
    assert status == 2
    assert "flax_vit's own" not in complaint
    for command in ('export', 'serve-export'):
        status, _, complaint = flax_vit(command, 'out', 'nowhere/x.safetensors')
        assert (status, 'nowhere is no folder: make it first' in complaint) == (2, True)


def test_debug_shows_the_traceback(flax_vit: Run) -> None:
    status, _, complaint = flax_vit('inspect', 'missing.pt', '--debug')
    assert status == 2
    for words in ('Traceback', 'FileNotFoundError', 'Error: missing.pt: No such file'):
        assert words in complaint


@pytest.mark.parametrize(
    ('error', 'expected', 'words'),
    [
        (KeyError('images'), 3, "Unexpected error: KeyError: 'images'"),
        (EOFError('Ran out of input'), 3, 'Unexpected error: EOFError: Ran out of input'),
        (AssertionError(), 3, 'prints with --debug, and what `flax-vit doctor` prints.'),
        (OSError(28, 'No space left on device', 'out'), 2, 'Error: out: No space left on device\n'),
        (ValueError('[bold] is no field'), 2, 'Error: [bold] is no field\n'),
        (MemoryError(), 2, 'Error: there is not enough memory.\n'),
        (KeyboardInterrupt(), 130, 'Interrupted.\n'),
        (BrokenPipeError(), 141, ''),
    ],
    ids=repr,
)
def test_only_a_wrong_port_ends_with_1(
    flax_vit: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, expected: int, words: str
) -> None:
    def fail(**_: Any) -> None:
        raise error

    monkeypatch.setattr(convert.command_line.commands, 'inspect_checkpoint', fail)
    status, printed, complaint = flax_vit('inspect', 'simple_vit.pt')
    assert (status, printed, words in complaint, complaint == '') == (expected, '', True, words == '')
    assert 'Traceback' not in complaint


def test_without_torch_it_says_what_to_install(flax_vit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert flax_vit('convert', 'simple_vit.pt', 'out', *FIELDS)[0] == 0
    monkeypatch.setitem(sys.modules, 'torch', None)
    status, _, complaint = flax_vit('verify', 'simple_vit.pt', *FIELDS)
    assert (status, "pip install 'flax-vit[torch]'" in complaint) == (2, True)
    status, _, complaint = flax_vit('export', 'out', 'x.pt')
    assert (status, 'pip install torch' in complaint) == (2, True)
    assert not pathlib.Path('x.pt').exists()
    assert flax_vit('export', 'out', 'x.safetensors')[0] == 0


def test_standard_input(flax_vit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    content = pathlib.Path('simple_vit.pt').read_bytes()
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(content)))
    remote._standard_input.cache_clear()
    status, printed, _ = flax_vit('inspect', '-', '--json')
    facts = json.loads(printed)
    assert (status, facts['model'], facts['source']) == (0, 'SimpleViT', '-')
    assert facts['convert'].endswith(' -- - vit-flax')
    assert flax_vit('convert', *FIELDS, '--', '-', 'vit-flax')[0] == 0
    assert from_pretrained('vit-flax')[0] == from_pretrained_with(flax_vit, FIELDS)
    remote._standard_input.cache_clear()


def test_the_demo_proves_every_model(flax_vit: Run) -> None:
    status, printed, _ = flax_vit('demo')
    assert status == 0
    assert printed.count('RIGHT: the Flax model computes what PyTorch does') == 3
    assert printed.count('same prediction in float32: 100.00% of 360 images') == 3
    assert 'flax-vit inspect CHECKPOINT' in printed


@pytest.mark.slow
def test_the_demo_fails_when_the_port_is_wrong(flax_vit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def misplace(*arguments: Any) -> dict[str, Any]:
        variables = place(*arguments)
        variables['params']['to_patch_embedding_1']['bias'] += 1e-5
        return variables

    monkeypatch.setattr(convert.command_line.demo, 'place', misplace)
    status, printed, _ = flax_vit('demo')
    assert (status, printed.count('WRONG: the Flax model does not compute what PyTorch does.')) == (1, 3)


def test_the_shipped_digits_models_are_95_percent_right() -> None:
    for name in convert.command_line.demo.FIELDS:
        accuracy = torch.load(DIGITS / f'{name}.pt')['accuracy']
        assert accuracy >= 0.95
        assert (DIGITS / f'{name}.pt').stat().st_size < 2**20


def test_it_is_also_a_module(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, '-m', 'convert', 'convert', str(DIGITS / 'deep_vit.pt'), 'out', '--channels', '1']
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert isinstance(from_pretrained(tmp_path / 'out')[0], DeepViT)


def test_a_certified_folder_proves_itself(flax_vit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    status, printed, _ = flax_vit('convert', 'simple_vit.pt', 'out', *FIELDS, '--verify')
    assert (status, 'prove it: flax-vit verify out\n' in printed) == (0, True)
    card = pathlib.Path('out', 'README.md').read_text()
    assert '`simple_vit.pt`' in card
    assert 'Z: the Flax model computes what PyTorch does.' in card.replace('+00:00', 'Z')
    monkeypatch.setitem(sys.modules, 'vit_pytorch', None)
    status, printed, _ = flax_vit('verify', 'out', '--json', 'figures.json')
    assert (status, 'RIGHT' in printed) == (0, True)
    assert 'Then it was said: the Flax model computes what PyTorch does.' in printed  # with all that it may stand on
    figures = json.loads(pathlib.Path('figures.json').read_text())
    assert (figures['right'], figures['command'], 'label' in figures) == (
        True,
        'flax-vit verify out --json figures.json',
        True,
    )
    status, printed, _ = flax_vit('inspect', 'out')
    assert 'the Flax model computes what PyTorch does' in printed
    assert flax_vit('convert', 'simple_vit.pt', 'plain', *FIELDS)[0] == 0
    status, _, complaint = flax_vit('verify', 'plain')
    assert (status, 'convert with --verify' in complaint) == (2, True)


def test_what_is_wrong_gets_no_certificate(flax_vit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    verify = convert.verify

    def with_other_heads(*source: Any, converted: Any, **options: Any) -> Any:
        model, variables = converted
        return verify(*source, converted=(model.clone(heads=4, dim_head=12), variables), **options)

    monkeypatch.setattr(sys.modules['convert.proof.parity'], 'verify', with_other_heads)
    status, printed, _ = flax_vit('convert', 'simple_vit.pt', 'out', *FIELDS, '--verify')
    assert (status, 'WRONG' in printed) == (1, True)
    assert not pathlib.Path('out').exists()


FEATURES = ['deep.pt', 'out', '--num-classes', '0']


@pytest.mark.parametrize(
    'arguments',
    [
        ['deep.pt', 'out'],
        ['deep.pt', 'out', '--pool', 'mean', '--dropout', '0.1', '--verify'],
        FEATURES,
        [*FEATURES, '--verify'],
        ['two.pt', 'a folder', '--key', 'model_ema'],
        ['simple.pt', '[bold] and :smile:', '--image-size', '8x12', '--patch-size', '4', '--channels', '3'],
        ['--heads', '3', '--', '-deep.pt', '-out'],
    ],
    ids=' '.join,
)
def test_what_is_printed_works_when_it_is_copied(flax_vit: Run, arguments: list[str]) -> None:
    torch.manual_seed(0)
    fields = {'patch_size': 4, 'num_classes': 3, 'dim': 16, 'depth': 1, 'heads': 3, 'mlp_dim': 8}
    modules = [deepvit.DeepViT(image_size=8, **fields) for _ in range(2)]
    torch.save(modules[0].state_dict(), 'deep.pt')
    shutil.copy('deep.pt', './-deep.pt')
    torch.save({'model': modules[0].state_dict(), 'model_ema': modules[1].state_dict()}, 'two.pt')
    torch.save(simple_vit.SimpleViT(image_size=(8, 12), **fields).state_dict(), 'simple.pt')
    status, printed, complaint = flax_vit('convert', *arguments)
    assert status == 0, complaint
    (use,) = re.findall('^use it: (.*)$', printed, re.MULTILINE)
    (proof,) = re.findall('^prove it: (.*)$', printed, re.MULTILINE)
    exec(use.strip(), {'flax_vit': sys.modules['flax_vit']})
    program, *words = shlex.split(proof)
    status, printed, complaint = flax_vit(*words)
    assert (program, status, 'RIGHT' in printed) == ('flax-vit', 0, True), complaint


def test_every_option_of_verify_has_its_use() -> None:
    options = {parameter.name for parameter in cli.commands['verify'].params if parameter.expose_value}
    taken = frozenset.union(*(way.takes for way in convert.command_line.commands.WAYS.values()))
    assert options == {'source', *taken}


@pytest.mark.parametrize(
    ('arguments', 'useless'),
    [
        (['inspect', 'out', '--heads', '9'], '--heads'),
        (['inspect', 'out', '--key', 'model', '--image-size', '8x8'], '--key, --image-size'),
        (['verify', 'out', 'other'], 'OUT'),
        (['verify', 'out', '--heads', '1', '--count', '8'], '--heads, --count'),
        (['verify', 'out', '--gradients', '--report', 'r.html', '--json', 'r.json'], '--gradients, --report'),
        (['verify', 'out', '--reference', 'outputs.npz', '--pool', 'mean'], '--pool'),
        (['verify', 'deep_vit.pt', 'out', '--reference', 'outputs.npz'], 'OUT'),
        (
            ['verify', 'deep_vit.pt', '--reference', 'outputs.npz', '--dtype', 'float32', '--seed', '0'],
            '--seed, --dtype',
        ),
        (['verify', 'deep_vit.pt', '--images', '.', '--seed', '1'], '--seed'),
    ],
    ids=lambda value: ' '.join(value) if isinstance(value, list) else '',
)
def test_what_would_change_nothing_is_refused(flax_vit: Run, arguments: list[str], useless: str) -> None:
    assert flax_vit('convert', 'deep_vit.pt', 'out', '--channels', '1')[0] == 0
    before = {path: path.stat().st_mtime_ns for path in pathlib.Path().rglob('*')}
    status, printed, complaint = flax_vit(*arguments)
    assert (status, printed, complaint.count('\n')) == (2, '', 1), complaint
    named = re.findall(r'--(?!reference)[a-z-]+|OUT', complaint)
    assert useless.split(', ') == [name for name in named if name != '--images'], complaint
    assert {path: path.stat().st_mtime_ns for path in pathlib.Path().rglob('*')} == before


def test_files_that_are_no_outputs(flax_vit: Run) -> None:
    """Of a reference, and those that a folder of somebody else keeps."""
    np.save('one.npy', np.zeros((2, 10), np.float32))
    np.savez('whole.npz', images=np.zeros((2, 8, 8, 1), np.float32), logits=np.zeros((2, 10), np.float32))
    pathlib.Path('cut.npz').write_bytes(pathlib.Path('whole.npz').read_bytes()[:-200])
    np.savez('numbers.npz', images=np.float32(1), logits=np.float32(1))
    np.savez('other.npz', pictures=np.zeros(3))
    for name, words in (
        ('one.npy', 'a single numpy array'),
        ('cut.npz', "'cut.npz': "),
        ('numbers.npz', 'images must be an array'),
        ('other.npz', 'other.npz holds pictures; images and logits are needed'),
    ):
        status, _, complaint = flax_vit('verify', 'simple_vit.pt', *FIELDS, '--reference', name)
        assert (status, words in complaint) == (2, True), complaint
    model, variables = convert.from_torch('simple_vit.safetensors', image_size=8, patch_size=4, heads=3, channels=1)
    kept: list[dict[str, np.ndarray]] = [
        {'batch': np.zeros(3)},
        {'images': np.zeros((2, 8, 8, 1)), 'float64': np.zeros((3, 10)), 'float32': np.zeros((3, 10))},
    ]
    for golden in kept:
        save_pretrained('out', model, variables, golden=golden)
        status, _, complaint = flax_vit('verify', 'out')
        assert (status, 'and not what convert --verify does: images, float64, float32' in complaint) == (2, True)


@pytest.mark.slow
def test_saved_outputs_catch_wrong_heads(flax_vit: Run) -> None:
    images = convert.command_line.demo.digits()[2][:40].transpose(0, 3, 1, 2)
    module = simple_vit.SimpleViT(
        image_size=8, patch_size=4, channels=1, num_classes=10, dim=48, depth=4, heads=3, dim_head=16, mlp_dim=96
    )
    module.load_state_dict(load_file('simple_vit.safetensors'))
    with torch.no_grad():
        np.savez('outputs.npz', images=images, logits=module(torch.from_numpy(images)).numpy())
    assert flax_vit('verify', 'simple_vit.pt', *FIELDS, '--reference', 'outputs.npz')[0] == 0
    wrong = ['--image-size', '8', '--patch-size', '4', '--heads', '4']
    to_json = ['--reference', 'outputs.npz', '--json', 'figures.json']
    status, printed, _ = flax_vit('verify', 'simple_vit.pt', *wrong, *to_json)
    assert (status, 'matches if heads=3 instead of 4' in printed) == (1, True)
    figures = json.loads(pathlib.Path('figures.json').read_text())
    assert (figures['right'], figures['causes']) == (False, ['matches if heads=3 instead of 4'])
    assert flax_vit('convert', 'simple_vit.pt', 'out', *wrong)[0] == 0
    assert flax_vit('verify', 'out', '--reference', 'outputs.npz')[0] == 1


def test_a_transformer_alone(flax_vit: Run, tmp_path: pathlib.Path) -> None:
    """Out of a model of one's own: told, converted with its proof, proven again, drawn, and written back."""
    alone = perturbed(simple_vit.Transformer(dim=12, depth=2, heads=2, dim_head=5, mlp_dim=16))
    model = torch.nn.ModuleDict({'encoder': alone, 'head': torch.nn.Linear(12, 3)})
    torch.save(model.state_dict(), tmp_path / 'own.pt')
    code, _, error = flax_vit('inspect', 'own.pt')
    assert code == 2
    assert "part='transformer' converts it alone" in error
    part = ('--part', 'transformer', '--heads', '2')
    code, out, _ = flax_vit('convert', 'own.pt', 'folder', *part, '--verify')
    assert code == 0
    assert 'Transformer of the SimpleViT of vit-pytorch 1.4.1 and later' in out
    assert 'same prediction' not in out
    assert flax_vit('verify', 'folder')[0] == 0
    assert flax_vit('verify', 'own.pt', 'folder', *part, '--report', 'page.html')[0] == 0
    assert 'block 1 attention' in (tmp_path / 'page.html').read_text()
    code, _, error = flax_vit('serve-export', 'folder', 'program.npz')
    assert (code, 'takes no images' in error) == (2, True)
    assert flax_vit('export', 'folder', 'back.pt')[0] == 0
    back = torch.load(tmp_path / 'back.pt', weights_only=True)
    alone.load_state_dict(back.get('state_dict', back))
