"""The versions that figures depend on, and a report of an error should name."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ('flax-vit', 'jax', 'jaxlib', 'flax', 'numpy', 'torch', 'vit-pytorch')


def versions() -> dict[str, str]:
    """Of Python and of the packages, by name."""
    found = {'python': platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = 'not installed'
    return found
