"""Autoregressive baseline on the same blocks: causal attention, next-token loss, key/value cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pipeline.config.schema import ARConfig
from pipeline.errors import CapabilityError
from pipeline.models.attention import Cache, CacheAppend, Segments
from pipeline.models.blocks import SelfBlock
from pipeline.models.denoiser import Batch, Denoiser, State, conditioned
from pipeline.models.layers import rotary


@dataclass
class Memory:
    """What a row's known tokens leave behind: keys and values of every layer, and the newest vector.

    Attributes:
        caches: one a layer, in preallocated rows.
        done: slots of every row that are in them: the prefix, then tokens.
        newest: [B, H] the trunk's vector of every row's last slot.
    """

    caches: list[Cache]
    done: list[int]
    newest: Float[Tensor, "B H"]


class AR(Denoiser):
    """Every token is predicted from all before it; the first from a learned start vector.

    A row is read as registers, start, tokens: the slot in front of position i predicts position i, so with or
    without BOS every token has a prediction and the likelihood of a row is exact. Sampling computes one slot
    a token: keys and values of the others are kept.

    Source: method.md section 3.
    """

    left_to_right = True

    def __init__(self, config: ARConfig, vocab_size: int, length: int, bos: int | None = None):
        self.start = max(vocab_size, 0 if bos is None else bos + 1)  # id of the start vector
        super().__init__(config, vocab_size, length, ids=self.start + 1)
        self.blocks = nn.ModuleList(
            SelfBlock(config.hidden, config.heads, config.dropout, self.conditional, causal=True)
            for _ in range(config.blocks)
        )

    def forward(self, batch: Batch) -> Float[Tensor, "B"]:
        """Targets are any positions behind the known ones (group 0), which must be the first of the row.

        Raises:
            CapabilityError: something known lies behind something hidden, as in the any-order estimators.
        """
        return self.losses(self.target_vectors(batch), batch)

    def target_vectors(self, batch: Batch) -> Float[Tensor, "Q H"]:
        """What the head makes the targets' next-token logits of, in one pass over all of them.

        Raises:
            CapabilityError: as `forward`.
        """
        self.check_condition(batch.condition, batch.shape[0])
        if (batch.groups[:, :-1] & ~batch.groups[:, 1:]).any() or (batch.targets & ~batch.groups).any():
            raise CapabilityError(
                "AR predicts a token from all before it, so hidden tokens must be the last of their row; "
                "expected the exact likelihood (or next-token training), not a masked estimate"
            )
        rows, length = batch.shape
        ids = self._ids(batch.tokens.to(batch.device, non_blocking=True))[:, :-1]  # [B, P + L - 1]
        slots = torch.arange(ids.shape[1], device=batch.device).repeat(rows)
        segments = Segments([ids.shape[1]] * rows, batch.device)
        vectors = self.class_vectors(batch.condition, rows)
        condition = conditioned(vectors, segments.ids)
        x, code = self.embedding(ids.flatten()), rotary(slots, self.head_size)
        for block in self.blocks:
            x = self.run_block(block, x, segments, code, condition)
        index = batch.target_index.to(batch.device, non_blocking=True)
        row = index // length
        x = x[row * ids.shape[1] + index % length + self.registers]
        return self.final(x, conditioned(vectors, row))

    def logits(self, tokens: Tensor, groups: Tensor, condition: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """Refused: next-token logits are no answer to what the other group says about a position."""
        raise CapabilityError(
            "logits: AR knows no groups, it predicts a token from all before it; "
            "ask for the position behind known tokens with predict"
        )

    def extend(
        self, state: State, tokens: Int[Tensor, "T"], positions: Int[Tensor, "T"], lengths: Sequence[int]
    ) -> None:
        """Add packed known tokens, which must continue their rows without a gap.

        Raises:
            CapabilityError: they do not.
        """
        for row, (first, places) in enumerate(zip(state.lengths, _by_row(positions, lengths), strict=True)):
            if places != list(range(first, first + len(places))):
                raise CapabilityError(
                    f"known positions {places[:8]} for row {row}: AR knows the first tokens of a row; "
                    f"expected positions from {first} on, in order"
                )
        super().extend(state, tokens, positions, lengths)

    def hidden(
        self, state: State, positions: Int[Tensor, "Q"], lengths: Sequence[int]
    ) -> Float[Tensor, "Q H"]:
        """The vector of every asked row's last slot: of its next position, the only one that can be asked.

        Raises:
            CapabilityError: another position, or more than one of a row.
        """
        known = zip(state.lengths, _by_row(positions, lengths), strict=True)
        for row, (following, places) in enumerate(known):
            if places and places != [following]:
                raise CapabilityError(
                    f"positions {places[:8]} asked of row {row}: AR answers left to right, from the "
                    f"{following} tokens that it knows; expected position {following} alone "
                    "(order left_to_right, one token a step)"
                )
        vectors = self.class_vectors(state.condition, len(state.lengths))
        if state.memory is None:
            state.memory = self._remember_nothing(state)
        self._grow(state, state.memory, vectors, lengths)
        asked = torch.repeat_interleave(torch.tensor(list(lengths))).to(positions.device)
        return self.final(state.memory.newest[asked], conditioned(vectors, asked))

    def _ids(self, tokens: Int[Tensor, "B L"]) -> Int[Tensor, "B P_plus_L"]:
        """Registers, start and tokens: what fills the slots."""
        prefix = torch.cat([self.register_ids(tokens.device), tokens.new_tensor([self.start])])
        return torch.cat([prefix.expand(len(tokens), -1), tokens], 1)

    def _remember_nothing(self, state: State) -> Memory:
        rows, capacity = state.tokens.shape
        weight, hidden = self.head.weight, self.embedding.embedding_dim
        heads = hidden // self.head_size
        shape = (rows, self.registers + 1 + capacity, heads, self.head_size)
        blank = [
            Cache(*(torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2)))
            for _ in self.blocks
        ]
        newest = torch.zeros(rows, hidden, dtype=weight.dtype, device=weight.device)
        return Memory(blank, [0] * rows, newest)

    def _grow(
        self, state: State, memory: Memory, vectors: Float[Tensor, "B H"] | None, asked: Sequence[int]
    ) -> None:
        """Run the slots of asked rows that are not in the caches yet."""
        rows = zip(state.lengths, memory.done, asked, strict=True)
        new = [self.registers + 1 + known - done if ask else 0 for known, done, ask in rows]
        if not any(new):
            return
        ids = self._ids(state.tokens)  # [B, P + capacity]
        growth = CacheAppend(memory.done, new, ids.shape[1], ids.device)
        x = self.embedding(growth.take(ids))  # [T, H]
        code, condition = rotary(growth.slots, self.head_size), conditioned(vectors, growth.segments.ids)
        for block, cache in zip(self.blocks, memory.caches, strict=True):
            x = block(x, growth.segments, code, condition, cache, growth)
        grown = [row for row, count in enumerate(new) if count]
        ends = growth.segments.boundaries[1:] - 1
        memory.newest[grown] = x[ends[grown]]
        memory.done = [a + b for a, b in zip(memory.done, new, strict=True)]


def _by_row(packed: Int[Tensor, "T"], lengths: Sequence[int]) -> list[list[int]]:
    """Packed entries as host integers, row by row."""
    entries = iter(packed.tolist())
    return [list(islice(entries, count)) for count in lengths]
