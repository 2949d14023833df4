"""Packages that import in a moment: their names come from their modules when they are first asked for."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def lazily(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` (PEP 562) of a package; `homes` has the module of each name it exports.

    Its modules are found as attributes, too, whether or not they were imported.
    """

    def getattr_(name: str) -> Any:
        if name in homes:
            value = getattr(import_module(f'{package}.{homes[name]}'), name)
        elif find_spec(f'{package}.{name}'):
            value = import_module(f'{package}.{name}')
        else:
            raise AttributeError(f'module {package!r} has no attribute {name!r}')
        setattr(sys.modules[package], name, value)
        return value

    def dir_() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return getattr_, dir_
