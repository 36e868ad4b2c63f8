"""What a benchmark found, as Markdown, CSV, metrics and a picture."""

import csv
import io
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import torch
from matplotlib.figure import Figure

from pipeline.benchmarks.phases import PARTS
from pipeline.benchmarks.preparation import MAP, OURS, RAW, Preparation
from pipeline.benchmarks.speed import Measured
from pipeline.config.benchmark import BenchmarkConfig, Ratio

COLUMNS = (
    "case", "parameters", "s/batch", "min", "max", "sequences/s", "tokens/s", "needed GFLOP", "roofline s",
    "share of roofline", "share of matmul peak", "peak MiB", "peak MiB, large V",
)  # fmt: skip
_COLORS = ("#c9ced4", "#7a828c", "#2563a8", "#7fa8d6", "#c2452d", "#e2a093", "#22262b")


@dataclass(frozen=True)
class SpeedReport:
    """Everything that one run of the benchmark found.

    Attributes:
        peaks: FLOP/s of the 2048-cube product, one a turn.
        waited: share of the first training case's time in which it waited for rows.
    """

    config: BenchmarkConfig
    machine: Mapping[str, str]
    measured: Sequence[Measured]
    peaks: Sequence[float]
    preparation: Preparation | None = None
    waited: float | None = None

    @property
    def peak(self) -> float:
        return statistics.median(self.peaks)

    def ratio(self, ratio: Ratio) -> list[float]:
        """Sequences a second of one case over another's, turn by turn."""
        by_label = {one.label: one for one in self.measured}
        of, over = by_label[ratio.of], by_label[ratio.over]
        scale = of.sequences / over.sequences
        return [scale * b / a for a, b in zip(of.seconds, over.seconds, strict=True)]

    def rows(self) -> list[dict[str, float | str | None]]:
        """A row a case, in the columns of `COLUMNS`."""
        return [
            dict(
                zip(
                    COLUMNS,
                    (
                        one.label,
                        one.parameters,
                        one.median,
                        min(one.seconds),
                        max(one.seconds),
                        one.sequences / one.median,
                        one.tokens / one.median,
                        None if one.flops is None else one.flops / 1e9,
                        statistics.median(one.roofline) if one.roofline else None,
                        one.share_of_roofline,
                        statistics.median(one.share_of_peak) if one.share_of_peak else None,
                        one.peak_mib,
                        one.peak_mib_large,
                    ),
                    strict=True,
                )
            )
            for one in self.measured
        ]

    def metrics(self) -> dict[str, float]:
        """Figures by MLflow's metric names."""
        found = {"benchmark/matmul_gflops": self.peak / 1e9}
        for row in self.rows():
            case = str(row["case"]).replace(" ", "_")
            for column in COLUMNS[1:]:
                value = row[column]
                if isinstance(value, (int, float)):
                    name = column.replace("/", "_per_").replace(" ", "_").replace(",", "")
                    found[f"benchmark/{case}/{name}"] = float(value)
        for ratio in self.config.ratios:
            name = f"benchmark/ratio/{ratio.of}_over_{ratio.over}".replace(" ", "_")
            found[name] = statistics.median(self.ratio(ratio))
        if self.preparation is not None:
            for form in self.preparation.seconds:
                name = form.replace(" + ", "_").replace(" ", "_")
                found[f"benchmark/preparation/{name}_tokens_per_s"] = self.preparation.rate(form)
        if self.waited is not None:
            found["benchmark/data_wait"] = self.waited
        return found

    def to_csv(self) -> str:
        """The table of cases, full precision, empty where there is no figure."""
        out = io.StringIO()
        writer = csv.DictWriter(out, [*COLUMNS, *(f"part {name}" for name in PARTS)])
        writer.writeheader()
        for row, one in zip(self.rows(), self.measured, strict=True):
            writer.writerow({**row, **{f"part {name}": share for name, share in one.split.items()}})
        return out.getvalue()

    def to_markdown(self) -> str:
        """Machine, cases, parts, ratios and data."""
        config = self.config
        clock = "wall clock" if config.clock == "wall" else "CPU seconds of the process"
        lines = [
            f"# Benchmark {config.name}",
            "",
            ", ".join(f"{key} {value}" for key, value in self.machine.items()),
            "",
            f"L {config.length}, V {config.vocabulary}, batch {config.batch}, {config.steps} sampling steps, "
            f"float32, draws in float64, {config.threads} threads, {clock}; medians of {config.repetitions} "
            f"(training) and {config.sampling_repetitions} (sampling) turns, each case once a turn. "
            f"2048-cube product: {self.peak / 1e9:.0f} GFLOP/s.",
            "",
            *_table(COLUMNS, [[_cell(row[column]) for column in COLUMNS] for row in self.rows()]),
            "",
            "Needed FLOPs are those of matrix products and attention, backward twice forward. Roofline: every "
            "product, attention, GELU and norm of the same shapes timed alone in the same turn, summed. Peak: "
            "growth of a fresh process by one step, weights there before; large V is "
            f"{config.memory_vocabulary}.",
            "",
            "Share of the time:",
            "",
            *_table(
                ("case", *PARTS),
                [
                    [one.label, *(f"{one.split[n]:.1%}" if n in one.split else "" for n in PARTS)]
                    for one in self.measured
                ],
            ),
        ]
        return "\n".join([*lines, *self._ratio_lines(), *self._data_lines()]) + "\n"

    def _ratio_lines(self) -> list[str]:
        if not self.config.ratios:
            return []
        rows = []
        for ratio in self.config.ratios:
            turns = self.ratio(ratio)
            middle = statistics.median(turns)
            goal = "" if ratio.goal is None else f"{ratio.goal:g}"
            met = "" if ratio.goal is None else "yes" if middle >= ratio.goal else "no"
            span = f"{min(turns):.2f} to {max(turns):.2f}"
            rows.append([f"{ratio.of} over {ratio.over}", f"{middle:.2f}", span, goal, met])
        return ["", *_table(("sequences/s of", "times", "over the turns", "goal", "met"), rows)]

    def _data_lines(self) -> list[str]:
        lines = []
        if self.preparation is not None:
            found = self.preparation
            lines += [
                "",
                f"Text preparation, one core, {found.megabytes:.1f} MB, tokenizer {found.tokenizer}"
                + (f" ({found.note})" if found.note else "")
                + ":",
                "",
                *_table(
                    ("form", "tokens/s", "MB/s", "ours over it"),
                    [
                        [
                            form,
                            f"{found.rate(form):,.0f}",
                            f"{found.megabytes / statistics.median(found.seconds[form]):.2f}",
                            "" if form == OURS else f"{found.ratio(form):.2f}",
                        ]
                        for form in (OURS, RAW, MAP)
                        if form in found.seconds
                    ],
                ),
            ]
        if self.waited is not None:
            lines += ["", f"Training waits for its rows {self.waited:.2%} of the time."]
        return lines

    def picture(self) -> Figure:
        """A bar a case: its seconds split into parts, with a line where its roofline ends."""
        figure = Figure(figsize=(10, 1.2 + 0.42 * len(self.measured)), dpi=150, layout="constrained")
        panels = [
            (title, [one for one in self.measured if one.label.startswith(title.lower())])
            for title in ("Training", "Sampling")
        ]
        panels = [(title, ones) for title, ones in panels if ones]
        axes = figure.subplots(
            len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": [len(ones) for _, ones in panels]}
        )
        for axis, (title, ones) in zip(axes[:, 0], panels, strict=True):
            names = [one.label.removeprefix(f"{title.lower()} ") for one in ones]
            left = [0.0] * len(ones)
            for part, color in zip(PARTS, _COLORS, strict=True):
                widths = [one.split.get(part, 0.0) * one.median for one in ones]
                if any(widths):
                    axis.barh(names, widths, left=left, color=color, label=part, height=0.7)
                left = [a + b for a, b in zip(left, widths, strict=True)]
            for place, one in enumerate(ones):
                if one.roofline:
                    end = statistics.median(one.roofline)
                    axis.plot([end, end], [place - 0.42, place + 0.42], color="black", linewidth=1.6)
            axis.invert_yaxis()
            axis.set_title(f"{title}, seconds a batch (black line: roofline)", loc="left", fontsize=10)
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=8.5)
            axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return figure


def machine() -> dict[str, str]:
    """Processor, cores and versions."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = (line.partition(":")[2].strip() for line in file if line.startswith("model name"))
            model = next(names, model)
    packages = {name: version(name) for name in ("torch", "numpy", "tiktoken", "datasets", "tokenizers")}
    facts = {"CPU": model, "cores": str(os.cpu_count()), "Python": platform.python_version()}
    return {**facts, **packages, "instructions": torch.backends.cpu.get_cpu_capability()}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    marks = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (head, marks, *rows)]


def _cell(value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
