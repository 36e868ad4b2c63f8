"""What an evaluation found: figures in groups, each with how it was measured, as JSON and plain text."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

HEAD = ("", "value", "95% interval", "measured by")


@dataclass(frozen=True)
class Measure:
    """One figure.

    Attributes:
        key: its metric's name within the group.
        name: for people, with the unit.
        interval: 95%, where it is known.
        by: what measured it, beside what the group says.
    """

    key: str
    name: str
    value: float
    interval: tuple[float, float] | None = None
    by: str = ""


@dataclass(frozen=True)
class Group:
    """Figures that were measured in the same way.

    Attributes:
        key: of the metrics, `evaluation/KEY/...`.
        title: for people.
        how: what all of its figures have in common.
    """

    key: str
    title: str
    how: Mapping[str, Any]
    measures: Sequence[Measure]

    @property
    def heading(self) -> str:
        """Title, and how it was measured, on one line."""
        return f"{self.title}: " + ", ".join(f"{key} {value}" for key, value in self.how.items())


@dataclass(frozen=True)
class Report:
    """All figures of a model.

    Attributes:
        model: folder or registered name.
        about: what it is: kind, parameters, training step.
    """

    model: str
    about: Mapping[str, Any] = field(default_factory=dict)
    groups: Sequence[Group] = ()

    def metrics(self) -> dict[str, float]:
        """Finite figures, and the ends of their intervals, by metric name."""
        found: dict[str, float] = {}
        for group in self.groups:
            for one in group.measures:
                key = f"evaluation/{group.key}/{one.key}"
                low, high = one.interval or (math.nan, math.nan)
                found |= {key: one.value, f"{key}_low": low, f"{key}_high": high}
        return {key: value for key, value in found.items() if math.isfinite(value)}

    def to_json(self) -> str:
        """Everything, with null for what is not finite."""
        groups = [
            {
                "key": group.key,
                "title": group.title,
                "how": dict(group.how),
                "figures": [
                    {
                        "key": one.key,
                        "name": one.name,
                        "value": _finite(one.value),
                        "interval": one.interval and [_finite(end) for end in one.interval],
                        "by": one.by,
                    }
                    for one in group.measures
                ],
            }
            for group in self.groups
        ]
        tree = {"model": self.model, "about": dict(self.about), "groups": groups}
        return json.dumps(tree, indent=2, ensure_ascii=False) + "\n"

    def to_text(self) -> str:
        """Columns aligned over all groups."""
        rows = [cells(one) for group in self.groups for one in group.measures]
        name, value, interval = (max(len(row[i]) for row in [HEAD, *rows]) for i in range(3))

        def line(row: tuple[str, ...]) -> str:
            return f"  {row[0]:<{name}}  {row[1]:>{value}}  {row[2]:<{interval}}  {row[3]}".rstrip()

        def lines() -> Iterator[str]:
            yield f"{self.model}: {self.told}"
            yield line(HEAD)
            for group in self.groups:
                yield f"{group.heading}"
                yield from (line(cells(one)) for one in group.measures)

        return "\n".join(lines())

    @property
    def told(self) -> str:
        """What it is, on one line."""
        return ", ".join(f"{key} {value}" for key, value in self.about.items())


def cells(one: Measure) -> tuple[str, str, str, str]:
    """A figure under `HEAD`."""
    interval = "" if one.interval is None else f"{short(one.interval[0])} to {short(one.interval[1])}"
    return one.name, short(one.value), interval, one.by


def short(value: float) -> str:
    """Four decimals below 10, two below 1,000, none above."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    return f"{value:.4f}" if size < 10 else f"{value:.2f}" if size < 1000 else f"{value:,.0f}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
