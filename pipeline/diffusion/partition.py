"""Random times and groups as a pure function of (seed, step, index in the global batch)."""

import numpy as np
from jaxtyping import Bool, Float, Int

from pipeline.diffusion.schedule import hidden_share


def stratified(count: int, rng: np.random.Generator) -> Float[np.ndarray, "count"]:
    """Low-discrepancy uniforms in [0, 1): one offset, equal spacing, in random order.

    The order is permuted so that no worker's share of a batch holds all the large ones.
    Source: arXiv 2406.07524, section 3 (low-discrepancy sampling of t).
    """
    return rng.permutation((rng.random() + np.arange(count) / count) % 1)


def draw(
    seed: int,
    step: int,
    batch: int,
    length: int,
    eps: float,
    bos: bool,
    schedule: str = "loglinear",
    least: float | None = None,
) -> tuple[Float[np.ndarray, "B"], Bool[np.ndarray, "B L"]]:
    """Times and groups of the whole global batch of a step.

    Every worker draws the whole batch (milliseconds) and takes its rows: nothing depends on who serves them.

    Args:
        least: smallest time of the log-linear schedule; None: eps.

    Returns:
        t: [B] in [least, 1] (of no meaning under the arccos schedule); groups: [B, L], True = group 1, with the
        schedule's hidden share, 1 - alpha(t) if it is log-linear. BOS is in group 0.
    """
    rng = np.random.default_rng([seed, step])
    u = stratified(batch, rng)
    if least is not None:  # the same uniforms, moved into [least, 1]
        u = (least - eps + (1 - least) * u) / (1 - eps)
    groups = rng.random((batch, length)) < hidden_share(u, schedule, eps)[:, None]
    if bos:
        groups[:, 0] = False
    return eps + (1 - eps) * u, groups


def draw_dropped(seed: int, step: int, batch: int, rate: float) -> Bool[np.ndarray, "B"]:
    """Which rows of a global batch are seen without their class, for classifier-free guidance."""
    return np.random.default_rng([seed, step, 1]).random(batch) < rate


def draw_subset(
    rng: np.random.Generator, counts: Int[np.ndarray, "B"], length: int, bos: bool
) -> Bool[np.ndarray, "B L"]:
    """Uniform random subsets of `counts[b]` positions, BOS never among them."""
    noise = rng.random((len(counts), length))
    if bos:
        noise[:, 0] = np.inf
    rank = noise.argsort(axis=1).argsort(axis=1)
    return rank < counts[:, None]
