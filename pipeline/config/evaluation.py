"""The sections of a config that say how models are sampled and evaluated."""

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, ValidationError, field_validator, model_validator

from pipeline.config.data import TextFilter
from pipeline.config.location import Location, ModelName
from pipeline.config.section import NonNegativeInt, Section, Seed
from pipeline.errors import did_you_mean

Precision = Literal["fp32", "bf16"]
Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _-]*$", max_length=128)]

# Bounds of the settings of samplers. Beyond them, distributions no longer change or are not finite.
LEAST_TEMPERATURE, LARGEST_SETTING, MOST_STEPS = 1e-6, 1e6, 1_000_000
Setting = Annotated[float, Field(ge=0, le=LARGEST_SETTING)]


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
        view: Writes a page that shows step by step how the first 80 rows were revealed (`jobs.sample`).
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
    view: bool = False
    batch: PositiveInt = 16
    seed: Seed = 0

    @property
    def given(self) -> list[str]:
        """Keys that are set of those that say what samples are drawn around."""
        return [key for key in ("prompt", "infill", "inpaint") if getattr(self, key) is not None]


# Keys of `sampling` that a comparison can vary, beside the steps.
GRID_KEYS = (
    *("order", "schedule", "gumbel", "gamma", "temperature"),
    *("top_k", "top_p", "guidance", "refresh_every"),
)


class ZeroShotSet(Section):
    """Text of another corpus, all of which is evaluated.

    Attributes:
        source: As `data.source`.
        subset: As `data.subset`.
        split: As `data.split`, but `test` unless it is stated.
        revision: As `data.revision`.
        text_field: As `data.text_field`.
        text_filter: As `data.text_filter`.
        end_of_text: As `data.end_of_text`; the published figures are of text without it.
    """

    source: Location
    subset: str | None = None
    split: str = "test"
    revision: str | None = None
    text_field: str = "text"
    text_filter: TextFilter | None = None
    end_of_text: bool = False


class EvaluationConfig(Section):
    """Validation during training, and what `jobs.evaluate` measures.

    Attributes:
        estimator: Estimator of the likelihood bound: `count` draws the number of hidden positions, `mdlm` draws t.
        draws: Maskings of every row.
        rows: Largest number of validation rows that are used.
        batch: Rows of one forward pass.
        score_bos: Counts the first token of rows that begin with BOS among those to predict, as the authors do.
        data: Folders of other prepared data to evaluate on, beside the run's own.
        zero_shot: Texts by name, which `jobs.evaluate` prepares and measures the likelihood of, and nothing else.
        tasks: Tasks of lm-evaluation-harness that `jobs.evaluate` answers, with nothing else (extra `harness`).
        tasks_path: Folder of further task files, as lm-eval's `--include_path`.
        task_limit: Largest number of questions of a task; null: all.
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
    score_bos: bool = False
    data: tuple[str, ...] = ()
    zero_shot: dict[Label, ZeroShotSet] = Field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    tasks_path: str | None = None
    task_limit: PositiveInt | None = None
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
