"""What every test may ask for."""

import os
import tempfile
from collections.abc import Generator, Iterator
from typing import Any

import jax
import jaxtyping
import pytest

# What draws with threefry takes two to three times as long to compile; no test hangs on what is drawn.
jax.config.update('jax_default_prng_impl', 'rbg')
os.environ['JAX_ENABLE_COMPILATION_CACHE'] = 'false'  # of the commands that tests start
# What a test has compiled, the others of its process need not: a quarter of the processors' time.
COMPILED = tempfile.TemporaryDirectory()
jax.config.update('jax_enable_compilation_cache', True)
jax.config.update('jax_compilation_cache_dir', COMPILED.name)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
# Roundings are held to what they are on a CPU: a GPU is used only if asked for.
jax.config.update('jax_platforms', os.environ.setdefault('JAX_PLATFORMS', 'cpu'))


def pytest_unconfigure() -> None:
    COMPILED.cleanup()


@pytest.fixture
def float64() -> Iterator[None]:
    """JAX has float64 in the tests that ask for it; the others run as users do, where it has not."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled in the test takes half the time: for float64 alone, not where rounding is judged."""
    from parity_tests.support.reference import quickly

    monkeypatch.setattr(jax, 'jit', quickly)


@pytest.fixture
def threefry() -> Iterator[None]:
    """Random numbers as the processes draw them that a test starts, and as users have them."""
    with jax.default_prng_impl('threefry2x32'):
        yield


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Annotations are checked, also where JAXTYPING_DISABLE says otherwise."""
    monkeypatch.setattr(jaxtyping.config, 'jaxtyping_disable', False)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody checks annotations, as users have it."""
    monkeypatch.setattr(jaxtyping.config, 'jaxtyping_disable', True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    """In CI nothing may be missing: there a test that is skipped has failed."""
    report = yield
    if report.skipped and os.environ.get('CI', 'false') not in ('', 'false'):
        report.outcome, report.longrepr = 'failed', f'skipped in CI: {report.longrepr[2]}'
    return report
