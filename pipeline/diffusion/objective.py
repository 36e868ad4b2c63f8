"""What is predicted from what, and with which weight: the training objective of every model."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from pipeline.config.schema import DiffusionConfig
from pipeline.diffusion.schedule import complement, weight
from pipeline.models.denoiser import Batch


def loss_weights(
    t: Float[np.ndarray, "B"], groups: Bool[np.ndarray, "B L"], config: DiffusionConfig
) -> Float[np.ndarray, "B L"]:
    """Weight of every position: w(t) in group 1, w(t') in group 0, or 1 (`loss_weight: uniform`)."""
    if config.loss_weight == "uniform":
        return np.ones(groups.shape)
    other = complement(t, config.eps, config.complement_time)
    return np.where(groups, weight(t)[:, None], weight(other)[:, None])


def training_batch(
    tokens: Int[np.ndarray, "B L"],
    t: Float[np.ndarray, "B"],
    groups: Bool[np.ndarray, "B L"],
    present: Bool[np.ndarray, "B"],
    config: DiffusionConfig,
    both_groups: bool,
    global_batch: int,
    bos: bool,
    device: torch.device,
) -> Batch:
    """A micro-batch whose row losses, summed over the global batch, are the objective.

    PGM and complementary MDLM learn from both groups at half weight, a masked model from group 1; all are
    divided by the global number of target positions, global batch x L'. Rows that are not `present` carry
    weight 0.

    Source: arXiv 2505.18883, equation 8 with its cases as in the text (method.md section 2).
    """
    targets = np.ones_like(groups) if both_groups else groups.copy()
    length = groups.shape[1] - bos
    if bos:
        targets[:, 0] = False
    weights = loss_weights(t, groups, config) * targets * present[:, None]
    weights *= (0.5 if both_groups else 1.0) / (global_batch * length)
    return Batch(
        tokens=torch.from_numpy(tokens),
        groups=torch.from_numpy(groups),
        targets=torch.from_numpy(targets),
        weights=torch.from_numpy(weights.astype(np.float32)),
        device=device,
    )


def next_token_batch(
    tokens: Int[np.ndarray, "B L"],
    present: Bool[np.ndarray, "B"],
    global_batch: int,
    bos: bool,
    device: torch.device,
) -> Batch:
    """The same for an autoregressive model: all tokens but BOS are targets of weight 1 / (global batch x L')."""
    targets = np.ones(tokens.shape, dtype=bool)
    targets[:, :bos] = False
    weights = targets * present[:, None] / (global_batch * (tokens.shape[1] - bos))
    return Batch(
        tokens=torch.from_numpy(tokens),
        groups=torch.from_numpy(targets),
        targets=torch.from_numpy(targets),
        weights=torch.from_numpy(weights.astype(np.float32)),
        device=device,
    )
