"""Which room may import which: those below it, so that no way leads back up."""

import ast
from collections.abc import Iterator

import pytest

from parity_tests.support.pages import ROOT

# From the ground up. A module that is named stands for itself, a package for all that is in it.
FLOORS = (
    'flax_vit.lazy',
    'flax_vit',
    'convert.errors',
    'convert.caches',
    'convert.versions',
    'convert.files',
    'convert.references',
    'convert.architectures',
    'convert.recognition',
    'convert.conversion',
    'convert.proof',
    'convert.command_line',
)
DOORS = {'flax_vit/__init__.py', 'flax_vit/__main__.py', 'convert/__init__.py', 'convert/__main__.py'}
MODULES = [
    str(path.relative_to(ROOT))
    for package in ('convert', 'flax_vit')
    for path in sorted((ROOT / package).rglob('*.py'))
    if str(path.relative_to(ROOT)) not in DOORS
]


def floor_of(module: str) -> int:
    homes = [floor for floor in FLOORS if module == floor or module.startswith(f'{floor}.')]
    return FLOORS.index(max(homes, key=len))


def imports_of(module: str) -> Iterator[str]:
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            below = [f'{node.module}.{alias.name}' for alias in node.names]
            names = [name if (ROOT / f'{name.replace(".", "/")}.py').exists() else node.module for name in below]
        yield from (name for name in names if name.partition('.')[0] in {'convert', 'flax_vit'})


@pytest.mark.parametrize('module', MODULES)
def test_what_it_imports_lies_below(module: str) -> None:
    own = floor_of(module.removesuffix('.py').removesuffix('/__init__').replace('/', '.'))
    above = [name for name in imports_of(module) if floor_of(name) > own]
    assert not above


def test_something_is_looked_at() -> None:
    assert len(MODULES) > 50
    assert 'convert.conversion' in set(imports_of('convert/proof/parity.py'))
    assert floor_of('convert.proof.parity') > floor_of('convert.conversion') > floor_of('flax_vit.layers')


@pytest.mark.parametrize('module', MODULES)
def test_its_first_line_says_what_it_is_for(module: str) -> None:
    words = ast.get_docstring(ast.parse((ROOT / module).read_text())) or ''
    assert len(words.partition('\n')[0]) > 30
