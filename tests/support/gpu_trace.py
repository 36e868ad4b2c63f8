"""The functions that the GPU trace calls, under the names and with the parameters that it expects."""

import inspect
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pipeline.config.model import MDLMConfig, PGMConfig
from pipeline.config.schema import DiffusionConfig
from pipeline.diffusion import partition
from pipeline.diffusion.objective import Objective
from pipeline.models.batch import Batch
from pipeline.models.denoiser import Denoiser
from pipeline.sampling import sampler

pgm, mdlm = PGMConfig, MDLMConfig


def draw(
    seed: int, step: int, batch: int, length: int, eps: float, bos: bool, schedule: str
) -> partition.StepDraws:
    config = DiffusionConfig(eps=eps, schedule=schedule)
    return partition.draw(config, seed=seed, step=step, shape=(batch, length), bos=bos)


def normaliser(groups: np.ndarray, config: DiffusionConfig, both_groups: bool, bos: bool) -> int:
    return Objective(config, bos, both_groups).normaliser(groups)


def training_batch(
    tokens: np.ndarray,
    t: np.ndarray,
    groups: np.ndarray,
    present: np.ndarray,
    config: DiffusionConfig,
    both_groups: bool,
    divisor: int,
    bos: bool,
    device: torch.device,
    labels: np.ndarray | None = None,
) -> Batch:
    draws, objective = partition.StepDraws(t, groups), Objective(config, bos, both_groups)
    return objective.batch(tokens, draws, present, divisor=divisor, labels=labels, device=device)


def sample(
    model: Denoiser,
    num_samples: int,
    steps: int,
    seed: int,
    order: str = "uniform",
    bos: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    refresh_every: int = 1,
) -> Tensor:
    request = sampler.SamplingRequest(num_samples, steps, seed, order, bos, refresh_every=refresh_every)
    # Without inference mode, in which the trace's fake tensors do not work.
    return inspect.unwrap(sampler.sample)(model, request, progress)
