"""The typed form of a run's config: one frozen model per section, with checks across sections at the end."""

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PositiveInt, Tag, ValidationError, field_validator, model_validator

from pipeline.config.data import AnyDataConfig, TextDataConfig
from pipeline.config.location import Location, ModelName
from pipeline.config.model import ModelConfig, PGMConfig
from pipeline.config.section import Name, NonNegativeFloat, NonNegativeInt, PositiveFloat, Rate, Section, Seed
from pipeline.errors import did_you_mean

Precision = Literal["fp32", "bf16"]
Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _-]*$", max_length=128)]
# What `models:/NAME@ALIAS` can name; MLflow's stores limit it to 256 characters, and `-round-N` may follow.
RegisteredName = Annotated[str, Field(pattern=r"^\w[\w .-]*$", max_length=200)]

# Bounds of the settings of samplers. Beyond them, distributions no longer change or are not finite.
LEAST_TEMPERATURE, LARGEST_SETTING, MOST_STEPS = 1e-6, 1e6, 1_000_000
Setting = Annotated[float, Field(ge=0, le=LARGEST_SETTING)]


class DiffusionConfig(Section):
    """Noise schedule and loss weights.

    Attributes:
        schedule: `loglinear` hides the share t; `arccos` (images) hides 2 arccos(r) / pi, with loss weight 1.
        eps: Smallest t, and eps of the log-linear schedule alpha(t) = 1 - (1 - eps) t.
        complement_time: Time of group 0: `matched` is unbiased, `paper` is 1 - t (docs/method.md section 2).
        loss_weight: `elbo` weights the loss as the likelihood bound does; `uniform` weights all targets alike.
    """

    schedule: Literal["loglinear", "arccos"] = "loglinear"
    eps: Annotated[float, Field(gt=0, lt=0.1)] = 1e-3
    complement_time: Literal["matched", "paper"] = "matched"
    loss_weight: Literal["elbo", "uniform"] = "elbo"


class OptimConfig(Section):
    """AdamW and its learning-rate schedule.

    Attributes:
        lr: Learning rate after the warm-up.
        betas: Decay rates of AdamW's two moments.
        weight_decay: Weight decay of AdamW.
        warmup_steps: Updates over which the learning rate grows from 0; must be below `train.steps`.
        schedule: Learning rate after the warm-up.
        clip: Largest norm of the whole gradient.
    """

    lr: PositiveFloat = 3e-4
    betas: tuple[Rate, Rate] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 0.0
    warmup_steps: NonNegativeInt = 2500
    schedule: Literal["constant", "cosine"] = "constant"
    clip: PositiveFloat = 1.0


class TrainConfig(Section):
    """Length, batch, numerics and bookkeeping of training.

    Attributes:
        steps: Number of updates.
        batch: Rows of a global batch, whatever the number of workers.
        micro_batch: Rows of one forward pass on one worker.
        precision: Precision of the weights and of what the blocks compute.
        zero_stage: DeepSpeed ZeRO stage.
        persistent_parameters: Parameters with fewer values than this stay whole on every worker in stage 3.
        offload_optimizer: Keeps the optimiser's state in host memory (stages 1 to 3).
        activation_checkpointing: Recomputes every block in the backward pass to save memory.
        class_drop: Share of rows that a model with classes sees without their class, for guidance.
        init_from: Weights to start from: a model folder, a checkpoint, released weights, `models:/NAME@ALIAS` or
            `hf:OWNER/NAME/FILE`.
        on_nonfinite: After a loss or gradient that is not finite: return to the last checkpoint and skip the rows, or
            stop.
        ema: Decay of the exponential moving average of the weights; 0 keeps the weights themselves.
        log_every: Updates between two log lines.
        validate_every: Updates between two validations.
        checkpoint_every: Updates between two checkpoints.
        keep: Number of newest checkpoints that are kept beside the best one.
    """

    steps: PositiveInt = 1_000_000
    batch: PositiveInt = 512
    micro_batch: PositiveInt = 32
    precision: Precision = "bf16"
    zero_stage: Literal[0, 1, 2, 3] = 1
    persistent_parameters: NonNegativeInt = 100_000
    offload_optimizer: bool = False
    activation_checkpointing: bool = False
    class_drop: Rate = 0.1
    init_from: ModelName | None = None
    on_nonfinite: Literal["skip", "stop"] = "skip"
    ema: Rate = 0.9999
    log_every: PositiveInt = 50
    validate_every: PositiveInt = 10_000
    checkpoint_every: PositiveInt = 5_000
    keep: PositiveInt = 2


class SamplingConfig(Section):
    """Sampling by `jobs.sample` and at the end of training.

    Attributes:
        model: Model folder, released weights, `models:/NAME@ALIAS` or `hf:OWNER/NAME/FILE`; null is the run's model.
        num_samples: Number of samples.
        steps: Number of sampling steps.
        order: Which positions a step reveals.
        schedule: How many tokens a step reveals; null is the order's own schedule.
        gumbel: Scale of the Gumbel noise of order `confidence` at the first step; it falls linearly to 0.
        gamma: Bound of order `entropy` on the joint error of a step, in nats.
        temperature: Temperature of the token distributions.
        top_k: Number of likeliest tokens that are kept; null keeps all.
        top_p: Probability mass of the likeliest tokens that are kept; null keeps all.
        labels: Classes to draw, by number or by the name that the data gives them, in turn; null draws all in turn.
        length: Tokens of every row, for models that were trained on padded rows (`data.wrap: sentence`); null draws
            the lengths of training rows.
        prompt: Beginning of every sample of text (`jobs.sample`).
        infill: File of text with blanks to fill in, such as [[12]] for 12 tokens (`jobs.sample`).
        inpaint: Image of which a part is drawn again (`jobs.sample`).
        mask: Image of the size of `inpaint`; what is white in it is drawn again.
        guidance: Weight w of guidance at the last step: (1 + w) log p(x|c) - w log p(x).
        refresh_every: Steps between two full encodings of the known tokens (bidirectional PGM); 1 is exact.
        precision: Precision of the blocks; `bf16` enables flash attention on GPUs. Draws are float64 in both.
        compile: Compiles steps of fixed shape on CUDA, for AR and for causal PGM without pooled swaps.
        batch: Rows that one worker samples together.
        seed: Seed of the samples.
    """

    model: ModelName | None = None
    num_samples: PositiveInt = 16
    steps: Annotated[int, Field(gt=0, le=MOST_STEPS)] = 128
    order: Literal["uniform", "binomial", "confidence", "entropy", "halton", "left_to_right"] = "uniform"
    schedule: Literal["linear", "arccos"] | None = None
    gumbel: Setting = 5.0
    gamma: Setting = 0.1
    temperature: Annotated[float, Field(ge=LEAST_TEMPERATURE, le=LARGEST_SETTING)] = 1.0
    top_k: PositiveInt | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    labels: tuple[NonNegativeInt | str, ...] | None = None
    length: Annotated[int, Field(ge=3)] | None = None
    prompt: str | None = None
    infill: str | None = None
    inpaint: str | None = None
    mask: str | None = None
    guidance: Setting = 0.0
    refresh_every: PositiveInt = 1
    precision: Precision = "fp32"
    compile: bool = False
    batch: PositiveInt = 16
    seed: Seed = 0


# Keys of `sampling` that a comparison can vary, beside the steps.
GRID_KEYS = (
    *("order", "schedule", "gumbel", "gamma", "temperature"),
    *("top_k", "top_p", "guidance", "refresh_every"),
)


class EvaluationConfig(Section):
    """Validation during training, and what `jobs.evaluate` measures.

    Attributes:
        estimator: Estimator of the likelihood bound: `count` draws the number of hidden positions, `mdlm` draws t.
        draws: Maskings of every row.
        rows: Largest number of validation rows that are used.
        batch: Rows of one forward pass.
        data: Folders of other prepared data to evaluate on, beside the run's own.
        models: Models to compare, by a name each, as `sampling.model` names them; empty evaluates the run's model.
        steps: Numbers of sampling steps at which models are compared.
        grid: Other keys of `sampling` with the values to compare, such as `{guidance: [0, 1, 2]}`; models are sampled
            with every combination of them, at every number of steps.
        scorer: Language model for generative perplexity (text): hub name, folder or .gguf; null: bigrams alone.
        features: Feature net for FID and Inception Score (images): `inception`, `efficientnet`, `classifier` (fitted
            on the data itself) or `package.module:factory`; null chooses by the size of the images.
        weights: File of Inception's weights; null downloads them.
        reference: An .npz file that samples are compared with (images): `mu` and `sigma` of the features, images as
            `arr_0`, or all three; null takes the training images.
    """

    estimator: Literal["count", "mdlm"] = "count"
    draws: PositiveInt = 1
    rows: PositiveInt = 1024
    batch: PositiveInt = 32
    data: tuple[str, ...] = ()
    models: dict[Label, ModelName] = Field(default_factory=dict)
    steps: tuple[PositiveInt, ...] = (8, 16, 32, 64)
    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    scorer: str | None = None
    features: str | None = None
    weights: str | None = None
    reference: str | None = None

    @field_validator("grid")
    @classmethod
    def _check_grid(cls, grid: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        """Check every value as `sampling` would, and give it the form that it has there."""
        for key, values in grid.items():
            if key not in GRID_KEYS:
                near = "; expected evaluation.steps" if key == "steps" else did_you_mean(key, GRID_KEYS)
                raise ValueError(f"{key!r} is not one of {', '.join(GRID_KEYS)}{near}")
            if not values:
                raise ValueError(f"{key}: []; expected at least one value")
        try:
            return {
                key: tuple(
                    dict.fromkeys(getattr(SamplingConfig.model_validate({key: v}), key) for v in values)
                )
                for key, values in grid.items()
            }
        except ValidationError as error:
            problem = error.errors()[0]
            raise ValueError(f"{problem['loc'][0]}: {problem['input']!r}: {problem['msg'].lower()}") from None

    @model_validator(mode="after")
    def _check_weights(self) -> "EvaluationConfig":
        if self.weights is not None and self.features != "inception":
            raise ValueError(f"weights {self.weights!r} are for features inception, not {self.features!r}")
        return self


class TrackingConfig(Section):
    """MLflow.

    Attributes:
        uri: Address of the tracking store; null uses MLFLOW_TRACKING_URI, else an SQLite file in `cluster.storage`.
        experiment: Name of the experiment.
        register_as: Name of the registered model; null uses the run's name.
        system_metrics: Records the use of CPU, GPU, memory, disk and network.
    """

    uri: str | None = None
    experiment: Annotated[str, Field(max_length=500)] = "pgm"
    register_as: RegisteredName | None = None
    system_metrics: bool = True


class Workers(Section):
    """A number of workers that may change during a run, as nodes leave and join.

    Attributes:
        min: Number of workers below which the run waits.
        max: Largest number of workers.
    """

    min: PositiveInt = 1
    max: PositiveInt

    @model_validator(mode="after")
    def _check_range(self) -> "Workers":
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}; expected at most {self.max}")
        return self


WORKER_FORMS = ("<number>", "<range>")  # tags of the two forms in pydantic's errors; no keys of a config


def _worker_form(value: Any) -> str:
    """Return which form of `cluster.workers` is meant, so that errors are reported for that form alone."""
    return WORKER_FORMS[isinstance(value, dict | Workers)]


class ClusterConfig(Section):
    """Where a run is stored and what it runs on.

    Attributes:
        storage: Folder of the runs and of prepared data: local, shared, `s3://` or `gs://`.
        workers: A fixed number of workers, or a range `{min: 1, max: 4}` that follows the nodes of the cluster.
        accelerator: Device of a worker; `auto` uses GPUs where there are any.
        cpus_per_worker: CPUs of a worker.
        max_failures: Restarts of the worker group before the run fails; -1 sets no limit.
        hang_timeout_s: Seconds that a training step may take before its worker counts as hung; null sets no limit.
    """

    storage: Location = "runs"
    workers: Annotated[
        Annotated[int, Field(gt=0, strict=True), Tag(WORKER_FORMS[0])]
        | Annotated[Workers, Tag(WORKER_FORMS[1])],
        Discriminator(_worker_form),
    ] = 1
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    cpus_per_worker: PositiveInt = 1
    max_failures: Annotated[int, Field(ge=-1)] = 3
    # Far above the time of a step, and below the 30 minutes after which torch aborts a collective without a reason.
    hang_timeout_s: Annotated[float, Field(gt=0, le=1e9)] | None = 900.0

    @property
    def least(self) -> int:
        """The smallest number of workers with which the run continues."""
        return self.workers.min if isinstance(self.workers, Workers) else self.workers

    @property
    def most(self) -> int:
        """The largest number of workers that the run uses."""
        return self.workers.max if isinstance(self.workers, Workers) else self.workers


class DistillConfig(Section):
    """Self-Distillation Through Time (SDTT); `train.steps` are divided among the rounds.

    Attributes:
        teacher: Model folder, released weights, `models:/NAME@ALIAS` or `hf:OWNER/NAME/FILE`.
        rounds: Number of rounds; each halves the sampling steps that are needed.
        teacher_steps: Sampling steps of the teacher in the first round, 1 / dt; the teacher takes two steps of dt.
        form: `compatible` distils one group; `complementary` distils both in one pass (PGM).
        divergence: Divergence between the student's and the teacher's distributions.
        next_teacher: Weights of the student that teach the next round: the raw ones or their moving average.
        optimizer: Whether the optimiser keeps its state between rounds; a reset one warms up again.
    """

    teacher: ModelName
    rounds: PositiveInt = 5
    teacher_steps: Annotated[int, Field(ge=2)] = 1024
    form: Literal["compatible", "complementary"] = "compatible"
    divergence: Literal["reverse_kl", "forward_kl", "total_variation", "mse"] = "reverse_kl"
    next_teacher: Literal["raw", "ema"] = "raw"
    optimizer: Literal["keep", "reset"] = "reset"


class ImportConfig(Section):
    """What a file of released weights is; every key is read from the file where the file states it.

    Attributes:
        model: Architecture, as in a run's config.
        length: Tokens of a row with BOS, L.
        bos: Id of the token that is always known at position 0; null is none.
        eot: Id of the token that ends a text; null is none.
        tokenizer: Tokenizer, as in a run's data section; it is written beside the weights.
    """

    model: ModelConfig
    length: Annotated[int, Field(ge=2)]
    bos: NonNegativeInt | None = None
    eot: NonNegativeInt | None = None
    tokenizer: str | None = None


class ExportConfig(Section):
    """What the card of an exported model says beside what the model itself knows, and where the model goes.

    Attributes:
        license: License as the hub spells it, for example apache-2.0; `other` leaves a line to fill in.
        figures: Measured figures by name.
        push: Repository of the Hugging Face hub that the folder is uploaded to, OWNER/NAME; null uploads nothing.
        private: Whether a new repository is private.
    """

    license: str = "other"
    figures: dict[str, float | str] = Field(default_factory=dict)
    push: str | None = None
    private: bool = True


class RunConfig(Section):
    """A whole run, as written in one YAML file.

    Attributes:
        name: Name of the run and of its folder in `cluster.storage`; never inherited from `base`.
        seed: Seed of all randomness of training.
        data: The data and how they are read.
        model: The architecture.
        distill: Distillation, in configs for `jobs.distill`; null elsewhere.
    """

    name: Name
    seed: Seed = 0
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
        """What validation reports: perplexity of the bound, or the loss in nats per masked token (no bound)."""
        return "loss" if self.diffusion.schedule == "arccos" and self.model.kind != "ar" else "perplexity"

    def _conflicts(self) -> Iterator[str]:
        """Yield the problems that no section can see alone, as `key: message` lines."""
        of_data = self._text() if self.data.kind == "text" else self._images()
        yield from (*self._training(), *of_data, *self._classes(), *self._distillation(), *self._sampling())

    def _training(self) -> Iterator[str]:
        train, streams, most = self.train, self.data.streams, self.cluster.most
        if train.batch % streams:
            near = min((c for c in range(1, 65) if train.batch % c == 0), key=lambda c: abs(c - streams))
            yield f"data.streams: {streams} does not divide train.batch {train.batch}; nearest that does: {near}"
        if most > streams:
            expected = "expected at most one worker a stream"
            yield f"cluster.workers: {most} workers for data.streams {streams}; {expected}"
        if train.offload_optimizer and train.zero_stage == 0:
            yield "train.offload_optimizer: stage 0 keeps its optimiser; expected train.zero_stage 1 to 3"
        if self.optim.warmup_steps >= train.steps:
            yield f"optim.warmup_steps: {self.optim.warmup_steps} is not below train.steps {train.steps}"

    def _sampling(self) -> Iterator[str]:
        sampling, steps, predicted = self.sampling, self.evaluation.steps, self.data.predicted
        given = [key for key in ("prompt", "infill", "inpaint") if getattr(sampling, key) is not None]
        if len(given) > 1:
            yield f"sampling.{given[0]}: together with sampling.{given[1]}; expected one of them"
        if (sampling.mask is None) != (sampling.inpaint is None):
            yield "sampling.mask: expected together with sampling.inpaint, the image that it is a mask of"
        most = math.inf if sampling.order == "binomial" else predicted
        too_many = [count for count in steps if count > most]
        row = f"for {predicted} predicted tokens a row; expected"
        if self.evaluation.models and (too_many or not steps):
            yield f"evaluation.steps: {too_many or '[]'} {row} numbers of at most {predicted}"
        if self.evaluation.grid and not self.evaluation.models:
            yield "evaluation.grid: without evaluation.models, which it is for; expected at least one model"
        if sampling.steps > most and self.model.kind != "ar":
            yield f"sampling.steps: {sampling.steps} steps {row} at most {predicted}"
        refreshes = self.model.kind == "pgm" and self.model.encoder == "bidirectional"
        if sampling.refresh_every > 1 and sampling.model is None and not refreshes:
            bidirectional = "expected 1; only a pgm with model.encoder bidirectional can encode less often"
            yield f"sampling.refresh_every: {sampling.refresh_every}; {bidirectional}"
        if sampling.compile and sampling.order in ("confidence", "entropy"):
            yield f"sampling.compile: true for order {sampling.order}; expected false, or an order planned in advance"
        if sampling.compile and sampling.model is None and not self.model.fixed_steps:
            models = "expected false; only ar and pgm with model.encoder causal and swap.pooling none can"
            yield f"sampling.compile: true; {models}"
        if self.model.kind == "ar" and sampling.model is None:
            if sampling.order != "left_to_right":
                yield f"sampling.order: {sampling.order!r} for model.kind ar; expected left_to_right"
            if sampling.steps != predicted:
                ar = "for model.kind ar, which draws one token a step; expected"
                yield f"sampling.steps: {sampling.steps} steps {ar} {predicted}"

    def _text(self) -> Iterator[str]:
        if (
            self.model.kind == "ar"
            and self.model.start == "bos"
            and getattr(self.data, "wrap", "none") == "none"
        ):
            yield "model.start: 'bos' for rows without BOS; expected learned, or data.wrap bos_eos"
        if self.model.classes is not None:
            yield f"model.classes: {self.model.classes}, but data.kind text has no labels; expected null"
        if self.diffusion.schedule == "arccos":
            yield "diffusion.schedule: arccos gives no bound for text; expected loglinear"
        if self.evaluation.features is not None:
            yield f"evaluation.features: {self.evaluation.features!r} looks at images; expected null"
        if self.evaluation.reference is not None:
            yield f"evaluation.reference: {self.evaluation.reference!r} is one of images; expected null"

    def _images(self) -> Iterator[str]:
        expected = getattr(self.data, "classes", None)
        if self.evaluation.scorer is not None:
            yield f"evaluation.scorer: {self.evaluation.scorer!r} reads text; expected null for images"
        if self.model.classes not in (None, expected):
            yield f"model.classes: {self.model.classes}; expected data.classes {expected}, or null"
        if self.model.kind == "ar" and self.diffusion.schedule == "arccos":
            yield "diffusion.schedule: arccos for model.kind ar, which hides nothing; expected loglinear"

    def _classes(self) -> Iterator[str]:
        sampling, classes = self.sampling, self.model.classes
        if sampling.labels == ():
            yield "sampling.labels: []; expected at least one class, or null"
        # A distillation without a model section has the teacher's model, which is not read yet.
        known = sampling.model is None and (self.distill is None or "model" in self.model_fields_set)
        if known and classes is None and (sampling.guidance or sampling.labels):
            key = "guidance" if sampling.guidance else "labels"
            yield f"sampling.{key}: needs a model with classes; expected model.classes, or no sampling.{key}"
        largest = max((label for label in sampling.labels or () if isinstance(label, int)), default=0)
        if classes is not None and largest >= classes:
            yield f"sampling.labels: {largest}; expected 0 to {classes - 1}"

    def _distillation(self) -> Iterator[str]:
        if self.distill is None:
            return
        if self.data.kind == "text" and self.data.wrap == "sentence":
            yield "data.wrap: 'sentence' in a distillation, whose rows have no padding; expected none or bos_eos"
        rounds, steps, warmup = self.distill.rounds, self.train.steps, self.optim.warmup_steps
        first = self.distill.teacher_steps
        if steps % rounds:
            near = max(rounds, round(steps / rounds) * rounds)
            yield f"distill.rounds: {rounds} do not divide train.steps {steps}; nearest steps: {near}"
        if self.distill.optimizer == "reset" and steps // rounds <= warmup < steps:
            length = f"the {steps // rounds} steps of a round, in each of which they are repeated"
            yield f"optim.warmup_steps: {warmup} are not below {length}"
        if first < 2**rounds:
            most = f"expected at most {first.bit_length() - 1}"
            yield f"distill.rounds: {rounds} rounds from {first} teacher steps end below one step; {most}"
