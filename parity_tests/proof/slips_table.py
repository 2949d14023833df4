"""Writes docs/slips.md: beside the right figure, the figure that each slip gives, and the cause that `verify` names.

python -m parity_tests.proof.slips_table
"""

from pathlib import Path

import jax
import pytest

from parity_tests.proof.test_causes import MORE, run
from parity_tests.proof.test_slips import CASES, DEEP, DROPOUT_SLIPS, MODELS, SLIPS, Port
from parity_tests.support.reference import dropout_errors

HEAD = """\
# Known mistakes

What a deliberate mistake in the port does to the parity figures, and what `convert.verify` says of it. The figure is
the largest difference of the logits from PyTorch's, relative to the largest logit, in float64, for the small
random models of `parity_tests/proof/test_slips.py`; a port is right up to 1e-12. `parity_tests/proof/test_causes.py`
puts every slip into the port, and holds that it is caught and its cause named. The images are far from zero mean, as
they are before anybody normalises them: the fast variance can't bear that.

Two kinds have no cause beside them. `sincos steps in float64` counts as right: no processor's float32 table is exact,
and PyTorch's own may be as far from the port's as this one is; the logits are compared with the same table on both
sides. Dropout acts in training only, where `verify` does not look: the figures of its slips are of training, with the
same masks on both sides, and `parity_tests/proof/test_slips.py` holds that they are caught.

This page is written by `python -m parity_tests.proof.slips_table`.

| slip | SimpleViT | DeepViT | ViT | `verify` says |
|---|---|---|---|---|
"""
COLUMNS = 'SimpleViT', 'DeepViT', 'ViT'


def main() -> None:
    slips = {**SLIPS, **{key: slip for key, (slip, _) in MORE.items()}}
    names = dict.fromkeys(name for _, name in slips)
    rows = []
    for name in ('none', *names):
        figures, said = dict.fromkeys(COLUMNS, ''), dict.fromkeys(COLUMNS, '')
        for model in COLUMNS:
            if name == 'none' or (model, name) in slips:
                with pytest.MonkeyPatch.context() as monkeypatch, jax.enable_x64(True):
                    case = CASES.get((model, name), MODELS[model])
                    report = run(case, slips.get((model, name), lambda port: None), monkeypatch)
                figures[model] = f'{report.rows[-1].exact:.0e}'
                said[model] = 'RIGHT' if report.right else '; '.join(report.causes)
        causes = ' / '.join(dict.fromkeys(cause for cause in said.values() if cause))
        rows.append(f'| {name.replace("_", " ")} | {" | ".join(figures.values())} | {causes} |')
    for model, name in DROPOUT_SLIPS:
        with pytest.MonkeyPatch.context() as monkeypatch, jax.enable_x64(True):
            port = Port.of(DEEP, monkeypatch)
            DROPOUT_SLIPS[model, name](port)
            figure = f'{port.errors(dropout_errors)[""]:.0e}'
        rows.append(f'| {name.replace("_", " ")} |  | {figure} |  | – |')
    target = Path(__file__).parents[2] / 'docs' / 'slips.md'
    target.parent.mkdir(exist_ok=True)
    target.write_text(HEAD + '\n'.join(rows) + '\n')


if __name__ == '__main__':
    main()
