"""The fine-tuning example: what it reads, that it learns, and that a killed run goes on as if nothing had happened."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
import rich_click as click
from rich.progress import Progress

from flax_vit import SimpleViT

EXAMPLE = pathlib.Path(__file__).parents[2] / 'examples' / 'finetune'
QUICK = '--xla_backend_optimization_level=0'
SETTINGS = ['--steps', '30', '--every', '10', '--batch', '32', '--image-size', '12']

# Killed in the middle of writing its second checkpoint, when the first is whole.
KILLED = """
import os, signal
import orbax.checkpoint as ocp
save = ocp.CheckpointManager.save
def save_and_die(self, step, **arguments):
    self.wait_until_finished()
    save(self, step, **arguments)
    if step == 20:
        os.kill(os.getpid(), signal.SIGKILL)
ocp.CheckpointManager.save = save_and_die
"""
RUN = """
import sys
import finetune
finetune.main(sys.argv[1:], standalone_mode=False)
assert 'torch' not in sys.modules
"""


@pytest.fixture(scope='module')
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment for the example's runs: little time goes into compiling, and none for what one has compiled."""
    folder = tmp_path_factory.mktemp('cache')
    path = os.pathsep.join([str(EXAMPLE), *os.environ.get('PYTHONPATH', '').split(os.pathsep)])
    return os.environ | {'PYTHONPATH': path, 'JAX_COMPILATION_CACHE_DIR': str(folder), 'XLA_FLAGS': QUICK}


def run(out: pathlib.Path, environment: dict[str, str], *, before: str = '') -> int:
    """The exit status of the example, run in a process of its own; torch must not be imported in it."""
    command = [sys.executable, '-c', before + RUN, str(out), *SETTINGS]
    with (out / 'printed').open('w') as printed:
        return subprocess.run(command, env=environment, check=False, stdout=printed).returncode


@pytest.fixture(scope='module')
def straight(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> pathlib.Path:
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp('straight')
    assert run(out, environment) == 0
    return out


def weights(out: pathlib.Path) -> bytes:
    (file,) = (out / 'converted' / 'model').glob('*.safetensors')
    return file.read_bytes()


def curve(out: pathlib.Path) -> list[dict[str, float]]:
    points: list[dict[str, float]] = json.loads((out / 'figures.json').read_text())['curves']['converted']
    return points


def test_it_learns(straight: pathlib.Path) -> None:
    points = curve(straight)
    assert [point['step'] for point in points] == [10, 20, 30]
    assert points[-1]['loss'] < points[0]['loss']
    assert points[-1]['held_out'] > 0.2
    assert '<svg' in (straight / 'accuracy.svg').read_text()
    # Where there is no terminal; some versions of rich end with an empty line.
    lines = (straight / 'printed').read_text().strip().splitlines()
    assert [line.partition(',')[0] for line in lines[:3]] == [f'converted: step {step}' for step in (10, 20, 30)]
    assert lines[3:] == [f'converted: {points[-1]["held_out"]:.1%} of 1000 held-out digits right']


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(
    straight: pathlib.Path, environment: dict[str, str], tmp_path: pathlib.Path
) -> None:
    assert run(tmp_path, environment, before=KILLED) == -signal.SIGKILL
    assert (tmp_path / 'converted' / 'checkpoints' / '10').exists()
    assert not (tmp_path / 'converted' / 'model').exists()
    assert run(tmp_path, environment) == 0
    assert weights(tmp_path) == weights(straight)
    assert curve(tmp_path) == curve(straight)


@pytest.mark.slow
def test_two_devices_train_as_one(straight: pathlib.Path, environment: dict[str, str], tmp_path: pathlib.Path) -> None:
    two = environment | {'XLA_FLAGS': f'{QUICK} --xla_force_host_platform_device_count=2'}
    assert run(tmp_path, two) == 0
    # float32 sums in another order, over 30 steps
    for one, other in zip(curve(straight), curve(tmp_path), strict=True):
        assert other == pytest.approx(one, rel=1e-2)


def test_a_run_with_other_settings_is_refused(straight: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)
    from finetune import fit

    model = SimpleViT(image_size=8, patch_size=4, num_classes=2, dim=8, depth=1, heads=1, mlp_dim=8, channels=1)
    variables = {'params': {'kernel': np.zeros(1)}}
    data = (np.zeros((4, 8, 8, 1), np.uint8), np.zeros(4, int)) * 2
    settings = {'steps': 30, 'every': 10, 'batch': 32, 'seed': 1}
    with pytest.raises(click.UsageError, match=r"other settings, .*'seed': 0.* instead of .*'seed': 1"):
        fit(model, variables, data, straight / 'converted' / 'checkpoints', settings, Progress())


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['--batch', '32'], '--batch 32 is not a multiple of the 3 devices'),
        (['--batch', '33', '--image-size', '18'], '--image-size 18 is not a multiple of the patch, 4'),
        (['--batch', '33', '--image-size', '18', '--model', 'simple_vit'], 'not a multiple of the patch, 4'),
    ],
    ids=['batch', 'deep_vit', 'simple_vit'],
)
def test_what_does_not_fit_is_refused(
    arguments: list[str], words: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)
    import finetune

    monkeypatch.setattr('jax.device_count', lambda: 3)
    with pytest.raises(click.UsageError, match=words) as refused:  # of which click makes the exit status
        finetune.main([str(tmp_path / 'out'), *arguments], standalone_mode=False)
    assert refused.value.exit_code == 2
    assert not (tmp_path / 'out').exists()


def test_a_batch_depends_on_its_number_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)
    from mnist import batches, digits

    images, labels, held_out_images, held_out_labels = digits(28)
    assert images.shape == (4000, 28, 28, 1)
    assert held_out_images.shape == (1000, 28, 28, 1)
    assert np.bincount(held_out_labels).tolist() == [100] * 10
    assert not set(map(bytes, images)) & set(map(bytes, held_out_images))

    one, other = (batches(images, labels, size=64, seed=3) for _ in range(2))
    later = other[100]
    for step, batch in zip(range(99, 101), one[99:101].to_iter_dataset(), strict=True):
        again = other[step]
        assert np.array_equal(batch['images'], again['images'])
        assert np.array_equal(batch['labels'], again['labels'])
    assert np.array_equal(later['images'], other[100]['images'])
    assert not np.array_equal(one[0]['labels'], one[len(images) // 64]['labels'])  # each pass has its own order
    assert not np.array_equal(one[0]['images'], batches(images, labels, size=64, seed=4)[0]['images'])


def test_augmentation_keeps_what_an_image_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)
    import mnist
    from PIL import Image

    images = mnist.digits(16)[0]
    generator = np.random.default_rng(0)
    augmented = np.stack([mnist.randaugment(image, generator) for image in images[::100]])
    assert augmented.shape == images[::100].shape
    assert augmented.dtype == np.uint8
    assert not np.array_equal(augmented, images[::100])
    picture = Image.fromarray(images[2000, ..., 0])
    for operation in mnist.OPERATIONS:
        for strength in (-1, 1):
            moved = np.asarray(operation(picture, strength), float)
            assert np.corrcoef(moved.ravel(), np.asarray(picture, float).ravel())[0, 1] > 0.1
