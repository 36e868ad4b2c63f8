"""Validation in the middle of training: perplexity of the EMA weights, and sample texts."""

import logging

import numpy as np
import torch.distributed as dist

from pipeline.config.schema import RunConfig
from pipeline.data.prepared import data_path
from pipeline.data.shards import Manifest, ShardReader
from pipeline.data.tokenizers import load_tokenizer
from pipeline.evaluation import likelihood
from pipeline.sampling.sampler import sample
from pipeline.tracking import Tracker
from pipeline.training.ema import EMA
from pipeline.training.engine import Engine
from pipeline.training.session import Session

log = logging.getLogger(__name__)


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
) -> tuple[float, tuple[str, ...]]:
    """Validation perplexity of the EMA weights, and sample texts; all ranks call it together."""
    bos = manifest.special.bos
    reader = ShardReader(data_path(config), manifest, "validation")
    rows = validation_rows(len(reader), config.evaluation.rows)
    estimator, draws = likelihood.estimator_for(
        engine.model, config.evaluation.estimator, config.evaluation.draws
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
            ),
            len(rows),
        ).to(session.device)
        dist.all_reduce(sums)
        # All ranks draw the same samples: under ZeRO-3 no rank can run the model alone.
        order = "left_to_right" if model.left_to_right else "uniform"
        steps = manifest.length - (bos is not None) if model.left_to_right else min(64, config.sampling.steps)
        tokens = sample(model, 2, steps, config.sampling.seed, order, bos)
    bound = likelihood.summarise(sums.cpu(), estimator, draws, config.seed)
    if session.rank == 0:
        log.info("step %d: validation %s", step, bound)
    tokenizer = load_tokenizer(config.data.tokenizer)
    texts = tuple(tokenizer.decode(row) for row in tokens.tolist())
    if tracker:
        tracker.log_metrics({"validation/perplexity": bound.perplexity, "validation/nats": bound.nats}, step)
        tracker.log_text("\n\n-----\n\n".join(texts), f"samples/step_{step:08d}.txt")
    return bound.perplexity, texts
