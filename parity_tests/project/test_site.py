"""The site of docs/, built as `make site` does: whole, strict, and without a request to anybody else."""

import functools
import importlib.util
import inspect
import json
import os
import pathlib
import re
import subprocess
import sys
from html.parser import HTMLParser
from typing import Any
from urllib.parse import unquote

import griffe
import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort, PluginError

import convert
import flax_vit
from flax_vit.architectures import MODELS, defaults_of
from parity_tests.support.pages import PAGES, ROOT

HOME = 'https://github.com/flax-vit/flax_vit'
DOCS = ROOT / 'docs'
PUBLIC = [f'{package.__name__}.{name}' for package in (flax_vit, convert) for name in package.__all__]


class Elements(HTMLParser):
    """The tags of a page, with their attributes."""

    def __init__(self, page: pathlib.Path) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.feed(page.read_text(encoding='utf-8'))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or '' for name, value in attrs}))


@pytest.fixture(scope='module')
def site(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp('site')
    ended = subprocess.run(
        [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir', folder],
        cwd=ROOT,
        env=os.environ | {'NO_MKDOCS_2_WARNING': '1'},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return folder


@pytest.fixture(scope='module')
def elements(site: pathlib.Path) -> dict[str, list[tuple[str, dict[str, str]]]]:
    """Of every page, by its path."""
    return {page.relative_to(site).as_posix(): Elements(page).found for page in site.rglob('*.html')}


def test_every_page_is_there(elements: dict[str, Any]) -> None:
    pages = [page.relative_to(DOCS).with_suffix('').as_posix() for page in PAGES if page.is_relative_to(DOCS)]
    assert len(pages) > 15
    expected = {'index.html' if page == 'README' else f'{page}/index.html' for page in pages}
    assert elements.keys() == expected | {'404.html'}


def test_every_public_name_has_an_entry_and_is_found(site: pathlib.Path, elements: dict[str, Any]) -> None:
    anchors = {
        f'{page.removesuffix("index.html")}#{attributes["id"]}'
        for page, found in elements.items()
        if page.startswith('reference/')
        for _, attributes in found
        if 'id' in attributes
    }
    assert set(PUBLIC) <= {anchor.partition('#')[2] for anchor in anchors}
    index = json.loads((site / 'search' / 'search_index.json').read_text(encoding='utf-8'))
    assert {'reference/models/#flax_vit.SimpleViT', 'tpu/#verify'} <= {entry['location'] for entry in index['docs']}


def test_the_overview_names_every_public_name() -> None:
    overview = (DOCS / 'api.md').read_text(encoding='utf-8')
    names = {name.partition('.')[2] for name in PUBLIC} - {'__version__'}
    assert [name for name in names if f'[`{name}`](reference/' not in overview] == []


@functools.cache
def loaded(package: str) -> Any:
    """As mkdocstrings reads it."""
    extensions = griffe.load_extensions(str(DOCS / 'site' / 'comments.py'))
    return griffe.GriffeLoader(search_paths=[ROOT], extensions=extensions).load(package)


def sections(documented: Any) -> dict[str, Any]:
    return {section.kind.value: section.value for section in documented.docstring.parse('google')}


def test_every_field_of_a_model_says_what_it_is() -> None:
    """They are its constructor's arguments, with linen's names and defaults."""
    package = loaded('flax_vit')
    for name, model in MODELS.items():
        module = package[model.__module__.partition('.')[2]][name]
        arguments = {argument.name: argument for argument in sections(module)['parameters']}
        assert list(sections(module))[-2:] == ['parameters', 'raises']
        assert arguments.keys() == set(defaults_of(model))
        assert [name for name, argument in arguments.items() if not argument.description] == []
        assert [name for name, argument in arguments.items() if argument.annotation is None] == []
        signature = inspect.signature(model).parameters
        assert {name: argument.default is not None for name, argument in arguments.items()} == {
            name: signature[name].default is not inspect.Parameter.empty for name in arguments
        }


@pytest.mark.parametrize(
    ('package', 'name', 'count'),
    [
        ('flax_vit', 'looking.Features', 6),
        ('convert', 'conversion.Inspection', 5),
        ('convert', 'proof.parity.Report', 14),
        ('convert', 'proof.measure.Row', 9),
    ],
)
def test_every_attribute_of_a_result_says_what_it_is(package: str, name: str, count: int) -> None:
    cls = loaded(package)[name]
    told = {attribute.name for attribute in sections(cls)['attributes'] if attribute.description}
    assert len(told) == count
    public = {name for name, each in cls.members.items() if each.is_attribute and not name.startswith('_')}
    assert [name for name in public - told if not cls[name].docstring] == []


def test_nothing_is_fetched_from_elsewhere(site: pathlib.Path, elements: dict[str, Any]) -> None:
    fetched = [
        address
        for found in elements.values()
        for tag, attributes in found
        for name, address in attributes.items()
        if name in {'src', 'srcset', 'data'} or (tag == 'link' and name == 'href')
    ]
    for sheet in site.rglob('*.css'):
        fetched += re.findall(r'(?:url\(|@import)\s*["\']?([^"\')]+)', sheet.read_text(encoding='utf-8'))
    assert len(fetched) > 100
    assert [address for address in fetched if re.match(r'(\w+:)?//', address)] == []
    components = {attributes.get('data-md-component') for found in elements.values() for _, attributes in found}
    assert 'search' in components
    assert 'source' not in components  # for which the theme asks GitHub how many stars the project has


def test_links_into_the_project_lead_somewhere(elements: dict[str, Any]) -> None:
    links = {attributes.get('href', '') for found in elements.values() for _, attributes in found}
    links = {link.removeprefix(f'{HOME}/') for link in links if link.startswith(f'{HOME}/')}
    assert {'blob/main/CONTRIBUTING.md', 'blob/main/SECURITY.md', 'edit/main/docs/tpu.md'} <= links
    for link in links:
        kind, _, path = link.partition('/main/')
        there = ROOT / unquote(path.partition('#')[0])
        assert there.is_dir() if kind == 'tree' else there.is_file(), link


@pytest.fixture
def links() -> Any:
    """The hook, a file that mkdocs reads."""
    spec = importlib.util.spec_from_file_location('links', DOCS / 'site' / 'links.py')
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_out_of_docs(links: Any) -> None:
    config = load_config(str(ROOT / 'mkdocs.yml'), plugins=[])

    def followed(target: str, folder: pathlib.Path = DOCS) -> str:
        return links.outwards(target, folder, config)

    assert followed('../examples/digits') == f'{HOME}/tree/main/examples/digits'
    assert followed('../CONTRIBUTING.md#style') == f'{HOME}/blob/main/CONTRIBUTING.md#style'
    assert followed('../../Makefile', DOCS / 'reference') == f'{HOME}/blob/main/Makefile'
    assert followed('../api.md', DOCS / 'reference') == '../api.md'
    with pytest.raises(PluginError, match='is not there'):
        followed('../nothing.md')
    with pytest.raises(PluginError, match='no such heading'):
        followed('../CONTRIBUTING.md#nothing')


@pytest.mark.parametrize(
    'wrong', ['[a](#nowhere)', '[a](page.md#nowhere)', '[a](nothing.md)', '[a](/page)', '![a](nothing.svg)', 'unlisted']
)
def test_what_leads_nowhere_is_an_error(wrong: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / 'docs').mkdir()
    (tmp_path / 'theme').mkdir()
    (tmp_path / 'theme' / 'main.html').write_text('{{ page.content }}')
    for name, text in (('page', 'Right: [a](#heading)'), *([('unlisted', '')] if wrong == 'unlisted' else [])):
        (tmp_path / 'docs' / f'{name}.md').write_text(f'# Heading\n\n{text}\n')

    def built() -> None:
        build(
            load_config(
                str(ROOT / 'mkdocs.yml'),
                docs_dir=str(tmp_path / 'docs'),
                site_dir=str(tmp_path / 'site'),
                nav=['page.md'],
                hooks=[],
                plugins=[],
                extra_css=[],
                theme={'name': None, 'custom_dir': str(tmp_path / 'theme')},
                strict=True,
            )
        )

    if wrong != 'unlisted':
        built()
        (tmp_path / 'docs' / 'page.md').write_text(f'# Heading\n\n{wrong}\n')
    with pytest.raises(Abort):
        built()
