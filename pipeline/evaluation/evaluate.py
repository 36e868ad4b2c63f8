"""From a run to its figures: likelihood, samples, and what others' networks think of them, in one report."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import storage, tracking
from pipeline.config.load import flatten
from pipeline.config.schema import ModelConfig, RunConfig
from pipeline.data.manifest import Manifest
from pipeline.data.prepare.images import TOKENIZER, read_pixels
from pipeline.data.shards import ShardReader
from pipeline.data.tokenizers import Tokenizer, load_tokenizer, saved_tokenizer
from pipeline.errors import ConfigError
from pipeline.evaluation.drawn_images import image_groups, reference_of
from pipeline.evaluation.source_images import SourceImages, load_net, source_images
from pipeline.metrics import corpora, draw, external_lm, likelihood, ngram, text
from pipeline.metrics.corpora import Corpus
from pipeline.metrics.image_features import FeatureNet
from pipeline.metrics.images import Gaussian
from pipeline.models import model_folder
from pipeline.reports.figures import loss_curve
from pipeline.reports.measures import Group, Measure, Report
from pipeline.reports.page import Block, Columns, Page, Picture, Section, Text, excerpt, picture
from pipeline.reports.pictures import sample_grid
from pipeline.reports.sections import figures_section, paper_section, setting_sections
from pipeline.run import Run
from pipeline.runtime.actors import Resources
from pipeline.runtime.ray_cluster import available_resources, joined_cluster
from pipeline.training.finish import NGRAM_ROWS
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
class EvaluatedModel:
    """The model that is judged.

    Attributes:
        model: folder that every node can read.
        step: of its training; 0 where that is unknown.
        estimator, draws: its likelihood is measured with.
    """

    model: str
    config: ModelConfig
    facts: model_folder.DataFacts
    parameters: int
    step: int
    estimator: likelihood.Estimator
    draws: int


def evaluate(config: RunConfig) -> Evaluation:
    """Judge a run's model, or `sampling.model`, and leave the figures in the run's folder and in its MLflow run.

    A later evaluation of the same run takes the place of an earlier one in its folder and among the artifacts;
    the MLflow metrics keep every value in their history. `name=` of another run keeps two apart.

    Raises:
        CheckpointError: there is no such model.
        ConfigError, DataError, CapabilityError: before anything is drawn.
    """
    run = Run.of(config)
    config, into = run.config, storage.join(run.folder, "evaluation")
    subject = open_model(run)
    others = corpora.open_corpora(config.evaluation.data)
    storage.check_writable(into, "cluster.storage")
    with mlflow_run(run) as run, joined_cluster(config.cluster):
        run = run.replace(given_resources=available_resources(config.cluster)).with_data()
        own = Corpus("validation", run.data_path, run.manifest)
        for corpus in (own, *others):
            corpora.check_fits(corpus, subject.facts, tokenizer_hash(subject, run.manifest))
        judge = _judge_text if config.data.kind == "text" else _judge_images
        groups, samples = judge(config, subject, own, others, into, run.resources)
        report = Report(config.sampling.model or subject.model, _about(subject), groups)
        page = Page(
            f"Evaluation of {report.model}",
            [
                Section("Model", [Text(report.told)]),
                figures_section("Figures", groups),
                *_training(run),
                Section("Samples", samples),
                paper_section({config.name: subject.config}, run.manifest),
                *setting_sections(config, run.manifest),
            ],
        )
        files = ["evaluation.json", *page.publish(into)]
        storage.publish_text(storage.join(into, "evaluation.json"), report.to_json())
        _track(run, subject.step, report, into, files)
    return Evaluation(report, into, run.tracking_uri)


def open_model(run: Run) -> EvaluatedModel:
    """The model that `jobs.sample` would draw from, checked against the config.

    Raises:
        CheckpointError: there is no such model, or it is damaged.
        ConfigError: it cannot be sampled as the config says.
    """
    config, model = run.config, run.sampled_model()
    local = storage.fetch(model)
    denoiser, section, facts = model_folder.read(local)
    sampling = config.sampling.model_copy(update={"model": None})
    if found := config.model_copy(update={"model": section, "sampling": sampling}).conflicts():
        name = config.sampling.model or model
        raise ConfigError(f"with the model {name}:\n" + "\n".join(f"  {line}" for line in found))
    step = int(model_folder.read_background(local).figures.get("step", 0))
    parameters = sum(value.numel() for value in denoiser.parameters())
    asked = config.evaluation
    estimator, draws = likelihood.estimator_for(
        denoiser, asked.estimator, asked.draws, config.diffusion.schedule
    )
    return EvaluatedModel(model, section, facts, parameters, step, estimator, draws)


def _about(subject: EvaluatedModel) -> dict[str, Any]:
    return {"kind": subject.config.kind, "parameters": f"{subject.parameters:,}", "step": subject.step}


def tokenizer_hash(subject: EvaluatedModel, manifest: Manifest) -> str:
    """Of the model's tokenizer; a model that came without one is taken to have the data's."""
    tokenizer = saved_tokenizer(storage.fetch(subject.model))
    return manifest.tokenizer.hash if tokenizer is None else tokenizer.hash


def likelihoods(
    config: RunConfig,
    subjects: Sequence[EvaluatedModel],
    own: Corpus,
    others: list[Corpus],
    resources: Resources,
) -> list[list[Group]]:
    """Of every model: a group a corpus, its own first."""
    settings, judged = config.evaluation, [own, *others]
    rows = [validation_rows(corpus.manifest.rows("validation"), settings.rows) for corpus in judged]
    cases = []
    for one in subjects:
        bos, labelled = one.facts.bos is not None, one.config.classes is not None
        how = corpora.Draws(one.estimator, one.draws, config.seed, config.diffusion.eps, bos, settings.batch)
        cases += [
            corpora.Case(one.model, corpus, some, labelled, how)
            for corpus, some in zip(judged, rows, strict=True)
        ]
    found = iter(corpora.measure_cases(cases, resources))
    titles = ["Validation", *(f"Zero-shot on {corpus.manifest.source.name}" for corpus in others)]
    return [
        [
            corpora.likelihood_group(corpus, title, next(found))
            for corpus, title in zip(judged, titles, strict=True)
        ]
        for _ in subjects
    ]


def _generate(
    config: RunConfig, subject: EvaluatedModel, into: str, resources: Resources
) -> tuple[draw.Samples, dict[str, Any]]:
    """Samples, and how they were drawn."""
    into = storage.join(into, "samples")
    samples = draw.generate(subject.model, config.sampling, resources, into)
    return samples, draw.describe(config.sampling, len(samples.tokens))


def _speed(samples: draw.Samples, resources: Resources) -> Measure:
    device = "GPU" if resources.use_gpu else f"{resources.cpus} CPU"
    rate = samples.tokens.size / samples.seconds
    by = f"wall clock of drawing, {resources.actors} actors with {device} each, at most"
    return Measure("tokens_per_second", "tokens/s", rate, by=by)


@dataclass(frozen=True)
class RealText:
    """Held-out rows as text, with their figures, and the bigrams of the training rows."""

    tokenizer: Tokenizer
    rows: np.ndarray
    texts: list[str]
    bigram: Callable[[Iterable[np.ndarray]], float]
    scored: external_lm.Scored | None
    measures: list[Measure]

    def decode(self, rows: np.ndarray) -> list[str]:
        """Text of every row."""
        return [self.tokenizer.decode(row) for row in rows.tolist()]


def real_text(config: RunConfig, subject: EvaluatedModel, own: Corpus, resources: Resources) -> RealText:
    """What drawn text is put beside; first of all, so that a scorer that cannot be had is told of at once.

    Raises:
        ConfigError: there is no such scorer, or its context is shorter than such texts.
    """
    assert config.data.kind == "text"
    manifest = own.manifest
    saved = saved_tokenizer(storage.fetch(subject.model))
    tokenizer = saved if isinstance(saved, Tokenizer) else load_tokenizer(config.data.tokenizer)
    count = min(config.sampling.num_samples, config.evaluation.rows)
    rows = corpora.held_out_rows(own, validation_rows(manifest.rows("validation"), count))
    decoded = [tokenizer.decode(row) for row in rows.tolist()]
    asked, scored = config.evaluation, None
    if asked.scorer is not None:
        external_lm.load_scorer_tokenizer(asked.scorer).check_context(decoded)
        (scored,) = external_lm.score_texts(asked.scorer, [decoded], asked.batch, resources)
    reader = ShardReader(own.path, manifest, "train")
    last = min(len(reader), NGRAM_ROWS)
    blocks = (reader.rows(np.arange(i, min(i + _BLOCK, last))) for i in range(0, last, _BLOCK))
    bigram = ngram.bigram_model(blocks, manifest.vocabulary)
    measures = text.text_measures(rows, subject.facts.bos is not None, bigram, scored, asked.scorer)
    return RealText(tokenizer, rows, decoded, bigram, scored, measures)


def judge_texts(
    config: RunConfig, real: RealText, bos: bool, groups: Sequence[np.ndarray], resources: Resources
) -> list[list[Measure]]:
    """Figures of groups of rows, which one start of the scorer reads."""
    asked = config.evaluation
    scored: Sequence[external_lm.Scored | None] = [None] * len(groups)
    if asked.scorer is not None:
        scored = external_lm.score_texts(asked.scorer, [*map(real.decode, groups)], asked.batch, resources)
    return [
        text.text_measures(rows, bos, real.bigram, one, asked.scorer, real.scored)
        for rows, one in zip(groups, scored, strict=True)
    ]


def without_mauve(config: RunConfig) -> dict[str, str]:
    """What a report says where MAUVE would stand, and does not."""
    if config.evaluation.scorer is None or text.has_mauve():
        return {}
    return {"MAUVE": "left out, since mauve-text is not installed"}


def _judge_text(
    config: RunConfig,
    subject: EvaluatedModel,
    own: Corpus,
    others: list[Corpus],
    into: str,
    resources: Resources,
) -> tuple[list[Group], list[Block]]:
    """Likelihoods, drawn text, and beside it real text."""
    real, bos = real_text(config, subject, own, resources), subject.facts.bos is not None
    beside = Group("real", "Real text", {"rows": len(real.rows), "split": "validation"}, real.measures)
    (groups,) = likelihoods(config, [subject], own, others, resources)
    samples, how = _generate(config, subject, into, resources)
    how |= without_mauve(config)
    (drawn,) = judge_texts(config, real, bos, [samples.tokens], resources)
    drawn.append(_speed(samples, resources))
    shown = Columns([("samples", excerpt(samples.texts)), ("held-out text", excerpt(real.texts))])
    return [*groups, Group("samples", "Samples", how, drawn), beside], [shown]


def feature_net(
    config: RunConfig, own: Corpus, resources: Resources
) -> tuple[FeatureNet, SourceImages, Gaussian]:
    """The net that looks at images, the source's images, and what it sees in those of the training split."""
    data, settings = config.data, config.evaluation
    assert data.kind == "image"
    if config.sampling.num_samples < 2:
        raise ConfigError("sampling.num_samples: 1; expected at least 2, since a covariance needs them")
    images = source_images(data, own.manifest)
    net = load_net(settings.features, settings.weights, data, images.train, settings.batch)
    seen = own.manifest.split("train").documents
    return net, images, reference_of(net, images, data, seen, own.path, resources)


def _judge_images(
    config: RunConfig,
    subject: EvaluatedModel,
    own: Corpus,
    others: list[Corpus],
    into: str,
    resources: Resources,
) -> tuple[list[Group], list[Block]]:
    """Likelihoods, drawn images, and beside them real ones and their reconstructions."""
    data = config.data
    assert data.kind == "image"
    net, images, reference = feature_net(config, own, resources)
    (groups,) = likelihoods(config, [subject], own, others, resources)
    samples, how = _generate(config, subject, into, resources)
    chosen = [images.validation[i] for i in validation_rows(len(images.validation), config.evaluation.rows)]
    drawn, *rest = image_groups(
        net,
        net.spec == "classifier",
        reference,
        samples.tokens[:, 1:],
        samples.labels,
        chosen,
        storage.join(own.path, TOKENIZER),
        data,
        how,
        resources,
    )
    drawn = Group(drawn.key, drawn.title, drawn.how, [*drawn.measures, _speed(samples, resources)])
    some = read_pixels(chosen[: draw.GRID_IMAGES], data)
    beside = sample_grid(some.images, some.labels.tolist() if subject.config.classes is not None else None)
    shown: list[Block] = [
        Picture("samples", storage.read_bytes(storage.join(into, "samples", draw.GRID)), "Samples"),
        picture("held_out", beside, "Held-out images"),
    ]
    return [*groups, drawn, *rest], shown


@contextmanager
def mlflow_run(run: Run) -> Iterator[Run]:
    """Give the run the MLflow run of its folder; one is opened, and ended, where the folder has none."""
    if recorded := tracking.recorded_run(run.folder):
        yield run.replace(run_id=recorded[0])
        return
    config, uri = run.config, run.tracking_uri
    params = flatten(config.model_dump(mode="json"))
    run_id = tracking.open_recorded_run(run.folder, uri, config.tracking.experiment, config.name, params, {})
    with tracking.ending(uri, run_id):
        yield run.replace(run_id=run_id)


def _training(run: Run) -> list[Section]:
    """The curves of the run's training, where MLflow has them."""
    assert run.run_id is not None
    keys = ["train/loss", f"validation/{run.config.validation_metric}"]
    history = tracking.metric_history(run.tracking_uri, run.run_id, keys)
    if not history["train/loss"]:
        return []
    return [Section("Training", [picture("training", loss_curve(history), "Loss and validation by step")])]


def _track(run: Run, step: int, report: Report, into: str, files: Sequence[str]) -> None:
    """Figures, tables and samples into the MLflow run."""
    with run.tracker() as tracker:
        tracker.log_metrics(report.metrics(), step)
        shown = "" if run.config.data.kind == "image" else "samples/samples.txt"
        for name in [*files, *([shown] if shown else [])]:
            tracker.log_artifact(storage.fetch(storage.join(into, name)), "evaluation")
        tracker.flush()
