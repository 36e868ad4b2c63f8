"""The typed form of a benchmark's YAML file: which models are timed, in which settings, beside what."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from pipeline.config.schema import ModelConfig, TrackingConfig
from pipeline.config.section import Section
from pipeline.errors import did_you_mean


class TrainingCase(Section):
    """One training step: forward, backward, optimiser."""

    model: str
    form: Literal["own", "dense"] = "own"  # dense: PGM with dense attention masks and all logits at once

    @property
    def label(self) -> str:
        """Its name in tables and in `ratios`."""
        return f"training {self.model}" + (f" {self.form}" if self.form != "own" else "")


class SamplingCase(Section):
    """Drawing a batch of rows from nothing."""

    model: str
    # hidden: MDLM that predicts all hidden positions at every step; plain: all positions, V wide in float64
    form: Literal["own", "hidden", "plain"] = "own"
    order: Literal["uniform", "binomial", "confidence", "entropy", "halton"] = "uniform"
    refresh_every: PositiveInt = 1

    @property
    def label(self) -> str:
        """Its name in tables and in `ratios`."""
        words: list[str] = [self.form] * (self.form != "own") + [self.order] * (self.order != "uniform")
        words += [f"refresh_every {self.refresh_every}"] * (self.refresh_every > 1)
        return " ".join(["sampling", self.model, *words])


class Ratio(Section):
    """How many times as fast one case is as another, in sequences a second."""

    of: str
    over: str
    goal: Annotated[float, Field(gt=0)] | None = None  # what it should at least be


class PreparationConfig(Section):
    """Text preparation on one core beside plain tokenisers, and how long training waits for its rows."""

    tokenizer: str = "gpt2"  # as data.tokenizer
    megabytes: Annotated[float, Field(gt=0)] = 8.0  # of text: the embedded corpus, over and over


class BenchmarkConfig(Section):
    """A whole benchmark."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    models: dict[str, ModelConfig]
    length: PositiveInt = 1024  # L
    vocabulary: PositiveInt = 8192  # V
    batch: PositiveInt = 4  # rows of a step and of a sampling run
    steps: PositiveInt = 64  # of sampling
    training: tuple[TrainingCase, ...] = ()
    sampling: tuple[SamplingCase, ...] = ()
    ratios: tuple[Ratio, ...] = ()
    repetitions: PositiveInt = 5  # turns of all training cases, of which medians count; one more warms up
    sampling_repetitions: PositiveInt = 3
    threads: PositiveInt = 2
    clock: Literal["wall", "cpu"] = "wall"  # cpu: seconds of this process, for machines that others load
    memory: bool = True  # measure peaks, in a process for each case
    memory_vocabulary: PositiveInt = 50_257  # V of a second look at the memory of training
    preparation: PreparationConfig | None = None
    trace: bool = False  # also write profiler traces, for chrome://tracing or Perfetto
    storage: str = "runs"  # the report goes to the folder benchmarks/NAME in it
    tracking: TrackingConfig = TrackingConfig(experiment="benchmark", system_metrics=False)

    @property
    def cases(self) -> tuple[TrainingCase | SamplingCase, ...]:
        """All that is timed."""
        return (*self.training, *self.sampling)

    @model_validator(mode="after")
    def _names_exist(self) -> "BenchmarkConfig":
        cases = self.cases
        for case in cases:
            if case.model not in self.models:
                known = ", ".join(self.models)
                raise ValueError(
                    f"model {case.model!r} of {case.label!r} is none of {known}"
                    f"{did_you_mean(case.model, self.models)}"
                )
            self._check(case)
        labels = [case.label for case in cases]
        for label in (name for ratio in self.ratios for name in (ratio.of, ratio.over)):
            if label not in labels:
                raise ValueError(
                    f"ratio with {label!r}, which is no case; known: {', '.join(labels)}"
                    f"{did_you_mean(label, labels)}"
                )
        if self.sampling and self.steps > self.length:
            raise ValueError(f"steps {self.steps} for rows of {self.length}; expected at most {self.length}")
        return self

    def _check(self, case: TrainingCase | SamplingCase) -> None:
        """Refuse what a model cannot do, before anything is timed."""
        model = self.models[case.model]
        if model.classes is not None:
            raise ValueError(f"model {case.model!r} has classes; the benchmark times models without")
        if case.form == "dense" and (
            model.kind != "pgm"
            or model.registers
            or model.dropout
            or model.swap.every_block
            or model.swap.pooling != "none"
        ):
            raise ValueError(
                f"form dense of {case.model!r}; expected a pgm without registers, dropout, pooling, every_block"
            )
        if isinstance(case, TrainingCase):
            return
        if model.kind == "ar":
            raise ValueError(f"{case.label!r}: kind ar samples in other steps; expected pgm or mdlm")
        if case.form in ("hidden", "plain") and model.kind != "mdlm":
            raise ValueError(f"{case.label!r}: form {case.form} is of kind mdlm, not of {model.kind}")
        if case.form != "own" and (case.order != "uniform" or case.refresh_every > 1):
            raise ValueError(f"{case.label!r}: form {case.form} has neither order nor refresh_every")
        if case.refresh_every > 1 and model.kind != "pgm":
            raise ValueError(f"{case.label!r}: refresh_every is of kind pgm, not of {model.kind}")
