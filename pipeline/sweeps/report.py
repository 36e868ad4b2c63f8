"""Results of a sweep: a row per variant, averaged over seeds, as Markdown and CSV."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from pipeline.reports import tables

Status = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class Trial:
    """One variant with one seed.

    Attributes:
        variant: its label.
        choices: label or number by entry of the space.
        seed: of the run.
        status: how it ended.
        step: number of updates done.
        curve: (step, metric) points from training, ascending.
        parameters: of the model; None where the trial left none; so are the rates.
        train_rate, sample_rate: tokens/s.
        run_id: of the MLflow run.
        error: of a failed trial.
    """

    variant: str
    choices: Mapping[str, str | float]
    seed: int
    status: Status
    step: int
    curve: Sequence[tuple[int, float]] = ()
    parameters: int | None = None
    train_rate: float | None = None
    sample_rate: float | None = None
    run_id: str | None = None
    error: str | None = None

    @property
    def value(self) -> float | None:
        """Return the metric at the end of the trial."""
        return self.curve[-1][1] if self.curve else None


class Spread(NamedTuple):
    """Spread of a figure over seeds.

    Attributes:
        mean: nan without a value.
        deviation: sample standard deviation; nan with fewer than two values.
    """

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Spread":
        """Average the values that are neither None nor infinite.

        Args:
            values: of the seeds.
        """
        known = [value for value in values if value is not None and math.isfinite(value)]
        mean = float(np.mean(known)) if known else math.nan
        return cls(mean, float(np.std(known, ddof=1)) if len(known) > 1 else math.nan)

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return ""
        digits = max(0, min(4, 3 - math.floor(math.log10(abs(self.mean))))) if self.mean else 2
        deviation = "" if math.isnan(self.deviation) else f" ± {self.deviation:,.{digits}f}"
        return f"{self.mean:,.{digits}f}{deviation}"


@dataclass(frozen=True)
class Row:
    """One variant, averaged over its trials.

    Attributes:
        variant: its label.
        choices: label or number by entry of the space.
        trials: by seed.
        metric: over the finished trials; over all where none finished.
        difference: of the metric to the first variant at the same seeds; None for the first variant.
        parameters: of the model; None where no trial left one.
        train_rate, sample_rate: tokens/s.
    """

    variant: str
    choices: Mapping[str, str | float]
    trials: Sequence[Trial]
    metric: Spread
    difference: Spread | None
    parameters: int | None
    train_rate: Spread
    sample_rate: Spread

    @property
    def state(self) -> str:
        """Summarise the trials: `3 finished`, `stopped at step 100`, ..."""
        finished = sum(trial.status == "finished" for trial in self.trials)
        parts = [f"{finished} finished"] if finished else []
        for status in ("stopped", "failed"):
            parts += [f"{status} at step {t.step}" for t in self.trials if t.status == status]
        return ", ".join(dict.fromkeys(parts))


def rows(trials: Sequence[Trial], mode: Literal["min", "max"]) -> list[Row]:
    """Make a row per variant: finished variants first, the best first; then those that went furthest.

    Args:
        trials: of all variants. The variant of the first one is what the others are compared with, seed by seed.
        mode: whether lower ("min") or higher ("max") values of the metric are better.
    """
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.variant, []).append(trial)
    table: list[Row] = []
    reference: dict[int, float] = {}
    for name, group in groups.items():
        finished = [trial for trial in group if trial.status == "finished"]
        finals = {trial.seed: trial.value for trial in finished if trial.value is not None}
        reference = reference if table else finals
        pairs = [value - reference[seed] for seed, value in finals.items() if seed in reference]
        row = Row(
            variant=name,
            choices=group[0].choices,
            trials=group,
            metric=Spread.of([trial.value for trial in finished or group]),
            difference=Spread.of(pairs) if table else None,
            parameters=next((trial.parameters for trial in group if trial.parameters is not None), None),
            train_rate=Spread.of([trial.train_rate for trial in group]),
            sample_rate=Spread.of([trial.sample_rate for trial in group]),
        )
        table.append(row)

    def rank(row: Row) -> tuple[bool, int, bool, float]:
        unknown = math.isnan(row.metric.mean)
        finished = all(trial.status == "finished" for trial in row.trials)
        reached = 0 if finished else -min(trial.step for trial in row.trials)
        value = row.metric.mean if mode == "min" else -row.metric.mean
        return not finished, reached, unknown, 0.0 if unknown else value

    return sorted(table, key=rank)


def best(table: Sequence[Row]) -> Row | None:
    """Return the best finished variant; where none finished, the best of those with a value; else None.

    Args:
        table: from `rows`.
    """
    return next((row for row in table if not math.isnan(row.metric.mean)), None)


def markdown(table: Sequence[Row], metric: str, about: str) -> str:
    """Write the table, and the failed trials with their errors below it.

    Args:
        table: from `rows`.
        metric: name of the metric.
        about: a paragraph above the table: how the results were measured.
    """
    reference = next((row.variant for row in table if row.difference is None), "")
    text = tables.markdown(
        tables.table_of(
            {
                **{entry.rpartition(".")[2]: _choice(row, entry) for entry in _entries(table)},
                metric.rpartition("/")[2]: str(row.metric),
                "difference to the first": "first" if row.difference is None else _signed(row.difference),
                "parameters": "" if row.parameters is None else f"{row.parameters:,}",
                "training tokens/s": str(row.train_rate),
                "sampling tokens/s": str(row.sample_rate),
                "trials": row.state,
            }
            for row in table
        )
    )
    failed = [trial for row in table for trial in row.trials if trial.status == "failed"]
    errors = "".join(f"- {t.variant} seed {t.seed}: {t.error}\n" for t in failed)
    end = f"\nFailed:\n{errors}" if failed else ""
    return f"{about}\n\nThe first variant is {reference}.\n\n{text}\n{end}"


def variants_csv(table: Sequence[Row], metric: str) -> str:
    """Write the table as CSV in full precision.

    Args:
        table: from `rows`.
        metric: name of the metric.
    """
    name, entries = metric.rpartition("/")[2], _entries(table)
    lines = (
        {
            **{entry: row.choices.get(entry) for entry in entries},
            **_cells(name, row.metric),
            **_cells(f"{name}_against_first", row.difference or Spread.of([])),
            "parameters": row.parameters,
            **_cells("train_tokens_per_second", row.train_rate),
            **_cells("sampling_tokens_per_second", row.sample_rate),
            "trials": row.state,
        }
        for row in table
    )
    return tables.to_csv(tables.table_of(lines))


def trials_csv(table: Sequence[Row], metric: str) -> str:
    """Write a CSV line per trial.

    Args:
        table: from `rows`.
        metric: name of the metric.
    """
    lines = (
        {
            **{entry: trial.choices.get(entry) for entry in _entries(table)},
            "seed": trial.seed,
            "status": trial.status,
            "step": trial.step,
            metric.rpartition("/")[2]: trial.value,
            "train_tokens_per_second": trial.train_rate,
            "run_id": trial.run_id,
            "error": trial.error,
        }
        for row in table
        for trial in row.trials
    )
    return tables.to_csv(tables.table_of(lines))


def _entries(table: Sequence[Row]) -> list[str]:
    """List every dimension that any variant has, in the order of first appearance."""
    return list(dict.fromkeys(entry for row in table for entry in row.choices))


def _choice(row: Row, entry: str) -> str:
    value = row.choices.get(entry, "")
    return f"{value:.4g}" if isinstance(value, float) else value


def _cells(name: str, spread: Spread) -> dict[str, float]:
    return {name: spread.mean, f"{name}_std": spread.deviation}


def _signed(difference: Spread) -> str:
    text = str(difference)
    return text if not text or text.startswith("-") else f"+{text}"
