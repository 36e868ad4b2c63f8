"""From a run to its figures: likelihood, samples, and what others' networks think of them, in one report."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pipeline import storage, tracking
from pipeline.config.load import flatten
from pipeline.config.schema import ModelConfig, RunConfig
from pipeline.data import prepared
from pipeline.data.images import TOKENIZER
from pipeline.data.shards import Manifest, ShardReader
from pipeline.data.tokenizers import Tokenizer, load_tokenizer, saved_tokenizer
from pipeline.errors import ConfigError
from pipeline.evaluation import corpora, generation, likelihood, ngram, scorer, texts
from pipeline.evaluation.actors import Resources
from pipeline.evaluation.corpora import Corpus
from pipeline.evaluation.drawn_images import image_groups, reference_of
from pipeline.evaluation.report import Group, Measure, Report
from pipeline.evaluation.source_images import load_net, source_images
from pipeline.logs import shown
from pipeline.models import folder
from pipeline.training import checkpoint
from pipeline.training.cluster import check_resources, cluster
from pipeline.training.launch import located, model_folder
from pipeline.training.loop import tracking_spill
from pipeline.training.outcome import NGRAM_ROWS
from pipeline.training.validation import validation_rows

log = logging.getLogger(__name__)

_BLOCK = 8192  # training rows read at a time


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and where it is."""

    report: Report
    folder: str
    tracking_uri: str


@dataclass(frozen=True)
class Subject:
    """The model that is judged.

    Attributes:
        model: folder that every node can read.
        step: of its training; 0 where that is unknown.
        estimator, draws: its likelihood is measured with.
    """

    model: str
    config: ModelConfig
    facts: folder.DataFacts
    parameters: int
    step: int
    estimator: likelihood.Estimator
    draws: int


def evaluate(config: RunConfig) -> Evaluation:
    """Judge a run's model, or `sampling.model`, and leave the figures in the run's folder and in its MLflow run.

    Raises:
        CheckpointError: there is no such model.
        ConfigError, DataError, CapabilityError: before anything is drawn.
    """
    config = located(config)
    run, uri = checkpoint.run_folder(config), tracking.tracking_uri(config)
    into = storage.join(run, "evaluation")
    subject = open_subject(config)
    others = corpora.open_corpora(config.evaluation.data)
    storage.check_writable(into, "cluster.storage")
    with _mlflow_run(config, run, uri) as run_id, cluster(config):
        resources = Resources(config.cluster.workers, config.cluster.cpus_per_worker, check_resources(config))
        manifest = prepared.ensure(config)
        own = Corpus("validation", prepared.data_path(config), manifest)
        tokenizer_hash = _tokenizer_hash(subject, manifest)
        for corpus in (own, *others):
            corpora.check_fits(corpus, subject.facts, tokenizer_hash)
        if config.data.kind == "text":
            groups = _judge_text(config, subject, own, others, into, resources)
        else:
            groups = _judge_images(config, subject, own, others, into, resources)
        report = Report(config.sampling.model or subject.model, _about(subject), groups)
        storage.publish_text(storage.join(into, "evaluation.json"), report.to_json())
        storage.publish_text(storage.join(into, "evaluation.md"), report.to_markdown())
        _track(config, uri, run_id, subject.step, report, into)
    return Evaluation(report, into, uri)


def open_subject(config: RunConfig) -> Subject:
    """The model that `jobs.sample` would draw from, checked against the config.

    Raises:
        CheckpointError: there is no such model, or it is damaged.
        ConfigError: it cannot be sampled as the config says.
    """
    named, model = config.sampling.model, model_folder(config)
    local = storage.fetch(model)
    denoiser, section, facts = folder.read(local)
    sampling = config.sampling.model_copy(update={"model": None})
    if found := config.model_copy(update={"model": section, "sampling": sampling}).conflicts():
        raise ConfigError(f"with the model {named or model}:\n" + "\n".join(f"  {line}" for line in found))
    step = int(folder.read_background(local).figures.get("step", 0))
    parameters = sum(value.numel() for value in denoiser.parameters())
    asked = config.evaluation
    estimator, draws = likelihood.estimator_for(
        denoiser, asked.estimator, asked.draws, config.diffusion.schedule
    )
    return Subject(model, section, facts, parameters, step, estimator, draws)


def _about(subject: Subject) -> dict[str, Any]:
    return {"kind": subject.config.kind, "parameters": f"{subject.parameters:,}", "step": subject.step}


def _tokenizer_hash(subject: Subject, manifest: Manifest) -> str:
    """Of the model's tokenizer; a model that came without one is taken to have the data's."""
    tokenizer = saved_tokenizer(storage.fetch(subject.model))
    return manifest.tokenizer.hash if tokenizer is None else tokenizer.hash


def _likelihoods(
    config: RunConfig, subject: Subject, own: Corpus, others: list[Corpus], resources: Resources
) -> list[Group]:
    settings, bos = config.evaluation, subject.facts.bos is not None
    eps = config.diffusion.eps
    how = corpora.Draws(subject.estimator, subject.draws, config.seed, eps, bos, settings.batch)
    judged = [own, *others]
    rows = [validation_rows(corpus.manifest.rows("validation"), settings.rows) for corpus in judged]
    labelled = subject.config.classes is not None
    found = corpora.measure_corpora(subject.model, judged, rows, labelled, how, resources)
    titles = ["Validation", *(f"Zero-shot on {corpus.manifest.source.name}" for corpus in others)]
    return [
        corpora.likelihood_group(corpus, title, one)
        for corpus, title, one in zip(judged, titles, found, strict=True)
    ]


def _generate(
    config: RunConfig, subject: Subject, into: str, resources: Resources
) -> tuple[generation.Samples, dict[str, Any]]:
    """Samples, and how they were drawn."""
    samples = generation.generate(
        subject.model,
        config.sampling,
        resources.actors,
        resources.cpus,
        resources.use_gpu,
        storage.join(into, "samples"),
    )
    return samples, generation.describe(config.sampling, len(samples.tokens))


def _speed(samples: generation.Samples, resources: Resources) -> Measure:
    device = "GPU" if resources.use_gpu else f"{resources.cpus} CPU"
    rate = samples.tokens.size / samples.seconds
    by = f"wall clock of drawing, {resources.actors} actors with {device} each, at most"
    return Measure("tokens_per_second", "tokens/s", rate, by=by)


def _judge_text(
    config: RunConfig, subject: Subject, own: Corpus, others: list[Corpus], into: str, resources: Resources
) -> list[Group]:
    """Likelihoods, drawn text, and beside it real text."""
    assert config.data.kind == "text"
    settings, manifest = config.evaluation, own.manifest
    saved = saved_tokenizer(storage.fetch(subject.model))
    tokenizer = saved if isinstance(saved, Tokenizer) else load_tokenizer(config.data.tokenizer)
    count = min(config.sampling.num_samples, settings.rows)
    real = corpora.held_out_rows(own, validation_rows(manifest.rows("validation"), count))
    real_texts = [tokenizer.decode(row) for row in real.tolist()]
    if settings.scorer is not None:
        scorer.load_scorer_tokenizer(settings.scorer).check_context(real_texts)
    reader = ShardReader(own.path, manifest, "train")
    last = min(len(reader), NGRAM_ROWS)
    blocks = (reader.rows(np.arange(i, min(i + _BLOCK, last))) for i in range(0, last, _BLOCK))
    bigram = ngram.bigram_model(blocks, manifest.vocabulary)

    def measures(rows: np.ndarray, decoded: list[str]) -> list[Measure]:
        scored = None
        if settings.scorer is not None:
            scored = scorer.score_texts(settings.scorer, decoded, settings.batch, resources)
        return texts.text_measures(rows, subject.facts.bos is not None, bigram, scored, settings.scorer)

    # Real text first: a scorer that cannot be had is told of before anything is drawn.
    beside = Group(
        "real", "Real text", {"rows": len(real), "split": "validation"}, measures(real, real_texts)
    )
    groups = _likelihoods(config, subject, own, others, resources)
    samples, how = _generate(config, subject, into, resources)
    drawn = measures(samples.tokens, [tokenizer.decode(row) for row in samples.tokens.tolist()])
    drawn.append(_speed(samples, resources))
    return [*groups, Group("samples", "Samples", how, drawn), beside]


def _judge_images(
    config: RunConfig, subject: Subject, own: Corpus, others: list[Corpus], into: str, resources: Resources
) -> list[Group]:
    """Likelihoods, drawn images, and beside them real ones and their reconstructions."""
    data, settings = config.data, config.evaluation
    assert data.kind == "image"
    if config.sampling.num_samples < 2:
        raise ConfigError("sampling.num_samples: 1; expected at least 2, since a covariance needs them")
    images = source_images(data, own.manifest)
    net = load_net(settings.features, settings.weights, data, images.train, settings.batch)
    seen = own.manifest.split("train").documents
    reference = reference_of(net, images, data, seen, own.path, resources)
    groups = _likelihoods(config, subject, own, others, resources)
    samples, how = _generate(config, subject, into, resources)
    chosen = validation_rows(len(images.validation), settings.rows)
    drawn, *rest = image_groups(
        net,
        net.spec == "classifier",
        reference,
        samples.tokens[:, 1:],
        samples.labels,
        [images.validation[i] for i in chosen],
        storage.join(own.path, TOKENIZER),
        data,
        how,
        resources,
    )
    drawn = Group(drawn.key, drawn.title, drawn.how, [*drawn.measures, _speed(samples, resources)])
    return [*groups, drawn, *rest]


@contextmanager
def _mlflow_run(config: RunConfig, run: str, uri: str) -> Iterator[str]:
    """The id of the folder's MLflow run; one is opened, and ended, where the folder has none."""
    record = storage.join(run, "run.json")
    if storage.exists(record):
        yield json.loads(storage.read_text(record))["run_id"]
        return
    params = flatten(config.model_dump(mode="json"))
    run_id = tracking.open_run(uri, config.tracking.experiment, config.name, params, {"folder": run})
    storage.publish_text(record, json.dumps({"run_id": run_id, "tracking_uri": shown(uri)}))
    status: Literal["FINISHED", "FAILED"] = "FAILED"
    try:
        yield run_id
        status = "FINISHED"
    finally:
        tracking.end_run(uri, run_id, status)


def _track(config: RunConfig, uri: str, run_id: str, step: int, report: Report, into: str) -> None:
    """Figures, tables and samples into the MLflow run."""
    with tracking.Tracker(uri, run_id, tracking_spill(config)) as tracker:
        tracker.log_metrics(report.metrics(), step)
        for name in ("evaluation.json", "evaluation.md"):
            tracker.log_text(storage.read_text(storage.join(into, name)), f"evaluation/{name}")
        shown = generation.GRID if config.data.kind == "image" else "samples.txt"
        tracker.log_artifact(storage.fetch(storage.join(into, "samples", shown)), "evaluation")
        tracker.flush()
