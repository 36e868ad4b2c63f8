"""The typed form of a run's YAML file: one frozen model per section, checks across sections at the end."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PositiveInt, Tag, model_validator

from pipeline.config.data import AnyDataConfig, TextDataConfig
from pipeline.config.section import NonNegativeInt, Rate, Section

Precision = Literal["fp32", "bf16"]  # of weights and of what blocks compute


class SwapConfig(Section):
    """GroupSwap, the cross-attention through which the two groups exchange places (method.md section 2)."""

    positional: bool = True  # add the sinusoidal position to the learned query
    pooling: Literal["none", "mean", "logsumexp"] = "none"  # add the pooled encoder outputs that it reads
    query: Literal["linear", "mlp4"] = "linear"  # the map behind the norm: H -> H, or H -> 4H -> H with SiLU
    norm: Literal["layer", "rms"] = "layer"
    every_block: bool = False  # read through a swap in front of every decoder block, not of the first alone


class TrunkConfig(Section):
    """What all models have."""

    hidden: PositiveInt = 768  # H
    heads: PositiveInt = 12  # N
    dropout: Rate = 0.1  # on the residual branches
    classes: PositiveInt | None = None  # C, labels 0..C-1 as a condition; None: unconditional
    registers: NonNegativeInt = 0  # vectors of the model's own in front of every row

    @model_validator(mode="after")
    def _heads_divide(self) -> "TrunkConfig":
        if self.hidden % self.heads or (self.hidden // self.heads) % 2:
            fits = [n for n in range(1, self.hidden + 1) if self.hidden % (2 * n) == 0]
            near = min(fits, key=lambda n: abs(n - self.heads), default=None)
            raise ValueError(
                f"heads {self.heads} does not split hidden {self.hidden} into even heads"
                + (f"; nearest that does: {near}" if near else "; hidden must be even")
            )
        return self


class PGMConfig(TrunkConfig):
    """Partition Generative Model."""

    kind: Literal["pgm"] = "pgm"
    encoder_blocks: PositiveInt = 8
    decoder_blocks: PositiveInt = 8
    swap: SwapConfig = SwapConfig()

    @model_validator(mode="after")
    def _registers_halve(self) -> "PGMConfig":
        if self.registers % 2:
            raise ValueError(
                f"registers {self.registers} cannot be split between the groups; "
                f"expected an even number, such as {self.registers + 1}"
            )
        return self


class MDLMConfig(TrunkConfig):
    """Masked diffusion language model, the baseline on the same blocks."""

    kind: Literal["mdlm"]
    blocks: PositiveInt = 12
    complementary: bool = False  # learn from both maskings of a row, in one doubled batch


class ARConfig(TrunkConfig):
    """Autoregressive language model, the baseline with causal attention on the same blocks."""

    kind: Literal["ar"]
    blocks: PositiveInt = 12


ModelConfig = Annotated[PGMConfig | MDLMConfig | ARConfig, Field(discriminator="kind")]


class DiffusionConfig(Section):
    """Noise schedule and loss weights."""

    # loglinear: hidden share t, weighted by loss_weight. arccos: hidden share 2 arccos(r) / pi, weight 1 (images)
    schedule: Literal["loglinear", "arccos"] = "loglinear"
    eps: Annotated[float, Field(gt=0, lt=0.1)] = 1e-3  # alpha(t) = 1 - (1 - eps) t, and the smallest t
    complement_time: Literal["matched", "paper"] = "matched"  # t' of group 0 (method.md section 2)
    loss_weight: Literal["elbo", "uniform"] = "elbo"


class OptimConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: Annotated[float, Field(gt=0)] = 3e-4
    betas: tuple[Rate, Rate] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_steps: NonNegativeInt = 2500
    schedule: Literal["constant", "cosine"] = "constant"
    clip: Annotated[float, Field(gt=0)] = 1.0  # global gradient norm


class TrainConfig(Section):
    """Length, batch, numerics and bookkeeping of training."""

    steps: PositiveInt = 1_000_000
    batch: PositiveInt = 512  # rows of a global batch, whatever the number of workers
    micro_batch: PositiveInt = 32  # rows of one forward pass on one worker
    precision: Precision = "bf16"
    zero_stage: Literal[0, 1, 2, 3] = 1
    persistent_parameters: NonNegativeInt = 100_000  # stage 3 keeps parameters of fewer values whole
    offload_optimizer: bool = False  # keep optimiser state in host memory (stages 1 to 3)
    activation_checkpointing: bool = False  # recompute every block in the backward pass
    class_drop: Rate = 0.1  # share of rows that a model with classes sees without theirs, for guidance
    init_from: str | None = None  # start from these weights: a model folder, models:/NAME@ALIAS, a checkpoint
    on_nonfinite: Literal["skip", "stop"] = "skip"  # a loss or gradient that is not finite
    ema: Rate = 0.9999
    log_every: PositiveInt = 50
    validate_every: PositiveInt = 10_000
    checkpoint_every: PositiveInt = 5_000
    keep: PositiveInt = 2  # newest checkpoints kept, beside the best


class SamplingConfig(Section):
    """What `jobs.sample` and the pictures of a run draw."""

    model: str | None = None  # consolidated folder or models:/NAME@ALIAS; None: the run's own model
    num_samples: PositiveInt = 16
    steps: PositiveInt = 128
    order: Literal["uniform", "binomial", "confidence", "entropy", "halton", "left_to_right"] = "uniform"
    schedule: Literal["linear", "arccos"] | None = None  # tokens a step; None: the order's own
    gumbel: Annotated[float, Field(ge=0)] = 1.0  # confidence: noise at the first step
    gamma: Annotated[float, Field(ge=0)] = 0.1  # entropy: bound on the joint error, nats
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_k: PositiveInt | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    labels: tuple[NonNegativeInt, ...] | None = None  # classes drawn, in turn; None: all in turn
    guidance: Annotated[float, Field(ge=0)] = 0.0  # w at the last step: (1 + w) log p(x|c) - w log p(x)
    refresh_every: PositiveInt = 1  # PGM: steps between full encodings of the known tokens; 1 is exact
    precision: Precision = "fp32"  # bf16 is what fast attention on GPUs needs; draws are float64 in both
    batch: PositiveInt = 16  # rows sampled together by one actor
    seed: int = 0


class EvaluationConfig(Section):
    """Validation during training, and what `jobs.evaluate` measures."""

    estimator: Literal["count", "mdlm"] = "count"
    draws: PositiveInt = 1  # maskings of every row
    rows: PositiveInt = 1024  # validation rows used, at most
    batch: PositiveInt = 32
    data: tuple[str, ...] = ()  # folders of other prepared data, judged beside the run's own (zero-shot)
    # compared with each other in place of judging one: a name for people -> model folder or models:/NAME@ALIAS
    models: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _-]*$")], str] = Field(
        default_factory=dict
    )
    steps: tuple[PositiveInt, ...] = (8, 16, 32, 64)  # sampling steps at which models are compared
    # text: the causal language model of generative perplexity, as a hub name, a folder or a .gguf file in one;
    # None: bigrams of the training rows alone
    scorer: str | None = None
    # images: "inception", "efficientnet", "classifier" (fitted on the data itself) or package.module:factory;
    # None: "classifier" where images are small enough for it, else "inception"
    features: str | None = None
    weights: str | None = None  # file of Inception's weights; None: downloaded

    @model_validator(mode="after")
    def _weights_have_a_net(self) -> "EvaluationConfig":
        if self.weights is not None and self.features != "inception":
            raise ValueError(f"weights {self.weights!r} are of features inception, not of {self.features!r}")
        return self


class TrackingConfig(Section):
    """MLflow."""

    uri: str | None = None  # None: MLFLOW_TRACKING_URI, else an SQLite store in cluster.storage
    experiment: str = "pgm"
    register_as: str | None = None  # registered model's name; None: the run's name
    system_metrics: bool = True


class Workers(Section):
    """A number of workers that may change while a run goes on, as nodes go and come."""

    min: PositiveInt = 1  # with fewer, the run waits
    max: PositiveInt

    @model_validator(mode="after")
    def _ordered(self) -> "Workers":
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}; expected at most {self.max}")
        return self


def _number_or_range(value: Any) -> str:
    """Which form of `cluster.workers` is meant, so that a mistake is reported for that form alone."""
    return WORKER_FORMS[isinstance(value, dict | Workers)]


WORKER_FORMS = ("<number>", "<range>")  # no keys of a config


class ClusterConfig(Section):
    """Where the run lives and on what."""

    storage: str = "runs"  # run folders and prepared data: a local folder, a shared one, s3://, gs://
    # a number, or {min: 1, max: 4}: as many as the nodes there hold, fewer after a loss, more when nodes come
    workers: Annotated[
        Annotated[int, Field(gt=0, strict=True), Tag(WORKER_FORMS[0])]
        | Annotated[Workers, Tag(WORKER_FORMS[1])],
        Discriminator(_number_or_range),
    ] = 1
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"  # auto: GPUs if there are any; on one machine, enough
    cpus_per_worker: PositiveInt = 1
    max_failures: Annotated[int, Field(ge=-1)] = 3  # restarts of the worker group; -1: without bound
    # Seconds that one training step may take before its worker counts as hung; null: any. The default is far
    # above a step's time, and below the 30 minutes after which torch gives a collective up without saying why.
    hang_timeout_s: Annotated[float, Field(gt=0)] | None = 900.0

    @property
    def least(self) -> int:
        """The fewest workers that the run goes on with."""
        return self.workers.min if isinstance(self.workers, Workers) else self.workers

    @property
    def most(self) -> int:
        """The most workers that the run uses."""
        return self.workers.max if isinstance(self.workers, Workers) else self.workers


class DistillConfig(Section):
    """Self-Distillation Through Time; `train.steps` are spread over the rounds."""

    teacher: str  # model folder, models:/NAME@ALIAS, or a file of released weights
    rounds: PositiveInt = 5  # each halves the steps that sampling needs
    teacher_steps: Annotated[int, Field(ge=2)] = (
        1024  # 1 / dt of the first round; the teacher takes two steps of dt
    )
    form: Literal["compatible", "complementary"] = (
        "compatible"  # one group distilled, or both in one pass (PGM)
    )
    divergence: Literal["reverse_kl", "forward_kl", "total_variation", "mse"] = "reverse_kl"
    next_teacher: Literal["raw", "ema"] = "raw"  # which of the student's weights the next round starts from
    optimizer: Literal["keep", "reset"] = "reset"  # at a round's end; a reset one warms up again


class ImportConfig(Section):
    """What a file of released weights is; all of it is read from the file where the file says it."""

    model: ModelConfig
    length: Annotated[int, Field(ge=2)]  # L, BOS included
    bos: NonNegativeInt | None = None  # id that stands known at position 0
    eot: NonNegativeInt | None = None
    tokenizer: str | None = None  # as in the data section; written beside the weights


class CardConfig(Section):
    """What an exported model's card says beside what the model itself knows."""

    license: str = "other"  # as the hub spells it, e.g. apache-2.0; other: the card leaves a line to fill in
    figures: dict[str, float | str] = Field(default_factory=dict)  # measured, by name


class RunConfig(Section):
    """A whole run, as written in one YAML file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: NonNegativeInt = 0
    data: AnyDataConfig = TextDataConfig()
    model: ModelConfig = PGMConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()
    distill: DistillConfig | None = None

    @property
    def validation_metric(self) -> str:
        """What validation reports: the bound's perplexity, or nats per masked token, which are no bound."""
        return "loss" if self.diffusion.schedule == "arccos" and self.model.kind != "ar" else "perplexity"

    def conflicts(self) -> list[str]:
        """Problems that no section can see alone, as `key: message` lines."""
        found = []
        batch, streams = self.train.batch, self.data.streams
        if batch % streams:
            near = min((c for c in range(1, 65) if batch % c == 0), key=lambda c: abs(c - streams))
            found.append(
                f"data.streams: {streams} does not divide train.batch {batch}; nearest that does: {near}"
            )
        if self.cluster.most > streams:
            found.append(
                f"cluster.workers: {self.cluster.most} workers for data.streams {streams}; "
                "expected at most one worker a stream"
            )
        if self.train.offload_optimizer and self.train.zero_stage == 0:
            found.append(
                "train.offload_optimizer: stage 0 keeps its optimiser; expected train.zero_stage 1 to 3"
            )
        if self.optim.warmup_steps >= self.train.steps:
            found.append(
                f"optim.warmup_steps: {self.optim.warmup_steps} is not below train.steps {self.train.steps}"
            )
        found += self._image_conflicts() + self._distill_conflicts()
        predicted = self.data.predicted
        too_many = [n for n in self.evaluation.steps if n > predicted and self.sampling.order != "binomial"]
        if self.evaluation.models and (too_many or not self.evaluation.steps):
            found.append(
                f"evaluation.steps: {too_many or '[]'} for {predicted} predicted tokens a row; "
                f"expected numbers of at most {predicted}"
            )
        if self.sampling.steps > predicted and self.sampling.order != "binomial" and self.model.kind != "ar":
            found.append(
                f"sampling.steps: {self.sampling.steps} steps for {predicted} predicted tokens a row; "
                f"expected at most {predicted}"
            )
        if self.model.kind == "ar" and self.sampling.model is None:
            if self.sampling.order != "left_to_right":
                found.append(
                    f"sampling.order: {self.sampling.order!r} for model.kind ar; expected left_to_right"
                )
            if self.sampling.steps != predicted:
                found.append(
                    f"sampling.steps: {self.sampling.steps} steps for model.kind ar, which draws one token a step; "
                    f"expected {predicted}"
                )
        return found

    def _image_conflicts(self) -> list[str]:
        """Problems between images, classes and guidance."""
        found = []
        classes, data = self.model.classes, self.data
        if data.kind == "text":
            if classes is not None:
                found.append(f"model.classes: {classes}, but data.kind text has no labels; expected null")
            if self.diffusion.schedule == "arccos":
                found.append("diffusion.schedule: arccos gives no bound for text; expected loglinear")
            if self.evaluation.features is not None:
                found.append(
                    f"evaluation.features: {self.evaluation.features!r} looks at images; expected null"
                )
        else:
            if self.evaluation.scorer is not None:
                found.append(
                    f"evaluation.scorer: {self.evaluation.scorer!r} reads text; expected null for images"
                )
            if classes not in (None, data.classes):
                found.append(f"model.classes: {classes}; expected data.classes {data.classes}, or null")
            if self.model.kind == "ar" and self.diffusion.schedule == "arccos":
                found.append(
                    "diffusion.schedule: arccos for model.kind ar, which hides nothing; expected loglinear"
                )
        if (
            self.sampling.model is None
            and classes is None
            and (self.distill is None or "model" in self.model_fields_set)  # else the teacher's, not read yet
            and (self.sampling.guidance or self.sampling.labels)
        ):
            key = "guidance" if self.sampling.guidance else "labels"
            found.append(
                f"sampling.{key}: needs a model with classes; expected model.classes, or no sampling.{key}"
            )
        wrong = [label for label in self.sampling.labels or () if classes is not None and label >= classes]
        if wrong:
            found.append(f"sampling.labels: {wrong[0]}; expected 0 to {(classes or 0) - 1}")
        return found

    def _distill_conflicts(self) -> list[str]:
        """Problems of rounds and steps."""
        if self.distill is None:
            return []
        rounds, steps, first = self.distill.rounds, self.train.steps, self.distill.teacher_steps
        found = []
        if steps % rounds:
            near = max(rounds, round(steps / rounds) * rounds)
            found.append(f"distill.rounds: {rounds} do not divide train.steps {steps}; nearest steps: {near}")
        warm = self.optim.warmup_steps
        if self.distill.optimizer == "reset" and steps // rounds <= warm < steps:
            found.append(
                f"optim.warmup_steps: {warm}, which come again in every round, are not below the "
                f"{steps // rounds} steps of a round"
            )
        if first < 2**rounds:
            found.append(
                f"distill.rounds: {rounds} rounds from {first} teacher steps end below one step; "
                f"expected at most {first.bit_length() - 1}"
            )
        return found
