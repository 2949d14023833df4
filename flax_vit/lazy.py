"""Packages that import in a moment: their names come from their modules when they are first asked for."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def lazily(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` (PEP 562) and `__all__` of a package; `homes`: each name's module.

    Its modules are found as attributes, too, whether or not they were imported.
    """

    def getattr_(name: str) -> Any:
        if name in homes:
            value = getattr(_imported(homes[name]), name)
        elif find_spec(f'{package}.{name}'):
            value = import_module(f'{package}.{name}')
        else:
            raise AttributeError(f'module {package!r} has no attribute {name!r}')
        setattr(sys.modules[package], name, value)
        return value

    def dir_() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return getattr_, dir_, list(homes)


def _imported(module: str) -> ModuleType:
    """The module. ImportError that names the file, where another one of the package's name is found first."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition('.')[0]
        file = getattr(sys.modules.get(package), '__file__', None)
        if file and error.name == module and not hasattr(sys.modules[package], '__path__'):
            raise ImportError(
                f"{file} is found before flax_vit's own package of that name, {package}: rename it, or take its folder "
                'off the path (sys.path).',
                name=package,
                path=file,
            ) from error
        raise
