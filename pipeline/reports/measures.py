"""Results of an evaluation: metrics in groups, each with how it was measured, as JSON and plain text."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool

from pipeline.reports.tables import aligned, short


@dataclass(frozen=True)
class Measure:
    """A measured metric.

    Attributes:
        key: name of the metric within the group.
        name: for people, with the unit.
        value: of the metric.
        interval: 95% confidence interval, where it is known.
        by: how it was measured, beyond what the group says.
    """

    key: str
    name: str
    value: float
    interval: tuple[float, float] | None = None
    by: str = ""


@dataclass(frozen=True)
class Group:
    """Metrics that were measured in the same way.

    Attributes:
        key: of the metrics, `evaluation/KEY/...`.
        title: for people.
        how: conditions of the measurement that all metrics have in common.
        measures: the metrics.
    """

    key: str
    title: str
    how: Mapping[str, Any]
    measures: Sequence[Measure]

    @property
    def heading(self) -> str:
        """Return title and conditions on one line."""
        return f"{self.title}: {_listed(self.how)}"


@dataclass(frozen=True)
class Report:
    """All metrics of a model.

    Attributes:
        model: folder or registered name.
        about: kind, parameters, training step.
        groups: the metrics.
    """

    model: str
    about: Mapping[str, Any] = field(default_factory=dict)
    groups: Sequence[Group] = ()

    def metrics(self) -> dict[str, float]:
        """Return finite values, and the ends of their intervals, by metric name."""
        values: dict[str, float] = {}
        for group in self.groups:
            for measure in group.measures:
                key = f"evaluation/{group.key}/{measure.key}"
                low, high = measure.interval or (math.nan, math.nan)
                values |= {key: measure.value, f"{key}_low": low, f"{key}_high": high}
        return {key: value for key, value in values.items() if math.isfinite(value)}

    def to_json(self) -> str:
        """Write everything as JSON, with null for what is not finite."""
        tree = asdict(self)
        for group in tree["groups"]:
            group["figures"] = group.pop("measures")
        tree = json.loads(json.dumps(tree), parse_constant=lambda _: None)
        return json.dumps(tree, indent=2, ensure_ascii=False) + "\n"

    def to_text(self) -> str:
        """Write a table with columns that are aligned over all groups."""
        head, *rows = aligned(measure_table(chain(*(group.measures for group in self.groups)))).splitlines()
        lines, left = [f"{self.model}: {self.description}", head], iter(rows)
        for group in self.groups:
            lines += [group.heading, *islice(left, len(group.measures))]
        return "\n".join(lines)

    @property
    def description(self) -> str:
        """Return kind, parameters and training step on one line."""
        return _listed(self.about)


def share_measure(key: str, name: str, right: Bool[np.ndarray, "n"], by: str = "") -> Measure:
    """Make the metric of a share, with the 95% interval of Wilson.

    Args:
        key: as in `Measure`.
        name: as in `Measure`.
        right: what is counted, at least one.
        by: as in `Measure`.
    """
    from scipy.stats import binomtest  # takes a second, and most reports do without

    low, high = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    return Measure(key, name, float(right.mean()), (float(low), float(high)), by)


def measure_table(measures: Iterable[Measure]) -> pd.DataFrame:
    """Make a table of texts with a row per metric."""
    rows = [
        (
            measure.name,
            short(measure.value),
            "" if measure.interval is None else " to ".join(map(short, measure.interval)),
            measure.by,
        )
        for measure in measures
    ]
    return pd.DataFrame(rows, columns=["", "value", "95% interval", "measured by"])


def _listed(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in facts.items())
