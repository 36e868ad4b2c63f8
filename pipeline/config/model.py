"""The model section of a config: one class for each kind of model."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from pipeline.config.section import NonNegativeInt, PositiveFloat, Rate, Section


class SwapConfig(Section):
    """GroupSwap, the cross-attention through which the two groups of a PGM exchange places.

    Attributes:
        positional: Adds the sinusoidal position to the learned query.
        pooling: How the encoder outputs that the swap reads are pooled and added to the query.
        query: Map behind the norm: `linear` is H -> H; `mlp4` is H -> 4H -> H with SiLU.
        norm: Norm in front of the query map.
        every_block: Places a swap in front of every decoder block instead of the first alone.

    Source: docs/method.md section 2.
    """

    positional: bool = True
    pooling: Literal["none", "mean", "logsumexp"] = "none"
    query: Literal["linear", "mlp4"] = "linear"
    norm: Literal["layer", "rms"] = "layer"
    every_block: bool = False


class LoraConfig(Section):
    """Low-rank adaptation (LoRA): the weights of `train.init_from` stay, and small updates of them are trained.

    Attributes:
        rank: Rank of every update, r.
        alpha: An update is alpha / r times the product of its two factors.
        targets: Linear maps with an update: those of attention, of the MLPs, or both.

    Source: docs/lora.md.
    """

    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    targets: tuple[Literal["attention", "mlp"], ...] = ("attention", "mlp")

    @model_validator(mode="after")
    def _check_targets(self) -> Self:
        if not self.targets:
            raise ValueError("targets []; expected attention, mlp or both")
        return self


class TrunkConfig(Section):
    """What all models have in common.

    Attributes:
        hidden: Width of the residual stream, H.
        heads: Number of attention heads, N.
        dropout: Dropout rate on the residual branches.
        classes: Number of classes that condition the model; null is an unconditional model.
        registers: Number of learned vectors in front of every row.
        lora: Low-rank adaptation of the model that `train.init_from` names; null trains all weights.
    """

    hidden: Annotated[int, Field(gt=0, le=65_536)] = 768
    heads: PositiveInt = 12
    dropout: Rate = 0.1
    classes: PositiveInt | None = None
    registers: NonNegativeInt = 0
    lora: LoraConfig | None = None

    @property
    def fixed_steps(self) -> bool:
        """Whether steps of sampling can have fixed shapes: stored keys and values are all that a step reads."""
        return False

    @property
    def merged(self) -> Self:
        """The section of the model whose updates are part of its weights."""
        return self.model_copy(update={"lora": None})

    @model_validator(mode="after")
    def _check_rank(self) -> Self:
        if self.lora is not None and self.lora.rank > self.hidden:
            raise ValueError(f"lora.rank {self.lora.rank}; expected at most hidden, {self.hidden}")
        return self

    @model_validator(mode="after")
    def _check_heads(self) -> "TrunkConfig":
        if self.hidden % (2 * self.heads):
            fits = [n for n in range(1, self.hidden + 1) if self.hidden % (2 * n) == 0]
            near = min(fits, key=lambda n: abs(n - self.heads), default=None)
            hint = f"nearest that does: {near}" if near else "hidden must be even"
            raise ValueError(
                f"heads {self.heads} does not split hidden {self.hidden} into even heads; {hint}"
            )
        return self


class PGMConfig(TrunkConfig):
    """Partition Generative Model.

    Attributes:
        kind: Selects the PGM; required in every model section.
        encoder: What a clean token reads in the encoder: `bidirectional` its group, `causal` what came before it.
        encoder_blocks: Number of encoder blocks.
        decoder_blocks: Number of decoder blocks.
    """

    kind: Literal["pgm"] = "pgm"
    encoder: Literal["bidirectional", "causal"] = "bidirectional"
    encoder_blocks: PositiveInt = 8
    decoder_blocks: PositiveInt = 8
    swap: SwapConfig = SwapConfig()

    @property
    def fixed_steps(self) -> bool:
        """Whether steps of sampling can have fixed shapes: stored keys and values are all that a step reads."""
        return self.encoder == "causal" and self.swap.pooling == "none"

    @model_validator(mode="after")
    def _check_registers(self) -> "PGMConfig":
        if self.registers % 2:
            even = f"expected an even number, such as {self.registers + 1}"
            raise ValueError(f"registers {self.registers} cannot be split between the groups; {even}")
        return self


class MDLMConfig(TrunkConfig):
    """Masked diffusion language model, the masked baseline on the same blocks; on images MaskGIT.

    Attributes:
        kind: Selects the masked model.
        blocks: Number of blocks.
        complementary: Trains on a masking and its complement in one batch of twice the rows.
    """

    kind: Literal["mdlm"]
    blocks: PositiveInt = 12
    complementary: bool = False


class ARConfig(TrunkConfig):
    """Autoregressive language model, the baseline with causal attention on the same blocks.

    Attributes:
        kind: Selects the autoregressive model.
        blocks: Number of blocks.
        start: What the first token is predicted from: a `learned` vector in front of every row, or the `bos` that
            rows begin with (`data.wrap: bos_eos`), as in the authors' models.
    """

    kind: Literal["ar"]
    blocks: PositiveInt = 12
    start: Literal["learned", "bos"] = "learned"

    @property
    def fixed_steps(self) -> bool:
        """Whether steps of sampling can have fixed shapes: stored keys and values are all that a step reads."""
        return True


ModelConfig = Annotated[PGMConfig | MDLMConfig | ARConfig, Field(discriminator="kind")]
