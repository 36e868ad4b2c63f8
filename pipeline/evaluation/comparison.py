"""Several models against each other: likelihood, the frontier of quality against speed, convergence."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline import storage, tracking
from pipeline.config.schema import RunConfig
from pipeline.data.prepare.images import TOKENIZER
from pipeline.errors import CheckpointError, ConfigError, DataError, did_you_mean
from pipeline.evaluation import convergence, frontier
from pipeline.evaluation.drawn_images import distances
from pipeline.evaluation.evaluate import (
    EvaluatedModel,
    feature_net,
    judge_texts,
    likelihoods,
    mlflow_run,
    open_model,
    real_text,
    tokenizer_hash,
    without_mauve,
)
from pipeline.evaluation.frontier import Contender, Point
from pipeline.logs import shown
from pipeline.metrics import corpora
from pipeline.metrics.corpora import Corpus
from pipeline.metrics.draw import describe
from pipeline.models import model_folder
from pipeline.reports import figures
from pipeline.reports.measures import Group, Measure
from pipeline.reports.page import Block, Columns, Page, Section, Table, Text, excerpt, picture
from pipeline.reports.sections import figures_section, paper_section, setting_sections
from pipeline.run import Run
from pipeline.runtime.actors import Resources
from pipeline.runtime.ray_cluster import available_resources, joined_cluster

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Comparison:
    """What was found, and where it is.

    Attributes:
        likelihoods: a group a model.
        curves: of the models whose runs are known.
    """

    likelihoods: Sequence[Group]
    points: Sequence[Point]
    curves: Sequence[convergence.Curve]
    metric: str
    folder: str
    tracking_uri: str


def compare(config: RunConfig) -> Comparison:
    """Judge the models of `evaluation.models` in the same way, and leave tables, figures and a page in the run.

    Raises:
        CheckpointError, ConfigError, DataError, CapabilityError: before anything is drawn, naming the model.
    """
    run = Run.of(config)
    config, into = run.config, storage.join(run.folder, "comparison")
    subjects = {name: _open(run, name) for name in config.evaluation.models}
    storage.check_writable(into, "cluster.storage")
    with mlflow_run(run) as run, joined_cluster(config.cluster):
        resources = available_resources(config.cluster)
        run = run.with_data()
        own = Corpus("validation", run.data_path, run.manifest)
        for name, subject in subjects.items():
            try:
                corpora.check_fits(own, subject.facts, tokenizer_hash(subject, run.manifest))
            except DataError as error:
                raise DataError(f"evaluation.models.{name}: {error}") from None
        contenders = [
            Contender(
                name,
                subject.model,
                subject.config.kind,
                subject.parameters,
                [_sampling(config, subject.config.kind, steps).sampling for steps in _steps(config, subject)],
            )
            for name, subject in subjects.items()
        ]
        judge = _judge_text if config.data.kind == "text" else _judge_images
        points, bounds, beside, samples = judge(config, subjects, contenders, own, resources)
        metric = config.validation_metric
        curves = _curves(run, subjects, f"validation/{metric}")
        found = Comparison(bounds, points, curves, metric, into, run.tracking_uri)
        page = _page(config, found, subjects, contenders, own, beside, samples)
        files = page.publish(into)
        for name, text in _data(found).items():
            storage.publish_text(storage.join(into, name), text)
            files.append(name)
        with run.tracker() as tracker:
            for one in points:
                key = f"frontier/{one.model}/"
                told = {key + measure.key: measure.value for measure in one.measures}
                tracker.log_metrics(told | {f"{key}tokens_per_second": one.speed}, one.steps)
            for group in bounds:
                tracker.log_metrics({f"{group.key}/{m.key}": m.value for m in group.measures}, 0)
            for name in files:
                tracker.log_artifact(storage.fetch(storage.join(into, name)), "comparison")
            tracker.flush()
    return found


def _open(run: Run, name: str) -> EvaluatedModel:
    """A model of the comparison, checked; mistakes name it."""
    config = run.config
    spec = config.evaluation.models[name]
    try:
        place = _with_model(config, spec).sampled_model()
        kind = model_folder.read_config(storage.fetch(place))[0].kind
        first = _sampling(config, kind, max(config.evaluation.steps))
        return open_model(_with_model(first, place))
    except CheckpointError as error:
        near = ""
        if not spec.startswith("models:/"):
            above, _, last = storage.resolve(spec).rstrip("/").rpartition("/")
            near = did_you_mean(last, storage.listing(above)) if last != "model" else ""
            if last == "model":
                above, _, last = above.rpartition("/")
                near = did_you_mean(last, storage.listing(above))
        raise CheckpointError(f"evaluation.models.{name}: {error}{near}") from None
    except ConfigError as error:
        raise ConfigError(f"evaluation.models.{name}: {error}") from None


def _with_model(config: RunConfig, model: str) -> Run:
    return Run(config).configured(sampling=config.sampling.model_copy(update={"model": model}))


def _steps(config: RunConfig, subject: EvaluatedModel) -> list[int]:
    """Numbers of steps of a model: an autoregressive one draws one token a step."""
    if subject.config.kind == "ar":
        return [config.data.predicted]
    return sorted(set(config.evaluation.steps))


def _sampling(config: RunConfig, kind: str, steps: int) -> RunConfig:
    """The config with one number of steps, in the order that a kind of model can follow."""
    changes: dict[str, Any] = {"steps": steps}
    if kind == "ar":
        changes = {"steps": config.data.predicted, "order": "left_to_right"}
    return config.model_copy(update={"sampling": config.sampling.model_copy(update=changes)})


_Judged = tuple[list[Point], list[Group], list[Measure], list[tuple[str, str]]]


def _judge_text(
    config: RunConfig,
    subjects: dict[str, EvaluatedModel],
    contenders: list[Contender],
    own: Corpus,
    resources: Resources,
) -> _Judged:
    """Points of the frontier, likelihoods, figures of real text, and samples to show."""
    first = next(iter(subjects.values()))
    real, bos = real_text(config, first, own, resources), first.facts.bos is not None
    bounds = _bounds(config, subjects, own, resources)
    drawn = frontier.draw_all(contenders, config.data.predicted, resources)
    found = judge_texts(config, real, bos, [one.tokens for one in drawn], resources)
    points = [frontier.point(one, measures) for one, measures in zip(drawn, found, strict=True)]
    shown = [("held-out text", excerpt(real.texts))]
    for one in drawn:
        if one.settings == one.contender.settings[-1]:
            title = f"{one.contender.name}, {one.settings.steps} steps"
            shown.append((title, excerpt(real.decode(one.tokens))))
    return points, bounds, real.measures, shown


def _judge_images(
    config: RunConfig,
    subjects: dict[str, EvaluatedModel],
    contenders: list[Contender],
    own: Corpus,
    resources: Resources,
) -> _Judged:
    """Points of the frontier, and likelihoods."""
    data = config.data
    assert data.kind == "image"
    net, _, reference = feature_net(config, own, resources)
    bounds = _bounds(config, subjects, own, resources)
    drawn = frontier.draw_all(contenders, data.predicted, resources)
    codes = [one.tokens[:, 1:] for one in drawn]
    found = distances(net, reference, codes, storage.join(own.path, TOKENIZER), data, resources)
    points = [frontier.point(one, [fid]) for one, fid in zip(drawn, found, strict=True)]
    return points, bounds, [], []


def _bounds(
    config: RunConfig, subjects: dict[str, EvaluatedModel], own: Corpus, resources: Resources
) -> list[Group]:
    """The likelihood of every model on the same held-out rows."""
    found = likelihoods(config, list(subjects.values()), own, [], resources)
    return [
        replace(group, key=f"validation/{name}", title=name)
        for name, (group,) in zip(subjects, found, strict=True)
    ]


def _curves(run: Run, subjects: dict[str, EvaluatedModel], metric: str) -> list[convergence.Curve]:
    """Histories of the runs that trained the models; a distilled or unknown one has none."""
    found = []
    for name, subject in subjects.items():
        trained = model_folder.read_background(storage.fetch(subject.model)).run
        record = _run_of(run, run.config.evaluation.models[name])
        if not trained or trained.get("distill") or record is None:
            log.warning("no convergence of %s: the MLflow run that pretrained it is not known", name)
            continue
        try:
            history = tracking.metric_history(*record, [metric, convergence.SPEED])
        except ConfigError as error:
            log.warning("no convergence of %s: %s", name, error)
            continue
        one = convergence.curve(name, history, metric, trained["train"]["batch"] * subject.facts.length)
        if one is None:
            log.warning("no convergence of %s: its run has no %s", name, metric)
        else:
            found.append(one)
    return found


def _run_of(run: Run, spec: str) -> tuple[str, str] | None:
    """MLflow store and id of the run that a model comes from."""
    if spec.startswith("models:/"):
        run_id = tracking.find_version(run.tracking_uri, spec).run_id
        return (run.tracking_uri, run_id) if run_id else None
    recorded = tracking.recorded_run(storage.resolve(spec).rstrip("/").rpartition("/")[0])
    if recorded is None:
        return None
    run_id, uri = recorded
    ours = run.tracking_uri  # with the password that a run's record leaves out
    return ours if uri == shown(ours) else uri, run_id


def _quality(points: Sequence[Point]) -> list[Measure]:
    """The figures that the frontier shows: quality, and of text the entropy beside it."""
    by_key = {one.key: one for one in points[0].measures}
    order = ("generative_perplexity", "bigram_perplexity", "fid")
    best = next(by_key[key] for key in order if key in by_key)
    return [best, *([by_key["entropy"]] if "entropy" in by_key else [])]


def _data(found: Comparison) -> dict[str, str]:
    """The data behind the figures."""
    files = {"frontier.csv": frontier.to_csv(found.points)}
    if found.curves:
        files["convergence.csv"] = convergence.to_csv(found.curves, found.metric)
    return files


def _page(
    config: RunConfig,
    found: Comparison,
    subjects: dict[str, EvaluatedModel],
    contenders: list[Contender],
    own: Corpus,
    beside: Sequence[Measure],
    samples: Sequence[tuple[str, str]],
) -> Page:
    """All of it for people."""
    models = [
        [name, one.config.kind, f"{one.parameters:,}", str(one.step), config.evaluation.models[name]]
        for name, one in subjects.items()
    ]
    sections = [
        Section("Models", [Table(["model", "kind", "parameters", "step", "from"], models)]),
        figures_section("Likelihood on held-out rows", found.likelihoods),
        Section("Frontier", _frontier_blocks(config, found.points, contenders, beside)),
    ]
    if found.curves:
        head, body = convergence.table(found.curves, found.metric)
        told = {one.model: (one.tokens, one.seconds, one.values) for one in found.curves}
        caption = f"Validation {found.metric} during training, by tokens read and by seconds"
        note = (
            "Tokens are those of the rows that were read. Seconds are those of training steps, without "
            "validation, checkpoints and pauses; they compare only where the runs had the same machine and load. "
            "Values between two validations lie on a line."
        )
        drawing = picture("convergence", figures.convergence(told, found.metric), caption)
        sections.append(Section("Convergence", [Text(note), drawing, Table(head, body)]))
    if samples:
        sections.append(Section("Samples", [Columns(samples)]))
    sections.append(paper_section({name: one.config for name, one in subjects.items()}, own.manifest))
    return Page(f"Comparison {config.name}", [*sections, *setting_sections(config, own.manifest)])


def _frontier_blocks(
    config: RunConfig, points: Sequence[Point], contenders: list[Contender], beside: Sequence[Measure]
) -> list[Block]:
    shown = _quality(points)
    lines = {
        name: [
            (one.steps, one.speed, [one.value(m.key) for m in shown]) for one in points if one.model == name
        ]
        for name in dict.fromkeys(one.model for one in points)
    }
    real = [next(m.value for m in beside if m.key == one.key) for one in shown] if beside else []
    settings = contenders[0].settings[0]
    told = describe(settings, settings.num_samples) | without_mauve(config)
    how = ", ".join(f"{key} {value}" for key, value in told.items() if key not in ("order", "steps"))
    note = (
        f"Every model: {how}, batch {settings.batch}. tokens/s is the median of {frontier.TIMED} batches, drawn "
        f"in turn by one warm process, with the slowest and the fastest beside it. {shown[0].name}: {shown[0].by}."
    )
    head, body = frontier.table(points)
    caption = "Quality of samples against the speed of drawing them; numbers are sampling steps"
    drawing = picture("frontier", figures.frontier(lines, [one.name for one in shown], real), caption)
    return [Text(note), drawing, Table(head, body)]
