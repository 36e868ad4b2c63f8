"""Partition Generative Model: two groups that cannot see each other, each predicted from the other."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pipeline.config.schema import PGMConfig
from pipeline.models.attention import Cache, CacheAppend, Segments
from pipeline.models.blocks import CrossBlock, GroupSwap, Rotary, SelfBlock
from pipeline.models.denoiser import Batch, Denoiser, State, conditioned, packed
from pipeline.models.layers import Condition, rotary


class Encoded(NamedTuple):
    """Encoder outputs of packed clean tokens, ready to be read by the decoder.

    Attributes:
        caches: of every swap and decoder block, with the keys and values of these tokens; None: still to be made.
    """

    vectors: Float[Tensor, "Tk H"]
    segments: Segments
    code: Rotary
    caches: Sequence[Cache] | None = None


@dataclass
class EncoderCache:
    """Encoder state that outlives a prediction: an approximation, since old tokens never see newer ones.

    Attributes:
        caches: keys and values of every encoder block, in preallocated rows.
        read: those of every swap and decoder block, in the order in which they read.
        vectors: [B, R/2 + capacity, H] encoder outputs.
        done: slots of every row that are in them, registers first.
        age: predictions since all were encoded together.
    """

    caches: list[Cache]
    read: list[Cache]
    vectors: Float[Tensor, "B slots H"]
    done: list[int]
    age: int = 0


class PGM(Denoiser):
    """Encoder inside groups, GroupSwap, cross-attention decoder that computes asked positions only.

    The variant `swap.every_block` adds a swap of its own to the running state in front of every decoder block
    but the first, whose input is the output of the only swap that all variants have. Of the registers the
    first half is in group 1, the second in group 0, where sampling has it known from the start.

    Source: arXiv 2505.18883, section 4; method.md section 2.
    """

    both_groups = True
    reuses = True

    def __init__(self, config: PGMConfig, vocab_size: int, length: int, bos: int | None = None):
        super().__init__(config, vocab_size, length, ids=max(vocab_size, 0 if bos is None else bos + 1))
        self.encoder = nn.ModuleList(
            SelfBlock(config.hidden, config.heads, config.dropout, self.conditional)
            for _ in range(config.encoder_blocks)
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
            CrossBlock(config.hidden, config.heads, config.dropout, self.conditional)
            for _ in range(config.decoder_blocks)
        )

    def forward(self, batch: Batch) -> Float[Tensor, "B"]:
        self.check_condition(batch.condition, batch.shape[0])
        return self.losses(self._both_sides(batch), batch)

    def logits(
        self,
        tokens: Int[Tensor, "B L"],
        groups: Bool[Tensor, "B L"],
        condition: Int[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B L V"]:
        self.check_condition(condition, len(tokens))
        device = self.head.weight.device
        every = torch.ones_like(groups, dtype=torch.bool, device="cpu")
        batch = Batch(tokens.cpu(), groups.cpu(), every, every.float(), condition, device)
        packed = self.head(self._both_sides(batch))
        out = packed.new_empty(tokens.numel(), self.vocab_size)
        out[batch.target_index.to(device)] = packed
        return out.view(*tokens.shape, self.vocab_size)

    def hidden(
        self, state: State, positions: Int[Tensor, "Q"], lengths: Sequence[int]
    ) -> Float[Tensor, "Q H"]:
        if state.refresh_every == 1:
            state, lengths = state.asked(lengths)  # the others need not be encoded
        vectors = self.class_vectors(state.condition, len(state.lengths))
        ids, places, filled = self._slots(state)
        if state.refresh_every > 1:
            encoded = self._grow(state, ids, places, filled, vectors)
        else:
            tokens, known = packed(filled, ids, places)
            segments = Segments(filled, tokens.device)
            encoded = self._encode(tokens, known, segments, conditioned(vectors, segments.ids))
        extent = max(self.length, state.tokens.shape[1])
        segments = Segments(lengths, positions.device)
        return self._decode(encoded, positions, extent, segments, conditioned(vectors, segments.ids))

    def _slots(self, state: State) -> tuple[Int[Tensor, "B slots"], Int[Tensor, "B slots"], list[int]]:
        """Every row's clean tokens with the registers of group 0 in front, their places, and their number."""
        rows, device = len(state.lengths), state.tokens.device
        own = torch.arange(self.registers // 2, self.registers, device=device)
        ids = torch.cat([self.register_ids(device)[own].expand(rows, -1), state.tokens], 1)
        places = torch.cat([own.expand(rows, -1), state.positions + self.registers], 1)
        return ids, places, [len(own) + known for known in state.lengths]

    def _grow(
        self,
        state: State,
        ids: Int[Tensor, "B slots"],
        places: Int[Tensor, "B slots"],
        filled: list[int],
        vectors: Float[Tensor, "B H"] | None,
    ) -> Encoded:
        """Encode what is new, or everything where a refresh is due; the same path for both."""
        rows, device = len(ids), ids.device
        memory: EncoderCache | None = state.memory
        if memory is None:
            memory = state.memory = self._remember_nothing(rows, ids.shape[1])
        elif memory.age >= state.refresh_every:
            memory.done, memory.age = [0] * rows, 0
        memory.age += 1
        new = [a - b for a, b in zip(filled, memory.done, strict=True)]
        if any(new):
            growth = CacheAppend(memory.done, new, ids.shape[1], device, causal=False)
            x = self.embedding(growth.take(ids))  # [T, H]
            code = rotary(growth.take(places), self.head_size)
            condition = conditioned(vectors, growth.segments.ids)
            for block, cache in zip(self.encoder, memory.caches, strict=True):
                x = block(x, growth.segments, code, condition, cache, growth)
            growth.put(memory.vectors, x)
            for reader, cache in zip(self._readers(), memory.read, strict=True):
                cache.put(*reader.keys_values(x, code), growth)
            memory.done = filled
        outputs, known = packed(filled, memory.vectors, places)
        return Encoded(outputs, Segments(filled, device), rotary(known, self.head_size), memory.read)

    def _readers(self) -> list[GroupSwap | CrossBlock]:
        """All that read encoder outputs, in the order in which they do."""
        found: list[Any] = [self.swap]
        for index, block in enumerate(self.decoder):
            found += [*self.later_swaps[index - 1 : index], block] if index else [block]
        return found

    def _remember_nothing(self, rows: int, slots: int) -> EncoderCache:
        weight, hidden = self.head.weight, self.embedding.embedding_dim
        shape = (rows, slots, hidden // self.head_size, self.head_size)
        caches, read = (
            [Cache(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in blocks]
            for blocks in (self.encoder, self._readers())
        )
        return EncoderCache(caches, read, weight.new_zeros(rows, slots, hidden), [0] * rows)

    def _both_sides(self, batch: Batch) -> Float[Tensor, "Q H"]:
        """Vectors at all targets of a batch: two key segments a row, read crosswise by two query segments."""
        rows, length = batch.shape
        cpu = torch.device("cpu")  # where batches are
        in_one = torch.arange(self.registers) < self.registers // 2
        groups = torch.cat([in_one.expand(rows, -1), batch.groups], 1)  # [B, R + L]
        ids = torch.cat([self.register_ids(cpu).expand(rows, -1), batch.tokens], 1)
        width = groups.shape[1]
        ones = groups.sum(1)
        asked_ones, asked = (batch.targets & batch.groups).sum(1), batch.targets.sum(1)
        asked_zeros = asked - asked_ones
        if asked_zeros.any():
            # Keys of row b: group 0, group 1. Queries: group 1, group 0. Segment i reads segment i.
            starts = torch.arange(rows)[:, None] * width
            key_index = (groups.long().argsort(dim=1, stable=True) + starts).flatten()
            key_lengths = list(chain.from_iterable(zip((width - ones).tolist(), ones.tolist(), strict=True)))
            lengths = list(chain.from_iterable(zip(asked_ones.tolist(), asked_zeros.tolist(), strict=True)))
            per_row = int(asked[0])
            window = per_row if per_row and bool((asked == per_row).all()) else None
            keys = Segments(key_lengths, batch.device, window=width)
            queries = Segments(lengths, batch.device, window=window)
        else:  # only group 1 is asked, so group 1 need not be encoded
            key_index = (~groups).flatten().nonzero().squeeze(1)
            keys = Segments((width - ones).tolist(), batch.device)
            queries = Segments(asked_ones.tolist(), batch.device)
        tokens = batch.gather(ids, key_index)
        key_index = key_index.to(batch.device, non_blocking=True)
        asked_index = batch.target_index.to(batch.device, non_blocking=True)
        vectors = self.class_vectors(batch.condition, rows)
        encoded = self._encode(tokens, key_index % width, keys, conditioned(vectors, key_index // width))
        condition = conditioned(vectors, asked_index // length)
        return self._decode(encoded, asked_index % length, length, queries, condition)

    def _encode(
        self,
        tokens: Int[Tensor, "Tk"],
        positions: Int[Tensor, "Tk"],
        segments: Segments,
        condition: Condition | None,
    ) -> Encoded:
        """Clean tokens, registers among them, at positions that count registers."""
        x = self.embedding(tokens)  # [Tk, H]
        code = rotary(positions, self.head_size)
        for block in self.encoder:
            x = self.run_block(block, x, segments, code, condition)
        return Encoded(x, segments, code)

    def _decode(
        self,
        encoded: Encoded,
        positions: Int[Tensor, "Q"],
        extent: int,
        segments: Segments,
        condition: Condition | None,
    ) -> Float[Tensor, "Q H"]:
        """Vectors for the head at `positions` below `extent`, which count tokens only."""
        positions, extent = positions + self.registers, extent + self.registers
        read, read_segments, read_code, stored = encoded
        caches: Iterable[Cache | None] = stored or repeat(None)
        (swap, first), *readers = zip(self._readers(), caches, strict=False)
        where = positions, extent, segments, read_segments, read_code
        x = swap(read, *where, first)
        code = rotary(positions, self.head_size)
        both = segments, read_segments, code, read_code
        for reader, cache in readers:
            if isinstance(reader, GroupSwap):
                x = x + self.run_block(reader, read, *where, cache)
            else:
                x = self.run_block(reader, x, read, *both, condition, cache)
        return self.final(x, condition)
