"""Layers that all models are made of: norms, modulation, position codes, MLP and head."""

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from pipeline.models.head_loss import (
    DistillTargets,
    chunked_loss,
    cross_entropy_rows,
    divergence_rows,
    operands,
    product,
)

MAX_PERIOD = 10_000.0  # of rotary and sinusoidal codes
# Largest number of logits (rows x V) that are computed together, by device type. On a CPU they fit the caches. On a
# GPU there are so many that reading and writing the head's gradient once a chunk costs little time.
CHUNK_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 27}


def chunk_rows(entries: Mapping[str, int], width: int, device: torch.device) -> int:
    """Choose the number of rows to compute together on a device.

    Args:
        entries: largest number of entries that are computed together, by device type; others count as "cpu".
        width: entries of a row.
        device: where they are computed.

    Returns:
        At least 1.
    """
    return max(1, entries.get(device.type, entries["cpu"]) // width)


def upcast(x: Tensor) -> Tensor:
    """Convert to float32, the precision of sums and norms.

    Args:
        x: a tensor of any floating-point type.

    Returns:
        The tensor in float32, or as it is if it is float64.
    """
    return x if x.dtype == torch.float64 else x.float()


def _angles(positions: Int[Tensor, "T"], count: int) -> Float[Tensor, "T count"]:
    """Angles of `count` frequencies at every position, in float32."""
    steps = torch.arange(count, device=positions.device, dtype=torch.float32)
    return positions[:, None].float() * torch.exp(steps * (-math.log(MAX_PERIOD) / count))


def rotary(positions: Int[Tensor, "T"], size: int) -> Complex[Tensor, "T 1 half"]:
    """Compute rotary position codes.

    Args:
        positions: of the tokens.
        size: entries of an attention head.

    Returns:
        [T, 1, size / 2] complex64: cosine + i sine of every angle.
    """
    angles = _angles(positions, size // 2)
    return torch.polar(torch.ones_like(angles), angles)[:, None]


def rotate(x: Float[Tensor, "T N D"], code: Complex[Tensor, "T 1 half"]) -> Float[Tensor, "T N D"]:
    """Apply a rotary code: entries 2i and 2i + 1 of a head are one complex number, rotated in one pass.

    Released weights rotate entry i with entry i + D/2. Their rows are reordered when they are read
    (`pipeline.models.released.architecture`), which changes no product of queries and keys.

    Args:
        x: queries or keys.
        code: of their positions, from `rotary`.

    Returns:
        [T, N, D] in the dtype of x.

    Source:
        docs/method.md section 2, "Block details".
    """
    numbers = torch.view_as_complex(upcast(x).unflatten(-1, (-1, 2)))
    return torch.view_as_real(numbers * code).flatten(-2).to(x.dtype)


def sinusoid(positions: Int[Tensor, "T"], size: int) -> Float[Tensor, "T H"]:
    """Compute sinusoidal position codes.

    Args:
        positions: of the tokens.
        size: entries of a code.

    Returns:
        [T, size] float32, cosines then sines.
    """
    angles = _angles(positions, size // 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


@dataclass(frozen=True)
class FoldedNorm:
    """A norm whose modulation is part of its weight and bias.

    Attributes:
        weight: [H].
        bias: [H].
    """

    weight: Float[Tensor, "H"]
    bias: Float[Tensor, "H"]

    def __call__(self, x: Float[Tensor, "T H"]) -> Float[Tensor, "T H"]:
        """Normalise and modulate every token in one kernel.

        Args:
            x: tokens.

        Returns:
            [T, H] in the dtype of x.
        """
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class LayerNorm(nn.Module):
    """LayerNorm in float32 with eps 1e-5, optionally modulated: `norm(x) * (1 + scale) + shift`.

    Args:
        size: H.
        bias: whether there is a bias in addition to the weight.
    """

    def __init__(self, size: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(
        self,
        x: Float[Tensor, "T H"],
        shift: Float[Tensor, "H"] | Float[Tensor, "T H"] | None = None,
        scale: Float[Tensor, "H"] | Float[Tensor, "T H"] | None = None,
    ) -> Float[Tensor, "T H"]:
        """Normalise every token, and modulate it if there are a shift and a scale.

        Args:
            x: tokens.
            shift: one vector for all tokens, or one for each; None: no modulation.
            scale: in the same form.

        Returns:
            [T, H] in the dtype of x.
        """
        if scale is None or shift is None:  # the kernel's forward pass computes in float32 whatever the dtype
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)
        weight = upcast(self.weight)
        bias = None if self.bias is None else upcast(self.bias)
        factor, shift = 1 + upcast(scale), upcast(shift)
        if scale.dim() == 2:
            normed = F.layer_norm(upcast(x), weight.shape, weight, bias, 1e-5)
            return (normed * factor + shift).to(x.dtype)
        # One vector for all tokens: folded into weight and bias, so that one kernel does it all.
        bias = shift if bias is None else bias * factor + shift
        return F.layer_norm(upcast(x), weight.shape, weight * factor, bias, 1e-5).to(x.dtype)

    def folded(self, shift: Float[Tensor, "H"], scale: Float[Tensor, "H"]) -> FoldedNorm:
        """Fold a modulation into the norm, for many calls with the same one.

        Args:
            shift: one vector for all tokens.
            scale: one vector for all tokens.

        Returns:
            What gives the same as `forward` with this shift and scale; it rounds weight and bias to the dtype of the
            norm, and computes the norm itself in float32.
        """
        factor, bias = 1 + upcast(scale), upcast(shift)
        if self.bias is not None:
            bias = bias + upcast(self.bias) * factor
        return FoldedNorm((upcast(self.weight) * factor).to(self.weight.dtype), bias.to(self.weight.dtype))


class RMSNorm(nn.Module):
    """Division by the root mean square in float32 with eps 1e-5, with a weight and no bias.

    Args:
        size: H.
    """

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Float[Tensor, "T H"]) -> Float[Tensor, "T H"]:
        """Normalise every token.

        Args:
            x: tokens.

        Returns:
            [T, H] in the dtype of x.
        """
        return F.rms_norm(upcast(x), self.weight.shape, upcast(self.weight), 1e-5).to(x.dtype)


ClassVectors = Float[Tensor, "B H"] | None  # of a batch's rows; None: a model without classes


class Condition(NamedTuple):
    """The class of each packed token.

    Attributes:
        vectors: class vectors of a batch's rows.
        rows: the row that each token belongs to.
    """

    vectors: ClassVectors
    rows: Int[Tensor, "T"]


class Modulation(nn.Module):
    """The vectors (shift, scale, gate, ...) of a block, as in adaLN.

    Without classes they are learned constants: the released text models feed a constant condition to their adaLN
    maps, which is the same function (docs/method.md section 2). With classes they are a linear map of the class
    vector. Both start at zero, and zero gates make every block the identity.

    Args:
        size: H.
        count: number of vectors.
        conditional: whether the model has classes.
    """

    def __init__(self, size: int, count: int, conditional: bool = False):
        super().__init__()
        self.count = count
        self.map: nn.Linear | None = None
        if conditional:
            self.map = nn.Linear(size, count * size)
            nn.init.zeros_(self.map.weight)
            nn.init.zeros_(self.map.bias)
        else:
            self.vectors = nn.Parameter(torch.zeros(count, size))

    def forward(self, condition: Condition | None = None) -> tuple[Tensor, ...]:
        """Compute the vectors.

        Args:
            condition: class vectors of the tokens.

        Returns:
            `count` vectors, each [H] for all tokens or, with class vectors, [T, H] for each token.
        """
        vectors = None if condition is None else condition.vectors
        assert (vectors is None) == (self.map is None)
        if condition is None or vectors is None or self.map is None:
            # A copy: under ZeRO-3 the parameter's storage is gone once this forward has returned.
            return self.vectors.clone().unbind(0)
        return F.embedding(condition.rows, self.map(vectors)).chunk(self.count, dim=-1)


class GeluLinear(nn.Linear):
    """A linear map with bias, then tanh-GELU."""

    def forward(self, x: Float[Tensor, "T I"]) -> Float[Tensor, "T O"]:
        """Map every token.

        Args:
            x: tokens.

        Returns:
            [T, O].
        """
        x = super().forward(x)
        if (
            x.device.type == "cpu"
            and not torch.is_grad_enabled()
            and x.dtype in (torch.float32, torch.float64)
        ):
            # The same function as x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), in half the time of PyTorch's kernel.
            factor = 2 * math.sqrt(2 / math.pi)
            return x.square().mul_(factor * 0.044715).add_(factor).mul_(x).sigmoid_().mul_(x)
        return F.gelu(x, approximate="tanh")


class MLP(nn.Sequential):
    """H -> 4H -> H with tanh-GELU and biases.

    Args:
        size: H.
    """

    def __init__(self, size: int):
        super().__init__(OrderedDict(up=GeluLinear(size, 4 * size), down=nn.Linear(4 * size, size)))


class FinalNorm(nn.Module):
    """The modulated norm between the last block and the head.

    Args:
        size: H.
        conditional: whether the model has classes.
    """

    def __init__(self, size: int, conditional: bool = False):
        super().__init__()
        self.norm = LayerNorm(size)
        self.modulation = Modulation(size, 2, conditional)

    def forward(self, x: Float[Tensor, "T H"], condition: Condition | None = None) -> Float[Tensor, "T H"]:
        """Normalise and modulate every token.

        Args:
            x: tokens.
            condition: class vectors of the tokens.

        Returns:
            [T, H].
        """
        return self.norm(x, *self.modulation(condition))

    def folded(self) -> FoldedNorm | None:
        """Fold the modulation into the norm for many calls; None where it depends on a class."""
        return None if self.modulation.map is not None else self.norm.folded(*self.modulation())


class Head(nn.Module):
    """Projection to the vocabulary; the only module that makes tensors with V entries a row.

    Args:
        size: H.
        vocab_size: V.
    """

    def __init__(self, size: int, vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size
        self.weight = nn.Parameter(torch.zeros(vocab_size, size))
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(
        self,
        hidden: Float[Tensor, "T H"],
        targets: Int[Tensor, "T"] | DistillTargets | None = None,
        row_weights: Float[Tensor, "T"] | None = None,
    ) -> Float[Tensor, "T V"] | Float[Tensor, "T"]:
        """Compute logits, or the loss of every row without ever holding all logits.

        Args:
            hidden: vectors from the final norm.
            targets: ids below V, and the loss is the cross-entropy with them, in nats; or a teacher's vectors for the
                same rows, and the loss is the divergence from the teacher; None: logits.
            row_weights: factor of every row's loss, see `chunked_loss`; None: 1.

        Returns:
            Logits [T, V] without targets, else losses [T]; float32, since cross-entropies from bf16 logits are wrong
            by up to 0.25 nats.
        """
        if targets is None:
            if torch.is_grad_enabled():
                return F.linear(upcast(hidden), upcast(self.weight), upcast(self.bias))
            x, weight, bias = operands(hidden, self.weight, self.bias)
            return product(x, weight.T).add_(bias)
        if row_weights is None:
            row_weights = torch.ones(len(hidden), device=hidden.device)
        row_losses = (
            divergence_rows(targets) if isinstance(targets, DistillTargets) else cross_entropy_rows(targets)
        )
        chunk = chunk_rows(CHUNK_LOGITS, self.vocab_size, hidden.device)
        return chunked_loss(hidden, self.weight, self.bias, row_weights, row_losses, chunk)
