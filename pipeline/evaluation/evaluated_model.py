"""A model that is evaluated: opening and checking it, and its likelihood."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline import storage
from pipeline.config.model import ARConfig, ModelConfig
from pipeline.config.schema import RunConfig
from pipeline.data.tokenizers import PairTokenizer, Tokenizer, saved_tokenizer
from pipeline.errors import CheckpointError, ConfigError
from pipeline.metrics.corpora import Case, Corpus, check_fits, likelihood_group, measure_cases
from pipeline.metrics.likelihood import PARTS, Estimator, Likelihood, Masking, Part
from pipeline.models import model_folder
from pipeline.models.vq import ImageTokenizer
from pipeline.reports.measures import Group
from pipeline.run import Run
from pipeline.training.validation import validation_rows


@dataclass(frozen=True)
class EvaluatedModel:
    """A model that is evaluated.

    Attributes:
        name: for people.
        folder: of the consolidated model; every node can read it.
        config: of the model.
        facts: what the model knows about its data.
        parameters: number of parameters.
        step: of its training; 0 where that is unknown.
        masking: how rows are hidden to measure its likelihood.
    """

    name: str
    folder: str
    config: ModelConfig
    facts: model_folder.DataFacts
    parameters: int
    step: int
    masking: Masking

    @property
    def tokenizer(self) -> Tokenizer | ImageTokenizer | PairTokenizer | None:
        """Load the tokenizer of the model's folder; None where it has none."""
        return saved_tokenizer(storage.fetch(self.folder))

    def check_fits(self, corpus: Corpus, run: Run) -> None:
        """Refuse data that the model cannot read. A model without a tokenizer is taken to have that of the run.

        Args:
            corpus: the data.
            run: of the evaluation, with its manifest.

        Raises:
            DataError: names every field that differs.
        """
        check_fits(corpus, self.facts, (self.tokenizer or run.manifest.tokenizer).hash)


def open_model(run: Run, name: str) -> EvaluatedModel:
    """Open the model that `jobs.sample` would draw from.

    Args:
        run: of the evaluation; `sampling.model` names the model.
        name: of the model, for people.

    Raises:
        CheckpointError: there is no such model, or it is damaged.
        ConfigError: its first token cannot be scored (`evaluation.score_bos`).
    """
    config, folder = run.config, run.sampled_model()
    local = storage.fetch(folder)
    denoiser, section, facts = model_folder.read(local)
    if config.evaluation.score_bos and isinstance(section, ARConfig) and section.start == "bos":
        raise ConfigError(
            "evaluation.score_bos: true for an autoregressive model that reads BOS first; expected false"
        )
    masking = Masking.of(config, denoiser, facts.bos is not None)
    parameters = sum(value.numel() for value in denoiser.parameters())
    step = int(model_folder.read_background(local).figures.get("step", 0))
    return EvaluatedModel(name, folder, section, facts, parameters, step, masking)


def open_models(run: Run) -> list[EvaluatedModel]:
    """Open the models of `evaluation.models`, or where there are none the model of `open_model`.

    Args:
        run: of the evaluation.

    Raises:
        CheckpointError, ConfigError: as `open_model`, naming the model.
    """
    models, sampling = [], run.config.sampling
    for name, spec in run.config.evaluation.models.items():
        try:
            models.append(
                open_model(run.configured(sampling=sampling.model_copy(update={"model": spec})), name)
            )
        except (CheckpointError, ConfigError) as error:
            raise type(error)(f"evaluation.models.{name}: {error}") from None
    return models or [open_model(run, run.config.name)]


def check_sampling(config: RunConfig, model: ModelConfig) -> None:
    """Refuse a config with which a model cannot be sampled.

    Args:
        config: of the evaluation; `sampling.model` names the model.
        model: section of the model.

    Raises:
        ConfigError: names all problems.
    """
    sampling = config.sampling.model_copy(update={"model": None})
    if problems := config.model_copy(update={"model": model, "sampling": sampling}).conflicts():
        spec = config.sampling.model or f"of the run {config.name}"
        raise ConfigError(f"with the model {spec}:\n" + "\n".join(f"  {line}" for line in problems))


def likelihood_groups(
    run: Run, models: Sequence[EvaluatedModel], corpora: Sequence[Corpus]
) -> list[list[Group]]:
    """Measure the likelihood of every model on every corpus.

    Args:
        run: of the evaluation.
        models: to measure.
        corpora: the run's own has the key "validation".

    Returns:
        A list per model with a group per corpus, or of captions and images with one for every part that can be given.
    """
    count, pairs = run.config.evaluation.rows, corpora[0].manifest.caption is not None
    rows = {corpus.path: validation_rows(corpus.manifest.rows("validation"), count) for corpus in corpora}
    cases = [
        [
            Case(model.folder, corpus, rows[corpus.path], model.masking, part)
            for corpus in corpora
            for part in (_parts(model) if pairs else PARTS[:1])
        ]
        for model in models
    ]
    results = iter(measure_cases([case for of_model in cases for case in of_model], run.resources))
    return [[_group(case, next(results), run.config) for case in of_model] for of_model in cases]


def _group(case: Case, result: Likelihood, config: RunConfig) -> Group:
    """Make the report's group of a likelihood."""
    of_run, source = case.corpus.key == "validation", case.corpus.manifest.source.name
    title = "Validation" if of_run else f"Zero-shot on {source}"
    return likelihood_group(case.corpus, title, result, config.evaluation.score_bos, case.given)


def _parts(model: EvaluatedModel) -> Sequence[Part]:
    """List what may be given of captions and images; an autoregressive model cannot be given an image."""
    return PARTS[:-1] if model.config.kind == "ar" else PARTS


def by_estimator(model: EvaluatedModel) -> list[EvaluatedModel]:
    """Copy a model of text for every estimator that it has.

    Args:
        model: of text.
    """
    own, masking = model.masking.estimator, model.masking
    estimators: tuple[Estimator, ...] = ("exact",) if own == "exact" else ("count", "mdlm")
    return [replace(model, masking=replace(masking, estimator=estimator)) for estimator in estimators]
