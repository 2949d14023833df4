"""The page and the JSON of a parity report: what they say is what was measured, and a browser shows it."""

import base64
import html
import json
import math
import pathlib
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from typing import Any

import jax
import pytest
import torch
from vit_pytorch import deepvit, simple_vit

import convert
import convert.proof.plots
from convert.command_line.cli import main
from convert.proof.report import figures_of, write_json, write_page
from flax_vit.folders.whole_files import sha256

BROWSERS = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable', 'chrome')
# What a stranger may call a file, and what is in it.
FILE, GROUP = '<img src=x onerror=alert(1)>&".pt', '<script>alert(1)</script>'


@pytest.fixture(scope='module')
def right(tmp_path_factory: pytest.TempPathFactory) -> convert.Report:
    torch.manual_seed(0)
    module = deepvit.DeepViT(image_size=8, patch_size=4, num_classes=5, dim=12, depth=1, heads=2, mlp_dim=8, dim_head=4)
    path = tmp_path_factory.mktemp('right') / FILE
    torch.save({'state_dict': module.state_dict(), GROUP: 1}, path)
    fields: dict[str, Any] = {'pool': 'cls', 'dropout': 0.0, 'emb_dropout': 0.0, 'channels': 3, 'dim_head': 4}
    return convert.verify(path, count=2, gradients=True, attention=True, **fields)


@pytest.fixture(scope='module')
def wrong() -> convert.Report:
    """The port has the same weights and other heads."""
    torch.manual_seed(0)
    module = simple_vit.SimpleViT(image_size=8, patch_size=4, num_classes=5, dim=16, depth=1, heads=2, mlp_dim=8)
    port = convert.from_torch(module.state_dict(), image_size=8, patch_size=4, heads=4, dim_head=32)
    return convert.verify(module, converted=port, count=2, attention=True, dtype='bfloat16')


@pytest.fixture
def reports(right: convert.Report, wrong: convert.Report) -> dict[str, convert.Report]:
    return {'right': right, 'wrong': wrong}


def page_of(report: convert.Report, folder: pathlib.Path) -> str:
    write_page(folder / 'report.html', report, figures_of(report, command="flax-vit verify 'a <b>.pt'"))
    return (folder / 'report.html').read_text()


def text_of(markup: str) -> str:
    return html.unescape(' '.join(re.sub('<[^>]*>', ' ', markup).split()))


@pytest.mark.parametrize('name', ['right', 'wrong'])
def test_the_page_says_what_was_measured(reports: dict[str, convert.Report], name: str, tmp_path: pathlib.Path) -> None:
    report = reports[name]
    page = page_of(report, tmp_path)
    rows = [text_of(row) for row in re.findall('<tr.*?</tr>', page, re.DOTALL)]
    for row in report.rows + report.gradients:
        (shown,) = [shown for shown in rows if shown.startswith(row.label.removeprefix('gradient of ') + ' ')]
        for figure in (f'{row.exact:.1e}', f'{row.port:.1e}', f'{row.torch:.1e}', str(list(row.worst))):
            assert f' {figure} ' in shown
        assert ('wrong' in shown) != row.right
    text = text_of(page)
    for file in report.inspection.files:
        assert sha256(file) in text
    for words in (
        '2 × 8 × 8 × 3 (batch, height, width, channels), from standard normal, seed 0',
        report.dtype,
        'precision=highest',
        f'jax {jax.__version__}',
        f'torch {torch.__version__.partition("+")[0]}',
        "flax-vit verify 'a <b>.pt'",
        'known by',
        'at most 1e-12',
    ):
        assert words in text, words
    assert page.count('<img src="data:image/svg+xml;base64,') == 3
    assert page.count(' alt="') == 3


def test_the_verdict_stands_at_the_top(reports: dict[str, convert.Report], tmp_path: pathlib.Path) -> None:
    good, bad = (text_of(page_of(report, tmp_path).partition('<h2>')[0]) for report in reports.values())
    assert '✓ Right: the Flax model computes what PyTorch does.' in good
    assert 'Why they part' not in good
    assert (
        '✗ Wrong: the Flax model does not compute what PyTorch does. The first difference is in: block 0 attention.'
        in bad
    )
    assert reports['wrong'].causes
    for cause in reports['wrong'].causes:
        assert cause in bad


def test_names_from_strangers_are_escaped(right: convert.Report, tmp_path: pathlib.Path) -> None:
    page = page_of(right, tmp_path)
    assert FILE in text_of(page)
    assert GROUP in text_of(page)
    assert '<script' not in page
    assert '<img src=x' not in page


def test_the_page_loads_nothing(right: convert.Report, tmp_path: pathlib.Path) -> None:
    page = page_of(right, tmp_path)
    images = [base64.b64decode(image).decode() for image in re.findall('svg\\+xml;base64,([^"]*)', page)]
    for markup in (page, *images):
        links = re.findall(r'\s(?:[\w:]*href|src|srcset|data|action|poster)="([^"]*)"', markup)
        assert all(link.startswith(('data:', '#')) for link in links), links
        assert not re.search(r'@import|url\((?!#)|<script|<link(?! rel="icon")', markup)


@pytest.mark.parametrize('name', ['right', 'wrong'])
def test_json_agrees(reports: dict[str, convert.Report], name: str, tmp_path: pathlib.Path) -> None:
    report = reports[name]
    write_json(tmp_path / 'report.json', figures_of(report))
    figures = read_json(tmp_path / 'report.json')
    assert figures['right'] is report.right
    assert figures['causes'] == report.causes
    assert figures['first'] == (None if report.right else 'block 0 attention')
    for rows, shown in ((report.rows, figures['parts']), (report.gradients, figures['gradients'])):
        for row, figure in zip(rows, shown, strict=True):
            assert (figure['name'], figure['float64'], figure['worst']) == (row.name, row.exact, list(row.worst))
            assert (figure['flax'], figure['torch'], figure['ratio']) == (row.port, row.torch, row.ratio)
            assert figure['right'] is row.right
            if figure['float64'] <= figure['limit']:  # the limits that are written are those that were applied
                assert (figure['flax'] <= figure['flax_limit']) is row.right
    assert figures['predictions']['flax'] == report.predictions.tolist()
    assert figures['predictions']['agreement'] == report.agreement
    assert figures['run']['dtype'] == report.dtype
    assert figures['source']['fields']['depth'] == {
        'value': 1,
        'how': 'inferred',
        'why': 'the number of blocks',
    }


def test_what_is_no_number_is_told(right: convert.Report, tmp_path: pathlib.Path) -> None:
    logits = right.logits._replace(port=right.logits.port * math.nan)
    rows = [
        replace(right.rows[0], exact=0.0),
        *right.rows[1:-1],
        replace(right.rows[-1], exact=math.nan, port=math.inf),
    ]
    report = replace(right, rows=rows, logits=logits)
    write_json(tmp_path / 'report.json', figures_of(report))
    figures = read_json(tmp_path / 'report.json')
    last = figures['parts'][-1]
    assert (last['float64'], last['flax'], last['right']) == ('NaN', 'Infinity', False)
    assert math.isnan(float(figures['logits']['flax']))
    text = text_of(page_of(report, tmp_path))
    assert '✗ Wrong: the Flax model does not compute what PyTorch does. The first difference is in: logits.' in text
    assert 'nan largest difference in float64, at logits' in text


def test_float64_features_have_neither_predictions_nor_an_error_of_their_own(tmp_path: pathlib.Path) -> None:
    module = simple_vit.SimpleViT(image_size=8, patch_size=4, num_classes=5, dim=8, depth=1, heads=1, mlp_dim=4)
    module.linear_head = torch.nn.Identity()
    text = text_of(page_of(convert.verify(module, count=1, dtype='float64'), tmp_path))
    assert 'Differences of the features' in text
    for words in ('predict', 'Attention maps', 'limit of Flax'):
        assert words not in text.partition('What was compared')[0]


@pytest.mark.parametrize('depth', [2, 7, 32])
def test_the_plot_of_a_deep_model(right: convert.Report, depth: int) -> None:
    first, attention, feed_forward, features, logits = right.rows
    report = replace(right, rows=[first, *[attention, feed_forward] * depth, features, logits])
    assert convert.proof.plots.errors(figures_of(report)).startswith('data:image/svg+xml;base64,')


@pytest.mark.filterwarnings('ignore::convert.ConversionWarning')
@pytest.mark.parametrize('depth', [1, 2])
def test_a_transformer_alone_has_only_blocks(depth: int, tmp_path: pathlib.Path) -> None:
    alone = simple_vit.Transformer(dim=8, depth=depth, heads=2, dim_head=4, mlp_dim=6)
    report = convert.verify(alone, count=1, dtype='float64')
    text = text_of(page_of(report, tmp_path))
    assert re.search(r'Tokens [\d ×]+ \(batch, tokens, dim\)', text)
    drawing = base64.b64decode(convert.proof.plots.errors(figures_of(report)).partition(',')[2]).decode()
    assert [f'block {block}' in drawing for block in range(3)] == [block < depth for block in range(3)]
    assert all(('tokens' in drawing, 'logits' not in drawing, 'embedding' not in drawing))


def test_the_file_appears_whole_or_not_at_all(
    right: convert.Report, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    page_of(right, tmp_path)
    before = (tmp_path / 'report.html').read_bytes()
    monkeypatch.setattr(convert.proof.plots, 'draw', interrupted)
    with pytest.raises(KeyboardInterrupt):
        page_of(right, tmp_path)
    monkeypatch.setattr(pathlib.Path, 'write_text', interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_json(tmp_path / 'report.json', {})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {'report.html': before}


def test_the_command_line_writes_both(
    right: convert.Report, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkpoint,) = right.inspection.files
    options = ['--dim-head', '4', '--count', '1', '--report', 'report.html', '--json', 'report.json']
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['flax-vit', 'verify', str(checkpoint), *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    figures = read_json(tmp_path / 'report.json')
    page = (tmp_path / 'report.html').read_text()
    assert figures['command'].startswith("flax-vit verify '")
    assert figures['command'] in text_of(page)
    assert f'{figures["parts"][-1]["float64"]:.1e}' in page
    assert 'Attention maps' in page


@pytest.mark.parametrize(
    ('options', 'missing', 'message'),
    [
        (['--report', 'report.html'], 'matplotlib', "pip install 'flax-vit[report]'"),
        (['--report', 'report.html'], 'jinja2', "pip install 'flax-vit[report]'"),
        (['--json', 'nowhere/report.json'], '', 'No such folder for a report'),
        (['--report', '.'], '', 'is a directory'),
    ],
)
def test_what_stops_the_report_is_said_before_the_models_run(
    options: list[str],
    missing: str,
    message: str,
    right: convert.Report,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr('convert.command_line.commands.parity.verify', lambda *_, **__: pytest.fail('the models ran'))
    monkeypatch.setattr(
        sys, 'argv', ['flax-vit', 'verify', str(right.inspection.files[0]), '--dim-head', '4', *options]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert message in ' '.join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


PROBE = """
<!DOCTYPE html><title>probe</title>
<iframe style="width: 360px" srcdoc="{page}"></iframe>
<iframe style="width: 1280px" srcdoc="{page}"></iframe>
<pre></pre>
<script>
onload = () => {{
  const seen = [...document.querySelectorAll('iframe')].map(({{contentWindow: frame}}) => {{
    const root = frame.document.documentElement;
    return {{
      title: frame.document.title,
      verdict: frame.document.querySelector('h1').innerText,
      images: [...frame.document.images].map(image => image.naturalWidth * image.offsetHeight),
      width: root.clientWidth,
      overflow: root.scrollWidth - root.clientWidth,
    }};
  }});
  document.querySelector('pre').textContent = JSON.stringify(seen);
}};
</script>
"""


@pytest.mark.parametrize('name', ['right', 'wrong'])
def test_a_browser_shows_it(reports: dict[str, convert.Report], name: str, tmp_path: pathlib.Path) -> None:
    """On a phone and on a desktop, without a horizontal scroll bar, a missing image or a message in the console."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f'none of {", ".join(BROWSERS)} is installed')
    probe = tmp_path / 'probe.html'
    probe.write_text(PROBE.format(page=html.escape(page_of(reports[name], tmp_path))))
    quiet = '--no-first-run --disable-background-networking --disable-component-update --disable-sync --disable-quic'
    done = subprocess.run(
        [
            *(browser, '--headless', '--no-sandbox', '--disable-gpu', *quiet.split(), '--hide-scrollbars'),
            *('--enable-logging=stderr', f'--user-data-dir={tmp_path / "profile"}', '--dump-dom', probe.as_uri()),
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert 'CONSOLE' not in done.stderr
    found = re.search('<pre>(.+)</pre>', done.stdout)
    assert found, done.stderr
    phone, desktop = json.loads(html.unescape(found[1]))
    for seen in (phone, desktop):
        assert seen['title'].startswith(f'{name.title()}: parity of ')
        assert f'{name.title()}:' in seen['verdict']
        assert len(seen['images']) == 3
        assert all(seen['images'])
        assert seen['overflow'] <= 0
    assert (phone['width'], desktop['width']) == (360, 1280)


def read_json(path: pathlib.Path) -> Any:
    """Strictly: Python's parser would take NaN, JSON has none."""
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f'{name} is no JSON'))
