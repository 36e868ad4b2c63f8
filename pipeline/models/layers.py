"""Layers that all models are made of: norms, modulation, position codes, linear maps of heads and MLP."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float, Int, Shaped
from torch import Tensor, nn

from pipeline.models.attention import Segments

MAX_PERIOD = 10_000.0  # of rotary and sinusoidal codes
FULL = (torch.float32, torch.float64)  # precisions in which rotations are products of complex numbers
Rotary = Complex[Tensor, "_ 1 half"] | Float[Tensor, "_ 2 1 half"]  # codes of tokens, see `rotary`


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


def rotary(positions: Int[Tensor, "T"], size: int, dtype: torch.dtype = torch.float32) -> Rotary:
    """Compute rotary position codes.

    Args:
        positions: of the tokens.
        size: entries of an attention head.
        dtype: of the queries and keys.

    Returns:
        cosine + i sine of every angle, [T, 1, size / 2] complex64; for half precision cosines and sines, [T, 2, 1,
        size / 2] in this precision: kernels for operands of two precisions take nearly twice as long on a GPU.
    """
    angles = _angles(positions, size // 2)
    if dtype in FULL:
        return torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.stack([angles.cos(), angles.sin()], 1)[:, :, None].to(dtype)


def rotate(x: Float[Tensor, "T N D"], code: Rotary) -> Float[Tensor, "T N D"]:
    """Apply a rotary code: entries 2i and 2i + 1 of a head are one complex number, rotated in one pass.

    PyTorch has no complex bf16. In half precision the pairs are entries i and i + D/2, as `HeadsLinear` gives them,
    and are rotated in real arithmetic.

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
    if not code.is_complex():
        if not torch.is_grad_enabled():  # without the cost of a function with a backward pass
            return _rotate_halves(x, code, 1)
        rotated: Tensor = _Rotation.apply(x, code)
        return rotated
    numbers = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(numbers * code).flatten(-2)


class _Rotation(torch.autograd.Function):
    """Rotation of halves; its backward pass is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, code: Tensor) -> Tensor:
        """Rotate by the angles."""
        ctx.save_for_backward(code)
        return _rotate_halves(x, code, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Rotate by minus the angles."""
        (code,) = ctx.saved_tensors
        return _rotate_halves(grad, code, -1), None


def _rotate_halves(x: Float[Tensor, "T N D"], code: Float[Tensor, "T 2 1 half"], sign: int) -> Tensor:
    """Rotate entries i and i + D/2 of every head by the angles or by minus the angles."""
    (cos, sin), halves = code.unbind(1), x.unflatten(-1, (2, -1))
    if torch.compiler.is_compiling():  # one kernel
        signs = (2 * torch.arange(2, device=x.device) - 1)[:, None] * sign
        return (halves * cos[:, :, None] + halves.flip(2) * (sin[:, :, None] * signs)).to(x.dtype).flatten(-2)
    rotated = halves * cos.unsqueeze(2)
    (first, second), (low, high) = halves.unbind(2), rotated.unbind(2)
    low.addcmul_(second, sin, value=-sign)
    high.addcmul_(first, sin, value=sign)
    return rotated.flatten(-2)


class HeadsLinear(nn.Linear):
    """A linear map to attention heads, of which the first are rotated.

    Rows 2i and 2i + 1 of a rotated head of the weight turn together. In half precision the result has what they give
    D/2 apart, as `rotate` expects it.

    Args:
        size: H.
        head_size: D.
        heads: of the result, N D = H of them for each of queries, keys and values.
        rotated: how many of them are rotated.
        bias: whether there is a bias.
    """

    def __init__(self, size: int, head_size: int, heads: int, rotated: int, bias: bool = False):
        super().__init__(size, heads * head_size, bias=bias)
        self.head_size, self.rotated = head_size, rotated

    def forward(self, x: Float[Tensor, "T H"]) -> Float[Tensor, "T heads D"]:
        """Map every token.

        Args:
            x: tokens.

        Returns:
            [T, heads, D].
        """
        bias = None if self.bias is None else self.ordered(self.bias)
        return F.linear(x, self.ordered(self.weight), bias).unflatten(-1, (-1, self.head_size))

    def ordered(self, values: Shaped[Tensor, "rows ..."]) -> Shaped[Tensor, "rows ..."]:
        """Order the rows of the weight, or of what is like it, as the result.

        Args:
            values: rows in the order of the weight.

        Returns:
            In half precision a copy, else the same tensor.
        """
        if values.dtype in FULL:
            return values
        heads = len(values) // self.head_size
        if heads == self.rotated:
            return values.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        rotated, others = values.unflatten(0, (heads, self.head_size)).split(
            [self.rotated, heads - self.rotated]
        )
        pairs, halves = (-1, 2), (2, -1)
        return torch.cat([rotated.unflatten(1, pairs).transpose(1, 2), others.unflatten(1, halves)]).flatten(
            0, 2
        )


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


ClassVectors = Float[Tensor, "B H"] | None  # of a batch's rows; None: a model without classes


class Condition(NamedTuple):
    """The class of each packed token.

    Attributes:
        vectors: class vectors of a batch's rows.
        rows: the row that each token belongs to.
        equal: the tokens lie row after row, as many in each.
    """

    vectors: ClassVectors
    rows: Int[Tensor, "T"]
    equal: bool = False

    @classmethod
    def of(cls, vectors: ClassVectors, segments: Segments) -> "Condition":
        """Return the class of each token of segments, of which each is one row.

        Args:
            vectors: class vectors of the rows.
            segments: that the tokens fill.
        """
        return cls(vectors, segments.ids, segments.equal and segments.total > 0)


# What modulates tokens: one vector for all, or one for each; or one a row, for rows of equally many tokens.
Vectors = Float[Tensor, "H"] | Float[Tensor, "T H"] | Float[Tensor, "B 1 H"]


def beside(x: Float[Tensor, "T H"], vectors: Vectors) -> Tensor:
    """View packed tokens in the shape that vectors of tokens or rows broadcast to."""
    return x.unflatten(0, (len(vectors), -1)) if vectors.dim() == 3 else x


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
    """LayerNorm with eps 1e-5, optionally modulated: `norm(x) * (1 + scale) + shift`.

    Its kernel computes in float32 whatever the dtype.

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
        shift: Vectors | None = None,
        scale: Vectors | None = None,
    ) -> Float[Tensor, "T H"]:
        """Normalise every token, and modulate it if there are a shift and a scale.

        Args:
            x: tokens.
            shift: from `Modulation`; None: no modulation.
            scale: in the same form.

        Returns:
            [T, H] in the dtype of x.
        """
        if scale is not None and shift is not None and scale.dim() == 1:
            norm = self.folded(shift, scale)  # not called: torch 2.11 cannot compile a call of a new object
            return F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, 1e-5)
        normed = F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)
        if scale is None or shift is None:
            return normed
        return (beside(normed, scale) * (1 + scale) + shift).view_as(normed)

    def folded(self, shift: Float[Tensor, "H"], scale: Float[Tensor, "H"]) -> FoldedNorm:
        """Fold a modulation into weight and bias, so that one kernel does it all.

        Args:
            shift: one vector for all tokens.
            scale: one vector for all tokens.

        Returns:
            What gives the same as `forward` with this shift and scale.
        """
        factor = 1 + scale
        return FoldedNorm(self.weight * factor, shift if self.bias is None else self.bias * factor + shift)


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
            `count` vectors, each [H] for all tokens or, with class vectors, [T, H] for each token, or [B, 1, H] for
            rows of equally many.
        """
        vectors = None if condition is None else condition.vectors
        assert (vectors is None) == (self.map is None)
        if condition is None or vectors is None or self.map is None:
            # A copy: under ZeRO-3 the parameter's storage is gone once this forward has returned.
            return self.vectors.clone().unbind(0)
        mapped = self.map(vectors)
        mapped = mapped[:, None] if condition.equal else F.embedding(condition.rows, mapped)
        return mapped.chunk(self.count, dim=-1)


class GeluLinear(nn.Linear):
    """A linear map with bias, then tanh-GELU."""

    def forward(self, x: Float[Tensor, "T I"]) -> Float[Tensor, "T O"]:
        """Map every token.

        Args:
            x: tokens.

        Returns:
            [T, O].
        """
        if x.is_cuda and not torch.is_grad_enabled():  # one kernel, which CUDA has for the tanh form
            return torch._addmm_activation(self.bias, x, self.weight.T, use_gelu=True)
        x = super().forward(x)
        if x.device.type == "cpu" and not torch.is_grad_enabled() and x.dtype in FULL:
            # The same function as x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), in half the time of PyTorch's kernel.
            factor = 2 * math.sqrt(2 / math.pi)
            inner = torch.addcmul(x.new_tensor(factor), x, x, value=factor * 0.044715)
            return inner.mul_(x).sigmoid_().mul_(x)
        return F.gelu(x, approximate="tanh")


class ResidualLinear(nn.Linear):
    """A linear map at the end of a residual branch, which gates the branch and adds it."""

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "T I"], residual: Float[Tensor, "T H"], gate: Vectors, dropout: float = 0.0
    ) -> Float[Tensor, "T H"]:
        """Map every token, multiply it with its gate, and add it to the residual stream.

        Args:
            x: tokens.
            residual: the residual stream; without gradients it may be overwritten.
            gate: from `Modulation`.
            dropout: rate of dropout of the branch.

        Returns:
            [T, H].
        """
        learns = torch.is_grad_enabled()
        if gate.dim() > 1 or (self.bias is not None and not learns):
            branch = F.dropout(F.linear(x, self.weight, self.bias), dropout)
            return torch.addcmul(beside(residual, gate), gate, beside(branch, gate)).view_as(residual)
        # The gate is folded into the weight, so that neither pass multiplies tokens with it.
        if not learns and not dropout:
            return residual.addmm_(x, (self.weight * gate[:, None]).T)
        weight, bias = _Gated.apply(gate, self.weight, self.bias)
        return residual + F.dropout(F.linear(x, weight, bias), dropout)


class _Gated(torch.autograd.Function):
    """Weight and bias of a linear map whose result is multiplied by a gate, in few kernels."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Multiply the rows."""
        ctx.save_for_backward(gate, weight, bias)
        return weight * gate[:, None], None if bias is None else bias * gate

    @staticmethod
    def backward(ctx: Any, weight_grad: Tensor, bias_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """Multiply the rows of the gradients; the gate's gradient is a product with the weight for every row."""
        gate, weight, bias = ctx.saved_tensors
        gate_grad = torch.bmm(weight_grad[:, None], weight[:, :, None]).view(-1)
        if bias is None or bias_grad is None:
            return gate_grad, weight_grad * gate[:, None], None
        return gate_grad.addcmul_(bias_grad, bias), weight_grad * gate[:, None], bias_grad * gate


class MLP(nn.Module):
    """H -> 4H -> H with tanh-GELU and biases, on a gated residual branch.

    Args:
        size: H.
    """

    def __init__(self, size: int):
        super().__init__()
        self.up, self.down = GeluLinear(size, 4 * size), ResidualLinear(4 * size, size)

    def forward(
        self, x: Float[Tensor, "T H"], residual: Float[Tensor, "T H"], gate: Vectors, dropout: float = 0.0
    ) -> Float[Tensor, "T H"]:
        """Map every token, and add the result to the residual stream.

        Args:
            x: tokens.
            residual: as in `ResidualLinear`.
            gate: as in `ResidualLinear`.
            dropout: as in `ResidualLinear`.

        Returns:
            [T, H].
        """
        return self.down(self.up(x), residual, gate, dropout)


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
