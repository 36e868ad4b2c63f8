"""Transformer blocks over packed segments: self-attention (encoder, masked models) and cross-attention."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from pipeline.models.attention import Segments, attend
from pipeline.models.layers import MLP, LayerNorm, Modulation, rotary, rotate, sinusoid

Rotary = tuple[Tensor, Tensor]


class SelfBlock(nn.Module):
    """Pre-norm block: self-attention inside segments, then MLP, both with gated residuals."""

    def __init__(self, hidden: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.modulation = Modulation(hidden, 6)
        self.norm1 = LayerNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.norm2 = LayerNorm(hidden)
        self.mlp = MLP(hidden)

    def forward(self, x: Float[Tensor, "T H"], segments: Segments, code: Rotary) -> Float[Tensor, "T H"]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation()
        qkv = self.qkv(self.norm1(x, shift1, scale1)).unflatten(-1, (3, self.heads, -1))  # [T, 3, N, D]
        q, k, v = qkv.unbind(1)
        y = attend(rotate(q, code), rotate(k, code), v, segments, segments).flatten(1)  # [T, H]
        x = x + gate1 * self._drop(self.out(y))
        return x + gate2 * self._drop(self.mlp(self.norm2(x, shift2, scale2)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class CrossBlock(nn.Module):
    """Decoder block: queries read the encoder outputs of their partner segment; no self-attention.

    Source: arXiv 2505.18883, section 4; separate norms for queries and keys, only queries modulated.
    """

    def __init__(self, hidden: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.modulation = Modulation(hidden, 6)
        self.q_norm = LayerNorm(hidden)
        self.kv_norm = LayerNorm(hidden)
        self.q = nn.Linear(hidden, hidden, bias=False)
        self.kv = nn.Linear(hidden, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.norm2 = LayerNorm(hidden)
        self.mlp = MLP(hidden)

    def forward(
        self,
        x: Float[Tensor, "Tq H"],
        encoded: Float[Tensor, "Tk H"],
        q_segments: Segments,
        k_segments: Segments,
        q_code: Rotary,
        k_code: Rotary,
    ) -> Float[Tensor, "Tq H"]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation()
        q = self.q(self.q_norm(x, shift1, scale1)).unflatten(-1, (self.heads, -1))  # [Tq, N, D]
        k, v = self.kv(self.kv_norm(encoded)).unflatten(-1, (2, self.heads, -1)).unbind(1)  # [Tk, N, D]
        y = attend(rotate(q, q_code), rotate(k, k_code), v, q_segments, k_segments).flatten(1)
        x = x + gate1 * F.dropout(self.out(y), self.dropout, self.training)
        return x + gate2 * F.dropout(self.mlp(self.norm2(x, shift2, scale2)), self.dropout, self.training)


class GroupSwap(nn.Module):
    """Cross-attention through which information changes groups: data-independent queries, no residual.

    The query of position i is `W LN(u + pos_i) + b` with a learned `u` and a sinusoidal code, so it knows
    where it is and nothing else. Source: arXiv 2505.18883, section 4.2 and equation 11.
    """

    def __init__(self, hidden: int, heads: int, positional: bool):
        super().__init__()
        self.heads, self.positional = heads, positional
        self.base = nn.Parameter(torch.randn(hidden) * 0.02)
        self.norm = LayerNorm(hidden, bias=True)
        self.query = nn.Linear(hidden, hidden)
        self.kv = nn.Linear(hidden, 2 * hidden)
        self.out = nn.Linear(hidden, hidden)

    def forward(
        self,
        encoded: Float[Tensor, "Tk H"],
        positions: Int[Tensor, "Tq"],
        extent: int,
        q_segments: Segments,
        k_segments: Segments,
        k_code: Rotary,
    ) -> Float[Tensor, "Tq H"]:
        """Read the partner segments at `positions`, all of them below `extent`."""
        # Queries depend on the position alone: many rows share them, so make each position's once.
        shared = len(positions) > extent
        rows = torch.arange(extent, device=positions.device) if shared else positions
        raw = self.base.expand(len(rows), -1)
        if self.positional:
            raw = raw + sinusoid(rows, raw.shape[-1]).to(raw.dtype)
        queries = self.query(self.norm(raw)).unflatten(-1, (self.heads, -1))  # [rows, N, D]
        q = rotate(queries, rotary(rows, queries.shape[-1]))
        if shared:
            q = F.embedding(positions, q.flatten(1)).unflatten(-1, (self.heads, -1))  # [Tq, N, D]
        k, v = self.kv(encoded).unflatten(-1, (2, self.heads, -1)).unbind(1)  # [Tk, N, D]
        return self.out(attend(q, rotate(k, k_code), v, q_segments, k_segments).flatten(1))
