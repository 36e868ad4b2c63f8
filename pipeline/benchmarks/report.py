"""The results of a benchmark as Markdown, CSV, metrics and a picture."""

import os
import platform
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from pipeline.benchmarks.phases import PHASES
from pipeline.benchmarks.preparation import PIPELINE, PreparationSpeed
from pipeline.benchmarks.speed import CaseResult, Measured, place_of
from pipeline.config.benchmark import BenchmarkConfig, Ratio, SamplingCase
from pipeline.reports.tables import markdown, table_of, to_csv

_COLORS = ("#c9ced4", "#7a828c", "#2563a8", "#7fa8d6", "#c2452d", "#e2a093", "#5b8c5a", "#22262b")


@dataclass(frozen=True)
class SpeedReport:
    """Everything that one run of the benchmark measured.

    Attributes:
        config: what was measured.
        machine: processor and versions.
        measured: times of all cases, and the rates of the device.
        preparation: speed of text preparation, or None.
        data_wait: share of the first training case's time in which it waited for rows, or None.
    """

    config: BenchmarkConfig
    machine: Mapping[str, str]
    measured: Measured
    preparation: PreparationSpeed | None = None
    data_wait: float | None = None

    @property
    def results(self) -> Sequence[CaseResult]:
        """One per case."""
        return self.measured.results

    @property
    def peak(self) -> float:
        """Median FLOP/s of the large matrix product."""
        return statistics.median(self.measured.peaks)

    @property
    def copies(self) -> float:
        """Median bytes/s of the large copy."""
        return statistics.median(self.measured.copies)

    def ratio(self, ratio: Ratio) -> list[float]:
        """Return the sequences per second of one case over another's, turn by turn."""
        by_label = {result.label: result for result in self.results}
        of, over = by_label[ratio.of], by_label[ratio.over]
        scale = of.sequences / over.sequences
        return [scale * b / a for a, b in zip(of.seconds, over.seconds, strict=True)]

    def table(self) -> pd.DataFrame:
        """Return a row per case; missing figures are NaN."""
        return pd.DataFrame(
            {
                "case": result.label,
                "parameters": result.parameters,
                "s/batch": result.median,
                "min": min(result.seconds),
                "max": max(result.seconds),
                "sequences/s": result.sequences / result.median,
                "tokens/s": result.tokens / result.median,
                "needed GFLOP": None if result.flops is None else result.flops / 1e9,
                "roofline s": statistics.median(result.roofline) if result.roofline else None,
                "share of roofline": result.share_of_roofline,
                "share of matmul peak": statistics.median(result.share_of_peak)
                if result.share_of_peak
                else None,
                "peak MiB": result.peak_mib,
                "peak MiB, large V": result.peak_mib_large,
            }
            for result in self.results
        )

    def split(self) -> pd.DataFrame:
        """Return a row per case: the share of every phase in its time; NaN where a case lacks the phase."""
        return pd.DataFrame([result.split for result in self.results], columns=PHASES)

    def metrics(self) -> dict[str, float]:
        """Return all figures by MLflow's metric names."""
        metrics = {"matmul_gflops": self.peak / 1e9, "copy_gb_per_s": self.copies / 1e9}
        for _, row in self.table().iterrows():
            for column, value in row.dropna().drop("case").items():
                name = str(column).replace("/", "_per_").replace(",", "")
                metrics[f"{row['case']}/{name}"] = float(value)
        for ratio in self.config.ratios:
            metrics[f"ratio/{ratio.of}_over_{ratio.over}"] = statistics.median(self.ratio(ratio))
        if self.preparation is not None:
            for form in self.preparation.seconds:
                name = form.replace(" + ", "_")
                metrics[f"preparation/{name}_tokens_per_s"] = self.preparation.rate(form)
        if self.data_wait is not None:
            metrics["data_wait"] = self.data_wait
        return {f"benchmark/{name.replace(' ', '_')}": value for name, value in metrics.items()}

    def to_csv(self) -> str:
        """Write the table of cases with full precision; cells without a figure are empty."""
        return to_csv(self.table().join(self.split().add_prefix("part ")))

    def to_markdown(self) -> str:
        """Write the machine, the cases, their phases, the ratios and the data."""
        config, table = self.config, self.table()
        phases = self.split().dropna(axis=1, how="all")
        shares = phases.map("{:.1%}".format, na_action="ignore").fillna("")
        where = f"{config.threads} threads" if config.device == "cpu" else "one GPU"
        cube = place_of(config).cube
        clock = "wall clock" if config.clock == "wall" else "CPU seconds of the process"
        blocks = [
            f"# Benchmark {config.name}",
            ", ".join(f"{key} {value}" for key, value in self.machine.items()),
            f"L {config.length}, V {config.vocabulary}, batch {config.batch}, {config.steps} sampling steps, "
            f"{config.precision}, draws in float64, {where}, {clock}. Times are medians over "
            f"{config.repetitions} (training) and {config.sampling_repetitions} (sampling) turns; in a turn every "
            f"case runs once. Product of two {cube}-square matrices: {self.peak / 1e12:.3g} TFLOP/s; copy: "
            f"{self.copies / 1e9:.3g} GB/s.",
            markdown(table.map(_cell)),
            "Needed FLOP are those of matrix products and attention; the backward pass needs twice those of the "
            "forward pass. The roofline is the sum of every product, attention, GELU and norm of the same shapes, "
            "each timed alone in the same turn. Peak is the growth of a fresh process by one step, with its weights "
            f"allocated before; large V is {config.memory_vocabulary}.",
            "Share of the time:",
            markdown(table[["case"]].join(shares)),
        ]
        if config.ratios:
            blocks.append(markdown(table_of(self._ratio_cells(ratio) for ratio in config.ratios)))
        if self.preparation is not None:
            blocks += _preparation_blocks(self.preparation)
        if self.data_wait is not None:
            blocks.append(f"Training waits for its rows {self.data_wait:.2%} of the time.")
        return "\n\n".join(blocks) + "\n"

    def picture(self) -> Figure:
        """Draw a bar per case: its seconds split into phases, with a line at its roofline."""
        seconds = self.split().fillna(0.0)
        table, starts = self.table(), seconds.cumsum(axis=1) - seconds
        groups = {title: table["case"].str.startswith(title.lower()) for title in ("Training", "Sampling")}
        groups = {title: rows for title, rows in groups.items() if rows.any()}
        figure = Figure(figsize=(10, 1.2 + 0.42 * len(table)), dpi=150, layout="constrained")
        heights = [rows.sum() for rows in groups.values()]
        axes = figure.subplots(len(groups), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
        for axis, (title, rows) in zip(axes[:, 0], groups.items(), strict=True):
            names, median = table["case"][rows].str.removeprefix(f"{title.lower()} "), table["s/batch"][rows]
            for phase, color in zip(PHASES, _COLORS, strict=True):
                if (widths := seconds[phase][rows] * median).any():
                    left = starts[phase][rows] * median
                    axis.barh(names, widths, left=left, color=color, label=phase, height=0.7)
            for place, end in enumerate(table["roofline s"][rows]):
                axis.plot([end, end], [place - 0.42, place + 0.42], color="black", linewidth=1.6)
            axis.invert_yaxis()
            axis.set_title(f"{title}, seconds per batch (black line: roofline)", loc="left", fontsize=10)
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=8.5)
            axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return figure

    def steps_picture(self) -> Figure | None:
        """Draw seconds per batch against the number of sampling steps; None where no model has several numbers."""
        points: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for case, result in zip(self.config.cases, self.results, strict=True):
            if not isinstance(case, SamplingCase) or case.form != "own" or case.refresh_every > 1:
                continue
            if case.order in ("uniform", "left_to_right"):
                points[case.model].append((self.config.steps_of(case), result.median))
        if all(len({steps for steps, _ in pairs}) == 1 for pairs in points.values()):
            return None
        figure = Figure(figsize=(6.4, 4), dpi=150, layout="constrained")
        axis = figure.subplots()
        for name, pairs in points.items():
            axis.plot(*zip(*sorted(pairs), strict=True), marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel="sampling steps", ylabel="seconds per batch")
        axis.set_title(f"{self.config.batch} rows of {self.config.length} tokens", loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False)
        return figure

    def _ratio_cells(self, ratio: Ratio) -> dict[str, str]:
        """A ratio against its target."""
        turns = self.ratio(ratio)
        median = statistics.median(turns)
        return {
            "sequences/s of": f"{ratio.of} over {ratio.over}",
            "measured (median)": f"{median:.2f}",
            "range": f"{min(turns):.2f} to {max(turns):.2f}",
            "target": "" if ratio.goal is None else f"at least {ratio.goal:g}",
            "met": "" if ratio.goal is None else "yes" if median >= ratio.goal else "no",
        }


def machine(device: torch.device) -> dict[str, str]:
    """Return processor, cores, instruction set, versions and the GPU that is measured.

    Args:
        device: that is measured.
    """
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = names[0] if names else platform.processor() or platform.machine()
    packages = {name: version(name) for name in ("torch", "numpy", "tiktoken", "datasets", "tokenizers")}
    facts = {"CPU": model, "cores": str(os.cpu_count()), "Python": platform.python_version()}
    if device.type == "cuda":
        facts["GPU"] = torch.cuda.get_device_name(device)
    return {**facts, **packages, "instructions": torch.backends.cpu.get_cpu_capability()}


def _preparation_blocks(result: PreparationSpeed) -> list[str]:
    """Text preparation beside plain tokenisers."""
    rows = [
        {
            "form": form,
            "tokens/s": f"{result.rate(form):,.0f}",
            "MB/s": f"{result.megabytes / statistics.median(seconds):.2f}",
            "this pipeline's speed over it": "" if form == PIPELINE else f"{result.ratio(form):.2f}",
        }
        for form, seconds in result.seconds.items()
    ]
    note = f" ({result.note})" if result.note else ""
    title = f"Text preparation, one core, {result.megabytes:.1f} MB, tokenizer {result.tokenizer}{note}:"
    return [title, markdown(table_of(rows))]


def _cell(value: Any) -> str:
    """Write a figure with three digits, or with all digits of its whole part."""
    if isinstance(value, str):
        return value
    if pd.isna(value):
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
