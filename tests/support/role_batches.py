"""Training batches of rows with roles, for tests of the method."""

import numpy as np
import torch

from pipeline.config.schema import DiffusionConfig
from pipeline.diffusion.objective import Objective
from pipeline.diffusion.partition import draw, draw_order
from pipeline.models.batch import Batch, Roles
from pipeline.models.denoiser import Denoiser

SEED, STEP = 3, 5


def role_batch(model: Denoiser, tokens: np.ndarray, roles: Roles | None, bos: bool) -> tuple[Batch, float]:
    """What training makes of rows at some step, and the number by which it divides their losses."""
    objective = Objective(DiffusionConfig(), bos, model.both_groups, model.left_to_right)
    rows, length = tokens.shape
    draws = draw(DiffusionConfig(), seed=SEED, step=STEP, shape=(rows, length), bos=bos)
    predicted = None if roles is None else int(roles.counts(bos).sum())
    known = None if roles is None else roles.known(length)
    divisor = objective.normaliser(draws.groups, predicted)
    order = draw_order([SEED, STEP], range(rows), length, bos=bos, given=known) if model.causal else None
    batch = objective.batch(
        tokens,
        draws,
        np.ones(rows, bool),
        divisor=divisor,
        order=order,
        roles=roles,
        device=torch.device("cpu"),
    )
    return batch, divisor
