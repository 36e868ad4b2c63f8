"""The end of a run: model folder, registered version, comparison with n-gram models, loss curve."""

import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from pipeline import storage, tracking
from pipeline.data.prepare import markov
from pipeline.data.shards import ShardReader
from pipeline.errors import CheckpointError, ConfigError
from pipeline.metrics import ngram, step_quality
from pipeline.metrics.draw import Sampler
from pipeline.reports.figures import loss_curve, png, quality_against_steps
from pipeline.reports.pictures import captioned_grid, sample_grid
from pipeline.run import Run
from pipeline.runtime.actors import in_order, started
from pipeline.sampling.row_ends import cut_rows
from pipeline.training import checkpoint
from pipeline.training.distillation import sampling_steps, teacher_folder
from pipeline.training.validation import (
    image_tokenizer,
    pair_tokenizer,
    pairs_shown,
    pictures_shown,
    prompts_of,
    validation_rows,
)

log = logging.getLogger(__name__)

GRID = "samples.png"  # in the run's folder: samples of an image model
NGRAM_ROWS = 200_000  # largest number of training rows that n-gram models are fitted on


@dataclass(frozen=True)
class RunResult:
    """Results of a finished run.

    Attributes:
        run: folder of the run.
        model: folder of the consolidated model.
        version: registered model, models:/NAME/VERSION; None: MLflow did not answer.
        metric: "perplexity" (text), or "loss" in nats per masked token (images).
        value: of the metric at the last validation.
        references: perplexities of reference models on the same rows, by name.
        samples: texts drawn at the last validation.
        bits_per_byte: of text, what `value` is in bits per UTF-8 byte; None where the bytes are not known.
        pictures: PNG file with samples of an image model.
        tracking_uri: of the MLflow store.
        quality: of a distillation, a Markdown table of sample quality by model and number of steps.
    """

    run: str
    model: str
    version: str | None
    metric: str
    value: float
    references: dict[str, float]
    samples: tuple[str, ...]
    pictures: str | None
    tracking_uri: str
    quality: str | None = None
    bits_per_byte: float | None = None


def finish(run: Run) -> RunResult:
    """Write the model folder, compare the model with n-gram models, and register it in MLflow.

    The students of all rounds of a distillation are registered, and compared with their teacher.

    Args:
        run: whose training is done.

    Returns:
        Where everything is, and the figures.

    Raises:
        CheckpointError: the run has no usable checkpoint.
    """
    config, folder = run.config, run.folder
    last = checkpoint.latest(folder, lambda path: checkpoint.problems(path, checkpoint.is_average))
    if last is None:
        raise CheckpointError(f"{folder}: training ended without a usable checkpoint")
    checkpoint.prune(folder, config.train.keep)
    state = checkpoint.read_state(last)
    text = config.data.kind == "text"
    tokenizers: dict[str, Callable[[], checkpoint.AnyTokenizer]] = {
        "text": lambda: run.text_tokenizer,
        "image": lambda: image_tokenizer(run),
        "pair": lambda: pair_tokenizer(run),
    }
    tokenizer = tokenizers[config.data.kind]()
    checkpoint.consolidate(last, run, tokenizer)
    references = _references(run) if text else {}
    grid = None if text else _grid(run)
    quality = _quality(run) if config.distill else []
    value = math.nan if state.validation is None else state.validation
    bits = run.manifest.bits_per_byte(math.log(value)) if config.validation_metric == "perplexity" else None
    version = None
    try:
        version = _register(run, tokenizer, state.step, value)
    except ConfigError as error:  # the training is done; an outage now must not make it a failure
        log.warning("the model is not registered; the next start registers it: %s", error)
    try:
        _log_results(run, state.step, references, grid, quality)
    except ConfigError as error:
        log.warning("the results are not in MLflow; the next start logs them: %s", error)
    return RunResult(
        run=folder,
        model=run.model_folder,
        version=version,
        metric=config.validation_metric,
        value=value,
        references=references,
        samples=state.samples,
        pictures=None if text else storage.join(folder, GRID),
        tracking_uri=run.tracking_uri,
        quality=step_quality.table(quality) if quality else None,
        bits_per_byte=bits,
    )


def _register(run: Run, tokenizer: checkpoint.AnyTokenizer, step: int, value: float) -> str:
    """Register the run's model, and of a distillation the students of all earlier rounds."""
    config, uri = run.config, run.tracking_uri
    rounds = run.distill.rounds if config.distill else 0
    assert run.run_id is not None
    name = config.tracking.register_as or config.name
    tags = {"step": str(step), f"validation_{config.validation_metric}": f"{value:.4f}"}
    tags |= _round_tags(run, rounds) if rounds else {}
    number = tracking.register_model(uri, run.run_id, storage.fetch(run.model_folder), name, tags)
    if not rounds:
        tracking.set_alias(uri, name, "teacher", number)
    for done in range(1, rounds):
        with storage.scratch() as temporary:
            student = temporary / "model"
            shutil.copytree(storage.fetch(teacher_folder(run.folder, done)), student)
            tokenizer.save(student)
            tags = _round_tags(run, done)
            tracking.register_model(uri, run.run_id, student, f"{name}-round-{done}", tags)
    return f"models:/{name}/{number}"


def _round_tags(run: Run, done: int) -> dict[str, str]:
    """Make the tags of the student after `done` rounds."""
    return {"round": str(done), "sampling_steps": str(sampling_steps(run.distill, done))}


def _log_results(
    run: Run,
    step: int,
    references: dict[str, float],
    grid: Figure | None,
    quality: list[step_quality.Quality],
) -> None:
    """Log the reference figures and the pictures to MLflow, and the loss curve to the run's folder too."""
    assert run.run_id is not None
    with run.tracker() as tracker:
        tracker.log_metrics({f"reference/{name}": value for name, value in references.items()}, step)
        tracker.flush()
        keys = ["train/loss", f"validation/{run.config.validation_metric}"]
        figure = loss_curve(tracking.metric_history(run.tracking_uri, run.run_id, keys), references)
        tracker.log_figure(figure, "figures/loss_curve.png")
        if grid is not None:
            tracker.log_figure(grid, "figures/samples.png")
        if quality:
            compared = quality_against_steps(step_quality.points(quality), references.get("bigram"))
            tracker.log_figure(compared, "figures/quality_against_steps.png")
            tracker.log_text(step_quality.table(quality) + "\n", "quality_against_steps.md")
    if storage.is_local(run.folder):
        figure.savefig(Path(run.folder) / "loss_curve.png")


def _quality(run: Run) -> list[step_quality.Quality]:
    """Score samples of the teacher and of every round's student by a bigram model of the training rows."""
    config, manifest, special = run.config, run.manifest, run.manifest.special
    if manifest.answer_block is not None:  # rows drawn without a prompt say nothing of the models
        return []
    distill, bos = run.distill, special.bos is not None
    models = {"teacher": teacher_folder(run.folder, 0)}
    models |= {f"round {done}": teacher_folder(run.folder, done) for done in range(1, distill.rounds)}
    models[f"round {distill.rounds}"] = run.model_folder
    counts = step_quality.step_counts(distill.teacher_steps, distill.rounds, manifest.length - bos)
    log.info("sampling from the teacher and %d students in %s steps", distill.rounds, counts)
    train = ShardReader(run.data_path, manifest, "train")
    rows = cut_rows(train.rows(np.arange(min(len(train), NGRAM_ROWS))), special.eot, special.pad, int(bos))
    perplexity = ngram.bigram_model([rows], manifest.vocabulary)
    # Nodes may have gone since the start, but the workers that training needs were there until now.
    resources = replace(run.resources, actors=config.cluster.least)
    return step_quality.compare(models, counts, config.sampling, special, perplexity, resources)


def _grid(run: Run) -> Figure:
    """Draw a grid of samples of the finished model on a device of the run, and write it to the run's folder.

    An actor has the GPU. CPUs compute in this process: trials of a sweep hold them all, so an actor would wait for
    CPUs that are not released before it ends.
    """
    pair, known = run.config.data.kind == "pair", None
    settings, classes = (pairs_shown(run), None) if pair else pictures_shown(run)
    if pair:
        known = prompts_of(run, ShardReader(run.data_path, run.manifest, "validation"))
    task = (run.model_folder, settings, 0, settings.num_samples, known)
    if run.resources.use_gpu:
        with started(Sampler, (run.resources.cpus,), replace(run.resources, actors=1), tasks=1) as samplers:
            (batch,) = in_order(samplers, "draw", [task])
            (pictures,) = in_order(samplers, "decode", [(run.model_folder, batch.tokens)])
    else:
        sampler = Sampler(run.resources.cpus)
        batch = sampler.draw(*task)
        pictures = sampler.decode(run.model_folder, batch.tokens)
    if pair:
        captions = pair_tokenizer(run).captions(batch.tokens, run.manifest.caption or 0)
        figure = captioned_grid(pictures, captions)
    else:
        figure = sample_grid(pictures, classes)
    storage.publish_bytes(storage.join(run.folder, GRID), png(figure))
    return figure


def _references(run: Run) -> dict[str, float]:
    """Compute perplexities of n-gram models, fitted on the training rows, on the same validation rows."""
    config, manifest = run.config, run.manifest
    if manifest.answer_block is not None:  # the model's perplexity is that of answers alone
        return {}
    train, validation = (ShardReader(run.data_path, manifest, split) for split in ("train", "validation"))
    ids = manifest.special.eot, manifest.special.pad
    seen = cut_rows(train.rows(np.arange(min(len(train), NGRAM_ROWS))), *ids)
    held_out = cut_rows(validation.rows(validation_rows(len(validation), config.evaluation.rows)), *ids)
    references = {
        "unigram": ngram.unigram_perplexity([seen], [held_out], manifest.vocabulary),
        "bigram": ngram.bigram_perplexity([seen], [held_out], manifest.vocabulary),
    }
    if config.data.source == "markov" and manifest.mix is None:
        references["source"] = math.exp(markov.embedded().entropy(manifest.length))
    return references
