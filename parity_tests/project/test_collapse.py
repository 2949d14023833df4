"""The attention-collapse example: its measure against a plain loop, and a run of a few steps."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

EXAMPLE = pathlib.Path(__file__).parents[2] / 'examples' / 'attention_collapse'


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)


def test_the_measure_is_that_of_a_plain_loop() -> None:
    from collapse import SIMILAR, similarity

    layers, batch, heads, queries, keys = 3, 2, 4, 5, 6
    maps = 1 + np.random.default_rng(0).normal(0, 0.4, (layers, batch, heads, queries, keys)).astype(np.float32)
    measured = similarity(jnp.asarray(maps))
    for p in range(layers):
        for q in range(layers):
            loop = []
            for image in range(batch):
                for head in range(heads):
                    for token in range(keys):
                        one, other = maps[p, image, head, :, token], maps[q, image, head, :, token]
                        loop.append(one @ other / np.sqrt((one @ one) * (other @ other)))
            assert measured['share'][p, q] == pytest.approx(np.mean([cosine > SIMILAR for cosine in loop]))
            assert measured['cosine'][p, q] == pytest.approx(np.mean(loop), rel=1e-5)
    assert 0 < measured['share'][0, 1] < 1


@pytest.mark.slow
def test_a_run_of_a_few_steps(tmp_path: pathlib.Path) -> None:
    from collapse import main

    result = CliRunner().invoke(main, [str(tmp_path), '--depth', '2', '--steps', '3'])
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / 'collapse.json').read_text())
    runs = [(run['model'], run['depth']) for run in figures['runs']]
    assert runs == [('plain', 2), ('re-attention', 2)]
    for run in figures['runs']:
        kinds = {'softmax'} if run['model'] == 'plain' else {'softmax', 're-attention'}
        assert run['trained'].keys() == run['untrained'].keys() == kinds
        assert run['trained'] != run['untrained']
        assert all(len(each['share']) == run['depth'] - 1 for each in run['trained'].values())
    assert '<svg' in (tmp_path / 'collapse.svg').read_text()
