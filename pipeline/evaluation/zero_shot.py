"""Zero-shot likelihood: perplexity of a model on texts of other corpora."""

from dataclasses import dataclass

import pandas as pd

from pipeline import storage
from pipeline.config.data import TextDataConfig
from pipeline.config.evaluation import ZeroShotSet
from pipeline.config.load import check
from pipeline.config.schema import RunConfig
from pipeline.data.prepare import prepare
from pipeline.data.tokenizers import Tokenizer
from pipeline.errors import ConfigError
from pipeline.evaluation.evaluate import mlflow_run
from pipeline.evaluation.evaluated_model import EvaluatedModel, both_estimators, open_model
from pipeline.metrics.corpora import Case, Corpus, check_fits, likelihood_group, measure_cases
from pipeline.metrics.likelihood import Likelihood
from pipeline.reports.measures import Report
from pipeline.reports.page import Page, Section, Table, Text
from pipeline.reports.sections import metrics_section, paper_section
from pipeline.reports.tables import two_decimals
from pipeline.run import Run
from pipeline.runtime import claims
from pipeline.runtime.ray_cluster import available_resources, joined_cluster
from pipeline.training.validation import validation_rows


@dataclass(frozen=True)
class ZeroShot:
    """Results on all texts.

    Attributes:
        table: a row per text, with the perplexity and its interval by every estimator.
        report: all metrics.
        folder: of the report's files.
        tracking_uri: of the MLflow store.
    """

    table: pd.DataFrame
    report: Report
    folder: str
    tracking_uri: str


def zero_shot(config: RunConfig) -> ZeroShot:
    """Prepare every text of `evaluation.zero_shot`, and measure its likelihood by all estimators.

    The texts go through the tokenizer of the model, into rows like those that it was trained on. The run's own data
    is not needed.

    Args:
        config: of the evaluation; the model is the run's own, or `sampling.model`.

    Raises:
        CheckpointError: there is no such model.
        ConfigError, DataError: a text cannot be prepared, or the model cannot read it.
    """
    run = Run.of(config)
    config, folder = run.config, storage.join(run.folder, "zero_shot")
    data, sets = config.data, config.evaluation.zero_shot
    if not isinstance(data, TextDataConfig):
        raise ConfigError("evaluation.zero_shot: texts, but data.kind is image; expected no texts")
    model = open_model(run, config.name)
    claim = claims.held(folder, "cluster.storage", f"run {config.name!r}", "evaluated")
    with claim, mlflow_run(run) as run, joined_cluster(config.cluster):
        run = run.replace(given_resources=available_resources(config.cluster))
        corpora = [_prepared(run, model, name, text) for name, text in sets.items()]
        maskings = both_estimators(model)
        cases = [
            Case(model.folder, corpus, validation_rows(corpus.manifest.rows("validation"), count), masking)
            for count in (config.evaluation.rows,)
            for corpus in corpora
            for masking in maskings
        ]
        results = measure_cases(cases, run.resources)
        groups = [
            likelihood_group(
                case.corpus,
                f"Zero-shot on {case.corpus.manifest.source.name}",
                result,
                config.evaluation.score_bos,
            )
            for case, result in zip(cases, results, strict=True)
        ]
        table = _table([*sets], results, len(maskings))
        about = {"kind": model.config.kind, "parameters": f"{model.parameters:,}", "step": model.step}
        report = Report(config.sampling.model or model.folder, about, groups)
        first = corpora[0].manifest
        page = Page(
            f"Zero-shot evaluation of {report.model}",
            [
                Section("Model", [Text(report.description)]),
                Section("Perplexity", [Table(table)]),
                metrics_section("Metrics", groups),
                paper_section({model.name: model.config}, first),
            ],
        )
        storage.publish_text(storage.join(folder, "zero_shot.json"), report.to_json())
        files = ["zero_shot.json", *page.publish(folder)]
        values = {
            f"evaluation/zero_shot/{name}/perplexity_{result.estimator}": result.perplexity
            for name, result in zip([name for name in sets for _ in maskings], results, strict=True)
        }
        with run.tracker(folder) as tracker:
            tracker.log_metrics(values, model.step)
            for name in files:
                tracker.log_artifact(storage.fetch(storage.join(folder, name)), "zero_shot")
            tracker.flush()
    return ZeroShot(table, report, folder, run.tracking_uri)


def _prepared(run: Run, model: EvaluatedModel, name: str, text: ZeroShotSet) -> Corpus:
    """Prepare a text with the tokenizer of the model, and check that the model can read it."""
    tokenizer, keys = model.tokenizer, text.model_dump()
    assert isinstance(run.config.data, TextDataConfig)
    keys |= {"path": None, "validation_documents": "all", "validation_split": None}
    keys["end_of_text"] |= run.config.data.wrap == "sentence"  # whose rows end with it
    if isinstance(tokenizer, Tokenizer):
        keys["tokenizer"] = model.folder
    section, problems = check(TextDataConfig, run.config.data.model_dump() | keys)
    if section is None:
        raise ConfigError("\n".join(f"evaluation.zero_shot.{name}: {problem}" for problem in problems))
    data = section
    path = prepare.data_path(data, storage.resolve(run.config.cluster.storage))
    corpus = Corpus(f"zero_shot/{name}", path, prepare.ensure(data, path))
    check_fits(corpus, model.facts, tokenizer.hash if tokenizer else corpus.manifest.tokenizer.hash)
    return corpus


def _table(names: list[str], results: list[Likelihood], estimators: int) -> pd.DataFrame:
    """Make a row per text: perplexity and 95% interval by every estimator."""
    rows = []
    for index, name in enumerate(names):
        row: dict[str, str] = {"text": name}
        for result in results[index * estimators : (index + 1) * estimators]:
            interval = result.perplexity_interval
            row[f"perplexity ({result.estimator})"] = two_decimals(result.perplexity)
            row[f"95% interval ({result.estimator})"] = (
                " to ".join(map(two_decimals, interval)) if interval else ""
            )
            row["rows"] = f"{result.rows:,}"
        rows.append(row)
    return pd.DataFrame(rows)
