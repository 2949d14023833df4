"""What earlier versions wrote is read: folders, the outputs that prove them, programs to serve.

`parity_tests/golden/earlier/` was written by the command line at commit 60ff9d5, with jax 0.10.2.
"""

import jax
import jax.export
import numpy as np
import pytest

from convert.proof.saved_outputs import recheck
from flax_vit import from_pretrained
from parity_tests.support.pages import ROOT, blocks

FOLDER = ROOT / 'parity_tests' / 'golden' / 'earlier'
IMAGES = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)
LOGITS = {
    'simple': [[0.7447937, 0.0937826, -0.3040999], [0.4227459, -0.0048261, -0.3365111]],
    'deep': [[-0.5248761, 0.4434842, 0.4982336], [0.2088389, 0.0376846, -0.6319733]],
}
reads_it = jax.__version_info__ >= (0, 10, 2)
both = pytest.mark.parametrize('name', LOGITS)


@both
def test_a_folder_and_its_proof(name: str) -> None:
    model, variables = from_pretrained(FOLDER / name)
    logits = np.asarray(model.apply(variables, IMAGES))
    np.testing.assert_allclose(logits, LOGITS[name], rtol=0, atol=1e-6)  # seven digits are written above
    assert recheck(FOLDER / name).right


@pytest.mark.skipif(not reads_it, reason='JAX reads what later versions exported for three weeks')
@both
def test_a_program_to_serve(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER)
    loader = next(text for _, text in blocks(ROOT / 'docs' / 'serving.md', 'python') if 'deserialize' in text)
    names: dict[str, object] = {'images': IMAGES}
    exec(loader.replace('digits-vit.npz', f'{name}.npz') + 'logits = serve(weights, images)', names)
    np.testing.assert_allclose(np.asarray(names['logits']), LOGITS[name], rtol=0, atol=1e-6)
