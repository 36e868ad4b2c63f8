"""Memory of one GPU during training: model states under ZeRO, and activations.

Activations are what autograd keeps between the forward and the backward pass. They are counted here tensor by tensor
from the code of the blocks, for the kernels that run on GPUs: fused dropout, which keeps a mask of one byte per
value, and flash attention, which keeps no scores.
"""

from dataclasses import dataclass

from pipeline.config.evaluation import SamplingConfig
from pipeline.config.model import ModelConfig
from pipeline.config.schema import TrainConfig
from pipeline.models.head import CHUNK_LOGITS
from pipeline.models.model_folder import DataFacts

FLOAT32 = 4  # bytes of a value in norms, master weights, moments and logits


@dataclass(frozen=True)
class Activations:
    """What autograd keeps for the backward pass of one micro-batch.

    Attributes:
        per_row: bytes per row.
        fixed: bytes that do not depend on the number of rows.
        recomputed: bytes per row of the largest block that the backward pass computes again; 0 without
            activation checkpointing.
        logits: number of logits per row.
        logit: bytes that the head holds for each logit of a chunk.
        head: bytes per row of the copies of its inputs that the head makes.
    """

    per_row: float
    fixed: float = 0.0
    recomputed: float = 0.0
    logits: float = 0.0
    logit: int = 2 * FLOAT32
    head: float = 0.0

    def kept(self, rows: float) -> float:
        """Return the bytes kept at the end of the forward pass, logits not included."""
        return self.fixed + rows * self.per_row

    def peak(self, rows: float) -> float:
        """Return the bytes at the fullest moment of a step.

        For one chunk of rows the head holds float32 logits and log-probabilities, and in half precision a gradient
        (in float32 it takes the place of the log-probabilities), while all else is kept.
        """
        entries = min(CHUNK_LOGITS["cuda"], rows * self.logits)
        return self.kept(rows) + max(self.logit * entries + rows * self.head, rows * self.recomputed)


def activations(model: ModelConfig, facts: DataFacts, train: TrainConfig, targets: float) -> Activations:
    """Count the bytes that autograd keeps in a training step.

    Args:
        model: the architecture.
        facts: vocabulary and length of the data.
        train: precision and activation checkpointing.
        targets: mean number of predicted positions per row (per masking, for complementary masking).

    Returns:
        The bytes per row and per micro-batch.
    """
    value = 2 if train.precision == "bf16" else 4
    half = value < FLOAT32
    copy = FLOAT32 if half else 0  # sums of pooled swaps take a float32 copy of a bf16 input
    classes = model.classes is not None
    # All sizes below are bytes per token and unit of the hidden size. With classes, modulation does not fold into
    # weights: the results of two norms and of two branches are kept before it.
    modulation = 4 * value if classes else 0
    # Mean and deviation of two norms, and each head's log-sum-exp of attention.
    statistics = (2 * 2 + model.heads) * FLOAT32 / model.hidden
    # Inputs of two norms (2), their outputs (2), query (1), attention output (1), MLP (4 + 4); two dropout masks.
    queries = 14 * value + modulation + (2 if model.dropout else 0) + statistics
    # The packed projection stays alive through the values, beside the rotated keys (and queries).
    self_block = queries + 4 * value
    width = float(facts.length + model.registers)
    if model.kind == "pgm":
        swap, swap_keys = 2 * value, 3 * value  # query, attention output; keys and values, rotated keys
        if model.swap.pooling != "none":  # else queries depend on the position alone, and all rows share them
            swap += FLOAT32 + value + (8 * value if model.swap.query == "mlp4" else 0)
            swap_keys += FLOAT32 if model.swap.pooling == "logsumexp" else copy
        swaps = targets * swap + width * swap_keys
        # The norm of the encoder outputs, and the product of keys and values as in a swap.
        cross_block = targets * queries + width * 4 * value
        blocks = [width * self_block] * model.encoder_blocks + [cross_block] * model.decoder_blocks
        inputs = width * value * model.encoder_blocks + targets * value * model.decoder_blocks
        if model.swap.every_block:
            blocks += [swaps] * (model.decoder_blocks - 1)
        # The first swap, the encoder outputs, and the decoder's rotary code.
        outside = swaps + width * value + targets * FLOAT32 / model.heads
    else:
        if model.kind == "mdlm" and model.complementary:
            width *= 2
        blocks = [width * self_block] * model.blocks
        inputs = width * value * model.blocks
        outside = 0.0
    outside += width * FLOAT32 / model.heads  # the rotary code
    # The final norm's input, the gradient that the head has made of its output and, with classes, the norm's result.
    outside += targets * value * (3 if classes else 2)
    recompute = train.activation_checkpointing
    # Weights with the gates folded in (1 + 4), and in half precision the projections to heads in its order (3).
    weights = len(blocks) * ((0 if classes else 5) + (3 if half else 0)) * model.hidden**2 * value
    return Activations(
        per_row=model.hidden * (outside + (inputs if recompute else sum(blocks))),
        # The gradient that the head has made of its weight.
        fixed=FLOAT32 * facts.vocab_size * (model.hidden + (8 if half else 0))
        + (0 if recompute else weights),
        recomputed=model.hidden * max(blocks) if recompute else 0.0,
        logits=targets * facts.vocab_size,
        logit=2 * FLOAT32 + (value if half else 0),
        head=2 * targets * (model.hidden + 8) * value if half else 0.0,  # with and without the rows' weights
    )


def sampling_caches(model: ModelConfig, facts: DataFacts, sampling: SamplingConfig) -> int:
    """Count the bytes of the keys and values that a model keeps while it samples a batch of rows.

    Args:
        model: the architecture.
        facts: length of the data.
        sampling: rows of a batch, precision, guidance and encoder reuse.

    Returns:
        The bytes; 0 for a model that keeps none.
    """
    rows = sampling.batch * (2 if sampling.guidance else 1)
    if model.kind == "ar":
        layers, slots = model.blocks, model.registers + 1 + facts.length
    elif model.kind == "pgm" and (model.encoder == "causal" or sampling.refresh_every > 1):
        swaps = model.decoder_blocks if model.swap.every_block else 1
        layers, slots = (
            model.encoder_blocks + model.decoder_blocks + swaps,
            model.registers // 2 + facts.length,
        )
    else:
        return 0
    values = 2 * layers * slots * model.hidden
    if model.kind == "pgm" and model.swap.pooling != "none":
        values += slots * model.hidden  # encoder outputs, which pooled swaps read
    return rows * values * (2 if sampling.precision == "bf16" else 4)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the fullest moment of a step.

    Attributes:
        weights: of the model, in the precision of training; with a teacher, its weights too.
        gradients: of the weights.
        optimiser: Adam's moments, and the float32 weights that it updates.
        ema: float32 averaged weights.
        activations: from `Activations.peak`.
    """

    weights: float
    gradients: float
    optimiser: float
    ema: float
    activations: float

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return self.weights + self.gradients + self.optimiser + self.ema + self.activations


def states(count: int, train: TrainConfig, workers: int, kept_whole: int = 0) -> Memory:
    """Compute the bytes of weights, gradients, optimiser and averaged weights on one GPU; activations are 0.

    Per parameter, fp32 takes 4 bytes each for weights, gradients and averaged weights, 8 for Adam's moments, and from
    stage 1 on 4 for a copy of the weights. bf16 takes 2 for weights, 2 for gradients, 4 for float32 weights, 8 for
    the moments and 4 for averaged weights. Stage 1 divides optimiser and average by the workers, stage 2 also the
    gradients, stage 3 also the weights. With offloading, optimiser and average are in host memory.

    Args:
        count: number of parameters.
        train: precision, ZeRO stage and offloading.
        workers: number of GPUs.
        kept_whole: parameters in tensors of fewer values than `train.persistent_parameters` (stage 3).
    """
    stage, value = train.zero_stage, 2 if train.precision == "bf16" else 4
    masters = 0 if stage == 0 and train.precision == "fp32" else FLOAT32
    on_gpu = 0 if train.offload_optimizer else count / (workers if stage >= 1 else 1)
    return Memory(
        weights=count * value if stage < 3 else (kept_whole + (count - kept_whole) / workers) * value,
        gradients=count * value / (workers if stage >= 2 else 1),
        optimiser=on_gpu * (8 + masters),
        ema=on_gpu * FLOAT32,
        activations=0.0,
    )
