"""The measure of a port: how far it is from PyTorch in float64 and in less, and whether rounding explains that.

Rounding is a question of the computation: where it is ill-conditioned (re-attention's LayerNorm over two heads), one
early rounding may be all of an output's error, and all the errors behind it are that one number again, amplified. The
errors of two right programs are then two draws from one wide distribution, and their ratio may be anything.

So the port is held against PyTorch in pairs of runs. In each pair both compute with the same images and parameters (and
weights of the gradients' loss), which are moved by about a unit in the last place against those of the other pairs.
That makes all roundings fall anew and leaves the computation as ill-conditioned as it is. A port's error counts as its
smallest, PyTorch's as its largest; so more pairs can only acquit, and there are more of them only for what looks wrong.
It is wrong when chance cannot be the reason: see `Row`.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

OUTPUT_LIMIT = 1e-12  # of float64: rounding over the depth of a model; the mildest slip known is at 1e-5
GRADIENT_LIMIT = 1e-11  # of float64: the backward pass adds as many roundings again, and sums over the batch
RATIO = 3.0  # times PyTorch's own rounding error: room for another order of summation
FALSE_ALARMS = 1e-6  # how often chance may call a part of a right port wrong, were its error a single number
# Half a unit in the last place of each dtype: below it nothing is left to compare.
FLOOR = {'float32': 2.0**-24, 'bfloat16': 2.0**-9, 'float16': 2.0**-12, 'float64': math.inf}
# A gradient that is by nature zero (of what a norm removes) is rounding noise, a few 1e-15 of the largest gradient,
# which must stay below the limit: errors are taken relative to at least this share of the largest.
SMALLEST = 1e-3


class Sides(NamedTuple):
    """The same output of all that is compared, as float64."""

    truth: np.ndarray  # PyTorch's in float64
    torch: np.ndarray  # PyTorch's in the compared dtype
    exact: np.ndarray  # the port's in float64
    port: np.ndarray  # the port's in the compared dtype


@dataclass(frozen=True)
class Row:
    """How far one part of the port is from PyTorch. Errors are relative."""

    name: str  # PyTorch's: 'transformer.layers.3.0'; '' for the whole; a parameter's for its gradient
    label: str  # in words
    exact: float  # the largest difference of the two in float64; of several runs the smallest
    worst: tuple[int, ...]  # where that is
    port: float  # root mean square error in the compared dtype against PyTorch in float64; of several runs the smallest
    torch: float  # PyTorch's own; of several runs the largest
    limit: float  # of `exact`
    floor: float  # of `port`, below which its ratio does not matter: half a unit in the last place
    runs: int = 1  # of both

    @property
    def ratio(self) -> float:
        """The port's error as a multiple of PyTorch's."""
        return relative(self.port, self.torch)

    @property
    def exact_limit(self) -> float:
        """What `exact` may be: `limit`, or what float64's rounding makes of it where the computation amplifies it.

        By how much it does, PyTorch's error in the compared dtype tells, up to where it is as large as the output.
        """
        return max(self.limit, RATIO * min(self.torch, 1.0) * 2.0**-53 / self.floor)

    @property
    def port_limit(self) -> float:
        """What `port` may be."""
        return max(RATIO * self.torch, self.floor)

    @property
    def same_function(self) -> bool:
        """Whether both agree in float64."""
        return self.exact <= self.exact_limit

    @property
    def right(self) -> bool:
        """Whether it is the same function, computed no coarser than PyTorch does."""
        return self.same_function and self.port <= self.port_limit

    @property
    def chance(self) -> float:
        """How likely a right port is at most to be this far off in every run.

        The worst case is an error that is one amplified number, normally distributed in both: the ratio of two such has
        the Cauchy distribution, and exceeds r with probability 2 / pi * arctan(1 / r) < 2 / (pi * r), in each pair.
        """
        reached = max(relative(self.exact, self.exact_limit), relative(self.port, self.port_limit))
        return (2 / max(2.0, math.pi * RATIO * reached)) ** self.runs

    @property
    def settled(self) -> bool:
        """Whether more runs cannot change the verdict, or chance cannot be the reason for it."""
        return self.right or self.chance <= FALSE_ALARMS

    def and_again(self, other: 'Row') -> 'Row':
        """With the runs of another row of this part, which may acquit it."""
        return replace(
            self,
            exact=min(self.exact, other.exact),
            port=min(self.port, other.port),
            torch=max(self.torch, other.torch),
            runs=self.runs + other.runs,
        )


@np.errstate(all='ignore')  # infinity less infinity is NaN, which no limit allows
def compare(name: str, label: str, limit: float, dtype: str, sides: Sides, *, scale: float = 0.0) -> Row:
    """The row of an output in `dtype`. Errors are relative to the output's size, or to `scale` where that is more."""
    difference = np.abs(sides.exact - sides.truth)
    worst = tuple(int(index) for index in np.unravel_index(difference.argmax(), difference.shape))
    largest, mean_square = max(float(np.abs(sides.truth).max()), scale), max(size(sides.truth), scale)
    return Row(
        name,
        label,
        exact=relative(float(difference[worst]), largest),
        worst=worst,
        port=relative(size(sides.port - sides.truth), mean_square),
        torch=relative(size(sides.torch - sides.truth), mean_square),
        limit=limit,
        floor=FLOOR[dtype],
    )


def settled(rows: list[Row], again: Callable[[int], list[Row]]) -> list[Row]:
    """The rows, with those of `again(run)` until all are right, or one is wrong and chance not the reason."""
    while not all(row.right for row in rows) and not any(not row.right and row.settled for row in rows):
        rows = [row.and_again(other) for row, other in zip(rows, again(rows[0].runs), strict=True)]
    return rows


def moved(numbers: np.ndarray, dtype: str, run: int, name: str = '') -> np.ndarray:
    """The numbers, moved at random by up to a unit in the last place of their largest in `dtype`, in their own dtype.

    `name` tells arrays apart that shall be moved independently.
    """
    exact = np.asarray(numbers, np.float64)
    unit = float(jnp.finfo(dtype).eps) * float(np.abs(exact).max(initial=0))
    random = np.random.default_rng([run, zlib.crc32(name.encode())])
    return (exact + unit * random.uniform(-1, 1, exact.shape)).astype(numbers.dtype)


def relative(error: float, to: float) -> float:
    """An error as a multiple; none is none, of whatever. NaN, as of a computation that overflowed, is infinite."""
    if error == 0:
        return 0.0
    return float(error / to) if to and not math.isnan(error) else math.inf


def size(x: np.ndarray) -> float:
    """The root mean square."""
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))
