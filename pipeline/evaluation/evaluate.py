"""Evaluation of a model: likelihood, and metrics of its samples, in one report."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline import storage, tracking
from pipeline.config.schema import RunConfig
from pipeline.evaluation.answers import answers_group
from pipeline.evaluation.drawn_images import ImageEvaluator
from pipeline.evaluation.drawn_pairs import PairEvaluator, matching_groups
from pipeline.evaluation.drawn_text import TextEvaluator
from pipeline.evaluation.evaluated_model import EvaluatedModel, check_sampling, likelihood_groups, open_model
from pipeline.metrics.corpora import Corpus, open_corpora
from pipeline.metrics.draw import Samples, describe, generate
from pipeline.metrics.given import refuse
from pipeline.reports.figures import loss_curve
from pipeline.reports.measures import Measure, Report
from pipeline.reports.page import Page, Section, Text, picture
from pipeline.reports.sections import metrics_section, paper_section, setting_sections
from pipeline.run import Run
from pipeline.runtime import claims
from pipeline.runtime.ray_cluster import available_resources, joined_cluster

Evaluator = TextEvaluator | ImageEvaluator | PairEvaluator


@dataclass(frozen=True)
class Evaluation:
    """Results of an evaluation.

    Attributes:
        report: all metrics.
        folder: of the report's files.
        tracking_uri: of the MLflow store.
    """

    report: Report
    folder: str
    tracking_uri: str


def evaluate(config: RunConfig) -> Evaluation:
    """Evaluate a run's model, or `sampling.model`, and write the results to the run's folder and MLflow run.

    A later evaluation of the same run replaces an earlier one in its folder and among the artifacts; the MLflow
    metrics keep every value in their history. Set `name` to that of another run to keep two evaluations apart.

    Args:
        config: of the evaluation.

    Raises:
        CheckpointError: there is no such model.
        ConfigError, DataError, CapabilityError: before anything is sampled.
    """
    run = Run.of(config)
    config, folder = run.config, storage.join(run.folder, "evaluation")
    refuse(config.sampling, "an evaluation")
    model = open_model(run, config.name)
    check_sampling(config, model.config)
    others = open_corpora(config.evaluation.data)
    claim = claims.held(folder, "cluster.storage", f"run {config.name!r}", "evaluated")
    with claim, run.in_mlflow() as run, joined_cluster(config.cluster):
        run = run.replace(given_resources=available_resources(config.cluster)).with_data()
        corpora = [Corpus("validation", run.data_path, run.manifest), *others]
        for corpus in corpora:
            model.check_fits(corpus, run)
        evaluator = evaluator_of(run, corpora[0], model)
        (likelihoods,) = likelihood_groups(run, [model], corpora)
        matching = matching_groups(run, corpora[0], model)
        samples = generate(model.folder, config.sampling, run.resources, storage.join(folder, "samples"))
        how = describe(config.sampling, len(samples.tokens)) | evaluator.notes
        (drawn, *real), blocks = evaluator.report(samples, how)
        groups = [
            *likelihoods,
            *matching,
            replace(drawn, measures=[*drawn.measures, _speed(samples, run)]),
            *real,
        ]
        if run.manifest.answer_block is not None and model.facts.answer_block is not None:
            groups.append(answers_group(run, corpora[0], model))
        about = {"kind": model.config.kind, "parameters": f"{model.parameters:,}", "step": model.step}
        report = Report(config.sampling.model or model.folder, about, groups)
        page = Page(
            f"Evaluation of {report.model}",
            [
                Section("Model", [Text(report.description)]),
                metrics_section("Metrics", groups),
                *_training(run),
                Section("Samples", blocks),
                paper_section({model.name: model.config}, run.manifest),
                *setting_sections(config, run.manifest),
            ],
        )
        storage.publish_text(storage.join(folder, "evaluation.json"), report.to_json())
        files = ["evaluation.json", *page.publish(folder)]
        files += ["samples/samples.txt"] if config.data.kind == "text" else []
        with run.tracker(folder) as tracker:
            tracker.log_metrics(report.metrics(), model.step)
            log_files(tracker, folder, files)
    return Evaluation(report, folder, run.tracking_uri)


def evaluator_of(run: Run, corpus: Corpus, model: EvaluatedModel) -> Evaluator:
    """Make the evaluator of samples that suits the run's data.

    Args:
        run: of the evaluation.
        corpus: its data.
        model: whose tokenizer decodes text.

    Raises:
        ConfigError, DataError: as `TextEvaluator` and `ImageEvaluator`.
    """
    if run.config.data.kind == "text":
        return TextEvaluator(run, corpus, model)
    return ImageEvaluator(run, corpus) if run.config.data.kind == "image" else PairEvaluator(run, corpus)


def log_files(tracker: tracking.Tracker, folder: str, names: Sequence[str]) -> None:
    """Log files of an evaluation's folder as artifacts below the folder's name, and wait until they are delivered.

    Args:
        tracker: of the evaluation's MLflow run.
        folder: path or URL.
        names: of the files.
    """
    for name in names:
        tracker.log_artifact(storage.fetch(storage.join(folder, name)), folder.rpartition("/")[2])
    tracker.flush()


def _speed(samples: Samples, run: Run) -> Measure:
    resources = run.resources
    device = "GPU" if resources.use_gpu else f"{resources.cpus} CPU"
    method = f"wall clock of sampling, {resources.actors} actors with {device} each, at most"
    return Measure("tokens_per_second", "tokens/s", samples.tokens.size / samples.seconds, by=method)


def _training(run: Run) -> list[Section]:
    """Draw the curves of the run's training, where MLflow has them."""
    assert run.run_id is not None
    keys = ["train/loss", f"validation/{run.config.validation_metric}"]
    history = tracking.metric_history(run.tracking_uri, run.run_id, keys)
    if not history["train/loss"]:
        return []
    return [Section("Training", [picture("training", loss_curve(history), "Loss and validation by step")])]
