"""Validation: two estimators of the negative log-likelihood bound, on draws that are fixed by the seed.

For an autoregressive model the likelihood is exact, and "exact" is its only estimator. Image models that are trained
with arccos masking are measured by their training loss, the estimator "arccos", which is not a bound.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Self, get_args

import numpy as np
import torch
from jaxtyping import Float, Int

from pipeline.config.schema import RunConfig
from pipeline.diffusion.partition import draw_order, draw_subset, given_roles, stratified
from pipeline.diffusion.schedule import hidden_share, weight
from pipeline.errors import CapabilityError
from pipeline.models.batch import Batch, Roles
from pipeline.models.denoiser import Denoiser
from pipeline.models.head import Modalities
from pipeline.reports.tables import two_decimals

Estimator = Literal["count", "mdlm", "exact", "arccos"]
Part = Literal["nothing", "caption", "image"]  # what is given of a caption and its image
PARTS = get_args(Part)
NORMAL_95 = 1.959964  # standard errors from the mean to either end of a 95% interval
CPU = torch.device("cpu")
Batches = Iterator[tuple[Int[np.ndarray, "b"], Batch]]  # indices of the rows, -1 for one that only fills up
Scorer = Callable[[Batch], torch.Tensor]  # Batch -> weighted sum of cross-entropies of every row


@dataclass(frozen=True)
class Masking:
    """How rows are hidden to measure a likelihood.

    Attributes:
        estimator: "count": n uniform in 1..L', a uniform subset of n positions, weight 1/n; exactly unbiased for the
            any-order bound. "mdlm": t uniform in [eps, 1], positions hidden with probability 1 - alpha(t), weight
            w(t) / L' (as in the papers; its expectation carries a factor 1 - eps). "exact": all positions, weight
            1 / L', for models that predict each position from those before it. "arccos": positions hidden with
            probability 2 arccos(u) / pi, weight 1 / (L' 2 / pi), the expected number of hidden positions.
        draws: maskings of every row.
        seed: fixes all maskings.
        eps: the smallest t of "mdlm".
        bos: whether every row begins with a token that is never hidden.
        batch: rows of a forward pass.

    Source: docs/method.md, "Validation"; L' is the number of positions without BOS, given tokens and padding.
    """

    estimator: Estimator
    draws: int
    seed: int
    eps: float = 1e-3
    bos: bool = False
    batch: int = 32

    @classmethod
    def of(cls, config: RunConfig, model: Denoiser, bos: bool) -> Self:
        """Make the masking that a config asks for, with the estimator that suits a model.

        Args:
            config: of the run.
            model: to measure.
            bos: whether every row begins with a token that is never hidden.

        Returns:
            The masking.
        """
        settings, diffusion = config.evaluation, config.diffusion
        estimator, draws = estimator_for(model, settings.estimator, settings.draws, diffusion.schedule)
        return cls(
            estimator, draws, config.seed, diffusion.eps, bos and not settings.score_bos, settings.batch
        )


@dataclass(frozen=True)
class Likelihood:
    """A measured bound, or the exact value.

    Attributes:
        nats: per predicted token.
        stderr: standard error of `nats` over rows; infinite for a single row.
        estimator, draws, seed: as in `Masking`.
        rows: number of rows.
    """

    nats: float
    stderr: float
    estimator: Estimator
    draws: int
    rows: int
    seed: int

    @property
    def perplexity(self) -> float:
        """Return exp(nats per token)."""
        return _exp(self.nats)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Return the 95% confidence interval of `nats`, normal over rows; None for a single row."""
        if not math.isfinite(self.stderr):
            return None
        return self.nats - NORMAL_95 * self.stderr, self.nats + NORMAL_95 * self.stderr

    @property
    def perplexity_interval(self) -> tuple[float, float] | None:
        """Return the 95% confidence interval of the perplexity; None for a single row."""
        return self.interval and (_exp(self.interval[0]), _exp(self.interval[1]))

    def __str__(self) -> str:
        method = f"{self.estimator} estimator, {self.rows} rows x {self.draws} draws, seed {self.seed}"
        nats = f"{self.nats:.4f}" + (f" +- {self.stderr:.4f}" if self.interval else "")
        if self.estimator == "arccos":
            return f"{nats} nats per masked token, {method}"
        interval = ""
        if self.perplexity_interval:
            low, high = map(two_decimals, self.perplexity_interval)
            interval = f"95% interval {low} to {high}; "
        return f"perplexity {two_decimals(self.perplexity)} ({interval}{nats} nats per token, {method})"


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # a diverged model is very bad, not an OverflowError


def masked_batches(
    masking: Masking,
    tokens: Int[np.ndarray, "R L"],
    labels: Int[np.ndarray, "R"] | None = None,
    roles: Roles | None = None,
    share: tuple[int, int] = (0, 1),
    device: torch.device = CPU,
) -> Batches:
    """Mask every row `masking.draws` times and yield one worker's share of the (row, draw) pairs in batches.

    Group 1 of a batch is hidden and predicted. The levels n and t are stratified over all pairs. The masks do not
    depend on the number of workers. Every worker gets the same number of batches; the last ones are filled up with
    rows of weight 0.

    Args:
        masking: how rows are hidden.
        tokens: the rows.
        labels: the rows' classes, for models that are conditioned on them.
        roles: given tokens and padding of the rows; None: neither.
        share: index of the worker and the number of workers.
        device: where the batches are put.

    Returns:
        Pairs of row indices (-1 for a row that only fills up a batch) and the batch.
    """
    count, length = tokens.shape
    (index, workers), batch, bos = share, masking.batch, masking.bos
    num_pairs = count * masking.draws
    levels = stratified(num_pairs, np.random.default_rng([masking.seed, masking.draws]))
    for first in range(index * batch, -(-num_pairs // (batch * workers)) * batch * workers, batch * workers):
        pairs = np.arange(first, first + batch)
        real = pairs < num_pairs
        pairs = np.where(real, pairs, 0)
        rows = pairs // masking.draws
        own = None if roles is None else roles.rows(rows)
        predicted = (np.full(batch, length - bos) if own is None else own.counts(bos))[:, None]
        rng = np.random.default_rng([masking.seed, masking.draws, first])
        weights: np.ndarray = 1 / predicted
        if masking.estimator == "count":
            n = 1 + np.floor(levels[pairs] * predicted[:, 0]).astype(np.int64)
            groups, weights = draw_subset(rng, n, length, bos, own), 1 / n[:, None]
        elif masking.estimator == "exact":
            groups = np.ones((batch, length), bool)
        else:
            schedule = "arccos" if masking.estimator == "arccos" else "loglinear"
            groups = rng.random((batch, length)) < hidden_share(levels[pairs], schedule, masking.eps)[:, None]
            t = masking.eps + (1 - masking.eps) * levels[pairs]
            weights = (np.pi / 2 if schedule == "arccos" else weight(t)[:, None]) / predicted
        groups[:, :bos] = False
        if own is not None:
            groups &= own.targets(length, bos)
        seed, given = [masking.seed, masking.draws, 0, 1], None if own is None else own.known(length)
        order = draw_order(seed, pairs, length, bos, given)
        ids, weighted = tokens[rows].astype(np.int64), weights * groups * real[:, None]
        classes = None if labels is None else labels[rows]
        part = Batch.of_arrays(
            ids,
            groups,
            groups,
            weighted,
            labels=classes,
            order=order,
            roles=own,
            device=device,
        )
        yield np.where(real, rows, -1), part


@torch.no_grad()
def row_sums(score: Scorer, batches: Batches, rows: int) -> Float[torch.Tensor, "R"]:
    """Sum every row's estimates over its draws.

    Args:
        score: the model, or any function that gives the weighted sum of cross-entropies of every row.
        batches: from `masked_batches`.
        rows: number of rows, those of other workers included.

    Returns:
        Float64 sums on the CPU; 0 for rows of other workers.
    """
    sums = torch.zeros(rows, dtype=torch.float64)
    for index, batch in batches:
        real = torch.from_numpy(index >= 0)
        values = score(batch).double().cpu()
        sums.index_add_(0, torch.from_numpy(index)[real], values[real])
    return sums


def pair_nats(
    model: Denoiser,
    rows: Int[np.ndarray, "n L"],
    given: Part,
    *,
    draws: int,
    seed: int,
    batch: int = 64,
) -> Float[torch.Tensor, "n"]:
    """Bound the negative log-likelihood of what is not given of captions and images, in nats.

    Calls with as many rows hide the same places of a row, so that differences between them are more exact than the
    bounds.

    Args:
        model: of captions and images, in eval mode.
        rows: ids.
        given: part of every row that is given.
        draws: maskings of every row.
        seed: of the maskings.
        batch: rows of a forward pass.

    Returns:
        [n] float64; exact for an autoregressive model.

    Raises:
        CapabilityError: an autoregressive model and a given image.
    """
    modalities = model.head.modalities
    assert modalities is not None, "the rows of the model are no captions and images"
    if model.left_to_right and given == "image":
        raise CapabilityError("given: 'image', but an autoregressive model reads captions first")
    estimator, draws = estimator_for(model, "count", draws)
    roles = roles_of(given, len(rows), rows.shape[1], modalities)
    masking = Masking(estimator, draws, seed, batch=batch)
    batches = masked_batches(masking, rows, roles=roles, device=model.head.weight.device)
    sums = row_sums(model, batches, len(rows))
    return sums / draws * torch.from_numpy(roles.counts(False))


def roles_of(given: Part, count: int, length: int, modalities: Modalities) -> Roles:
    """Return the roles of rows of captions and images of which all have the same part given.

    Args:
        given: the part.
        count: number of rows.
        length: L.
        modalities: of the rows.
    """
    return given_roles(np.full(count, PARTS.index(given)), modalities.places, length)


def estimator_for(
    model: Denoiser, estimator: Estimator, draws: int, schedule: str = "loglinear"
) -> tuple[Estimator, int]:
    """Choose the estimator and the number of draws that suit a model.

    Args:
        model: an autoregressive one has an exact likelihood, which is measured once.
        estimator: "count" or "mdlm", as configured.
        draws: as configured.
        schedule: of training; "arccos" has its own estimator.
    """
    if model.left_to_right:
        return "exact", 1
    return ("arccos" if schedule == "arccos" else estimator), draws


def summarise(sums: Float[torch.Tensor, "R"], masking: Masking, roles: Roles | None = None) -> Likelihood:
    """Average the row sums of all workers; the standard error is over rows, each averaged over its draws.

    Rows with given tokens or padding weigh as many tokens as they have to predict, so that the result is nats per
    token of all rows together; its standard error is then that of a ratio (delta method).

    Args:
        sums: of the estimates of every row over its draws.
        masking: that they were measured with.
        roles: given tokens and padding of the rows; None: neither.
    """
    per_row, rows = sums / masking.draws, len(sums)
    weights = torch.ones_like(sums)
    if roles is not None:
        weights = torch.from_numpy(roles.counts(masking.bos)).double()
        weights = weights / weights.mean()
    nats = float((weights * per_row).mean())
    spread = weights * (per_row - nats)
    stderr = float(spread.std(unbiased=True)) / math.sqrt(rows) if rows > 1 else math.inf
    return Likelihood(nats, stderr, masking.estimator, masking.draws, rows, masking.seed)
