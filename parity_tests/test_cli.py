"""`flax-vit` as a user calls it: what it prints, what it writes, how it ends."""

import json
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from vit_pytorch import deepvit, simple_vit

import convert.demo
from convert.cli import main
from flax_vit import DeepViT, from_pretrained

DIGITS = pathlib.Path(__file__).parents[1] / 'examples' / 'digits'
FIELDS = ['--image-size', '8', '--patch-size', '4', '--heads', '3']

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def flax_vit(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in an empty folder that holds the digits checkpoints: status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    for path in DIGITS.glob('*.[ps][ta]*'):
        shutil.copy(path, tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, 'argv', ['flax-vit', *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        status = ended.value.code
        assert isinstance(status, int)
        return status, *capsys.readouterr()

    return run


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


@pytest.mark.parametrize('ending', ['pt', 'safetensors'])
def test_convert_verify_export_and_back(flax_vit: Run, ending: str) -> None:
    source = f'simple_vit.{ending}'
    status, printed, _ = flax_vit('convert', source, 'out', *FIELDS)
    assert (status, 'Converted to out' in printed, 'verify' in printed) == (0, True, True)
    assert flax_vit('verify', source, 'out', '--count', '2')[0] == 0
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
    assert 'WRONG: the two part first at: block 0 attention' in printed


def test_verify_on_real_images(flax_vit: Run, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / 'images'
    folder.mkdir()
    for number, image in enumerate(convert.demo.digits()[2][:3]):
        Image.fromarray(((image[..., 0] + 1) * 127.5).astype(np.uint8)).resize((20, 30)).save(folder / f'{number}.png')
    (folder / 'notes.txt').write_text('no image')
    status, printed, _ = flax_vit('verify', 'deep_vit.pt', '--channels', '1', '--images', str(folder))
    assert (status, 'of 3 images' in printed) == (0, True)
    assert flax_vit('verify', 'deep_vit.pt', '--channels', '1', '--images', str(tmp_path))[0] == 2
    assert flax_vit('verify', 'deep_vit.pt', '--channels', '1', '--images', 'nowhere')[0] == 2


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
        (['convert', 'simple_vit.pt', 'out', '--image-size', 'big'], 'is no size'),
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


def test_debug_shows_the_traceback(flax_vit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, 'argv', ['flax-vit', 'inspect', 'missing.pt', '--debug'])
    with pytest.raises(FileNotFoundError):
        main()


def test_without_torch_it_says_what_to_install(flax_vit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert flax_vit('convert', 'simple_vit.pt', 'out', *FIELDS)[0] == 0
    monkeypatch.setitem(sys.modules, 'torch', None)
    status, _, complaint = flax_vit('verify', 'simple_vit.pt', *FIELDS)
    assert (status, "pip install 'flax-vit[torch]'" in complaint) == (2, True)
    status, _, complaint = flax_vit('export', 'out', 'x.pt')
    assert (status, 'pip install torch' in complaint) == (2, True)
    assert not pathlib.Path('x.pt').exists()
    assert flax_vit('export', 'out', 'x.safetensors')[0] == 0


def test_the_demo_proves_both_models(flax_vit: Run) -> None:
    status, printed, _ = flax_vit('demo')
    assert status == 0
    assert printed.count('RIGHT: the Flax model computes what PyTorch does') == 2
    assert printed.count('same prediction in float32: 100.00% of 360 images') == 2
    assert 'flax-vit inspect CHECKPOINT' in printed


def test_the_demo_fails_when_the_port_is_wrong(flax_vit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules['convert.parity'], 'OUTPUT_LIMIT', 0.0)
    assert flax_vit('demo')[0] == 1


def test_the_shipped_digits_models_are_95_percent_right() -> None:
    for name in convert.demo.FIELDS:
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
    status, printed, _ = flax_vit('verify', 'out')
    assert (status, 'RIGHT' in printed) == (0, True)
    status, printed, _ = flax_vit('inspect', 'out')
    assert 'the Flax model computes what PyTorch does' in printed
    assert flax_vit('convert', 'simple_vit.pt', 'plain', *FIELDS)[0] == 0
    status, _, complaint = flax_vit('verify', 'plain')
    assert (status, 'convert with --verify' in complaint) == (2, True)


def test_what_is_wrong_gets_no_certificate(flax_vit: Run) -> None:
    status, printed, _ = flax_vit('convert', 'simple_vit.pt', 'out', *FIELDS, '--verify', '--param-dtype', 'bfloat16')
    assert (status, 'rounded to bfloat16' in ' '.join(printed.split())) == (1, True)
    assert not pathlib.Path('out').exists()


def test_saved_outputs_catch_wrong_heads(flax_vit: Run) -> None:
    images = convert.demo.digits()[2][:40].transpose(0, 3, 1, 2)
    module = simple_vit.SimpleViT(
        image_size=8, patch_size=4, channels=1, num_classes=10, dim=48, depth=4, heads=3, dim_head=16, mlp_dim=96
    )
    module.load_state_dict(load_file('simple_vit.safetensors'))
    with torch.no_grad():
        np.savez('outputs.npz', images=images, logits=module(torch.from_numpy(images)).numpy())
    assert flax_vit('verify', 'simple_vit.pt', *FIELDS, '--reference', 'outputs.npz')[0] == 0
    wrong = ['--image-size', '8', '--patch-size', '4', '--heads', '4']
    status, printed, _ = flax_vit('verify', 'simple_vit.pt', *wrong, '--reference', 'outputs.npz')
    assert (status, 'matches if heads=3 instead of 4' in printed) == (1, True)
    assert flax_vit('convert', 'simple_vit.pt', 'out', *wrong)[0] == 0
    assert flax_vit('verify', 'out', '--reference', 'outputs.npz')[0] == 1
