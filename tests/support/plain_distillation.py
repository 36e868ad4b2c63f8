"""Distillation in the plainest form: one process, whole batches, full passes, all log-probabilities at once."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pipeline.config.schema import DiffusionConfig, RunConfig
from pipeline.data.manifest import Manifest
from pipeline.data.shards import ShardReader
from pipeline.diffusion import partition
from pipeline.diffusion.schedule import complement
from pipeline.models import build
from pipeline.models.batch import Batch, Roles
from pipeline.models.denoiser import Denoiser
from pipeline.models.head import divergence
from pipeline.run import Run
from tests.support import plain
from tests.support.known_source import naive_roll_out

Weights = dict[str, Tensor]


@dataclass
class Plain:
    """What a run is: losses by number of updates done, the weights that every round starts from, the last average."""

    losses: dict[int, float] = field(default_factory=dict)
    starts: list[Weights] = field(default_factory=list)
    weights: Weights = field(default_factory=dict)
    average: Weights = field(default_factory=dict)


def logits_of(
    model: Denoiser, tokens: Tensor, hidden: Tensor, labels: Tensor | None, roles: Roles | None
) -> Tensor:
    """[B, L, V] logits of all positions, each from the tokens of the other group and what is given."""
    if roles is None:
        return model.logits(tokens, hidden, labels)
    asked = roles.targets(tokens.shape[1], bos=False)
    arrays = tokens.numpy(), hidden.numpy() & asked, asked, asked.astype(np.float64)
    batch = Batch.of_arrays(*arrays, labels=None, order=None, roles=roles, device=tokens.device)
    logits = model.head(model.target_vectors(batch), places=model.places_of(batch))
    every = logits.new_zeros(tokens.numel(), logits.shape[1])
    return every.index_copy(0, batch.target_index, logits).view(*tokens.shape, -1)


def loss_of(config: RunConfig, step: int, student: Denoiser, teacher: Denoiser, dt: float) -> Tensor:
    """The mean over the sides of the mean divergence over what each hides."""
    assert config.distill is not None
    manifest, size = Manifest.read(Run(config).data_path), config.train.batch
    rows, ids = plain.rows_of(config, step)
    bos, eps = manifest.special.bos is not None, config.diffusion.eps
    tokens, labels = torch.from_numpy(ids), None
    if config.model.classes is not None:
        found = ShardReader(Run(config).data_path, manifest, "train").labels(rows)
        dropped = partition.draw_dropped(config.seed, step, size, config.train.class_drop)
        labels = torch.from_numpy(np.where(dropped, config.model.classes, found))
    t, groups = partition.draw(
        DiffusionConfig(eps=eps),
        seed=config.seed,
        step=step,
        shape=(size, manifest.length),
        bos=bos,
        least=2 * dt,
    )
    noise = torch.from_numpy(
        np.random.default_rng([config.seed, step, 2]).random((size, 2, 2, manifest.length))
    )
    roles, asked = None, np.ones_like(groups)
    if manifest.caption is not None:
        own = {"caption": manifest.caption, "length": manifest.length}
        roles = partition.draw_given(np.arange(size), seed=config.seed, step=step, batch=size, **own)
        asked = roles.targets(manifest.length, bos)
    hidden = torch.from_numpy(groups & asked)
    logits = logits_of(student, tokens, hidden, labels, roles)
    sides = [(hidden, t)]
    if config.distill.form == "complementary":
        others = torch.from_numpy(~groups & asked)
        others[:, 0] &= not bos
        sides.append((others, complement(t, eps, "matched").clip(2 * dt, 1)))
    losses = []
    for side, (asked, time) in enumerate(sides):
        with torch.no_grad():
            told = naive_roll_out(
                lambda known, unknown: logits_of(teacher, known, unknown, labels, roles),
                tokens,
                asked,
                time=torch.from_numpy(time),
                dt=dt,
                noise=noise[:, side],
            )
        losses.append(divergence(logits[asked], told, config.distill.divergence).sum() / max(1, len(told)))
    return torch.stack(losses).mean()


def copies(model: Denoiser) -> Weights:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def train(config: RunConfig, teacher: Denoiser) -> Plain:
    """Every round of a run at dropout 0; the rate is constant after the warm-up of a fresh optimiser."""
    distill, optim, decay = config.distill, config.optim, config.train.ema
    assert distill is not None
    assert config.model.dropout == 0
    manifest = Manifest.read(Run(config).data_path)
    every, run = config.train.steps // distill.rounds, Plain()
    facts = manifest.facts
    shape = facts.vocab_size, facts.length, facts.bos, facts.modalities
    student, guide = (build(config.model, *shape) for _ in range(2))
    weights = copies(teacher)
    for step in range(config.train.steps):
        done, inside = divmod(step, every)
        if inside == 0:
            if done:
                weights = copies(student) if distill.next_teacher == "raw" else average
            run.starts.append(weights)
            for model in (student, guide):
                model.load_state_dict(weights)
            average = copies(student)
            if done == 0 or distill.optimizer == "reset":
                fresh = step
                adam = torch.optim.AdamW(
                    student.parameters(), betas=optim.betas, weight_decay=optim.weight_decay
                )
        loss = loss_of(config, step, student, guide, 2**done / distill.teacher_steps)
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), optim.clip)
        for group in adam.param_groups:
            group["lr"] = optim.lr * min(1, (step - fresh + 1) / optim.warmup_steps)
        adam.step()
        run.losses[step + 1] = loss.item()
        for name, value in copies(student).items():
            average[name] = decay * average[name] + (1 - decay) * value
    run.weights, run.average = copies(student), average
    return run
