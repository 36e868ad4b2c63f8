"""Zero-shot likelihood: perplexity of a model on texts of other corpora."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import pandas as pd

from pipeline import storage
from pipeline.config.data import TextDataConfig
from pipeline.config.evaluation import ZeroShotSet
from pipeline.config.load import check
from pipeline.config.schema import RunConfig
from pipeline.data.prepare import prepare
from pipeline.data.tokenizers import Tokenizer
from pipeline.errors import ConfigError
from pipeline.evaluation.evaluate import log_files
from pipeline.evaluation.evaluated_model import EvaluatedModel, by_estimator, likelihood_groups, open_model
from pipeline.metrics.corpora import Corpus, check_fits
from pipeline.reports.measures import Group, Report
from pipeline.reports.page import Page, Section, Table, Text
from pipeline.reports.sections import metrics_section, paper_section
from pipeline.reports.tables import two_decimals
from pipeline.run import Run
from pipeline.runtime import claims
from pipeline.runtime.ray_cluster import available_resources, joined_cluster


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
    sets = config.evaluation.zero_shot
    if not isinstance(config.data, TextDataConfig):
        raise ConfigError(
            f"evaluation.zero_shot: texts, but data.kind is {config.data.kind}; expected no texts"
        )
    model = open_model(run, config.name)
    claim = claims.held(folder, "cluster.storage", f"run {config.name!r}", "evaluated")
    with claim, run.in_mlflow() as run, joined_cluster(config.cluster):
        run = run.replace(given_resources=available_resources(config.cluster))
        corpora = [_prepared(run, model, name, text) for name, text in sets.items()]
        # A list per estimator with a group per text, turned into one per text with a group per estimator.
        by_text = [*zip(*likelihood_groups(run, by_estimator(model), corpora), strict=True)]
        groups, table = [*chain(*by_text)], _table(dict(zip(sets, by_text, strict=True)))
        about = {"kind": model.config.kind, "parameters": f"{model.parameters:,}", "step": model.step}
        report = Report(config.sampling.model or model.folder, about, groups)
        page = Page(
            f"Zero-shot evaluation of {report.model}",
            [
                Section("Model", [Text(report.description)]),
                Section("Perplexity", [Table(table)]),
                metrics_section("Metrics", groups),
                paper_section({model.name: model.config}, corpora[0].manifest),
            ],
        )
        storage.publish_text(storage.join(folder, "zero_shot.json"), report.to_json())
        values = {
            f"evaluation/{group.key}/perplexity_{group.how['estimator']}": group.measures[0].value
            for group in groups
        }
        with run.tracker(folder) as tracker:
            tracker.log_metrics(values, model.step)
            log_files(tracker, folder, ["zero_shot.json", *page.publish(folder)])
    return ZeroShot(table, report, folder, run.tracking_uri)


def _prepared(run: Run, model: EvaluatedModel, name: str, text: ZeroShotSet) -> Corpus:
    """Prepare a text with the tokenizer of the model, and check that the model can read it."""
    tokenizer, keys = model.tokenizer, text.model_dump()
    assert isinstance(run.config.data, TextDataConfig)
    keys |= {"path": None, "validation_documents": "all", "validation_split": None}
    keys |= {"prompt_field": None, "answer_field": None, "messages_field": None, "template": "plain"}
    keys["end_of_text"] |= run.config.data.padded  # whose rows end with it
    if isinstance(tokenizer, Tokenizer):
        keys["tokenizer"] = model.folder
    section, problems = check(TextDataConfig, run.config.data.model_dump() | keys)
    if section is None:
        raise ConfigError("\n".join(f"evaluation.zero_shot.{name}: {problem}" for problem in problems))
    path = prepare.data_path(section, storage.resolve(run.config.cluster.storage))
    corpus = Corpus(f"zero_shot/{name}", path, prepare.ensure(section, path))
    check_fits(corpus, model.facts, tokenizer.hash if tokenizer else corpus.manifest.tokenizer.hash)
    return corpus


def _table(by_text: Mapping[str, Sequence[Group]]) -> pd.DataFrame:
    """Make a row per text: perplexity and 95% interval by every estimator."""
    rows = []
    for name, groups in by_text.items():
        row = {"text": name}
        for group in groups:
            perplexity, estimator = group.measures[0], group.how["estimator"]
            row[f"perplexity ({estimator})"] = two_decimals(perplexity.value)
            row[f"95% interval ({estimator})"] = " to ".join(map(two_decimals, perplexity.interval or ()))
            row["rows"] = f"{group.how['rows']:,}"
        rows.append(row)
    return pd.DataFrame(rows)
