"""The typed form of a run's config: one frozen model per section, with checks across sections at the end."""

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PositiveInt, Tag, model_validator

from pipeline.config.data import AnyDataConfig, TextDataConfig
from pipeline.config.evaluation import EvaluationConfig, Precision, SamplingConfig
from pipeline.config.location import Location, ModelName
from pipeline.config.model import ModelConfig, PGMConfig
from pipeline.config.section import Name, NonNegativeFloat, NonNegativeInt, PositiveFloat, Rate, Section, Seed

# What `models:/NAME@ALIAS` can name; MLflow's stores limit it to 256 characters, and `-round-N` may follow.
RegisteredName = Annotated[str, Field(pattern=r"^\w[\w .-]*$", max_length=200)]


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
        micro_batch: Rows of one forward pass on one worker; null where `micro_tokens` is set.
        micro_tokens: Tokens of one forward pass on one worker, in place of `micro_batch`: as many padded rows as fit,
            their padding not counted; at least `data.length`.
        precision: Precision of the weights and of what the blocks compute.
        zero_stage: DeepSpeed ZeRO stage.
        persistent_parameters: Parameters with fewer values than this stay whole on every worker in stage 3.
        offload_optimizer: Keeps the optimiser's state in host memory (stages 1 to 3).
        activation_checkpointing: Recomputes every block in the backward pass to save memory.
        compile: Compiles what blocks compute before and after attention. CPUs, which it would slow down, ignore it.
        profile_steps: Steps that are traced by torch's profiler, after the first ten of a start (docs/speed.md).
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
    micro_batch: PositiveInt | None = 32
    micro_tokens: PositiveInt | None = None
    precision: Precision = "bf16"
    zero_stage: Literal[0, 1, 2, 3] = 1
    persistent_parameters: NonNegativeInt = 100_000
    offload_optimizer: bool = False
    activation_checkpointing: bool = False
    compile: bool = False
    profile_steps: NonNegativeInt = 0
    class_drop: Rate = 0.1
    init_from: ModelName | None = None
    on_nonfinite: Literal["skip", "stop"] = "skip"
    ema: Rate = 0.9999
    log_every: PositiveInt = 50
    validate_every: PositiveInt = 10_000
    checkpoint_every: PositiveInt = 5_000
    keep: PositiveInt = 2

    @property
    def micro_size(self) -> str:
        """The largest size of a micro-batch, for logs."""
        return f"{self.micro_batch} rows" if self.micro_tokens is None else f"{self.micro_tokens} tokens"

    def rows_at_once(self, length: int) -> int:
        """Return the rows of one forward pass on one worker, if they have no padding.

        Args:
            length: L.
        """
        return self.micro_batch or max(1, (self.micro_tokens or 0) // length)


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
        max_failures: Restarts of the worker group without a new checkpoint in between; -1 sets no limit.
        wait_s: Seconds that a job waits for the nodes of a cluster that can grow; 0 refuses at once.
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
    wait_s: Annotated[float, Field(ge=0, le=1e6)] = 900.0
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
        of_data = {"text": self._text, "image": self._images, "pair": self._pairs}[self.data.kind]()
        yield from (*self._training(), *of_data, *self._classes(), *self._distillation(), *self._sampling())

    def _training(self) -> Iterator[str]:
        train, streams, most = self.train, self.data.streams, self.cluster.most
        if train.batch % streams:
            divisors = (c for c in range(1, train.batch + 1) if train.batch % c == 0)
            near = min(divisors, key=lambda c: abs(c - streams))
            yield f"data.streams: {streams} does not divide train.batch {train.batch}; nearest that does: {near}"
        if most > streams:
            expected = "expected at most one worker a stream"
            yield f"cluster.workers: {most} workers for data.streams {streams}; {expected}"
        if train.offload_optimizer and train.zero_stage == 0:
            yield "train.offload_optimizer: stage 0 keeps its optimiser; expected train.zero_stage 1 to 3"
        if (train.micro_batch is None) == (train.micro_tokens is None):
            both = f"{train.micro_batch or 'null'} beside train.micro_tokens {train.micro_tokens or 'null'}"
            yield f"train.micro_batch: {both}; expected a number for one of them, and null for the other"
        elif train.micro_tokens is not None:
            if not self.data.padded:
                yield (
                    f"train.micro_tokens: {train.micro_tokens} for rows without padding, which are equally long; "
                    f"expected null, and train.micro_batch {train.rows_at_once(self.data.length)}"
                )
            elif train.micro_tokens < self.data.length:
                yield (
                    f"train.micro_tokens: {train.micro_tokens}; expected at least data.length {self.data.length}, "
                    "the tokens of the longest row"
                )
        if train.compile and train.zero_stage == 3:
            yield "train.compile: true at stage 3, which gathers module by module; expected train.zero_stage 0 to 2"
        if train.compile and self.data.ragged:
            what = "padding" if self.data.padded else "captions that may be given"
            yield f"train.compile: true for rows with {what}, whose batches differ in shape; expected false"
        if train.profile_steps and train.profile_steps > train.steps - 10:
            expected = (
                f"expected at most {max(0, train.steps - 10)} behind the first ten of {train.steps} steps"
            )
            yield f"train.profile_steps: {train.profile_steps}; {expected}"
        if self.model.lora is not None:
            if train.init_from is None:
                yield "model.lora: without train.init_from; expected the model that is adapted there"
            if self.distill is not None:
                yield "model.lora: together with distill; expected null, since a student trains all weights"
        if self.optim.warmup_steps >= train.steps:
            yield f"optim.warmup_steps: {self.optim.warmup_steps} is not below train.steps {train.steps}"

    def _sampling(self) -> Iterator[str]:
        sampling, steps, predicted = self.sampling, self.evaluation.steps, self.data.predicted
        # Of a model of captions and images, an image may be given whole; other models refuse it when they are read.
        whole = self.data.kind == "pair" or sampling.model is not None
        given = sampling.given
        if len(given) > 1 and not (whole and given[1:] == ["inpaint"]):
            yield f"sampling.{given[0]}: together with sampling.{given[1]}; expected one of them"
        if (sampling.mask is None) != (sampling.inpaint is None) and not (whole and sampling.mask is None):
            yield "sampling.mask: expected together with sampling.inpaint, the image that it is a mask of"
        most = math.inf if sampling.order == "binomial" else predicted
        too_many = [count for count in steps if count > most]
        row = f"for {predicted} predicted tokens a row; expected"
        if self.evaluation.models and not self.evaluation.tasks and (too_many or not steps):
            yield f"evaluation.steps: {too_many or '[]'} {row} numbers of at most {predicted}"
        if self.evaluation.grid and not self.evaluation.models:
            yield "evaluation.grid: without evaluation.models, which it is for; expected at least one model"
        if sampling.steps > most and self.model.kind != "ar":
            yield f"sampling.steps: {sampling.steps} steps {row} at most {predicted}"
        refreshes = self.model.kind == "pgm" and self.model.encoder == "bidirectional"
        if sampling.refresh_every > 1 and sampling.model is None and not refreshes:
            bidirectional = "expected 1; only a pgm with model.encoder bidirectional can encode less often"
            yield f"sampling.refresh_every: {sampling.refresh_every}; {bidirectional}"
        if sampling.length is not None and sampling.model is None:
            if not self.data.padded or self.model.kind == "ar" or self.data.answers:
                yield (
                    f"sampling.length: {sampling.length}; expected null, since only rows with padding (data.wrap "
                    "sentence) have a length, and ar and answers to prompts end themselves"
                )
            elif sampling.length > self.data.length:
                yield f"sampling.length: {sampling.length}; expected at most data.length {self.data.length}"
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
        if self.evaluation.score_bos and self.model.kind == "ar" and self.model.start == "bos":
            yield "evaluation.score_bos: true for model.start 'bos', which does not predict BOS; expected false"
        if self.evaluation.zero_shot and (self.evaluation.models or self.evaluation.tasks):
            yield "evaluation.zero_shot: together with other evaluations; expected no models and no tasks beside it"
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
        if self.evaluation.score_bos:
            yield "evaluation.score_bos: true, but the BOS of images is no code; expected false"
        if self.evaluation.scorer is not None:
            yield f"evaluation.scorer: {self.evaluation.scorer!r} reads text; expected null for images"
        if self.model.classes not in (None, expected):
            yield f"model.classes: {self.model.classes}; expected data.classes {expected}, or null"
        if self.model.kind == "ar" and self.diffusion.schedule == "arccos":
            yield "diffusion.schedule: arccos for model.kind ar, which hides nothing; expected loglinear"

    def _pairs(self) -> Iterator[str]:
        evaluation = self.evaluation
        if self.model.classes is not None:
            yield f"model.classes: {self.model.classes}, but data.kind pair has no labels; expected null"
        if self.diffusion.schedule == "arccos":
            yield "diffusion.schedule: arccos hides too much of captions; expected loglinear for data.kind pair"
        for key in ("score_bos", "zero_shot", "tasks", "scorer", "features", "reference"):
            if value := getattr(evaluation, key):
                yield f"evaluation.{key}: {value!r} with data.kind pair; expected its default"

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
