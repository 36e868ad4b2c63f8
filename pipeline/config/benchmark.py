"""A benchmark's config: which models are timed, in which settings, and what they are compared with."""

from collections.abc import Iterator
from typing import Literal

from pydantic import PositiveInt

from pipeline.config.evaluation import Precision
from pipeline.config.model import ModelConfig
from pipeline.config.schema import TrackingConfig
from pipeline.config.section import Name, PositiveFloat, Section
from pipeline.errors import did_you_mean


class TrainingCase(Section):
    """One training step: forward, backward and optimiser.

    Attributes:
        model: Name of one of `models`.
        form: `own` is the pipeline's; `dense` is PGM with dense attention masks and all logits at once.
    """

    model: str
    form: Literal["own", "dense"] = "own"

    @property
    def label(self) -> str:
        """The case's name in tables and in `ratios`."""
        return f"training {self.model}" + (f" {self.form}" if self.form != "own" else "")


class SamplingCase(Section):
    """Drawing a batch of rows from nothing.

    Attributes:
        model: Name of one of `models`.
        form: `own` is the pipeline's; `hidden` is MDLM that predicts all hidden positions in every step; `plain` is
            MDLM that predicts all positions with V-wide float64 distributions.
        order: As `sampling.order`.
        refresh_every: As `sampling.refresh_every`.
        steps: Sampling steps; null is the benchmark's `steps`, and one token a step for kind ar.
    """

    model: str
    form: Literal["own", "hidden", "plain"] = "own"
    order: Literal["uniform", "binomial", "confidence", "entropy", "halton", "left_to_right"] = "uniform"
    refresh_every: PositiveInt = 1
    steps: PositiveInt | None = None

    @property
    def label(self) -> str:
        """The case's name in tables and in `ratios`."""
        words: list[str] = [self.form] * (self.form != "own") + [self.order] * (self.order != "uniform")
        words += [f"refresh_every {self.refresh_every}"] * (self.refresh_every > 1)
        words += [f"{self.steps} steps"] * (self.steps is not None)
        return " ".join(["sampling", self.model, *words])


class Ratio(Section):
    """How many times as fast one case is as another, in sequences a second.

    Attributes:
        of: Label of the case that should be the faster one.
        over: Label of the case it is compared with.
        goal: Smallest ratio that is wanted.
    """

    of: str
    over: str
    goal: PositiveFloat | None = None


class PreparationConfig(Section):
    """Text preparation on one core, compared with plain tokenisers, and how long training waits for its rows.

    Attributes:
        tokenizer: As `data.tokenizer`.
        megabytes: Amount of text: the embedded corpus, repeated.
    """

    tokenizer: str = "gpt2"
    megabytes: PositiveFloat = 8.0


class BenchmarkConfig(Section):
    """A whole benchmark, as written in one YAML file.

    Attributes:
        name: Name of the benchmark and of its folder; never inherited from `base`.
        models: Model sections by name.
        length: Tokens of a row, L.
        vocabulary: Size of the vocabulary, V.
        batch: Rows of a training step and of a sampling run.
        steps: Sampling steps.
        training: Training steps to time.
        sampling: Sampling runs to time.
        ratios: Pairs of cases to compare.
        repetitions: Timed repetitions of all training cases, of which medians are reported; one more warms up.
        sampling_repetitions: Timed repetitions of all sampling cases.
        device: `gpu` times whole steps on the GPU of this machine, without their phases.
        precision: Precision of the weights and of what the blocks compute. Draws are float64 in both.
        compile: Compiles training steps, as `train.compile`, and the sampling of models with steps of fixed shape.
        threads: CPU threads.
        clock: `wall` time, or `cpu` time of this process for machines that others use.
        memory: Measures peak memory, on CPUs each case in a process of its own.
        memory_vocabulary: Size of the vocabulary in a second measurement of training's memory.
        preparation: Settings of the text preparation benchmark; null leaves it out.
        trace: Writes profiler traces, for chrome://tracing or Perfetto.
        storage: The report is written to the folder benchmarks/NAME in this folder.
        tracking: As in a run, with experiment `benchmark` and without system metrics by default.
    """

    name: Name
    models: dict[str, ModelConfig]
    length: PositiveInt = 1024
    vocabulary: PositiveInt = 8192
    batch: PositiveInt = 4
    steps: PositiveInt = 64
    training: tuple[TrainingCase, ...] = ()
    sampling: tuple[SamplingCase, ...] = ()
    ratios: tuple[Ratio, ...] = ()
    repetitions: PositiveInt = 5
    sampling_repetitions: PositiveInt = 3
    device: Literal["cpu", "gpu"] = "cpu"
    precision: Precision = "fp32"
    compile: bool = False
    threads: PositiveInt = 2
    clock: Literal["wall", "cpu"] = "wall"
    memory: bool = True
    memory_vocabulary: PositiveInt = 50_257
    preparation: PreparationConfig | None = None
    trace: bool = False
    storage: str = "runs"
    tracking: TrackingConfig = TrackingConfig(experiment="benchmark", system_metrics=False)

    def steps_of(self, case: SamplingCase) -> int:
        """Return the number of sampling steps of a case."""
        return case.steps or (self.length if self.models[case.model].kind == "ar" else self.steps)

    @property
    def cases(self) -> tuple[TrainingCase | SamplingCase, ...]:
        """All cases that are timed."""
        return (*self.training, *self.sampling)

    def _conflicts(self) -> Iterator[str]:
        """Yield the problems between models, cases and ratios, as `key: message` lines."""
        for case in self.cases:
            yield from self._case_conflicts(case)
        if self.device == "gpu" and self.clock == "cpu":
            yield "clock: cpu for device gpu, which does not work in CPU time; expected wall"
        if self.compile and self.device == "cpu":
            yield "compile: true for device cpu, where it does not pay; expected false, or device gpu"
        labels = [case.label for case in self.cases]
        for label in [label for ratio in self.ratios for label in (ratio.of, ratio.over)]:
            if label not in labels:
                known = f"{', '.join(labels)}{did_you_mean(label, labels)}"
                yield f"ratios: ratio with {label!r}, which is no case; known: {known}"
        for steps in {self.steps_of(case) for case in self.sampling if case.model in self.models}:
            if steps > self.length:
                yield f"steps: steps {steps} for rows of {self.length}; expected at most {self.length}"

    def _case_conflicts(self, case: TrainingCase | SamplingCase) -> Iterator[str]:
        """Yield what the model of a case cannot do."""
        key, model = case.label.partition(" ")[0], self.models.get(case.model)
        if model is None:
            near = did_you_mean(case.model, self.models)
            yield f"{key}: model {case.model!r} of {case.label!r} is none of {', '.join(self.models)}{near}"
            return
        if model.classes is not None:
            yield f"models.{case.model}: classes {model.classes}; expected null; only such models are timed"
        if isinstance(case, TrainingCase):
            plain = (
                model.kind == "pgm"
                and model.encoder == "bidirectional"
                and model.swap.pooling == "none"
                and not model.swap.every_block
            )
            if case.form == "dense" and (model.registers or model.dropout or not plain):
                wanted = "a bidirectional pgm without registers, dropout, pooling, every_block"
                yield f"training: form dense of {case.model!r}; expected {wanted}"
            return
        if model.kind == "ar" and (case.order != "left_to_right" or case.steps):
            yield f"sampling: {case.label!r}: kind ar draws one token a step; expected order left_to_right, no steps"
        if case.form != "own" and model.kind != "mdlm":
            yield f"sampling: {case.label!r}: form {case.form} is of kind mdlm, not of {model.kind}"
        if case.form != "own" and (case.order != "uniform" or case.refresh_every > 1):
            yield f"sampling: {case.label!r}: form {case.form} has neither order nor refresh_every"
        if case.refresh_every > 1 and not (model.kind == "pgm" and model.encoder == "bidirectional"):
            yield f"sampling: {case.label!r}: refresh_every is of kind pgm with a bidirectional encoder"
