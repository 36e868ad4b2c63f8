"""Transformer blocks over packed segments: self-attention (encoder, masked models) and cross-attention."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from pipeline.compiling import P, R, compiled
from pipeline.config.model import SwapConfig, TrunkConfig
from pipeline.models.attention import Cache, CacheAppend, Segments, attend
from pipeline.models.layers import (
    MLP,
    Condition,
    HeadsLinear,
    LayerNorm,
    Modulation,
    ResidualLinear,
    RMSNorm,
    Rotary,
    rotary,
    rotate,
    sinusoid,
    upcast,
)


class Layout(NamedTuple):
    """How packed tokens lie.

    Attributes:
        segments: that the tokens fill.
        code: rotary code of each token's position.
    """

    segments: Segments
    code: Rotary


class Modulated(NamedTuple):
    """A block's norms and gates under its modulation.

    Attributes:
        norm1: norm in front of the attention.
        attention_gate: factor of the attention branch, from `Modulation`.
        norm2: norm in front of the MLP.
        mlp_gate: factor of the MLP branch.
    """

    norm1: Callable[[Tensor], Tensor]
    attention_gate: Tensor
    norm2: Callable[[Tensor], Tensor]
    mlp_gate: Tensor


class Stored(NamedTuple):
    """What a module keeps between the steps of sampling.

    Attributes:
        cache: keys and values.
        modulated: norms and gates of a block, folded once for all steps; None where they depend on the class of a
            token.
        queries: [places, H] queries of a swap at every position, where they depend on the position alone.
    """

    cache: Cache
    modulated: Modulated | None = None
    queries: Float[Tensor, "places H"] | None = None


# Combinations of shapes that a part of a block is compiled for: encoder and decoder, whole and last micro-batches.
_SHAPES = 16


def part(method: Callable[P, R]) -> Callable[P, R]:
    """Mark what a module computes before or after attention: compiled in training if the module is a `compiled` one.

    Attention stays out, since its segments differ from batch to batch. Dropout in compiled code is another function
    of the same generator.

    Args:
        method: of an `nn.Module` with the attribute `compiled`.

    Returns:
        The method.
    """
    fast = compiled(method, _SHAPES)

    @wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        module: Any = args[0]
        return (fast if module.compiled and module.training else method)(*args, **kwargs)

    return run


class EncoderReader(nn.Module):
    """Base of the modules that read encoder outputs by cross-attention.

    Attributes:
        heads: N.
        kv_norm: norm of the encoder outputs in front of `kv_proj`.
        kv_proj: maps encoder outputs to keys and values.
        compiled: see `part`.
    """

    heads: int
    compiled: bool = False
    kv_norm: nn.Module
    kv_proj: HeadsLinear

    @part
    def keys_values(
        self, encoded: Float[Tensor, "T H"], code: Rotary
    ) -> tuple[Float[Tensor, "T N D"], Float[Tensor, "T N D"]]:
        """Compute the keys, with their rotary code applied, and the values of encoder outputs.

        Args:
            encoded: encoder outputs.
            code: rotary code of their positions.

        Returns:
            Keys and values, [T, N, D] each.
        """
        k, v = self.kv_proj(self.kv_norm(encoded)).chunk(2, 1)
        return rotate(k, code), v

    def read(
        self,
        q: Float[Tensor, "Tq N D"],
        encoded: Float[Tensor, "Tk H"],
        q_segments: Segments,
        keys: Layout,
        stored: Stored | None,
    ) -> Float[Tensor, "Tq H"]:
        """Attend from each query segment to its key segment of encoder outputs.

        Args:
            q: queries with their rotary code applied.
            encoded: encoder outputs.
            q_segments: of the queries.
            keys: layout of the encoder outputs.
            stored: keys and values of the encoder outputs, if they are stored; None: they are computed.

        Returns:
            [Tq, H], heads side by side.
        """
        if stored is not None:
            return stored.cache.read(q, q_segments, keys.segments).flatten(1)
        return attend(q, *self.keys_values(encoded, keys.code), q_segments, keys.segments).flatten(1)


class Block(nn.Module, ABC):
    """Base of pre-norm blocks: attention, then an MLP, both modulated and on gated residual branches.

    Args:
        config: sizes, dropout, and whether there are classes.

    Attributes:
        compiled: see `part`.
    """

    compiled: bool = False

    def __init__(self, config: TrunkConfig):
        super().__init__()
        hidden = config.hidden
        self.heads, self.dropout = config.heads, config.dropout
        self.modulation = Modulation(hidden, 6, config.classes is not None)
        self._add_projections(hidden)
        self.out = ResidualLinear(hidden, hidden, bias=False)
        self.norm2 = LayerNorm(hidden)
        self.mlp = MLP(hidden)

    @abstractmethod
    def _add_projections(self, hidden: int) -> None:
        """Create the norms and projections in front of the attention.

        They come between modulation and output, since the order of creation fixes the initial weights of a
        seed, and the order of parameters in checkpoints.
        """

    @property
    @abstractmethod
    def norm_before_attention(self) -> LayerNorm:
        """The norm in front of the attention."""

    def modulated(self, condition: Condition | None) -> Modulated:
        """Modulate the block's norms and gates.

        Args:
            condition: class vectors of the tokens.

        Returns:
            What `residuals` and the attention apply.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)
        norm1 = partial(self.norm_before_attention, shift=shift1, scale=scale1)
        return Modulated(norm1, gate1, partial(self.norm2, shift=shift2, scale=scale2), gate2)

    def folded(self) -> Modulated | None:
        """Modulate the norms and gates once for many calls; None for a block whose modulation depends on a class."""
        if self.modulation.map is not None:
            return None
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation()
        norm1 = self.norm_before_attention.folded(shift1, scale1)
        return Modulated(norm1, gate1, self.norm2.folded(shift2, scale2), gate2)

    @part
    def residuals(
        self, x: Float[Tensor, "T H"], attended: Float[Tensor, "T H"], modulated: Modulated
    ) -> Float[Tensor, "T H"]:
        """Add both residual branches: the projected attention, then the MLP.

        Args:
            x: the block's input, which is overwritten if there are no gradients.
            attended: output of the attention, heads side by side.
            modulated: the block's norms and gates.

        Returns:
            The block's output, [T, H].
        """
        dropout = self.dropout if self.training else 0.0
        x = self.out(attended, x, modulated.attention_gate, dropout)
        return self.mlp(modulated.norm2(x), x, modulated.mlp_gate, dropout)


class SelfBlock(Block):
    """Pre-norm block with self-attention inside segments.

    Args:
        config: sizes, dropout, and whether there are classes.
        causal: tokens read only those before them and themselves.
    """

    def __init__(self, config: TrunkConfig, causal: bool = False):
        super().__init__(config)
        self.causal = causal

    def _add_projections(self, hidden: int) -> None:
        """Norm, and one projection to queries, keys and values."""
        self.norm1 = LayerNorm(hidden)
        self.qkv_proj = HeadsLinear(hidden, hidden // self.heads, 3 * self.heads, 2 * self.heads)

    @property
    def norm_before_attention(self) -> LayerNorm:
        """The norm in front of the attention."""
        return self.norm1

    def forward(
        self,
        x: Float[Tensor, "T H"],
        layout: Layout,
        condition: Condition | None = None,
        stored: Stored | None = None,
        append: CacheAppend | None = None,
    ) -> Float[Tensor, "T H"]:
        """Transform packed tokens.

        Args:
            x: tokens; with a cache, only the new ones.
            layout: of the tokens.
            condition: class vectors of the tokens.
            stored: keys and values of the tokens before; the new ones are added to them.
            append: where the new tokens belong in the cache.

        Returns:
            [T, H].
        """
        modulated = (stored and stored.modulated) or self.modulated(condition)
        q, k, v = self.queries_keys_values(x, layout.code, modulated)
        if stored is not None and append is not None:
            y = stored.cache.attend(q, k, v, append)
        else:
            y = attend(q, k, v, layout.segments, layout.segments, self.causal)
        return self.residuals(x, y.flatten(1), modulated)

    @part
    def queries_keys_values(
        self, x: Float[Tensor, "T H"], code: Rotary, modulated: Modulated
    ) -> tuple[Float[Tensor, "T N D"], Float[Tensor, "T N D"], Float[Tensor, "T N D"]]:
        """Compute the queries and keys, with their rotary code applied, and the values of tokens.

        Args:
            x: tokens.
            code: rotary code of their positions.
            modulated: the block's norms and gates.

        Returns:
            Queries, keys and values, [T, N, D] each.
        """
        qk, v = self.qkv_proj(modulated.norm1(x)).split([2 * self.heads, self.heads], 1)
        q, k = rotate(qk, code).chunk(2, 1)  # rotated together: one pass instead of two
        return q, k, v


class CrossBlock(Block, EncoderReader):
    """Decoder block: queries read the encoder outputs of their partner segment; no self-attention.

    Args:
        config: sizes, dropout, and whether there are classes.

    Source:
        arXiv 2505.18883, section 4; separate norms for queries and keys, of which only the query side is
        modulated: docs/method.md section 2, "Block details".
    """

    kv_norm: LayerNorm

    def _add_projections(self, hidden: int) -> None:
        """Norms and projections of queries, and of keys and values."""
        self.q_norm = LayerNorm(hidden)
        self.kv_norm = LayerNorm(hidden)
        size = hidden // self.heads
        self.q_proj = HeadsLinear(hidden, size, self.heads, self.heads)
        self.kv_proj = HeadsLinear(hidden, size, 2 * self.heads, self.heads)

    @property
    def norm_before_attention(self) -> LayerNorm:
        """The norm in front of the attention."""
        return self.q_norm

    def forward(
        self,
        x: Float[Tensor, "Tq H"],
        encoded: Float[Tensor, "Tk H"],
        queries: Layout,
        keys: Layout,
        condition: Condition | None = None,
        stored: Stored | None = None,
    ) -> Float[Tensor, "Tq H"]:
        """Transform the decoder state of packed positions.

        Args:
            x: decoder state.
            encoded: encoder outputs.
            queries: layout of the decoder state.
            keys: layout of the encoder outputs.
            condition: class vectors of the tokens.
            stored: keys and values of the encoder outputs, if they are stored.

        Returns:
            [Tq, H].
        """
        modulated = (stored and stored.modulated) or self.modulated(condition)
        q = self.queries(x, queries.code, modulated)
        y = self.read(q, encoded, queries.segments, keys, stored)
        return self.residuals(x, y, modulated)

    @part
    def queries(
        self, x: Float[Tensor, "Tq H"], code: Rotary, modulated: Modulated
    ) -> Float[Tensor, "Tq N D"]:
        """Compute the queries of decoder states, with their rotary code applied.

        Args:
            x: decoder state.
            code: rotary code of the positions.
            modulated: the block's norms and gates.

        Returns:
            [Tq, N, D].
        """
        return rotate(self.q_proj(modulated.norm1(x)), code)


class GroupSwap(EncoderReader):
    """Cross-attention through which information changes groups: queries that know no token, no residual.

    The query of position i is `f(norm(u + pos_i + Y))`: a learned `u`, a sinusoidal code and, in the pooled
    variants, one vector that pools the encoder outputs of the partner segment (0 if that is empty). It depends
    on the position and on the other group's tokens, never on its own group's.

    Args:
        hidden: H.
        heads: N.
        config: the variant: position code, pooling, query map and norm.

    Source:
        arXiv 2505.18883, section 4.2 and equation 11; Y is added before the norm (docs/method.md section 2).
    """

    def __init__(self, hidden: int, heads: int, config: SwapConfig):
        super().__init__()
        self.heads, self.positional, self.pooling = heads, config.positional, config.pooling
        self.base = nn.Parameter(torch.randn(hidden) * 0.02)
        self.norm = LayerNorm(hidden, bias=True) if config.norm == "layer" else RMSNorm(hidden)
        size = hidden // heads
        if config.query == "mlp4":
            last = HeadsLinear(4 * hidden, size, heads, heads, bias=True)
            self.query: nn.Module = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.SiLU(), last)
        else:
            self.query = HeadsLinear(hidden, size, heads, heads, bias=True)
        self.kv_norm = nn.Identity()
        self.kv_proj = HeadsLinear(hidden, size, 2 * heads, heads, bias=True)
        self.out = nn.Linear(hidden, hidden)

    def forward(
        self,
        encoded: Float[Tensor, "Tk H"],
        positions: Int[Tensor, "Tq"],
        extent: int,
        q_segments: Segments,
        keys: Layout,
        stored: Stored | None = None,
    ) -> Float[Tensor, "Tq H"]:
        """Read the partner segments from packed positions.

        Args:
            encoded: encoder outputs.
            positions: of the queries.
            extent: a number that all positions are below.
            q_segments: of the queries.
            keys: layout of the encoder outputs.
            stored: keys and values of the encoder outputs, if they are stored.

        Returns:
            [Tq, H].
        """
        # Without pooling, a query depends on its position alone, so all rows share the queries of `extent` places.
        table = stored.queries if stored else None
        if table is None and self.pooling == "none" and len(positions) > extent:
            table = self.queries(torch.arange(extent, device=positions.device))
        if table is not None:
            q = F.embedding(positions, table)
        else:
            pooled = None
            if self.pooling != "none":
                pooled = pool(encoded, keys.segments, self.pooling)[q_segments.ids]
            q = self.queries(positions, pooled)
        q = q.unflatten(-1, (self.heads, -1))  # [Tq, N, D]
        return self.out(self.read(q, encoded, q_segments, keys, stored))

    def queries(
        self, positions: Int[Tensor, "T"], pooled: Float[Tensor, "T H"] | None = None
    ) -> Float[Tensor, "T H"]:
        """Compute queries with their rotary code applied.

        Args:
            positions: of the queries.
            pooled: what is added to each of them, in the pooled variants.

        Returns:
            [T, H], heads side by side.
        """
        raw = self.base.expand(len(positions), -1)
        if self.positional:
            raw = raw + sinusoid(positions, raw.shape[-1]).to(raw.dtype)
        if pooled is not None:
            raw = raw + pooled
        queries = self.query(self.norm(raw))  # [T, N, D]
        return rotate(queries, rotary(positions, queries.shape[-1], queries.dtype)).flatten(1)


def pool(x: Float[Tensor, "T H"], segments: Segments, how: str) -> Float[Tensor, "S H"]:
    """Reduce every segment to one vector, with float32 sums.

    Args:
        x: packed tokens.
        segments: of the tokens.
        how: "mean" or "logsumexp", over the tokens of a segment.

    Returns:
        [S, H] in the dtype of x, 0 for an empty segment.

    Source:
        arXiv 2505.18883, section 4.2 (data-dependent queries).
    """
    lengths = segments.counts[:, None]  # [S, 1]
    values = upcast(x)
    zeros = values.new_zeros(len(segments), x.shape[1])
    if how == "mean":
        return (zeros.index_add(0, segments.ids, values) / lengths.clamp(min=1)).to(x.dtype)
    top = zeros.scatter_reduce(
        0, segments.ids[:, None].expand_as(values), values.detach(), "amax", include_self=False
    )
    sums = zeros.index_add(0, segments.ids, (values - top[segments.ids]).exp())
    return ((sums + (lengths == 0)).log() + top).to(x.dtype)  # for an empty segment: log 1 + 0
