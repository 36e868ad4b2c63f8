"""Validation: two estimators of the negative log-likelihood bound, on draws that are fixed by the seed.

For an autoregressive model the likelihood is exact, and the estimator "exact" is its only one. Image models that
are trained with arccos masking are judged by what they are trained for, the estimator "arccos": no bound.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int

from pipeline.diffusion.partition import draw_subset, stratified
from pipeline.diffusion.schedule import hidden_share, weight
from pipeline.errors import CapabilityError
from pipeline.models.denoiser import Batch, Denoiser

Estimator = Literal["count", "mdlm", "exact", "arccos"]
NORMAL_95 = 1.959964  # standard errors from the mean to either end of a 95% interval
Scorer = Callable[[Batch], torch.Tensor]  # Batch -> weighted sum of cross-entropies of every row


@dataclass(frozen=True)
class Likelihood:
    """A measured bound, or the exact value.

    Attributes:
        nats: per predicted token.
        stderr: standard error of `nats` over rows.
        estimator, draws, rows, seed: how it was measured.
    """

    nats: float
    stderr: float
    estimator: Estimator
    draws: int
    rows: int
    seed: int

    @property
    def perplexity(self) -> float:
        """exp(nats per token)."""
        return _exp(self.nats)

    @property
    def interval(self) -> tuple[float, float]:
        """95% confidence interval of `nats`: normal over rows, unbounded for a single one."""
        return self.nats - NORMAL_95 * self.stderr, self.nats + NORMAL_95 * self.stderr

    @property
    def perplexity_interval(self) -> tuple[float, float]:
        """95% confidence interval of the perplexity."""
        low, high = self.interval
        return _exp(low), _exp(high)

    def __str__(self) -> str:
        if self.estimator == "arccos":
            return f"{self.nats:.4f} +- {self.stderr:.4f} nats per masked token, {self._how}"
        low, high = self.perplexity_interval
        within = f"95% interval {low:.2f} to {high:.2f}; " if math.isfinite(self.stderr) else ""
        return (
            f"perplexity {self.perplexity:.2f} ({within}{self.nats:.4f} +- {self.stderr:.4f} nats per token, "
            f"{self._how})"
        )

    @property
    def _how(self) -> str:
        return f"{self.estimator} estimator, {self.rows} rows x {self.draws} draws, seed {self.seed}"


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # a diverged model is very bad, not an OverflowError


def masked_batches(
    tokens: Int[np.ndarray, "R L"],
    estimator: Estimator,
    draws: int,
    seed: int,
    eps: float,
    bos: bool,
    batch: int,
    rank: int,
    workers: int,
    device: torch.device,
    labels: Int[np.ndarray, "R"] | None = None,
) -> Iterator[tuple[Int[np.ndarray, "b"], Batch]]:
    """This worker's share of all (row, draw) pairs, as batches with their row indices.

    Group 1 is hidden and predicted. `count`: n uniform in 1..L', a uniform subset of n positions, weight 1/n;
    exactly unbiased for the any-order bound. `mdlm`: t uniform in [eps, 1], positions hidden with probability
    1 - alpha(t), weight w(t) / L' (as in the papers; its expectation carries a factor 1 - eps). n and t are
    stratified over all pairs. `exact`: all positions, weight 1 / L', for models that predict each from those
    before it. `arccos`: positions hidden with probability 2 arccos(u) / pi, weight 1 / (L' 2 / pi), the expected
    number of them. Nothing depends on the number of workers; every worker gets the same number of
    batches, the last ones filled up with rows of weight 0, whose index is -1.

    Source: method.md section 2, "Validation has two estimators".
    """
    count, length = tokens.shape
    predicted = length - bos
    rng = np.random.default_rng([seed, draws])
    levels = stratified(count * draws, rng)
    every = -(-count * draws // (batch * workers))  # batches of one worker
    for index in range(every):
        first = (index * workers + rank) * batch
        pairs = np.arange(first, first + batch)
        real = pairs < count * draws
        pairs = np.where(real, pairs, 0)
        rows = pairs // draws
        own = np.random.default_rng([seed, draws, first])
        if estimator == "count":
            n = 1 + np.floor(levels[pairs] * predicted).astype(np.int64)
            groups = draw_subset(own, n, length, bos)
            weights = np.repeat(1 / n[:, None], length, axis=1)
        elif estimator == "exact":
            groups = np.repeat(np.arange(length)[None] >= bos, batch, axis=0)
            weights = np.full((batch, length), 1 / predicted)
        else:
            schedule = "arccos" if estimator == "arccos" else "loglinear"
            t = eps + (1 - eps) * levels[pairs]
            groups = own.random((batch, length)) < hidden_share(levels[pairs], schedule, eps)[:, None]
            groups[:, :bos] = False
            weights = np.full((batch, length), np.pi / 2 / predicted)
        if estimator == "mdlm":
            weights = np.repeat(weight(t)[:, None] / predicted, length, axis=1)
        weights = weights * groups * real[:, None]
        yield (
            np.where(real, rows, -1),
            Batch(
                tokens=torch.from_numpy(tokens[rows].astype(np.int64)),
                groups=torch.from_numpy(groups),
                targets=torch.from_numpy(groups),
                weights=torch.from_numpy(weights.astype(np.float32)),
                condition=None if labels is None else torch.from_numpy(labels[rows]),
                device=device,
            ),
        )


@torch.no_grad()
def row_sums(
    score: Scorer, batches: Iterator[tuple[Int[np.ndarray, "b"], Batch]], rows: int
) -> Float[torch.Tensor, "R"]:
    """Sum over draws of every row's estimate, float64 on the CPU; zero for rows of other workers."""
    sums = torch.zeros(rows, dtype=torch.float64)
    for index, batch in batches:
        real = torch.from_numpy(index >= 0)
        values = score(batch).double().cpu()
        sums.index_add_(0, torch.from_numpy(index)[real], values[real])
    return sums


def estimator_for(
    model: Denoiser, asked: Estimator, draws: int, schedule: str = "loglinear"
) -> tuple[Estimator, int]:
    """The estimator and the draws that a model is measured with: an exact likelihood is measured once."""
    if model.left_to_right:
        return "exact", 1
    return ("arccos" if schedule == "arccos" else asked), draws


def summarise(sums: Float[torch.Tensor, "R"], estimator: Estimator, draws: int, seed: int) -> Likelihood:
    """The bound from all workers' row sums; the standard error is over rows, each averaged over its draws."""
    per_row = sums / draws
    rows = len(per_row)
    stderr = float(per_row.std(unbiased=True)) / math.sqrt(rows) if rows > 1 else math.inf
    return Likelihood(float(per_row.mean()), stderr, estimator, draws, rows, seed)


def measure(
    score: Scorer,
    tokens: Int[np.ndarray, "R L"],
    estimator: Estimator,
    draws: int,
    seed: int,
    eps: float = 1e-3,
    bos: bool = False,
    batch: int = 32,
    device: torch.device | None = None,
    labels: Int[np.ndarray, "R"] | None = None,
) -> Likelihood:
    """The bound, or the exact value, on one machine.

    Raises:
        CapabilityError: "exact" for a model that is not autoregressive, or another estimator for one that is.
    """
    if isinstance(score, Denoiser) and (estimator == "exact") != score.left_to_right:
        raise CapabilityError(
            f"estimator {estimator!r} does not fit {type(score).__name__}; "
            f"expected {'exact' if score.left_to_right else 'count or mdlm'}"
        )
    device = device or torch.device("cpu")
    batches = masked_batches(tokens, estimator, draws, seed, eps, bos, batch, 0, 1, device, labels)
    return summarise(row_sums(score, batches, len(tokens)), estimator, draws, seed)
