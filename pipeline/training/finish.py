"""The end of a run: consolidated model, registered version, comparison with n-grams, the curve."""

import logging
import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from pipeline import storage, tracking
from pipeline.config.schema import RunConfig
from pipeline.data.prepare import markov
from pipeline.data.shards import ShardReader
from pipeline.data.tokenizers import Tokenizer, load_tokenizer
from pipeline.errors import CheckpointError, ConfigError
from pipeline.metrics import ngram, step_quality
from pipeline.models import model_folder
from pipeline.models.vq import ImageTokenizer
from pipeline.reports.figures import loss_curve, png, quality_against_steps
from pipeline.reports.pictures import sample_grid
from pipeline.run import Run
from pipeline.training import checkpoint
from pipeline.training.distillation import sampling_steps, teacher_folder
from pipeline.training.validation import draw, image_tokenizer, validation_rows

log = logging.getLogger(__name__)

NGRAM_ROWS = 200_000  # training rows that the reference perplexities are counted on, at most


@dataclass(frozen=True)
class RunResult:
    """What a finished run left behind."""

    run: str  # folder
    model: str  # consolidated model
    version: str | None  # models:/NAME/VERSION; None: MLflow did not answer
    metric: str  # perplexity (text), or loss (images: nats per masked token)
    value: float
    references: dict[str, float]
    samples: tuple[str, ...]
    pictures: str | None  # PNG of an image model's samples
    tracking_uri: str
    quality: str | None = None  # Markdown table of a distillation: samples of every model by steps


def finish(run: Run) -> RunResult:
    """Consolidate, register, draw the curve, compare with n-grams; of a distillation, every student too."""
    config, folder, uri, run_id = run.config, run.folder, run.tracking_uri, run.run_id
    assert run_id is not None
    last = checkpoint.latest(folder)
    if last is None:
        raise CheckpointError(f"{folder}: training ended without a usable checkpoint")
    checkpoint.prune(folder, config.train.keep)
    state = checkpoint.read_state(last)
    model = run.model_folder
    text = config.data.kind == "text"
    tokenizer = load_tokenizer(config.data.tokenizer) if text else image_tokenizer(run)
    checkpoint.consolidate(last, run, tokenizer)
    metric, value = (
        config.validation_metric,
        float("nan") if state.validation is None else state.validation,
    )
    name = config.tracking.register_as or config.name
    references = _references(run) if text else {}
    grid = None if text else _grid(run)
    quality = [] if config.distill is None else _quality(run)
    version = None
    try:
        number = tracking.register_model(
            uri,
            run_id,
            storage.fetch(model),
            name,
            tags={"step": str(state.step), f"validation_{metric}": f"{value:.4f}"} | _round_tags(config),
        )
        version = f"models:/{name}/{number}"
        if config.distill is None:
            tracking.set_alias(uri, name, "teacher", number)
        else:
            _register_rounds(run, name, tokenizer)
        with run.tracker() as tracker:
            tracker.log_metrics({f"reference/{k}": v for k, v in references.items()}, state.step)
            tracker.flush()
            history = tracking.metric_history(uri, run_id, ["train/loss", f"validation/{metric}"])
            figure = loss_curve(history, references)
            tracker.log_figure(figure, "figures/loss_curve.png")
            if grid is not None:
                tracker.log_figure(grid, "figures/samples.png")
            if quality:
                compared = quality_against_steps(step_quality.points(quality), references.get("bigram"))
                tracker.log_figure(compared, "figures/quality_against_steps.png")
                tracker.log_text(step_quality.table(quality) + "\n", "quality_against_steps.md")
        if storage.is_local(folder):
            figure.savefig(Path(folder) / "loss_curve.png")
    except ConfigError as error:  # the training is done; an outage now must not make it a failure
        log.warning("the model is not registered, the next start does it: %s", error)
    pictures = None
    if grid is not None:
        pictures = storage.join(folder, "samples.png")
        storage.publish_bytes(pictures, png(grid))
    told = step_quality.table(quality) if quality else None
    return RunResult(folder, model, version, metric, value, references, state.samples, pictures, uri, told)


def _round_tags(config: RunConfig) -> dict[str, str]:
    if config.distill is None:
        return {}
    rounds = config.distill.rounds
    return {"round": str(rounds), "sampling_steps": str(sampling_steps(config.distill, rounds))}


def _register_rounds(run: Run, name: str, tokenizer: Tokenizer | ImageTokenizer) -> None:
    """The students of all rounds but the last, which is the run's model."""
    distill = run.config.distill
    assert distill is not None
    assert run.run_id is not None
    for done in range(1, distill.rounds):
        steps = str(sampling_steps(distill, done))
        tags = {"round": str(done), "sampling_steps": steps}
        with tempfile.TemporaryDirectory() as temporary:
            student = Path(temporary) / "model"
            shutil.copytree(storage.fetch(teacher_folder(run.folder, done)), student)
            tokenizer.save(student)
            tracking.register_model(run.tracking_uri, run.run_id, student, f"{name}-round-{done}", tags)


def _quality(run: Run) -> list[step_quality.Quality]:
    """Samples of the teacher and of every round's student, under the training rows' bigram model."""
    config, manifest = run.config, run.manifest
    asked, bos = config.distill, int(manifest.special.bos is not None)
    assert asked is not None
    models = {
        "teacher" if done == 0 else f"round {done}": teacher_folder(run.folder, done)
        for done in range(asked.rounds)
    }
    models[f"round {asked.rounds}"] = run.model_folder
    counts = step_quality.step_counts(asked.teacher_steps, asked.rounds, manifest.length - bos)
    log.info("sampling from the teacher and %d students in %s steps", asked.rounds, counts)
    train = ShardReader(run.data_path, manifest, "train")
    seen = train.rows(np.arange(min(len(train), NGRAM_ROWS)))[:, bos:]
    judge = ngram.bigram_model([seen], manifest.vocabulary)
    cpus = config.cluster.cpus_per_worker
    return step_quality.compare(models, counts, config.sampling, judge, cpus, run.resources.use_gpu)


def _grid(run: Run) -> Figure:
    """Pictures that the finished model draws."""
    denoiser, _, _ = model_folder.read(storage.fetch(run.model_folder))
    tokens, classes, _ = draw(run, denoiser)
    pictures = image_tokenizer(run, batch=len(tokens)).decode(tokens[:, 1:].numpy())
    return sample_grid(pictures, classes)


def _references(run: Run) -> dict[str, float]:
    """Perplexities of n-gram models of the same training rows on the same validation rows."""
    config, manifest = run.config, run.manifest
    train, validation = (ShardReader(run.data_path, manifest, split) for split in ("train", "validation"))
    seen = train.rows(np.arange(min(len(train), NGRAM_ROWS)))
    held_out = validation.rows(validation_rows(len(validation), config.evaluation.rows))
    known = config.data.source == "markov"
    return {
        "unigram": ngram.unigram_perplexity([seen], [held_out], manifest.vocabulary),
        "bigram": ngram.bigram_perplexity([seen], [held_out], manifest.vocabulary),
        **({"source": math.exp(markov.embedded().entropy(manifest.length))} if known else {}),
    }
