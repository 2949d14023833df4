"""Which values of a parameter are tried everywhere, and which only by `make test`."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(kept: Any, values: Iterable[Any]) -> list[Any]:
    """The values of a parameter; the tests of all but one are `slow`, or of all but those in a set."""
    some = kept if isinstance(kept, set) else [kept]
    return [pytest.param(value, marks=() if value in some else pytest.mark.slow) for value in values]
