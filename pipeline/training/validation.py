"""Validation in the middle of training: how well the EMA weights predict, and what they draw."""

import logging
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Int

from pipeline import storage
from pipeline.config.schema import RunConfig
from pipeline.data.manifest import Manifest
from pipeline.data.prepare.prepare import data_path
from pipeline.data.shards import ShardReader
from pipeline.data.tokenizers import load_tokenizer
from pipeline.metrics import likelihood
from pipeline.models.denoiser import Denoiser
from pipeline.models.vq import ImageTokenizer, load_image_tokenizer
from pipeline.reports.pictures import sample_grid, unmasking_order
from pipeline.runtime.session import Session
from pipeline.sampling.logits import Filters
from pipeline.sampling.sampler import SamplingRequest, sample
from pipeline.tracking import Tracker
from pipeline.training.ema import EMA
from pipeline.training.engine import Engine

log = logging.getLogger(__name__)

TEXTS, PICTURES_A_CLASS, CLASSES_SHOWN = 2, 4, 10


@dataclass(frozen=True)
class Validation:
    """What was measured: the bound's perplexity for text, nats per masked token for images; lower is better."""

    metric: str
    value: float
    texts: tuple[str, ...] = ()


def image_tokenizer(
    config: RunConfig, device: torch.device | str = "cpu", batch: int | None = None
) -> ImageTokenizer:
    """What made the codes of the config's images; it lies beside the shards.

    Args:
        batch: images that it takes at once; None: as many as when the codes were made.
    """
    data = config.data
    assert data.kind == "image"
    folder = storage.join(data_path(config), "tokenizer")
    return load_image_tokenizer(folder, data.factor, batch or data.encode_batch, device)


def validation_rows(there: int, most: int) -> np.ndarray:
    """Which of the held-out rows are judged: at most so many, evenly spread."""
    return np.unique(np.linspace(0, there - 1, min(most, there)).astype(np.int64))


def validate(
    config: RunConfig,
    manifest: Manifest,
    engine: Engine,
    ema: EMA,
    session: Session,
    tracker: Tracker | None,
    step: int,
) -> Validation:
    """Judge the EMA weights and show samples of theirs; all ranks call it together."""
    bos = manifest.special.bos
    reader = ShardReader(data_path(config), manifest, "validation")
    rows = validation_rows(len(reader), config.evaluation.rows)
    labels = reader.labels(rows) if config.model.classes is not None else None
    estimator, draws = likelihood.estimator_for(
        engine.model, config.evaluation.estimator, config.evaluation.draws, config.diffusion.schedule
    )
    with engine.weights(ema.slices) as model:
        sums = likelihood.row_sums(
            model,
            likelihood.masked_batches(
                reader.rows(rows),
                estimator,
                draws,
                config.seed,
                config.diffusion.eps,
                bos is not None,
                config.evaluation.batch,
                session.rank,
                session.workers,
                session.device,
                labels,
            ),
            len(rows),
        ).to(session.device)
        dist.all_reduce(sums)
        # All ranks draw the same samples: under ZeRO-3 no rank can run the model alone.
        tokens, classes, revealed = draw(config, manifest, model)
    bound = likelihood.summarise(sums.cpu(), estimator, draws, config.seed)
    if session.rank == 0:
        log.info("step %d: validation %s", step, bound)
    texts: tuple[str, ...] = ()
    if config.data.kind == "text":
        tokenizer = load_tokenizer(config.data.tokenizer)
        texts = tuple(tokenizer.decode(row) for row in tokens.tolist())
        if tracker:
            tracker.log_text("\n\n-----\n\n".join(texts), f"samples/step_{step:08d}.txt")
    elif tracker:
        pictures = image_tokenizer(config, session.device, len(tokens)).decode(tokens[:, 1:].numpy())
        tracker.log_figure(sample_grid(pictures, classes), f"samples/step_{step:08d}.png")
        one_a_class = slice(None, None, PICTURES_A_CLASS)
        figure = unmasking_order(pictures[one_a_class], revealed[one_a_class, 1:].numpy())
        tracker.log_figure(figure, f"samples/order_{step:08d}.png")
    metric = config.validation_metric
    value = bound.nats if metric == "loss" else bound.perplexity
    if tracker:
        tracker.log_metrics({f"validation/{metric}": value, "validation/nats": bound.nats}, step)
    return Validation(metric, value, texts)


def draw(
    config: RunConfig, manifest: Manifest, model: Denoiser
) -> tuple[Int[torch.Tensor, "B L"], list[int] | None, Int[torch.Tensor, "B L"]]:
    """A few samples as the config's sampling section draws them: tokens, classes, steps of revelation."""
    settings, bos = config.sampling, manifest.special.bos
    request = replace(SamplingRequest.of(settings, bos), refresh_every=1)
    if config.data.kind == "text":
        steps = manifest.length - (bos is not None) if model.left_to_right else min(64, settings.steps)
        order, classes = "left_to_right" if model.left_to_right else "uniform", None
        request = replace(
            request, num_samples=TEXTS, steps=steps, order=order, filters=Filters(), guidance=0.0
        )
    else:
        known = config.model.classes or 1
        shown = settings.labels or range(known)
        classes = [label for label in list(shown)[:CLASSES_SHOWN] for _ in range(PICTURES_A_CLASS)]
        request = replace(request, num_samples=len(classes))
    conditional = classes is not None and config.model.classes is not None
    condition = torch.tensor(classes) if conditional else None
    revealed = torch.zeros(request.num_samples, manifest.length, dtype=torch.int64)
    tokens = sample(model, replace(request, condition=condition), revealed_at=revealed)
    return tokens.cpu(), classes if condition is not None else None, revealed
