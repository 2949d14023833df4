"""What JAX compiles meanwhile."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax


@contextmanager
def compilations() -> Iterator[list[str]]:
    """A list that gets an item for each program that is compiled."""
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **keywords: str | int) -> None:
        if event == '/jax/core/compile/backend_compile_duration':
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
