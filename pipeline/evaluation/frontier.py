"""The frontier: quality of the samples of several models against sampling speed, over numbers of sampling steps.

All models draw the same number of samples with the same seeds and settings. Speed is measured while nothing else is
drawn: one actor holds all models and draws the same full batch of every model and number of steps in turn, so that
other load on the machine affects all of them alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int

from pipeline.config.evaluation import SamplingConfig
from pipeline.evaluation.evaluated_model import EvaluatedModel
from pipeline.logs import Progress
from pipeline.metrics.draw import DrawnBatch, Sampler, batches_of, labels_of
from pipeline.reports import tables
from pipeline.reports.measures import Measure
from pipeline.runtime.actors import Resources, in_order, started

TIMED = 5  # times that every point's batch is drawn to measure its speed, after once to warm up


@dataclass(frozen=True)
class Point:
    """Speed and quality of one model with one setting of the sampler.

    Attributes:
        evaluated: the model.
        settings: of sampling.
        tokens: the samples.
        rates: tokens/s of every timed batch.
        measures: of the samples.
        varied: keys of the settings that differ between points, beside the steps.
    """

    evaluated: EvaluatedModel
    settings: SamplingConfig
    tokens: Int[np.ndarray, "n L"]
    rates: Sequence[float]
    measures: Sequence[Measure] = ()
    varied: Sequence[str] = ()

    @property
    def model(self) -> str:
        """Return the name of the model."""
        return self.evaluated.name

    @property
    def labels(self) -> list[int] | None:
        """List the class of every sample; None for a model without classes."""
        classes = self.evaluated.config.classes
        return None if classes is None else labels_of(self.settings, classes, 0, len(self.tokens))

    @property
    def steps(self) -> int:
        """Return the number of steps."""
        return self.settings.steps

    @property
    def variant(self) -> list[str]:
        """List the varied settings that have an effect, as `key value`."""
        order = self.settings.order
        idle = {"gumbel": order != "confidence", "gamma": order != "entropy"}
        return [f"{key} {value}" for key, value in self.chosen.items() if not idle.get(key)]

    @property
    def line(self) -> str:
        """Name the model with its varied settings, which all numbers of steps have in common."""
        return ", ".join([self.model, *self.variant])

    @property
    def chosen(self) -> dict[str, str]:
        """Return the varied settings as texts."""
        values = {key: getattr(self.settings, key) for key in self.varied}
        # MLflow's keys have no "+", which stands in 1e+06.
        texts = {key: f"{v:g}" if isinstance(v, float) else str(v) for key, v in values.items()}
        return {key: text.replace("+", "") for key, text in texts.items()}

    @property
    def speed(self) -> float:
        """Return the median tokens/s."""
        return median(self.rates)

    def value(self, key: str) -> float:
        """Return a metric by its key.

        Args:
            key: of the metric.
        """
        return next(measure.value for measure in self.measures if measure.key == key)


def draw_all(
    points: Sequence[tuple[EvaluatedModel, SamplingConfig]], predicted: int, resources: Resources
) -> list[Point]:
    """Sample from every model at every number of steps, and measure the speed.

    Args:
        points: models and settings, which all have the same number of samples and the same batch.
        predicted: tokens of a row that are drawn.
        resources: of the actors.

    Returns:
        A point per model and settings, without measures.
    """
    batches = batches_of(points[0][1])
    full = [batch for batch in batches if batch[1] == batches[0][1]]
    timed = [full[turn % len(full)] for turn in range(TIMED + 1)]
    rest = [batch for batch in batches if batch not in timed]
    drawn: list[list[DrawnBatch]] = [[] for _ in points]  # a list per point, with all turns

    def draw(actors: list[Any], turns: Sequence[tuple[int, int]], verb: str) -> None:
        tasks = [(model.folder, settings, *batch) for batch in turns for model, settings in points]
        progress = Progress(verb, "batches", len(tasks), "rows")
        for index, batch in enumerate(in_order(actors, "draw", tasks)):
            # A grid of 50,000 images a point is held in memory.
            drawn[index % len(points)].append(replace(batch, tokens=batch.tokens.astype(np.int32)))
            progress.add(len(batch.tokens))

    num_models = len({model.folder for model, _ in points})
    with started(Sampler, (resources.cpus, num_models), resources, len(rest) * len(points)) as actors:
        draw(actors[:1], timed, "timed")
        draw(actors, rest, "sampled")
    order, found = [*timed, *rest], []
    for (model, settings), turns in zip(points, drawn, strict=True):
        tokens = np.concatenate([turns[order.index(batch)].tokens for batch in batches])
        rates = [len(batch.tokens) * predicted / batch.seconds for batch in turns[1 : len(timed)]]
        found.append(Point(model, settings, tokens, rates))
    return found


def table(points: Sequence[Point]) -> pd.DataFrame:
    """Make a table of texts with a row per point.

    Args:
        points: of all models.
    """
    return tables.table_of(
        {
            "model": point.model,
            "parameters": f"{point.evaluated.parameters:,}",
            "order": point.settings.order,
            **point.chosen,
            "steps": str(point.steps),
            "tokens/s (median)": tables.short(point.speed),
            "range": f"{tables.short(min(point.rates))} to {tables.short(max(point.rates))}",
            **{measure.name: tables.short(measure.value) for measure in point.measures},
        }
        for point in points
    )


def to_csv(points: Sequence[Point]) -> str:
    """Write the points as CSV in full precision.

    Args:
        points: of all models.
    """
    rows = (
        {
            "model": point.model,
            "kind": point.evaluated.config.kind,
            "parameters": point.evaluated.parameters,
            "order": point.settings.order,
            **{key: getattr(point.settings, key) for key in point.varied},
            "steps": point.steps,
            "tokens_per_second": point.speed,
            "slowest": min(point.rates),
            "fastest": max(point.rates),
            **{measure.key: measure.value for measure in point.measures},
        }
        for point in points
    )
    return tables.to_csv(tables.table_of(rows))
