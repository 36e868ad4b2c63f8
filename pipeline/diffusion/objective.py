"""The training objective of every model: which positions are predicted, and with which weights."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from pipeline.config.schema import DiffusionConfig
from pipeline.diffusion.partition import StepDraws
from pipeline.diffusion.schedule import complement, weight
from pipeline.models.batch import Batch, Roles


@dataclass(frozen=True)
class Objective:
    """The objective of a model.

    Attributes:
        config: schedule and weights of diffusion models.
        bos: position 0 holds BOS, which is never a target.
        both_groups: the model learns from both groups (PGM, complementary MDLM), else from group 1 only.
        left_to_right: the model is autoregressive and learns from all tokens but BOS, whatever the groups.
    """

    config: DiffusionConfig
    bos: bool
    both_groups: bool
    left_to_right: bool = False

    def weights(self, draws: StepDraws) -> Float[np.ndarray, "B L"]:
        """Compute the loss weight of every position.

        Args:
            draws: times and groups.

        Returns:
            [B, L]: w(t) in group 1 and w(t') in group 0; 1 for `loss_weight: uniform`, images and autoregressive
            models.
        """
        config, (t, groups) = self.config, draws
        if config.loss_weight == "uniform" or config.schedule == "arccos" or self.left_to_right:
            return np.ones(groups.shape)
        other = complement(t, config.eps, config.complement_time)
        return np.where(groups, weight(t)[:, None], weight(other)[:, None])

    def normaliser(self, groups: Bool[np.ndarray, "B L"], predicted: int | None = None) -> int:
        """Compute the number that the weighted cross-entropies of a global batch are divided by.

        Args:
            groups: of the global batch.
            predicted: number of tokens of the global batch that can be predicted, where rows have given tokens or
                padding; None: B L'.

        Returns:
            For text and autoregressive models the number of target positions B L', doubled if the model learns from
            both groups. For images (arccos) B L' if it does, else the number of hidden positions.

        Source:
            docs/method.md section 2, "Normaliser".
        """
        return max(1, self.count(groups, predicted))

    def count(self, groups: Bool[np.ndarray, "B L"], predicted: int | None = None) -> int:
        """Compute what some rows add to the normaliser of their global batch.

        Args:
            groups: of the rows.
            predicted: number of tokens of the rows that can be predicted, where rows have given tokens or padding;
                None: B L'.
        """
        rows, length = groups.shape
        positions = rows * (length - self.bos) if predicted is None else predicted
        if self.counts_groups:
            return int(groups.sum())
        return positions * (2 if self.both_groups and self.config.schedule == "loglinear" else 1)

    @property
    def counts_groups(self) -> bool:
        """Whether the normaliser is the number of hidden positions, which depends on the groups."""
        return self.config.schedule == "arccos" and not self.left_to_right and not self.both_groups

    def batch(
        self,
        tokens: Int[np.ndarray, "B L"],
        draws: StepDraws,
        present: Bool[np.ndarray, "B"],
        *,
        divisor: int,
        labels: Int[np.ndarray, "B"] | None = None,
        order: Int[np.ndarray, "B L"] | None = None,
        roles: Roles | None = None,
        device: torch.device,
    ) -> Batch:
        """Build a micro-batch whose row losses, summed over the global batch, are the objective.

        Args:
            tokens: ids of the micro-batch's rows.
            draws: times and groups of these rows.
            present: rows that count; others have weight 0.
            divisor: `normaliser` of the global batch.
            labels: class labels, or None.
            order: ranks of revelation, for models with a causal encoder.
            roles: given tokens and padding of these rows; None: neither.
            device: where the model computes.

        Returns:
            The batch, on the host.

        Source:
            arXiv 2505.18883, equation 8 with its cases as in the text (docs/method.md section 2).
        """
        groups = np.ones_like(draws.groups) if self.left_to_right else draws.groups.copy()
        length = groups.shape[1]
        predicted = np.arange(length) >= self.bos if roles is None else roles.targets(length, self.bos)
        groups &= predicted
        targets = np.broadcast_to(predicted, groups.shape).copy() if self.both_groups else groups.copy()
        weights = self.weights(draws) * targets * present[:, None] / divisor
        return Batch.of_arrays(
            tokens, groups, targets, weights, labels=labels, order=order, roles=roles, device=device
        )
