"""What a sweep found: a row a variant, its seeds averaged, as Markdown and CSV."""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

Status = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class Trial:
    """One variant with one seed.

    Attributes:
        variant: its label.
        choices: label or number by entry of the space.
        step: updates done, of `steps`.
        curve: (step, metric) as judged during training, ascending.
        parameters: None where it left no model; so are the rates.
        train_rate, sample_rate: tokens/s.
        run_id: MLflow's.
        error: of a failed one.
    """

    variant: str
    choices: Mapping[str, str | float]
    seed: int
    status: Status
    step: int
    steps: int
    curve: Sequence[tuple[int, float]] = ()
    parameters: int | None = None
    train_rate: float | None = None
    sample_rate: float | None = None
    run_id: str | None = None
    error: str | None = None

    @property
    def value(self) -> float | None:
        """The metric at the trial's end."""
        return self.curve[-1][1] if self.curve else None


class Spread(NamedTuple):
    """Mean and sample standard deviation; the latter is nan of one value, both of none."""

    mean: float
    deviation: float

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return ""
        digits = max(0, min(4, 3 - math.floor(math.log10(abs(self.mean))))) if self.mean else 2
        shown = f"{self.mean:,.{digits}f}"
        return shown if math.isnan(self.deviation) else f"{shown} ± {self.deviation:,.{digits}f}"


@dataclass(frozen=True)
class Row:
    """One variant: what its trials have in common, and their averages.

    Attributes:
        trials: by seed.
        metric: over the seeds that finished; of the others where none did.
        against: the metric's difference to the first variant at the same seeds, None for that one itself.
    """

    variant: str
    choices: Mapping[str, str | float]
    trials: Sequence[Trial]
    metric: Spread
    against: Spread | None = None
    parameters: int | None = None
    train_rate: Spread = field(default=Spread(math.nan, math.nan))
    sample_rate: Spread = field(default=Spread(math.nan, math.nan))

    @property
    def finished(self) -> bool:
        """Whether all of its trials went to the end."""
        return all(trial.status == "finished" for trial in self.trials)

    @property
    def state(self) -> str:
        """`3 finished`, `stopped at step 100`, ..."""
        found = []
        finished = [trial for trial in self.trials if trial.status == "finished"]
        if finished:
            found.append(f"{len(finished)} finished")
        found += [f"stopped at step {t.step}" for t in self.trials if t.status == "stopped"]
        failed = [trial for trial in self.trials if trial.status == "failed"]
        found += [f"failed at step {t.step}" for t in failed]
        return ", ".join(dict.fromkeys(found))


def spread(values: Sequence[float | None]) -> Spread:
    """Of the values that are there and finite."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    mean = float(np.mean(known)) if known else math.nan
    return Spread(mean, float(np.std(known, ddof=1)) if len(known) > 1 else math.nan)


def rows(trials: Sequence[Trial], mode: Literal["min", "max"]) -> list[Row]:
    """A row a variant: those that finished first, the best first; then those that went furthest.

    The first variant among `trials` is what the others are compared with, seed by seed.
    """
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.variant, []).append(trial)
    reference: dict[int, float] = {}
    found: list[Row] = []
    for variant, ones in groups.items():
        counted = [one for one in ones if one.status == "finished"] or ones
        finals = {one.seed: one.value for one in ones if one.status == "finished" and one.value is not None}
        first = not found
        reference = finals if first else reference
        paired: list[float | None] = [finals[seed] - reference[seed] for seed in finals if seed in reference]
        found.append(
            Row(
                variant,
                ones[0].choices,
                ones,
                spread([one.value for one in counted]),
                None if first else spread(paired),
                next((one.parameters for one in ones if one.parameters is not None), None),
                spread([one.train_rate for one in ones]),
                spread([one.sample_rate for one in ones]),
            )
        )
    sign = 1 if mode == "min" else -1

    def place(row: Row) -> tuple[bool, int, bool, float]:
        unknown = math.isnan(row.metric.mean)
        reached = 0 if row.finished else -min(trial.step for trial in row.trials)
        return not row.finished, reached, unknown, 0.0 if unknown else sign * row.metric.mean

    return sorted(found, key=place)


def best(table: Sequence[Row]) -> Row | None:
    """The best variant all of whose trials finished; where none did, the best that was judged."""
    judged = [row for row in table if not math.isnan(row.metric.mean)]
    return judged[0] if judged else None


def markdown(table: Sequence[Row], metric: str, about: str) -> str:
    """The table, with what failed and why below it.

    Args:
        about: a paragraph above the table: how the figures came about.
    """
    entries = _entries(table)
    name = metric.rpartition("/")[2]
    reference = next((row.variant for row in table if row.against is None), "")
    columns: dict[str, Callable[[Row], str]] = {
        **{_short(entry): _chosen(entry) for entry in entries},
        name: lambda row: str(row.metric),
        "against the first": lambda row: "first" if row.against is None else _signed(row.against),
        "parameters": lambda row: "" if row.parameters is None else f"{row.parameters:,}",
        "training tokens/s": lambda row: str(row.train_rate),
        "sampling tokens/s": lambda row: str(row.sample_rate),
        "trials": lambda row: row.state,
    }
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(cell(row) for cell in columns.values()) + " |" for row in table]
    text = f"{about}\n\nThe first is {reference}.\n\n" + "\n".join(lines) + "\n"
    failed = [trial for row in table for trial in row.trials if trial.status == "failed"]
    if failed:
        text += "\nFailed:\n" + "".join(f"- {t.variant} seed {t.seed}: {t.error}\n" for t in failed)
    return text


def variants_csv(table: Sequence[Row], metric: str) -> str:
    """The table in full precision."""
    entries = _entries(table)
    name = metric.rpartition("/")[2]
    head = [*entries, name, f"{name}_std", f"{name}_against_first", f"{name}_against_first_std", "parameters"]
    head += ["train_tokens_per_second", "train_tokens_per_second_std"]
    head += ["sampling_tokens_per_second", "sampling_tokens_per_second_std", "trials"]
    lines = [
        [
            *(row.choices.get(entry, "") for entry in entries),
            *row.metric,
            *(row.against or ("", "")),
            row.parameters,
            *row.train_rate,
            *row.sample_rate,
            row.state,
        ]
        for row in table
    ]
    return _csv(head, lines)


def trials_csv(table: Sequence[Row], metric: str) -> str:
    """A line a trial."""
    entries = _entries(table)
    head = [
        *entries,
        "seed",
        "status",
        "step",
        metric.rpartition("/")[2],
        "train_tokens_per_second",
        "run_id",
    ]
    lines = [
        [
            *(trial.choices.get(entry, "") for entry in entries),
            trial.seed,
            trial.status,
            trial.step,
            trial.value,
            trial.train_rate,
            trial.run_id,
            trial.error,
        ]
        for row in table
        for trial in row.trials
    ]
    return _csv([*head, "error"], lines)


def _csv(head: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(head)
    for line in lines:
        empty = (value is None or (isinstance(value, float) and math.isnan(value)) for value in line)
        writer.writerow(["" if gone else value for gone, value in zip(empty, line, strict=True)])
    return stream.getvalue()


def _entries(table: Sequence[Row]) -> list[str]:
    """Every dimension that any variant has, in the order of their first appearance."""
    return list(dict.fromkeys(entry for row in table for entry in row.choices))


def _chosen(entry: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        value = row.choices.get(entry, "")
        return f"{value:.4g}" if isinstance(value, float) else value

    return cell


def _signed(against: Spread) -> str:
    return (
        ""
        if math.isnan(against.mean)
        else f"{'+' if against.mean >= 0 else '-'}{against._replace(mean=abs(against.mean))}"
    )


def _short(key: str) -> str:
    return key.rpartition(".")[2]
