"""The same training in the plainest form: one process, whole batches, no DeepSpeed."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from pipeline.config.schema import RunConfig
from pipeline.data.manifest import Manifest
from pipeline.data.reading_order import ReadingOrder
from pipeline.data.shards import ShardReader
from pipeline.diffusion import partition
from pipeline.diffusion.objective import Objective
from pipeline.models import build
from pipeline.models.batch import Batch
from pipeline.models.denoiser import Denoiser
from pipeline.run import Run


@dataclass
class Plain:
    """Losses and gradient norms by number of updates done; weights and their average after the last one."""

    losses: dict[int, float]
    norms: dict[int, float]
    weights: dict[str, Tensor]
    average: dict[str, Tensor]


def rows_of(config: RunConfig, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices [batch] and tokens [batch, L] of a step's rows."""
    manifest, data = Manifest.read(Run(config).data_path), config.data
    order = ReadingOrder(
        manifest.rows_per_shard("train"), config.train.batch, data.streams, data.shuffle_window, config.seed
    )
    rows = order.rows_of_step(step)
    return rows, ShardReader(Run(config).data_path, manifest, "train").rows(rows).astype(np.int64)


def batch_of(config: RunConfig, step: int, skipped: Collection[int] = ()) -> Batch:
    """The whole global batch of a step, some places of which weigh nothing."""
    tokens, size = rows_of(config, step)[1], config.train.batch
    draws = partition.draw(config.diffusion, seed=config.seed, step=step, shape=tokens.shape, bos=False)
    present = ~np.isin(np.arange(size), list(skipped))
    objective = Objective(config.diffusion, bos=False, both_groups=True)
    divisor = objective.normaliser(draws.groups)
    return objective.batch(tokens, draws, present, divisor=divisor, device=torch.device("cpu"))


def fresh(config: RunConfig) -> Denoiser:
    """The model that a run of this config starts from."""
    manifest = Manifest.read(Run(config).data_path)
    torch.manual_seed(config.seed)
    return build(config.model, manifest.vocabulary, manifest.length, manifest.special.bos)


def train(
    config: RunConfig,
    skipped: Mapping[int, Collection[int]] = MappingProxyType({}),
    model: Denoiser | None = None,
) -> Plain:
    """Train `train.steps` steps at dropout 0 with a constant rate after the warm-up.

    Args:
        skipped: places in global batches to leave out, by step.
        model: to train, which may have frozen weights; None: that of the config.
    """
    assert config.model.dropout == 0
    assert config.optim.schedule == "constant"
    optim, model = config.optim, fresh(config) if model is None else model
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    adam = torch.optim.AdamW(trained.values(), betas=optim.betas, weight_decay=optim.weight_decay)
    average = {name: value.detach().double() for name, value in trained.items()}
    losses, norms = {}, {}
    for step in range(config.train.steps):
        loss = model(batch_of(config, step, skipped.get(step, ()))).sum()
        adam.zero_grad()
        loss.backward()
        norms[step + 1] = float(torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip))
        for group in adam.param_groups:
            group["lr"] = optim.lr * min(1, (step + 1) / optim.warmup_steps)
        adam.step()
        losses[step + 1] = loss.item()
        for name, value in trained.items():
            average[name] = config.train.ema * average[name] + (1 - config.train.ema) * value.detach()
    weights = {name: value.detach() for name, value in trained.items()}
    return Plain(losses, norms, weights, {name: value.float() for name, value in average.items()})
