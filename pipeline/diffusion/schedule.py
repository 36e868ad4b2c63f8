"""The log-linear noise schedule and the loss weights that follow from it (method.md sections 1 and 2)."""

import numpy as np
from jaxtyping import Float

Times = Float[np.ndarray, "..."]


def alpha(t: Times, eps: float) -> Times:
    """Share of clean tokens at time t: `1 - (1 - eps) t`."""
    return 1 - (1 - eps) * t


def hidden_share(u: Times, schedule: str, eps: float) -> Times:
    """Probability that a token is hidden, for u uniform in [0, 1].

    `loglinear`: `1 - alpha(t)` at `t = eps + (1 - eps) u`. `arccos`: `2 arccos(u) / pi`, whose mean is 2 / pi.
    Source: method.md section 1; arXiv 2503.17076 (arccos).
    """
    return 1 - alpha(eps + (1 - eps) * u, eps) if schedule == "loglinear" else 2 / np.pi * np.arccos(u)


def weight(t: Times) -> Times:
    """Loss weight `-alpha'(t) / (1 - alpha(t)) = 1 / t` of a token hidden at time t."""
    return 1 / t


def complement(t: Times, eps: float, kind: str) -> Times:
    """The time t' of group 0, when group 1 is the side hidden at time t.

    `matched`: the time whose hidden share is exactly group 0's, `1 - alpha(t') = alpha(t)`; its weight is
    bounded by `1 / eps` and unbiased. `paper`: `1 - t`, whose weight has no bound while group 0 never
    becomes rarer than `eps`. Source: method.md section 2 (arXiv 2505.18883 uses `1 - t`).
    """
    return alpha(t, eps) / (1 - eps) if kind == "matched" else 1 - t
