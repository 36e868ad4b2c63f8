"""Random times and groups as a pure function of (seed, step, index in the global batch)."""

import numpy as np
from jaxtyping import Bool, Float, Int

from pipeline.diffusion.schedule import alpha


def stratified(count: int, rng: np.random.Generator) -> Float[np.ndarray, "count"]:
    """Low-discrepancy uniforms in [0, 1): one offset, equal spacing, in random order.

    The order is permuted so that no worker's share of a batch holds all the large ones.
    Source: arXiv 2406.07524, section 3 (low-discrepancy sampling of t).
    """
    return rng.permutation((rng.random() + np.arange(count) / count) % 1)


def draw(
    seed: int, step: int, batch: int, length: int, eps: float, bos: bool
) -> tuple[Float[np.ndarray, "B"], Bool[np.ndarray, "B L"]]:
    """Times and groups of the whole global batch of a step.

    Every worker draws the whole batch (milliseconds) and takes its rows: nothing depends on who serves them.

    Returns:
        t: [B] in [eps, 1]; groups: [B, L], True = group 1, with probability 1 - alpha(t). BOS is in group 0.
    """
    rng = np.random.default_rng([seed, step])
    t = eps + (1 - eps) * stratified(batch, rng)
    groups = rng.random((batch, length)) < (1 - alpha(t, eps))[:, None]
    if bos:
        groups[:, 0] = False
    return t, groups


def draw_subset(
    rng: np.random.Generator, counts: Int[np.ndarray, "B"], length: int, bos: bool
) -> Bool[np.ndarray, "B L"]:
    """Uniform random subsets of `counts[b]` positions, BOS never among them."""
    noise = rng.random((len(counts), length))
    if bos:
        noise[:, 0] = np.inf
    rank = noise.argsort(axis=1).argsort(axis=1)
    return rank < counts[:, None]
