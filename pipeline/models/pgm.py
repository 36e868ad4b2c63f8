"""Partition Generative Model: two groups that cannot see each other, each predicted from the other."""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pipeline.config.schema import PGMConfig
from pipeline.models.attention import Segments
from pipeline.models.blocks import CrossBlock, GroupSwap, Rotary, SelfBlock
from pipeline.models.denoiser import Batch, Denoiser, State
from pipeline.models.layers import Head, rotary


class Encoded(NamedTuple):
    """Encoder outputs of packed clean tokens, ready to be read by the decoder."""

    vectors: Float[Tensor, "Tk H"]
    segments: Segments
    code: Rotary


class PGM(Denoiser):
    """Encoder inside groups, GroupSwap, cross-attention decoder that computes asked positions only.

    The variant `swap.every_block` adds a swap of its own to the running state in front of every decoder block
    but the first, whose input is the output of the only swap that all variants have.

    Source: arXiv 2505.18883, section 4; method.md section 2.
    """

    def __init__(self, config: PGMConfig, vocab_size: int, length: int):
        super().__init__()
        self.vocab_size, self.length = vocab_size, length
        self.head_size = config.hidden // config.heads
        self.embedding = nn.Embedding(vocab_size, config.hidden)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.encoder = nn.ModuleList(
            SelfBlock(config.hidden, config.heads, config.dropout) for _ in range(config.encoder_blocks)
        )
        swap = config.swap
        self.swap, *later = (
            GroupSwap(config.hidden, config.heads, swap.positional, swap.pooling, swap.query, swap.norm)
            for _ in range(config.decoder_blocks if swap.every_block else 1)
        )
        self.later_swaps = nn.ModuleList(later)
        for swap_in_front in later:  # 0 at the start, as every residual branch is
            nn.init.zeros_(swap_in_front.out.weight)
            nn.init.zeros_(swap_in_front.out.bias)
        self.decoder = nn.ModuleList(
            CrossBlock(config.hidden, config.heads, config.dropout) for _ in range(config.decoder_blocks)
        )
        self.head = Head(config.hidden, vocab_size)

    def forward(self, batch: Batch) -> Float[Tensor, "B"]:
        self.check_condition(batch.condition)
        losses = self.head(self._both_sides(batch), batch.gather(batch.tokens, batch.target_index))
        return batch.by_row(losses)

    def logits(
        self,
        tokens: Int[Tensor, "B L"],
        groups: Bool[Tensor, "B L"],
        condition: Int[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B L V"]:
        self.check_condition(condition)
        device = self.head.weight.device
        every = torch.ones_like(groups, dtype=torch.bool, device="cpu")
        batch = Batch(tokens.cpu(), groups.cpu(), every, every.float(), device=device)
        packed = self.head(self._both_sides(batch))
        out = packed.new_empty(tokens.numel(), self.vocab_size)
        out[batch.target_index.to(device)] = packed
        return out.view(*tokens.shape, self.vocab_size)

    def hidden(
        self, state: State, positions: Int[Tensor, "Q"], lengths: Sequence[int]
    ) -> Float[Tensor, "Q H"]:
        if state.memory is None:
            tokens, known = state.known()
            state.memory = self._encode(tokens, known, Segments(state.lengths, tokens.device))
        extent = max(self.length, state.tokens.shape[1])
        return self._decode(state.memory, positions, extent, Segments(lengths, positions.device))

    def _both_sides(self, batch: Batch) -> Float[Tensor, "Q H"]:
        """Vectors at all targets of a batch: two key segments a row, read crosswise by two query segments."""
        length = batch.shape[1]
        ones = batch.groups.sum(1)
        asked_ones, asked = (batch.targets & batch.groups).sum(1), batch.targets.sum(1)
        asked_zeros = asked - asked_ones
        if asked_zeros.any():
            # Keys of row b: group 0, group 1. Queries: group 1, group 0. Segment i reads segment i.
            key_index = (batch.groups.long().argsort(dim=1, stable=True) + batch.starts).flatten()
            key_lengths = list(chain.from_iterable(zip((length - ones).tolist(), ones.tolist(), strict=True)))
            lengths = list(chain.from_iterable(zip(asked_ones.tolist(), asked_zeros.tolist(), strict=True)))
            per_row = int(asked[0])
            window = per_row if per_row and bool((asked == per_row).all()) else None
            keys = Segments(key_lengths, batch.device, window=length)
            queries = Segments(lengths, batch.device, window=window)
        else:  # only group 1 is asked, so group 1 need not be encoded
            key_index = (~batch.groups).flatten().nonzero().squeeze(1)
            keys = Segments((length - ones).tolist(), batch.device)
            queries = Segments(asked_ones.tolist(), batch.device)
        tokens = batch.gather(batch.tokens, key_index)
        positions = (key_index % length).to(batch.device, non_blocking=True)
        asked_at = (batch.target_index % length).to(batch.device, non_blocking=True)
        return self._decode(self._encode(tokens, positions, keys), asked_at, length, queries)

    def _encode(self, tokens: Int[Tensor, "Tk"], positions: Int[Tensor, "Tk"], segments: Segments) -> Encoded:
        x = self.embedding(tokens)  # [Tk, H]
        code = rotary(positions, self.head_size)
        for block in self.encoder:
            x = self.run_block(block, x, segments, code)
        return Encoded(x, segments, code)

    def _decode(
        self, encoded: Encoded, positions: Int[Tensor, "Q"], extent: int, segments: Segments
    ) -> Float[Tensor, "Q H"]:
        x = self.swap(encoded.vectors, positions, extent, segments, encoded.segments, encoded.code)
        code = rotary(positions, self.head_size)
        for index, block in enumerate(self.decoder):
            if index and self.later_swaps:
                swap = self.later_swaps[index - 1]
                x = x + self.run_block(
                    swap, encoded.vectors, positions, extent, segments, encoded.segments, encoded.code
                )
            x = self.run_block(block, x, encoded.vectors, segments, encoded.segments, code, encoded.code)
        return x
