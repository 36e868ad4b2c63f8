"""The frontier: what samples of several models are worth, against how fast they are drawn, over sampling steps.

All models draw the same number of samples with the same seeds and settings. Speed is taken while nothing else is
drawn: one actor holds all models, and draws the same full batch of every model and number of steps in turn, so that
whatever else the machine does meets all of them alike.
"""

import csv
import io
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from jaxtyping import Int

from pipeline.config.schema import Precision, SamplingConfig
from pipeline.metrics.draw import Sampler
from pipeline.reports.measures import Measure, short
from pipeline.runtime.actors import Resources, in_order, started

log = logging.getLogger(__name__)

TIMED = 5  # times that every point's batch is drawn for its speed, after one that warms up


@dataclass(frozen=True)
class Contender:
    """A model of the comparison.

    Attributes:
        name: for people.
        folder: consolidated model that every node can read.
        kind: pgm, mdlm or ar.
        settings: one for every number of steps.
    """

    name: str
    folder: str
    kind: str
    parameters: int
    settings: Sequence[SamplingConfig]


@dataclass(frozen=True)
class Drawn:
    """The samples of one model at one number of steps.

    Attributes:
        rates: tokens/s of every timed batch.
    """

    contender: Contender
    settings: SamplingConfig
    tokens: Int[np.ndarray, "n L"]
    rates: Sequence[float]


@dataclass(frozen=True)
class Point:
    """What is known of one model at one number of steps."""

    model: str
    kind: str
    parameters: int
    steps: int
    order: str
    rates: Sequence[float]
    measures: Sequence[Measure]

    @property
    def speed(self) -> float:
        """Median tokens/s."""
        return median(self.rates)

    def value(self, key: str) -> float:
        """A figure by its key."""
        return next(one.value for one in self.measures if one.key == key)


class _Gallery:
    """One actor: all models on one device."""

    def __init__(self, models: Mapping[str, str], threads: int, precision: Precision):
        self._models = {name: Sampler(folder, threads, precision) for name, folder in models.items()}

    def draw(
        self, name: str, settings: SamplingConfig, first: int, count: int
    ) -> tuple[Int[np.ndarray, "count L"], float]:
        """Samples `first` to `first + count - 1`, and the seconds that they took."""
        began = time.perf_counter()
        rows = self._models[name].draw(settings, first, count)
        return rows, time.perf_counter() - began


def draw_all(contenders: Sequence[Contender], predicted: int, resources: Resources) -> list[Drawn]:
    """Samples of every model at every number of steps, and their speed.

    Args:
        predicted: tokens of a row that are drawn.
    """
    asked = [(one, settings) for one in contenders for settings in one.settings]
    count, batch = asked[0][1].num_samples, min(asked[0][1].batch, asked[0][1].num_samples)
    full = count // batch
    rows: list[dict[int, np.ndarray]] = [{} for _ in asked]
    rates: list[list[float]] = [[] for _ in asked]
    models = {one.name: one.folder for one in contenders}
    left = [(which, first) for first in range(0, count, batch) for which in range(len(asked))]
    with started(_Gallery, (models, resources.cpus, asked[0][1].precision), resources, len(left)) as actors:
        timed = [(which, batch * (turn % full)) for turn in range(TIMED + 1) for which in range(len(asked))]

        def tasks(places: Sequence[tuple[int, int]]) -> list[tuple[Any, ...]]:
            return [
                (asked[which][0].name, asked[which][1], first, min(batch, count - first))
                for which, first in places
            ]

        found = in_order(actors[:1], "draw", tasks(timed))
        for turn, ((which, first), (drawn, seconds)) in enumerate(zip(timed, found, strict=True)):
            rows[which][first] = drawn
            if turn >= len(asked):
                rates[which].append(len(drawn) * predicted / seconds)
            if turn % len(asked) == len(asked) - 1:
                log.info("timed %d of %d rounds of %d batches", turn // len(asked), TIMED, len(asked))
        left = [(which, first) for which, first in left if first not in rows[which]]
        for done, ((which, first), (drawn, _)) in enumerate(
            zip(left, in_order(actors, "draw", tasks(left)), strict=True), start=1
        ):
            rows[which][first] = drawn
            if done % len(asked) == 0:
                log.info("drew %d of %d further batches", done, len(left))
    return [
        Drawn(one, settings, np.concatenate([parts[first] for first in sorted(parts)]), speeds)
        for (one, settings), parts, speeds in zip(asked, rows, rates, strict=True)
    ]


def point(drawn: Drawn, measures: Sequence[Measure]) -> Point:
    """Put figures beside the samples that they are of."""
    one, settings = drawn.contender, drawn.settings
    return Point(
        one.name, one.kind, one.parameters, settings.steps, settings.order, drawn.rates, list(measures)
    )


def table(points: Sequence[Point]) -> tuple[list[str], list[list[str]]]:
    """Head and rows for people: a row a point."""
    head = ["model", "parameters", "order", "steps", "tokens/s", "slowest to fastest"]
    head += [one.name for one in points[0].measures]
    rows = [
        [
            one.model,
            f"{one.parameters:,}",
            one.order,
            str(one.steps),
            short(one.speed),
            f"{short(min(one.rates))} to {short(max(one.rates))}",
            *(short(measure.value) for measure in one.measures),
        ]
        for one in points
    ]
    return head, rows


def to_csv(points: Sequence[Point]) -> str:
    """The data behind the figure, in full precision."""
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n")
    facts = ["model", "kind", "parameters", "order", "steps"]
    keys = [one.key for one in points[0].measures]
    write.writerow([*facts, "tokens_per_second", "slowest", "fastest", *keys])
    for one in points:
        told = [getattr(one, fact) for fact in facts]
        speeds = [one.speed, min(one.rates), max(one.rates)]
        write.writerow([*told, *speeds, *(one.value(key) for key in keys)])
    return out.getvalue()
