"""Which positions a sampling step reveals."""

import numpy as np
from jaxtyping import Int

from pipeline.errors import ConfigError, did_you_mean

ORDERS = ("uniform", "left_to_right")


def check(order: str, steps: int, unknown: int) -> None:
    """Refuse an unknown order, or more steps than there are positions to reveal.

    Raises:
        ConfigError: names the choices, or the largest number of steps.
    """
    if order not in ORDERS:
        raise ConfigError(f"order: {order!r} is not one of {', '.join(ORDERS)}{did_you_mean(order, ORDERS)}")
    if not 1 <= steps <= max(unknown, 1):
        raise ConfigError(
            f"steps: {steps} for {unknown} positions to reveal; expected 1 to {max(unknown, 1)}"
        )


def uniform(
    unknown: Int[np.ndarray, "U"], steps: int, rng: np.random.Generator
) -> list[Int[np.ndarray, "n"]]:
    """A random permutation, cut into `steps` parts whose sizes differ by at most one."""
    return np.array_split(rng.permutation(unknown), steps)


def plan(
    order: str, unknown: Int[np.ndarray, "U"], steps: int, rng: np.random.Generator
) -> list[Int[np.ndarray, "n"]]:
    """The positions of every step of one row; `order` is one of ORDERS."""
    if order == "left_to_right":
        return np.array_split(unknown, steps)
    return uniform(unknown, steps, rng)
