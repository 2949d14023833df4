"""Advice to call what another package has, followed with that package, as the package index has it.

`pytest -m releases` runs these. Where the index is out of reach they are skipped.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

import convert
from convert import ConversionError
from parity_tests.support.pages import ROOT
from parity_tests.support.reference import (
    CONFIGURATIONS,
    FLOAT64_BOUND,
    channels_first,
    pytorch,
    random_images,
    relative_error,
)

pytestmark = pytest.mark.releases

# Without their dependencies, most of which are here already; torch is the one of this environment.
PEFT = ('peft==0.21.2', 'accelerate==1.15.0', 'transformers==5.24.0', 'regex==2026.11.19', 'tokenizers==0.23.3')
LORALIB = ('loralib==0.1.2',)
DEEPSPEED = (
    'deepspeed==0.19.8', 'annotated-types==0.8.0', 'hjson==3.1.0', 'ninja==1.13.2', 'py-cpuinfo==9.0.0',
    'pydantic==2.14.4', 'pydantic-core==2.50.5', 'typing-inspection==0.4.5',
)  # fmt: skip


def installed(folder: Path, packages: tuple[str, ...]) -> dict[str, str]:
    """An environment in which they can be imported; where they cannot be fetched, the test is skipped."""
    pip = [sys.executable, '-m', 'pip', '--retries', '1', '--disable-pip-version-check']
    pip += ['install', '--quiet', '--no-deps', '--no-compile', '--target', str(folder), *packages]
    plain = os.environ | {'DS_BUILD_OPS': '0'}  # nothing of deepspeed is compiled
    try:
        subprocess.run(pip, check=True, capture_output=True, text=True, timeout=900, env=plain)
    except subprocess.SubprocessError as error:
        pytest.skip(f'{packages[0]} could not be fetched: {getattr(error, "stderr", None) or error}')
    return os.environ | {'PYTHONPATH': os.pathsep.join([str(ROOT), str(folder)])}


def run(*command: str | Path, **options: Any) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900, **options)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_adapters_are_merged(tmp_path: Path) -> None:
    environment = installed(tmp_path / 'packages', PEFT + LORALIB)
    run(sys.executable, '-m', 'parity_tests.support.adapters', tmp_path, env=environment)


@pytest.fixture(scope='module')
def zero(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """What support/zero.py makes, and the environment where deepspeed is."""
    folder = tmp_path_factory.mktemp('zero')
    environment = installed(folder / 'packages', DEEPSPEED) | {'DS_ACCELERATOR': 'cpu'}
    run(sys.executable, '-m', 'parity_tests.support.zero', folder, env=environment)
    return folder, environment


def computes_the_same(source: Any, trained: Path) -> None:
    configuration = CONFIGURATIONS['deep-plain']
    told = {name: configuration.fields[name] for name in ('image_size', 'patch_size', 'heads')}
    assumed: Any = {'channels': 3, 'pool': 'cls', 'dropout': 0.0, 'emb_dropout': 0.0}
    port, variables = convert.from_torch(source, **told, **assumed, param_dtype=np.float64)
    module = pytorch(configuration)
    module.load_state_dict(torch.load(trained))
    images = random_images(configuration)
    with torch.no_grad():
        expected = module(channels_first(images)).numpy()
    assert relative_error(jax.jit(port.apply)(variables, images), expected) <= FLOAT64_BOUND


@pytest.mark.parametrize('stage', [2, 3])
def test_shards_of_zero_are_merged(stage: int, zero: Any, float64: None) -> None:
    folder, environment = zero
    saved = folder / str(stage)
    for source in (saved, saved / 'global_step1', *(saved / 'global_step1').glob('zero_*')):
        with pytest.raises(ConversionError, match='parts that DeepSpeed ZeRO saved') as refused:
            convert.inspect(source)
        (command,) = re.findall(r'^ {4}python (.*)$', str(refused.value), re.MULTILINE)
    run(sys.executable, *shlex.split(command), cwd=saved, env=environment)
    computes_the_same(saved / 'weights', folder / f'{stage}.pt')
    (merged,) = (saved / 'weights').iterdir()
    merged.rename(folder / 'file')  # which deepspeed 0.14 wrote under the name itself
    (saved / 'weights').rmdir()
    (folder / 'file').rename(saved / 'weights')
    computes_the_same(saved / 'weights', folder / f'{stage}.pt')


@pytest.mark.filterwarnings('ignore::convert.ConversionWarning')  # the optimizer and the counters lie beside
def test_without_zero_nothing_is_spread(zero: Any, float64: None) -> None:
    folder, _ = zero
    computes_the_same(folder / '0', folder / '0.pt')
