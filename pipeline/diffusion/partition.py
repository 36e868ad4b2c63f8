"""Random times and groups as a pure function of (seed, step, index in the global batch)."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, SupportsInt

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.config.schema import DiffusionConfig
from pipeline.diffusion.schedule import hidden_share
from pipeline.models.batch import Roles


class StepDraws(NamedTuple):
    """The random draws of a training step.

    Attributes:
        t: [B] times in [eps, 1]; of no meaning under the arccos schedule.
        groups: [B, L], True = group 1, with the schedule's hidden share: 1 - alpha(t) if it is log-linear.
    """

    t: Float[np.ndarray, "B"]
    groups: Bool[np.ndarray, "B L"]


def stratified(count: int, rng: np.random.Generator) -> Float[np.ndarray, "count"]:
    """Draw low-discrepancy uniforms: one random offset, equal spacing, in random order.

    Args:
        count: how many.
        rng: source of the offset and of the order, which is random so that no worker's share of a batch holds all
            the large ones.

    Returns:
        [count] in [0, 1).

    Source:
        arXiv 2406.07524, section 3 (low-discrepancy sampling of t).
    """
    return rng.permutation((rng.random() + np.arange(count) / count) % 1)


def uniforms_of_rows(
    rng: np.random.Generator, rows: Iterable[SupportsInt], shape: tuple[int, ...]
) -> Float[np.ndarray, "m ..."]:
    """Draw some rows of the uniforms of a whole batch, at a cost that does not depend on the size of the batch.

    Args:
        rng: of PCG64, as it would draw the batch next.
        rows: of the batch, m of them.
        shape: of a row.

    Returns:
        [m, *shape], bit by bit the rows of `rng.random((batch, *shape))`.
    """
    places, width = list(map(int, rows)), math.prod(shape)
    uniforms, drawn = np.empty((len(places), width)), 0
    for place, values in zip(places, uniforms, strict=True):
        rng.bit_generator.advance((place * width - drawn) % 2**128)  # type: ignore[attr-defined]  # of PCG64
        rng.random(out=values)
        drawn = (place + 1) * width
    return uniforms.reshape(len(places), *shape)


def draw(
    config: DiffusionConfig,
    *,
    seed: int,
    step: int,
    shape: tuple[int, int],
    bos: bool,
    least: float | None = None,
    rows: Int[np.ndarray, "m"] | None = None,
) -> StepDraws:
    """Draw times and groups of the global batch of a step, or of the rows that a worker serves.

    What a row gets is a function of (seed, step, row), so nothing depends on which worker serves which rows.

    Args:
        config: schedule and its eps.
        seed: of the run.
        step: updates before this one.
        shape: (rows of the global batch, L).
        bos: position 0 holds BOS, which is in group 0.
        least: smallest time of the log-linear schedule; None: eps.
        rows: of the global batch that are drawn; None: all.

    Returns:
        Times and groups of these rows.
    """
    eps = config.eps
    rng = np.random.default_rng([seed, step])
    u = stratified(shape[0], rng)
    if least is not None:  # the same uniforms, moved into [least, 1]
        u = (least - eps + (1 - least) * u) / (1 - eps)
    if rows is None:
        rows = np.arange(shape[0])
    u = u[rows]
    groups = uniforms_of_rows(rng, rows, shape[1:]) < hidden_share(u, config.schedule, eps)[:, None]
    groups[:, :bos] = False
    return StepDraws(eps + (1 - eps) * u, groups)


def draw_order(
    seed: Sequence[int],
    rows: Iterable[SupportsInt],
    length: int,
    bos: bool,
    given: Bool[np.ndarray, "m L"] | None = None,
) -> Int[np.ndarray, "m L"]:
    """Draw uniform random orders of revelation, each as a function of (seed, row).

    Args:
        seed: numbers that fix all orders, such as the seed of a run and a step.
        rows: whose orders are drawn, m of them.
        length: L.
        bos: position 0 holds BOS, which comes first.
        given: given tokens of every row, which come next, in an order of their own; None: none.

    Returns:
        [m, L] rank of every position, from 0.

    Source:
        docs/method.md section 9.
    """
    uniforms = np.stack([np.random.default_rng([*seed, row]).random(length) for row in map(int, rows)])
    if given is not None:
        uniforms -= given
    uniforms[:, :bos] = -2
    return uniforms.argsort(axis=1).argsort(axis=1)


def by_rank(where: Bool[Tensor, "B L"], order: Int[Tensor, "B L"] | None) -> Int[Tensor, "T"]:
    """List positions in the order of their revelation.

    Args:
        where: the positions.
        order: rank of every position in its row; None: ascending positions.

    Returns:
        [T] flat indices, row after row.
    """
    index = where.flatten().nonzero().squeeze(1)
    if order is None:
        return index
    key = index // where.shape[1] * where.shape[1] + order.flatten()[index]
    return index[key.argsort()]


def draw_dropped(seed: int, step: int, batch: int, rate: float) -> Bool[np.ndarray, "B"]:
    """Draw which rows of a global batch are trained without their class, for classifier-free guidance.

    Args:
        seed: of the run.
        step: updates before this one.
        batch: rows of the global batch.
        rate: share of such rows.

    Returns:
        [B], True = without its class.
    """
    return np.random.default_rng([seed, step, 1]).random(batch) < rate


def cut_answers(
    roles: Roles, index: Int[np.ndarray, "m"], *, seed: int, step: int, batch: int, block: int
) -> Roles:
    """Let the answers of some rows of a global batch end with a random one of their blocks.

    A masked model reads how many tokens are hidden, so it must learn to fill a block without knowing of later ones.

    Args:
        roles: of the rows.
        index: of the rows in the global batch.
        seed: of the run.
        step: updates before this one.
        batch: rows of the global batch.
        block: tokens of a block.

    Returns:
        The roles of the shorter rows.
    """
    uniforms = np.random.default_rng([seed, step, 4]).random(batch)[index]
    blocks = 1 + np.floor(uniforms * -(-roles.counts(False) // block)).astype(np.int64)
    return roles._replace(lengths=np.minimum(roles.lengths, roles.given + blocks * block))


def draw_given(
    index: Int[np.ndarray, "m"], *, seed: int, step: int, batch: int, caption: int, length: int
) -> Roles:
    """Draw which part of rows of captions and images is given: nothing, the caption or the image, a third each.

    Args:
        index: of the rows in the global batch.
        seed: of the run.
        step: updates before this one.
        batch: rows of the global batch.
        caption: positions of the caption, which come first.
        length: L.

    Returns:
        The roles of the rows.
    """
    part = np.floor(3 * stratified(batch, np.random.default_rng([seed, step, 5]))[index]).astype(np.int64)
    return given_roles(part, caption, length)


def given_roles(part: Int[np.ndarray, "m"], caption: int, length: int) -> Roles:
    """Return the roles of rows of which a part is given.

    Args:
        part: 0: nothing is given, 1: the caption, 2: the image.
        caption: positions of the caption, which come first.
        length: L.
    """
    ends = np.array([0, caption, length])
    return Roles(ends[part], np.full_like(part, length), np.array([0, 0, caption])[part])


def draw_subset(
    rng: np.random.Generator,
    counts: Int[np.ndarray, "B"],
    length: int,
    bos: bool,
    roles: Roles | None = None,
) -> Bool[np.ndarray, "B L"]:
    """Draw a uniform random subset of positions in every row.

    Args:
        rng: source of the subsets.
        counts: number of positions in every row's subset.
        length: L.
        bos: position 0 holds BOS, which is in no subset.
        roles: given tokens and padding of the rows, which are in no subset; None: neither.

    Returns:
        [B, L], True = in the subset.
    """
    noise = rng.random((len(counts), length))
    noise[:, :bos] = np.inf
    if roles is not None:
        noise[~roles.targets(length, bos)] = np.inf
    return noise.argsort(axis=1).argsort(axis=1) < counts[:, None]
