"""The likelihood of a model in one process, to compare with that of workers and actors."""

import numpy as np
from jaxtyping import Int

from pipeline.errors import CapabilityError
from pipeline.metrics.likelihood import Likelihood, Masking, Scorer, masked_batches, row_sums, summarise
from pipeline.models.denoiser import Denoiser


def measure(
    score: Scorer,
    masking: Masking,
    tokens: Int[np.ndarray, "R L"],
    labels: Int[np.ndarray, "R"] | None = None,
) -> Likelihood:
    """Measure the bound, or the exact value, in this process.

    Args:
        score: as in `row_sums`.
        masking: as in `masked_batches`.
        tokens: as in `masked_batches`.
        labels: as in `masked_batches`.

    Raises:
        CapabilityError: "exact" for a model that is not autoregressive, or another estimator for one that is.
    """
    if isinstance(score, Denoiser) and (masking.estimator == "exact") != score.left_to_right:
        raise CapabilityError(
            f"estimator {masking.estimator!r} does not fit {type(score).__name__}; "
            f"expected {'exact' if score.left_to_right else 'count or mdlm'}"
        )
    return summarise(row_sums(score, masked_batches(masking, tokens, labels), len(tokens)), masking)
