"""Accuracy of text models on tasks of lm-evaluation-harness (extra `harness`), in one table."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from pipeline import storage
from pipeline.api import load_model
from pipeline.config.schema import RunConfig
from pipeline.errors import CapabilityError, ConfigError, DataError, did_you_mean, kind_and_line
from pipeline.evaluation.evaluate import log_files
from pipeline.evaluation.evaluated_model import EvaluatedModel, open_models
from pipeline.logs import Progress
from pipeline.metrics.likelihood import NORMAL_95
from pipeline.reports.measures import Group, Measure, Report
from pipeline.reports.page import Page, Section, Table, Text
from pipeline.run import Run
from pipeline.runtime import claims
from pipeline.runtime.actors import in_order, own_device, started
from pipeline.runtime.ray_cluster import available_resources, joined_cluster


@dataclass(frozen=True)
class Accuracy:
    """Result of a task.

    Attributes:
        value: share of questions that are answered right.
        stderr: its standard error over questions.
        chance: expected share of right answers if all choices were alike; 0 where the text itself is the answer.
        questions: number of questions.
    """

    value: float
    stderr: float
    chance: float
    questions: int

    @property
    def above_chance(self) -> float:
        """Return (value - chance) / (1 - chance)."""
        return (self.value - self.chance) / (1 - self.chance)

    @property
    def above_chance_stderr(self) -> float:
        """Return the standard error of `above_chance`."""
        return self.stderr / (1 - self.chance)


@dataclass(frozen=True)
class Downstream:
    """Results of all models on all tasks.

    Attributes:
        table: a row for every task and model.
        folder: of the report's files.
        tracking_uri: of the MLflow store.
    """

    table: pd.DataFrame
    folder: str
    tracking_uri: str


def downstream(config: RunConfig) -> Downstream:
    """Answer the questions of every task of `evaluation.tasks` with every model.

    A choice is scored by the bound of its log-likelihood behind the question, from `evaluation.draws` maskings
    (exact for an autoregressive model). Tasks are spread over Ray actors.

    Args:
        config: of the evaluation; the models are those of `evaluation.models`, or the run's own.

    Raises:
        CapabilityError: the extra `harness` is not installed, or a model is not one of text.
        CheckpointError: there is no such model.
        ConfigError: there is no such task.
        DataError: a task cannot be read.
    """
    run = Run.of(config)
    config, folder = run.config, storage.join(run.folder, "downstream")
    settings = config.evaluation
    _check_tasks(settings.tasks, settings.tasks_path)
    models = open_models(run)
    claim = claims.held(folder, "cluster.storage", f"run {config.name!r}", "evaluated")
    with claim, run.in_mlflow() as run, joined_cluster(config.cluster):
        resources = available_resources(config.cluster)
        limits = (settings.draws, settings.batch, config.seed, settings.tasks_path, settings.task_limit)
        pairs = [(model, task) for model in models for task in settings.tasks]
        progress = Progress("answered", "tasks", len(pairs), "questions")
        results: list[Accuracy] = []
        with started(_Examiner, (resources.cpus,), resources, len(pairs)) as actors:
            tasks = [(model.folder, task, *limits) for model, task in pairs]
            for result in in_order(actors, "answer", tasks):
                results.append(result)
                progress.add(result.questions)
        answered = [(*pair, result) for pair, result in zip(pairs, results, strict=True)]
        table, groups = pd.DataFrame([_row(*row) for row in answered]), [_group(*row) for row in answered]
        report = Report(config.name, {"models": len(models), "draws": settings.draws}, groups)
        page = Page(
            f"Downstream tasks: {config.name}",
            [Section("Accuracy", [Text(_METHOD.format(draws=settings.draws)), Table(table)])],
        )
        storage.publish_text(storage.join(folder, "downstream.json"), report.to_json())
        with run.tracker(folder) as tracker:
            tracker.log_metrics(report.metrics(), models[0].step)
            log_files(tracker, folder, ["downstream.json", *page.publish(folder)])
    return Downstream(table, folder, run.tracking_uri)


_METHOD = (
    "A choice is scored by the bound of its log-likelihood behind the question, the mean of {draws} maskings (exact "
    "for AR). Above chance: (accuracy - chance) / (1 - chance). Standard errors are over questions."
)


class _Examiner:
    """Answers tasks with models on one device; one Ray actor holds one."""

    def __init__(self, threads: int):
        torch.set_num_threads(threads)
        self._device = own_device()

    def answer(
        self, folder: str, task: str, draws: int, batch: int, seed: int, path: str | None, limit: int | None
    ) -> Accuracy:
        """Answer the questions of a task."""
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from pipeline.evaluation.harness import DenoiserLM, HarnessSettings

        model = load_model(str(storage.fetch(folder)), self._device)
        harness = DenoiserLM(model, HarnessSettings(draws=draws, seed=seed, rows=batch))
        try:
            output = simple_evaluate(
                harness,
                tasks=[task],
                limit=limit,
                bootstrap_iters=0,
                task_manager=TaskManager(include_path=path),
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise DataError(f"evaluation.tasks: {task!r} cannot be read: {kind_and_line(error)}") from None
        return _accuracy(task, output)


def _accuracy(task: str, output: Mapping[str, Any]) -> Accuracy:
    """Read the accuracy of a task, and of its chance, from what lm-eval returns."""
    results, samples = output["results"].get(task, {}), output["samples"].get(task, [])
    value = results.get("acc,none")
    if value is None or not samples:
        known = ", ".join(key for key in results if key.endswith(",none"))
        raise ConfigError(
            f"evaluation.tasks: {task!r} has no accuracy (acc); expected a task with one, not {known}"
        )
    count = len(samples)
    choices = [len(sample["arguments"]) for sample in samples]
    # One request a question: the text itself is the answer, and guessing does not help.
    chance = sum(1 / n for n in choices if n > 1) / count
    stderr = math.sqrt(value * (1 - value) / max(1, count - 1))
    return Accuracy(float(value), stderr, chance, count)


def _check_tasks(tasks: Sequence[str], path: str | None) -> None:
    """Refuse names that no task has, before models are loaded."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise CapabilityError(
            f"evaluation.tasks: a package is not installed: {error}; pip install -e '.[harness]'"
        ) from None
    known = TaskManager(include_path=path).all_subtasks
    for task in tasks:
        if task not in known:
            raise ConfigError(
                f"evaluation.tasks: {task!r} is no task of lm-evaluation-harness{did_you_mean(task, known)}"
            )


def _row(model: EvaluatedModel, task: str, result: Accuracy) -> dict[str, str]:
    return {
        "task": task,
        "model": model.name,
        "questions": f"{result.questions:,}",
        "accuracy": f"{result.value:.1%} ± {result.stderr:.1%}",
        "chance": f"{result.chance:.1%}",
        "above chance": f"{result.above_chance:.3f} ± {result.above_chance_stderr:.3f}",
    }


def _group(model: EvaluatedModel, task: str, result: Accuracy) -> Group:
    """Make the report's group of a result."""
    half, rest = NORMAL_95 * result.stderr, NORMAL_95 * result.above_chance_stderr
    measures = [
        Measure("accuracy", "accuracy", result.value, (result.value - half, result.value + half)),
        Measure(
            "above_chance",
            "accuracy above chance",
            result.above_chance,
            (result.above_chance - rest, result.above_chance + rest),
        ),
    ]
    key = f"downstream/{model.name}/{task}"
    return Group(key, f"{model.name} on {task}", {"questions": result.questions}, measures)
