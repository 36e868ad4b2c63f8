"""What is predicted from what, and with which weight: the training objective of every model."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from pipeline.config.schema import DiffusionConfig
from pipeline.diffusion.schedule import complement, weight
from pipeline.models.denoiser import Batch
from pipeline.models.distill_loss import DistillTargets


def loss_weights(
    t: Float[np.ndarray, "B"], groups: Bool[np.ndarray, "B L"], config: DiffusionConfig
) -> Float[np.ndarray, "B L"]:
    """Weight of every position: w(t) in group 1, w(t') in group 0; 1 for `loss_weight: uniform` and for images."""
    if config.loss_weight == "uniform" or config.schedule == "arccos":
        return np.ones(groups.shape)
    other = complement(t, config.eps, config.complement_time)
    return np.where(groups, weight(t)[:, None], weight(other)[:, None])


def normaliser(groups: Bool[np.ndarray, "B L"], config: DiffusionConfig, both_groups: bool, bos: bool) -> int:
    """What the weighted cross-entropies of a global batch are divided by, from its groups.

    Text: the target positions B L', twice that where both groups are learnt from. Images (arccos): B L' where
    both are, else the positions that are hidden.

    Source: method.md section 2, "Normaliser".
    """
    rows, length = groups.shape
    positions = rows * (length - bos)
    if config.schedule == "loglinear":
        return positions * (2 if both_groups else 1)
    return positions if both_groups else max(1, int(groups.sum()))


def training_batch(
    tokens: Int[np.ndarray, "B L"],
    t: Float[np.ndarray, "B"],
    groups: Bool[np.ndarray, "B L"],
    present: Bool[np.ndarray, "B"],
    config: DiffusionConfig,
    both_groups: bool,
    divisor: int,
    bos: bool,
    device: torch.device,
    labels: Int[np.ndarray, "B"] | None = None,
) -> Batch:
    """A micro-batch whose row losses, summed over the global batch, are the objective.

    PGM and complementary MDLM learn from both groups, a masked model from group 1. Rows that are not `present`
    carry weight 0.

    Args:
        divisor: `normaliser` of the global batch.

    Source: arXiv 2505.18883, equation 8 with its cases as in the text (method.md section 2).
    """
    targets = np.ones_like(groups) if both_groups else groups.copy()
    if bos:
        targets[:, 0] = False
    weights = loss_weights(t, groups, config) * targets * present[:, None] / divisor
    return as_batch(tokens, groups, targets, weights, labels, device)


def next_token_batch(
    tokens: Int[np.ndarray, "B L"],
    present: Bool[np.ndarray, "B"],
    global_batch: int,
    bos: bool,
    device: torch.device,
    labels: Int[np.ndarray, "B"] | None = None,
) -> Batch:
    """The same for an autoregressive model: all tokens but BOS are targets of weight 1 / (global batch x L')."""
    targets = np.ones(tokens.shape, dtype=bool)
    targets[:, :bos] = False
    weights = targets * present[:, None] / (global_batch * (tokens.shape[1] - bos))
    return as_batch(tokens, targets, targets, weights, labels, device)


def as_batch(
    tokens: Int[np.ndarray, "B L"],
    groups: Bool[np.ndarray, "B L"],
    targets: Bool[np.ndarray, "B L"],
    weights: Float[np.ndarray, "B L"],
    labels: Int[np.ndarray, "B"] | None,
    device: torch.device,
    teaching: DistillTargets | None = None,
) -> Batch:
    """A batch from arrays; see `Batch`."""
    return Batch(
        tokens=torch.from_numpy(tokens),
        groups=torch.from_numpy(groups),
        targets=torch.from_numpy(targets),
        weights=torch.from_numpy(weights.astype(np.float32)),
        condition=None if labels is None else torch.from_numpy(labels),
        device=device,
        teaching=teaching,
    )
