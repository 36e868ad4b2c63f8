"""Transformer blocks over packed segments: self-attention (encoder, masked models) and cross-attention."""

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from pipeline.models.attention import Cache, CacheAppend, Segments, attend
from pipeline.models.layers import (
    MLP,
    Condition,
    LayerNorm,
    Modulation,
    RMSNorm,
    rotary,
    rotate,
    sinusoid,
    wide,
)

Rotary = Complex[Tensor, "_ 1 half"]  # of as many tokens as it is for


class SelfBlock(nn.Module):
    """Pre-norm block: self-attention inside segments, then MLP, both with gated residuals."""

    def __init__(
        self, hidden: int, heads: int, dropout: float, conditional: bool = False, causal: bool = False
    ):
        super().__init__()
        self.heads, self.dropout, self.causal = heads, dropout, causal
        self.modulation = Modulation(hidden, 6, conditional)
        self.norm1 = LayerNorm(hidden)
        self.qkv_proj = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.norm2 = LayerNorm(hidden)
        self.mlp = MLP(hidden)

    def forward(
        self,
        x: Float[Tensor, "T H"],
        segments: Segments,
        code: Rotary,
        condition: Condition | None = None,
        cache: Cache | None = None,
        growth: CacheAppend | None = None,
    ) -> Float[Tensor, "T H"]:
        """With a cache, x are the new tokens of `growth` and the cache holds those before."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)
        qkv = self.qkv_proj(self.norm1(x, shift1, scale1)).unflatten(-1, (3 * self.heads, -1))  # [T, 3N, D]
        qk, v = qkv.split([2 * self.heads, self.heads], 1)
        q, k = rotate(qk, code).chunk(2, 1)  # [T, N, D], turned together: one pass instead of two
        if cache is not None and growth is not None:
            y = cache.attend(q, k, v, growth)
        else:
            y = attend(q, k, v, segments, segments, self.causal)
        x = torch.addcmul(x, gate1, self._drop(self.out(y.flatten(1))))
        return torch.addcmul(x, gate2, self._drop(self.mlp(self.norm2(x, shift2, scale2))))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class CrossBlock(nn.Module):
    """Decoder block: queries read the encoder outputs of their partner segment; no self-attention.

    Source: arXiv 2505.18883, section 4; separate norms for queries and keys, only queries modulated.
    """

    def __init__(self, hidden: int, heads: int, dropout: float, conditional: bool = False):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.modulation = Modulation(hidden, 6, conditional)
        self.q_norm = LayerNorm(hidden)
        self.kv_norm = LayerNorm(hidden)
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.kv_proj = nn.Linear(hidden, 2 * hidden, bias=False)
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
        condition: Condition | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "Tq H"]:
        """With a cache, it holds the keys and values of the encoder outputs."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)
        q = self.q_proj(self.q_norm(x, shift1, scale1)).unflatten(-1, (self.heads, -1))  # [Tq, N, D]
        q = rotate(q, q_code)
        if cache is not None:
            y = cache.read(q, q_segments, k_segments)
        else:
            y = attend(q, *self.keys_values(encoded, k_code), q_segments, k_segments)
        x = torch.addcmul(x, gate1, F.dropout(self.out(y.flatten(1)), self.dropout, self.training))
        rest = F.dropout(self.mlp(self.norm2(x, shift2, scale2)), self.dropout, self.training)
        return torch.addcmul(x, gate2, rest)

    def keys_values(
        self, encoded: Float[Tensor, "T H"], code: Rotary
    ) -> tuple[Float[Tensor, "T N D"], Float[Tensor, "T N D"]]:
        """What queries read of encoder outputs."""
        return _keys_values(self.kv_proj(self.kv_norm(encoded)), self.heads, code)


class GroupSwap(nn.Module):
    """Cross-attention through which information changes groups: queries that know no token, no residual.

    The query of position i is `f(norm(u + pos_i + Y))`: a learned `u`, a sinusoidal code, and, in the pooled
    variants, one vector that sums up the encoder outputs of the partner segment (0 if that is empty). It
    depends on where the position is and on what the other group holds, never on its own group.

    Args:
        positional: add the sinusoidal code.
        pooling: how Y is made from the partner's encoder outputs: "none", "mean" or "logsumexp".
        query: f, one linear map ("linear"), or H -> 4H -> H with SiLU ("mlp4").
        norm: of the sum, "layer" or "rms".

    Source: arXiv 2505.18883, section 4.2 and equation 11; Y is added before the norm (method.md section 2).
    """

    def __init__(
        self,
        hidden: int,
        heads: int,
        positional: bool = True,
        pooling: str = "none",
        query: str = "linear",
        norm: str = "layer",
    ):
        super().__init__()
        self.heads, self.positional, self.pooling = heads, positional, pooling
        self.base = nn.Parameter(torch.randn(hidden) * 0.02)
        self.norm = LayerNorm(hidden, bias=True) if norm == "layer" else RMSNorm(hidden)
        self.query: nn.Module = nn.Linear(hidden, hidden)
        if query == "mlp4":
            self.query = nn.Sequential(
                nn.Linear(hidden, 4 * hidden), nn.SiLU(), nn.Linear(4 * hidden, hidden)
            )
        self.kv_proj = nn.Linear(hidden, 2 * hidden)
        self.out = nn.Linear(hidden, hidden)

    def forward(
        self,
        encoded: Float[Tensor, "Tk H"],
        positions: Int[Tensor, "Tq"],
        extent: int,
        q_segments: Segments,
        k_segments: Segments,
        k_code: Rotary,
        cache: Cache | None = None,
    ) -> Float[Tensor, "Tq H"]:
        """Read the partner segments at `positions`, all of them below `extent`; caches are those of blocks."""
        # Without pooling, queries depend on the position alone and rows share them: make each once.
        shared = self.pooling == "none" and len(positions) > extent
        places = torch.arange(extent, device=positions.device) if shared else positions
        raw = self.base.expand(len(places), -1)
        if self.positional:
            raw = raw + sinusoid(places, raw.shape[-1]).to(raw.dtype)
        if self.pooling != "none":
            raw = raw + pool(encoded, k_segments, self.pooling)[q_segments.ids]
        queries = self.query(self.norm(raw)).unflatten(-1, (self.heads, -1))  # [places, N, D]
        q = rotate(queries, rotary(places, queries.shape[-1]))
        if shared:
            q = F.embedding(positions, q.flatten(1)).unflatten(-1, (self.heads, -1))  # [Tq, N, D]
        if cache is not None:
            return self.out(cache.read(q, q_segments, k_segments).flatten(1))
        return self.out(attend(q, *self.keys_values(encoded, k_code), q_segments, k_segments).flatten(1))

    def keys_values(
        self, encoded: Float[Tensor, "T H"], code: Rotary
    ) -> tuple[Float[Tensor, "T N D"], Float[Tensor, "T N D"]]:
        """What queries read of encoder outputs."""
        return _keys_values(self.kv_proj(encoded), self.heads, code)


def _keys_values(
    product: Float[Tensor, "T two_H"], heads: int, code: Rotary
) -> tuple[Float[Tensor, "T N D"], Float[Tensor, "T N D"]]:
    """A product that holds both, as heads, keys turned."""
    k, v = product.unflatten(-1, (2, heads, -1)).unbind(1)
    return rotate(k, code), v


def pool(x: Float[Tensor, "T H"], segments: Segments, how: str) -> Float[Tensor, "S H"]:
    """One vector a segment, in float32 inside: the "mean" or the "logsumexp" over its tokens; 0 for none.

    Source: arXiv 2505.18883, section 4.2 (data-dependent queries).
    """
    lengths = torch.tensor(segments.lengths, device=x.device)[:, None]  # [S, 1]
    values = wide(x)
    zeros = values.new_zeros(len(segments), x.shape[1])
    if how == "mean":
        return (zeros.index_add(0, segments.ids, values) / lengths.clamp(min=1)).to(x.dtype)
    top = zeros.scatter_reduce(
        0, segments.ids[:, None].expand_as(values), values.detach(), "amax", include_self=False
    )
    sums = zeros.index_add(0, segments.ids, (values - top[segments.ids]).exp())
    return ((sums + (lengths == 0)).log() + top).to(x.dtype)  # of nothing: log 1 + 0
