"""The end of a run: consolidated model, registered version, comparison with n-grams, the curve."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline import storage, tracking
from pipeline.config.schema import RunConfig
from pipeline.data import prepared
from pipeline.data.shards import Manifest, ShardReader
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import CheckpointError, ConfigError
from pipeline.evaluation import ngram
from pipeline.evaluation.figures import loss_curve
from pipeline.training import checkpoint
from pipeline.training.loop import tracking_spill
from pipeline.training.validation import validation_rows

log = logging.getLogger(__name__)

NGRAM_ROWS = 200_000  # training rows that the reference perplexities are counted on, at most


@dataclass(frozen=True)
class Outcome:
    """What a finished run left behind."""

    run: str  # folder
    model: str  # consolidated model
    version: str | None  # models:/NAME/VERSION; None: MLflow did not answer
    perplexity: float
    references: dict[str, float]
    samples: tuple[str, ...]
    tracking_uri: str


def finish(config: RunConfig, run: str, uri: str, run_id: str, manifest: Manifest) -> Outcome:
    """Consolidate, register, draw the curve, compare with n-grams."""
    last = checkpoint.latest(run)
    if last is None:
        raise CheckpointError(f"{run}: training ended without a usable checkpoint")
    checkpoint.prune(run, config.train.keep)
    state = checkpoint.read_state(last)
    model = storage.join(run, "model")
    tokenizer = load_tokenizer(config.data.tokenizer)
    checkpoint.consolidate(last, config, manifest, tokenizer, model)
    perplexity = float("nan") if state.validation is None else state.validation
    name = config.tracking.register_as or config.name
    references = _references(config, manifest)
    version = None
    try:
        number = tracking.register_model(
            uri,
            run_id,
            storage.fetch(model),
            name,
            tags={"step": str(state.step), "validation_perplexity": f"{perplexity:.4f}"},
        )
        version = f"models:/{name}/{number}"
        with tracking.Tracker(uri, run_id, tracking_spill(config)) as tracker:
            tracker.log_metrics({f"reference/{k}": v for k, v in references.items()}, state.step)
            tracker.flush()
            history = tracking.metric_history(uri, run_id, ["train/loss", "validation/perplexity"])
            figure = loss_curve(history, references)
            tracker.log_figure(figure, "figures/loss_curve.png")
        if storage.is_local(run):
            figure.savefig(Path(run) / "loss_curve.png")
    except ConfigError as error:  # the training is done; an outage now must not make it a failure
        log.warning("the model is not registered, the next start does it: %s", error)
    return Outcome(run, model, version, perplexity, references, state.samples, uri)


def _references(config: RunConfig, manifest: Manifest) -> dict[str, float]:
    """Perplexities of n-gram models of the same training rows on the same validation rows."""
    path = prepared.data_path(config)

    train, validation = (ShardReader(path, manifest, split) for split in ("train", "validation"))
    seen = train.rows(np.arange(min(len(train), NGRAM_ROWS)))
    held_out = validation.rows(validation_rows(len(validation), config.evaluation.rows))
    return {
        "unigram": ngram.unigram_perplexity([seen], [held_out], manifest.vocabulary),
        "bigram": ngram.bigram_perplexity([seen], [held_out], manifest.vocabulary),
    }
