"""Small layers that every trunk is made of: norm, modulation, rotary and sinusoidal positions, MLP, head."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from pipeline.models.distill_loss import DistillTargets, matched

PERIOD = 10_000.0  # longest period of rotary and sinusoidal codes
# Entries of rows x V, by kind of device, above which logits are made in chunks of rows. A CPU's fit its caches; a
# GPU's are so large that the head's gradient, read and written once a chunk, costs little beside the products.
LOGITS_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 27}


def rows_at_once(entries: Mapping[str, int], width: int, device: torch.device) -> int:
    """Rows of `width` entries that are made together on a device, at least one."""
    return max(1, entries.get(device.type, entries["cpu"]) // width)


def wide(x: Tensor) -> Tensor:
    """The tensor in float32, or as it is in a float64 model: what sums and norms are computed in."""
    return x if x.dtype == torch.float64 else x.float()


def _frequencies(count: int, device: torch.device) -> Float[Tensor, "count"]:
    return torch.exp(torch.arange(count, device=device, dtype=torch.float32) * (-math.log(PERIOD) / count))


def rotary(positions: Int[Tensor, "T"], size: int) -> Complex[Tensor, "T 1 half"]:
    """Rotary position embedding for heads of `size` entries: cosine + i sine of every angle, in float32."""
    angles = positions[:, None].float() * _frequencies(size // 2, positions.device)  # [T, D/2]
    return torch.polar(torch.ones_like(angles), angles)[:, None]


def rotate(x: Float[Tensor, "T N D"], code: Complex[Tensor, "T 1 half"]) -> Float[Tensor, "T N D"]:
    """Apply a rotary code: entries 2i and 2i + 1 of a head are one complex number, turned in one pass.

    Released weights turn entry i with entry i + D/2; their rows are reordered when they are read
    (`pretrained.translate`), which changes no product of queries and keys.

    Source: method.md section 2, "Block details".
    """
    numbers = torch.view_as_complex(wide(x).unflatten(-1, (-1, 2)))
    return torch.view_as_real(numbers * code).flatten(-2).to(x.dtype)


def sinusoid(positions: Int[Tensor, "T"], size: int) -> Float[Tensor, "T H"]:
    """Sinusoidal position code, cosines then sines, in float32."""
    angles = positions[:, None].float() * _frequencies(size // 2, positions.device)  # [T, H/2]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class LayerNorm(nn.Module):
    """LayerNorm in float32, eps 1e-5, optionally modulated: `norm(x) * (1 + scale) + shift`."""

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
        weight = wide(self.weight)
        bias = None if self.bias is None else wide(self.bias)
        if scale is not None and shift is not None:
            if scale.dim() == 2:  # a vector for each token
                normed = F.layer_norm(wide(x), weight.shape, weight, bias, 1e-5)
                return (normed * (1 + wide(scale)) + wide(shift)).to(x.dtype)
            # One vector for all tokens: folded, so that one kernel does it all.
            weight = weight * (1 + wide(scale))
            bias = wide(shift) if bias is None else bias * (1 + wide(scale)) + wide(shift)
        return F.layer_norm(wide(x), weight.shape, weight, bias, 1e-5).to(x.dtype)


class RMSNorm(nn.Module):
    """Division by the root mean square in float32, eps 1e-5, with a weight and no bias."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Float[Tensor, "T H"]) -> Float[Tensor, "T H"]:
        return F.rms_norm(wide(x), self.weight.shape, wide(self.weight), 1e-5).to(x.dtype)


class Condition(NamedTuple):
    """The class vectors of a batch, and which of them each packed token goes by."""

    vectors: Float[Tensor, "B H"]
    rows: Int[Tensor, "T"]

    def at(self, rows: Int[Tensor, "Q"]) -> "Condition":
        """The same vectors for other tokens."""
        return Condition(self.vectors, rows)


class Modulation(nn.Module):
    """The vectors (shift, scale, gate, ...) of a block: adaLN.

    Without classes they are learned constants: the released text models feed adaLN maps a constant condition,
    which is the same function (method.md section 2). With classes they are a linear map of the class vector.
    Both start at zero, and zero gates make every block the identity.
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
        """`count` vectors for all tokens, each [H], or with a condition for each token, each [T, H]."""
        assert (condition is None) == (self.map is None)
        if condition is None or self.map is None:
            # A copy: under ZeRO-3 the parameter's storage is gone once this forward has returned.
            return self.vectors.clone().unbind(0)
        return F.embedding(condition.rows, self.map(condition.vectors)).chunk(self.count, dim=-1)


class GeluLinear(nn.Linear):
    """A linear map with bias, then tanh-GELU."""

    def forward(self, x: Float[Tensor, "T I"]) -> Float[Tensor, "T O"]:
        on_cpu = x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()
        if on_cpu and not torch.is_grad_enabled():
            # Product, bias and GELU in one kernel, which torch.compile would choose too, but needs a compiler for.
            fused: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "gelu", [], "tanh")
            return fused
        return F.gelu(super().forward(x), approximate="tanh")


class MLP(nn.Module):
    """H -> 4H -> H with tanh-GELU and biases."""

    def __init__(self, size: int):
        super().__init__()
        self.up = GeluLinear(size, 4 * size)
        self.down = nn.Linear(4 * size, size)

    def forward(self, x: Float[Tensor, "T H"]) -> Float[Tensor, "T H"]:
        return self.down(self.up(x))


class FinalNorm(nn.Module):
    """The modulated norm behind the last block, in front of the head."""

    def __init__(self, size: int, conditional: bool = False):
        super().__init__()
        self.norm = LayerNorm(size)
        self.modulation = Modulation(size, 2, conditional)

    def forward(self, x: Float[Tensor, "T H"], condition: Condition | None = None) -> Float[Tensor, "T H"]:
        shift, scale = self.modulation(condition)
        return self.norm(x, shift, scale)


class Head(nn.Module):
    """Projection to the vocabulary; the only place where V-wide tensors are made."""

    def __init__(self, size: int, vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size
        self.weight = nn.Parameter(torch.zeros(vocab_size, size))
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(
        self,
        hidden: Float[Tensor, "T H"],
        targets: Int[Tensor, "T"] | None = None,
        teaching: DistillTargets | None = None,
    ) -> Float[Tensor, "T V"] | Float[Tensor, "T"]:
        """Logits; or the loss of every row, never holding all logits.

        The loss is the cross-entropy with `targets` in nats, or with `teaching` the divergence from a teacher.

        Shape:
            hidden: [T, H]; targets: [T] ids below V. Returns float32 [T, V], or [T].
        """
        # float32 from here on: cross-entropies from bf16 logits are off by up to 0.25 nats.
        x, weight, bias = wide(hidden), wide(self.weight), wide(self.bias)
        chunk = rows_at_once(LOGITS_AT_ONCE, self.vocab_size, hidden.device)
        if teaching is not None:
            return matched(x, weight, bias, teaching, chunk)
        if targets is None:
            return F.linear(x, weight, bias)
        options = None
        if len(x) > chunk:
            options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk, chunking_method=None)
        return F.linear_cross_entropy(x, weight, targets, linear_bias=bias, reduction="none", options=options)
