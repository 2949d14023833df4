"""What the command line finds where it runs. Imports nothing that may be missing or broken before it is looked at."""

import os
import platform
import re
from importlib import import_module
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any

from convert.caches import COMPILED, cache_folder
from convert.versions import PACKAGES, versions

OURS = {'test', 'docs'}  # extras for whoever works on this


def examine() -> dict[str, Any]:
    """The versions, what cannot be imported, what JAX runs on, the caches, and what is optional: plain JSON."""
    found = versions()
    broken = {package: trouble for package in PACKAGES if (trouble := _trouble(package))}
    caches = [os.environ.get(COMPILED), cache_folder('flax-vit-downloads')]
    return {
        'format': 'flax_vit doctor 1',
        'versions': found,
        'platform': platform.platform(),
        'broken': broken,
        'jax': _jax() if 'jax' not in broken else None,
        'caches': {str(folder): _size(Path(folder)) for folder in caches if folder},
        'extras': _extras(),
    }


def in_words(facts: dict[str, Any]) -> dict[str, str]:
    """The same for people."""
    jax, broken = facts['jax'], facts['broken']
    said = {
        name: f'{found}, but it cannot be imported: {broken[name]}' if name in broken else found
        for name, found in facts['versions'].items()
    }
    said['platform'] = facts['platform']
    if jax:
        said['JAX runs on'] = jax['trouble'] or f'{jax["backend"]}: {", ".join(jax["devices"])}'
        said["JAX's 64-bit mode"] = f'{"on" if jax["x64"] else "off"} by default; the commands turn it on themselves'
    said |= {f'cache {folder}': f'{size / 1e6:,.1f} MB' for folder, size in facts['caches'].items()}
    for extra, missing in facts['extras'].items():
        lack = f"lacks {', '.join(missing)}: pip install 'flax-vit[{extra}]'"
        said[f'optional: {extra}'] = lack if missing else 'installed'
    return said


def _trouble(package: str) -> str | None:
    try:
        version(package)
        import_module(package.replace('-', '_'))
    except PackageNotFoundError:
        return None
    except Exception as error:  # whatever a broken library raises
        return f'{type(error).__name__}: {error}'
    return None


def _jax() -> dict[str, Any]:
    import jax

    facts: dict[str, Any] = {'backend': None, 'devices': [], 'x64': jax.config.read('jax_enable_x64'), 'trouble': None}
    try:
        devices = [device.device_kind for device in jax.devices()]
        return facts | {'backend': jax.default_backend(), 'devices': devices}
    except RuntimeError as error:  # JAX_PLATFORMS asks for what is not there
        return facts | {'trouble': str(error)}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob('*') if path.is_file())


def _extras() -> dict[str, list[str]]:
    """Of each extra, the packages that are missing."""
    try:
        names = metadata('flax-vit').get_all('Provides-Extra') or []
    except PackageNotFoundError:  # run from its sources
        return {}
    return {name: sorted(_missing('flax-vit', name)) for name in sorted(set(names) - OURS)}


def _missing(package: str, extra: str) -> set[str]:
    """What `package[extra]` needs and is not installed."""
    missing = set()
    for line in requires(package) or []:
        needed = re.match(r'([\w.-]+)(?:\[([\w.,-]+)\])?.*;.*extra == [\'"]' + re.escape(extra) + '[\'"]', line)
        if needed:
            try:
                version(needed[1])
            except PackageNotFoundError:
                missing.add(needed[1])
            else:
                missing |= {name for more in (needed[2] or '').split(',') if more for name in _missing(needed[1], more)}
    return missing
