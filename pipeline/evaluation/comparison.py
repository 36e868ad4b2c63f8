"""Comparison of several models: likelihood, quality of samples against sampling speed, convergence."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from pipeline import storage, tracking, trained
from pipeline.config.evaluation import SamplingConfig
from pipeline.config.model import ModelConfig
from pipeline.config.schema import RunConfig
from pipeline.errors import CheckpointError, ConfigError, DataError
from pipeline.evaluation import convergence, frontier
from pipeline.evaluation.drawn_pairs import PairEvaluator, matching_groups
from pipeline.evaluation.drawn_text import TextEvaluator
from pipeline.evaluation.evaluate import Evaluator, evaluator_of, log_files
from pipeline.evaluation.evaluated_model import EvaluatedModel, check_sampling, likelihood_groups, open_model
from pipeline.logs import shown
from pipeline.metrics.corpora import Corpus
from pipeline.metrics.draw import describe
from pipeline.metrics.given import refuse
from pipeline.models import model_folder
from pipeline.reports import figures
from pipeline.reports.measures import Group
from pipeline.reports.page import Block, Columns, Page, Section, Table, Text, excerpt, picture
from pipeline.reports.sections import metrics_section, paper_section, setting_sections
from pipeline.reports.tables import table_of
from pipeline.run import Run
from pipeline.runtime import claims
from pipeline.runtime.ray_cluster import available_resources, joined_cluster

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Comparison:
    """Results of a comparison.

    Attributes:
        likelihoods: groups of every model: one, or of captions and images one for every part that can be given, and
            how well they are matched.
        points: quality and speed of every model with every setting of the sampler.
        curves: convergence of the models whose runs are known.
        metric: of the curves, perplexity or loss.
        folder: of the report's files.
        tracking_uri: of the MLflow store.
    """

    likelihoods: Sequence[Group]
    points: Sequence[frontier.Point]
    curves: Sequence[convergence.Curve]
    metric: str
    folder: str
    tracking_uri: str


def compare(config: RunConfig) -> Comparison:
    """Evaluate the models of `evaluation.models` in the same way, and write the results to the run's folder.

    Args:
        config: of the comparison.

    Raises:
        CheckpointError, ConfigError, DataError, CapabilityError: before anything is sampled, naming the model.
    """
    run = Run.of(config)
    config, folder = run.config, storage.join(run.folder, "comparison")
    refuse(config.sampling, "a comparison")
    models = [_open(run, name, spec) for name, spec in config.evaluation.models.items()]
    claim = claims.held(folder, "cluster.storage", f"the comparison {config.name!r}", "made")
    with claim, run.in_mlflow() as run, joined_cluster(config.cluster):
        run = run.replace(given_resources=available_resources(config.cluster)).with_data()
        corpus = Corpus("validation", run.data_path, run.manifest)
        if "train" not in run.manifest.splits and config.evaluation.scorer is None:
            raise ConfigError(
                "evaluation.scorer: null, and the data has no training rows for a bigram model; expected a scorer"
            )
        for model in models:
            try:
                model.check_fits(corpus, run)
            except DataError as error:
                raise DataError(f"evaluation.models.{model.name}: {error}") from None
        evaluator = evaluator_of(run, corpus, models[0])
        likelihoods = [
            replace(
                group, key=f"{group.key}/{model.name}", title=group.title.replace("Validation", model.name)
            )
            for model, groups in zip(models, likelihood_groups(run, models, [corpus]), strict=True)
            for group in [*groups, *matching_groups(run, corpus, model)]
        ]
        settings = [(model, one) for model in models for one in _sampling(config, model.config)]
        drawn = frontier.draw_all(settings, config.data.predicted, run.resources)
        measures = evaluator.measure(drawn)
        varied = tuple(config.evaluation.grid)
        points = [
            replace(point, measures=own, varied=varied) for point, own in zip(drawn, measures, strict=True)
        ]
        metric, uri = config.validation_metric, run.tracking_uri
        curves = _curves(run, models, f"validation/{metric}")
        result = Comparison(likelihoods, points, curves, metric, folder, uri)
        tables = {"frontier.csv": frontier.to_csv(points)}
        if curves:
            tables["convergence.csv"] = convergence.to_csv(curves, metric)
        for name, content in tables.items():
            storage.publish_text(storage.join(folder, name), content)
        files = [*_page(run, models, result, evaluator).publish(folder), *tables]
        with run.tracker(folder) as tracker:
            for point in points:
                key = "/".join(["frontier", point.model, *point.variant, ""])
                values = {key + measure.key: measure.value for measure in point.measures}
                tracker.log_metrics(values | {f"{key}tokens_per_second": point.speed}, point.steps)
            for group in likelihoods:
                tracker.log_metrics({f"{group.key}/{m.key}": m.value for m in group.measures}, 0)
            log_files(tracker, folder, files)
    return result


def _open(run: Run, name: str, spec: str) -> EvaluatedModel:
    """Open a model of the comparison; errors name it."""
    sampling = run.config.sampling.model_copy(update={"model": spec})
    try:
        folder = run.configured(sampling=sampling).sampled_model()
        section, _ = model_folder.read_config(storage.fetch(folder))
        own = [one.model_copy(update={"model": folder}) for one in _sampling(run.config, section)]
        for sampling in own:
            check_sampling(run.configured(sampling=sampling).config, section)
        return open_model(run.configured(sampling=own[0]), name)
    except (CheckpointError, ConfigError) as error:
        raise type(error)(f"evaluation.models.{name}: {error}") from None


def _sampling(config: RunConfig, model: ModelConfig) -> list[SamplingConfig]:
    """List how a model is sampled, by the grid and by steps; an autoregressive one draws one token per step.

    Models without encoder outputs to refresh are exact, whatever `refresh_every`.
    """
    grid, fixed = config.evaluation.grid, dict[str, object]()
    if model.kind == "ar":
        fixed = {"steps": config.data.predicted, "order": "left_to_right", "length": None}
    if model.kind != "pgm" or model.encoder == "causal":
        fixed |= {"refresh_every": 1}
    found: dict[str, SamplingConfig] = {}
    for values in product(*grid.values(), sorted(set(config.evaluation.steps))):
        settings = config.sampling.model_copy(update=dict(zip([*grid, "steps"], values, strict=True)) | fixed)
        # What a setting has no effect on is sampled once, such as other orders than confidence with any noise.
        found.setdefault(str(describe(settings, 0)), settings)
    return list(found.values())


def _curves(run: Run, models: Sequence[EvaluatedModel], metric: str) -> list[convergence.Curve]:
    """Read the histories of the runs that trained the models; a distilled or unknown one has none."""
    curves = []
    for model in models:
        try:
            curves.append(_curve(run, model, metric))
        except ConfigError as error:
            log.warning("no convergence of %s: %s", model.name, error)
    return curves


def _curve(run: Run, model: EvaluatedModel, metric: str) -> convergence.Curve:
    config = model_folder.read_background(storage.fetch(model.folder)).run
    record = _mlflow_run_of(run, run.config.evaluation.models[model.name])
    if not config or config.get("distill") or record is None:
        raise ConfigError("the MLflow run that pretrained it is not known")
    history = tracking.metric_history(*record, [metric, convergence.SPEED])
    tokens_per_step = config["train"]["batch"] * model.facts.length
    curve = convergence.curve(model.name, history, metric, tokens_per_step)
    if curve is None:
        raise ConfigError(f"its run has no {metric}")
    return curve


def _mlflow_run_of(run: Run, spec: str) -> tuple[str, str] | None:
    """Find MLflow store and id of the run that a model comes from."""
    if spec.startswith(trained.REGISTERED):
        run_id = tracking.find_version(run.tracking_uri, spec).run_id
        return (run.tracking_uri, run_id) if run_id else None
    if not trained.is_path(spec):
        return None
    recorded = tracking.recorded_run(storage.resolve(spec).rstrip("/").rpartition("/")[0])
    if recorded is None:
        return None
    run_id, uri = recorded
    # Our own address has the password that a run's record leaves out.
    return run.tracking_uri if uri == shown(run.tracking_uri) else uri, run_id


def _page(run: Run, models: Sequence[EvaluatedModel], result: Comparison, evaluator: Evaluator) -> Page:
    config = run.config
    listed = table_of(
        {
            "model": model.name,
            "kind": model.config.kind,
            "parameters": f"{model.parameters:,}",
            "step": str(model.step),
            "from": config.evaluation.models[model.name],
        }
        for model in models
    )
    sections = [
        Section("Models", [Table(listed)]),
        metrics_section("Likelihood on held-out rows", result.likelihoods),
        _frontier_section(result.points, evaluator),
    ]
    if result.curves:
        note = (
            "Tokens are those of the rows that were read. Seconds are those of training steps, without validation, "
            "checkpoints and pauses; they compare only between runs on the same machine under the same load. Values "
            "between two validations lie on a straight line."
        )
        lines = {curve.model: (curve.tokens, curve.seconds, curve.values) for curve in result.curves}
        figure = figures.convergence(lines, result.metric)
        caption = f"Validation {result.metric} during training, by tokens read and by seconds"
        table = Table(convergence.table(result.curves, result.metric))
        sections.append(Section("Convergence", [Text(note), picture("convergence", figure, caption), table]))
    if isinstance(evaluator, TextEvaluator):
        texts = [("held-out text", excerpt(evaluator.texts))]
        for point in {point.line: point for point in result.points}.values():  # with most steps
            texts.append((f"{point.line}, {point.steps} steps", evaluator.excerpt(point.tokens)))
        sections.append(Section("Samples", [Columns(texts)]))
    elif isinstance(evaluator, PairEvaluator):
        shown = [evaluator.held_out]
        for number, point in enumerate({point.line: point for point in result.points}.values()):
            title = f"{point.line}, {point.steps} steps"
            shown.append(evaluator.shown(point.tokens, f"samples_{number}", title))
        sections.append(Section("Samples", shown))
    sections.append(paper_section({model.name: model.config for model in models}, run.manifest))
    return Page(f"Comparison {config.name}", [*sections, *setting_sections(config, run.manifest)])


def _frontier_section(points: Sequence[frontier.Point], evaluator: Evaluator) -> Section:
    """Show the best metric of quality, and of text the entropy, against the speed; without metrics, the speed."""
    by_key = {measure.key: measure for measure in points[0].measures}
    settings = points[0].settings
    how = describe(settings, settings.num_samples) | evaluator.notes
    left_out = ("order", "steps", *points[0].varied)
    listed = ", ".join(f"{key} {value}" for key, value in how.items() if key not in left_out)
    note = (
        f"Settings of every model: {listed}, batch {settings.batch}. tokens/s is the median over {frontier.TIMED} "
        "batches, which one warm process drew in turn; the range is from the slowest to the fastest."
    )
    if not by_key:
        return Section("Speed", [Text(note), Table(frontier.table(points))])
    quality = next(
        by_key[key] for key in ("generative_perplexity", "bigram_perplexity", "fid") if key in by_key
    )
    measures = [quality, *([by_key["entropy"]] if "entropy" in by_key else [])]
    lines: dict[str, list[tuple[int, float, list[float]]]] = {}
    for point in points:
        values = [point.value(measure.key) for measure in measures]
        lines.setdefault(point.line, []).append((point.steps, point.speed, values))
    real = {measure.key: measure.value for measure in evaluator.real}
    references = [real[measure.key] for measure in measures] if real else []
    note += f" {quality.name}: {quality.by}."
    figure = figures.frontier(lines, [measure.name for measure in measures], references)
    caption = "Quality of samples against sampling speed; numbers are sampling steps"
    blocks: list[Block] = [Text(note), picture("frontier", figure, caption)]
    if points[0].varied:
        cells: dict[str, dict[int, float]] = {}
        for point in points:
            cells.setdefault(point.line, {})[point.steps] = point.value(quality.key)
        heat = figures.heat_map(cells, quality.name, "sampling steps")
        blocks.append(picture("grid", heat, f"{quality.name} by settings and sampling steps"))
    return Section("Frontier", [*blocks, Table(frontier.table(points))])
