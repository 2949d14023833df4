"""Public functions say what they take, give and raise."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest

import convert
import flax_vit

FUNCTIONS = {
    f'{package.__name__}.{name}': getattr(package, name)
    for package in (flax_vit, convert)
    for name in package.__all__
    if inspect.isfunction(getattr(package, name))
}


@pytest.mark.parametrize('name', FUNCTIONS)
def test_every_argument_is_there(name: str) -> None:
    function: Callable[..., Any] = FUNCTIONS[name]
    words, signature = inspect.getdoc(function) or '', inspect.signature(function)
    _, _, arguments = words.partition('\nArgs:\n')
    for parameter in signature.parameters.values():
        stars = '**' if parameter.kind is parameter.VAR_KEYWORD else ''
        assert f'\n    {stars}{parameter.name}: ' in f'\n{arguments}', parameter.name
    if signature.return_annotation not in (None, 'None'):
        assert '\nReturns:\n' in words


def test_functions_are_looked_at() -> None:
    assert len(FUNCTIONS) >= 18
