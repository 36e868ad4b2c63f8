"""The noise schedules and the loss weights that follow from them (docs/method.md sections 1 and 2)."""

import numpy as np
from jaxtyping import Float

Times = Float[np.ndarray, "..."]


def alpha(t: Times, eps: float) -> Times:
    """Return the share of clean tokens at time t under the log-linear schedule, `1 - (1 - eps) t`."""
    return 1 - (1 - eps) * t


def hidden_share(u: Times, schedule: str, eps: float) -> Times:
    """Return the probability that a token is hidden.

    Args:
        u: uniform in [0, 1].
        schedule: "loglinear": `1 - alpha(t)` at `t = eps + (1 - eps) u`; "arccos": `2 arccos(u) / pi`, whose mean
            is 2 / pi.
        eps: smallest time of the log-linear schedule.

    Source:
        docs/method.md section 1; arXiv 2503.17076 (arccos).
    """
    return 1 - alpha(eps + (1 - eps) * u, eps) if schedule == "loglinear" else 2 / np.pi * np.arccos(u)


def weight(t: Times) -> Times:
    """Return the loss weight `-alpha'(t) / (1 - alpha(t)) = 1 / t` of a token hidden at time t."""
    return 1 / t


def complement(t: Times, eps: float, kind: str) -> Times:
    """Return the time t' at which group 0 counts as hidden, when group 1 is hidden at time t.

    Args:
        t: time of group 1.
        eps: smallest time of the schedule.
        kind: "matched": the time whose hidden share is exactly group 0's, `1 - alpha(t') = alpha(t)`; its weight
            is bounded by `1 / eps` and unbiased. "paper": `1 - t`, whose weight has no bound while group 0 never
            becomes rarer than `eps`.

    Source:
        docs/method.md section 2 (arXiv 2505.18883 uses `1 - t`).
    """
    return alpha(t, eps) / (1 - eps) if kind == "matched" else 1 - t
