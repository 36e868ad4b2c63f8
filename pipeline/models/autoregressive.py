"""Autoregressive baseline with the same blocks: causal attention, next-token loss, key/value cache."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pipeline.config.model import ARConfig
from pipeline.errors import CapabilityError, ConfigError
from pipeline.models.attention import CacheAppend, FixedAppend, Segments
from pipeline.models.batch import Batch, Labels, NewTokens, State
from pipeline.models.blocks import SelfBlock, Stored
from pipeline.models.denoiser import CachedDenoiser
from pipeline.models.layers import ClassVectors, Condition


@dataclass
class PrefixCache:
    """What the model keeps of every row's known tokens.

    Attributes:
        stored: keys and values of every block, in preallocated rows.
        done: slots of every row that are in the caches: registers and start, then tokens.
        newest: [B, H] vector of every row's last slot, before the final norm.
    """

    stored: list[Stored]
    done: list[int]
    newest: Float[Tensor, "B H"]


class AR(CachedDenoiser):
    """Every token is predicted from all before it; the first from a learned start vector.

    A row is read as registers, start, tokens: the slot before position i predicts position i. So every token has a
    prediction, with or without BOS, and the likelihood of a row is exact. With `start: bos` there is no start vector,
    and BOS, which is always known, has no prediction. Sampling computes one slot for each token, since keys and
    values of the others are kept.

    Args:
        config: sizes, classes and registers.
        vocab_size: V.
        length: L.
        bos: the data's BOS, or None.

    Raises:
        ConfigError: `start: bos` without BOS.

    Source:
        docs/method.md section 3.
    """

    left_to_right = True

    def __init__(self, config: ARConfig, vocab_size: int, length: int, bos: int | None = None):
        if config.start == "bos" and bos is None:
            raise ConfigError("model.start: 'bos' for rows without BOS; expected 'learned', or data with one")
        end = max(vocab_size, 0 if bos is None else bos + 1)
        starts = [end] if config.start == "learned" else []  # id of the start vector
        super().__init__(config, vocab_size, length, ids=end + len(starts))
        self.starts, self.prefix = starts, self.registers + len(starts)
        self.blocks = nn.ModuleList(SelfBlock(config, causal=True) for _ in range(config.blocks))

    def target_vectors(self, batch: Batch) -> Float[Tensor, "Q H"]:
        """Compute the targets' vectors in one pass over all rows.

        Args:
            batch: its known tokens (group 0) must be the first of every row; any others may be targets.

        Returns:
            [Q, H], in the order of `batch.target_index`.

        Raises:
            CapabilityError: a known token after a hidden one, as in the estimators of masked models.
        """
        if not self.starts and batch.targets[:, 0].any():
            raise CapabilityError("AR without a start vector reads BOS first; expected no prediction of BOS")
        hidden = batch.groups | batch.padding
        if (hidden[:, :-1] & ~hidden[:, 1:]).any() or (batch.targets & ~batch.groups).any():
            raise CapabilityError(
                "AR predicts a token from all before it, so hidden tokens must be the last of their row; "
                "expected the exact likelihood (or next-token training), not a masked estimate"
            )
        rows, length = batch.shape
        ids = self._ids(batch.send(batch.tokens))[:, :-1]  # [B, P + L - 1]
        vectors = self.class_vectors(batch.condition, rows)
        # 0, or -1 without a start vector, where a row has a slot less than tokens.
        shift = self.prefix - 1 - self.registers
        extents = batch.extents and [extent + shift for extent in batch.extents]
        x = self.run_rows(self.blocks, ids, vectors, extents)
        index, row = batch.sent.places, batch.sent.rows
        slots = self.row_starts(row, length + shift, extents) + index % length + shift
        return self.final(x[slots], Condition(vectors, row))

    def logits(
        self,
        tokens: Tensor,  # noqa: ARG002
        groups: Tensor,  # noqa: ARG002
        condition: Labels = None,  # noqa: ARG002
        order: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        """Refuse, because an autoregressive model has no groups.

        Args:
            tokens: not used.
            groups: not used.
            condition: not used.
            order: not used.

        Raises:
            CapabilityError: always.
        """
        raise CapabilityError(
            "logits: AR knows no groups, it predicts a token from all before it; "
            "use predict for the position after known tokens"
        )

    def extend(
        self, state: State, tokens: Int[Tensor, "T"], positions: Int[Tensor, "T"], lengths: Sequence[int]
    ) -> None:
        """Add known tokens, which must continue their rows without a gap.

        Args:
            state: rows to extend.
            tokens: packed row after row.
            positions: of the tokens.
            lengths: number of tokens in every row, 0 allowed.

        Raises:
            CapabilityError: tokens at other positions.
        """
        by_row = positions.cpu().split(list(lengths))
        for row, (first, places) in enumerate(zip(state.lengths, by_row, strict=True)):
            if places.tolist() != list(range(first, first + len(places))):
                raise CapabilityError(
                    f"known positions {places.tolist()[:8]} for row {row}: AR knows the first tokens of a row; "
                    f"expected positions from {first} on, in order"
                )
        super().extend(state, tokens, positions, lengths)

    def hidden(
        self, state: State, positions: Int[Tensor, "Q"], lengths: Sequence[int]
    ) -> Float[Tensor, "Q H"]:
        """Compute the vector of every row's next position.

        Args:
            state: rows and their known tokens.
            positions: the next position of every row that a prediction is needed of.
            lengths: 1 for these rows, 0 for the others.

        Returns:
            [Q, H].

        Raises:
            CapabilityError: a position that is not the next one, or more than one in a row.
        """
        by_row = positions.cpu().split(list(lengths))
        for row, (following, places) in enumerate(zip(state.lengths, by_row, strict=True)):
            if len(places) and places.tolist() != [following]:
                raise CapabilityError(
                    f"positions {places.tolist()[:8]} of row {row}: AR predicts left to right; with {following} "
                    f"known tokens, expected position {following} alone (order left_to_right, one token a step)"
                )
            if len(places) and not following and not self.starts:
                raise CapabilityError(
                    f"position 0 of row {row}: it holds BOS; expected BOS among the known tokens"
                )
        vectors = self.class_vectors(state.condition, len(state.lengths))
        self._encode_new(state, vectors, lengths)
        active = Segments(lengths, positions.device).ids
        return self.final(state.memory.newest[active], Condition(vectors, active))

    def encode(self, state: State, width: int) -> NewTokens:
        """Encode all known tokens of all rows, so that `hidden_fixed` can follow.

        Args:
            state: rows and their known tokens, in tensors with room for one more.
            width: 1, the tokens that the first step adds to every row.

        Returns:
            The newest slot of every row once more, whose output the first step needs.
        """
        first = super().encode(state, width)
        newest = first.filled[:, None] - 1
        return NewTokens(self._ids(state.tokens).gather(1, newest), newest, newest, first.filled)

    def hidden_fixed(
        self,
        memory: PrefixCache,
        vectors: ClassVectors,
        new: NewTokens,
        positions: Int[Tensor, "B 1"],
    ) -> Float[Tensor, "B H"]:
        """Add one token to every row and compute the vector of what follows it.

        Args:
            memory: of a state after `encode`; changed in place.
            vectors: class vectors of the rows.
            new: the tokens.
            positions: of the tokens to predict, one a row; the newest slot of a row predicts what follows it.

        Returns:
            [B, H] vectors for the head.
        """
        assert positions.shape[1] == new.ids.shape[1] == 1, "AR predicts one token a step"
        append = FixedAppend(new.slots, memory.stored[0].cache.keys.shape[1])
        layout = self.layout(append.segments, new.slots.flatten())
        condition = Condition.of(vectors, append.segments)
        x = self.run_blocks(self.blocks, new.ids.flatten(), layout, condition, memory.stored, append)
        return self.final(x, condition)

    def _ids(self, tokens: Int[Tensor, "B L"]) -> Int[Tensor, "B P_plus_L"]:
        """Registers, start if there is one, and tokens: the content of the slots."""
        device = tokens.device  # without copies from the host
        starts = [torch.full((1,), start, device=device) for start in self.starts]
        prefix = torch.cat([self.register_ids(device), *starts])
        return torch.cat([prefix.expand(len(tokens), -1), tokens], 1)

    def _encode_new(self, state: State, vectors: ClassVectors, lengths: Sequence[int]) -> None:
        """Compute the slots that are not in the caches yet, of rows that a prediction is needed of."""
        if state.memory is None:
            rows, capacity = state.tokens.shape
            stored = self.store([*self.blocks], rows, self.prefix + capacity)
            newest = self.head.weight.new_zeros(rows, self.embedding.embedding_dim)
            state.memory = PrefixCache(stored, [0] * rows, newest)
        memory: PrefixCache = state.memory
        new = [
            self.prefix + known - done if count else 0
            for known, done, count in zip(state.lengths, memory.done, lengths, strict=True)
        ]
        if not any(new):
            return
        ids = self._ids(state.tokens)  # [B, P + capacity]
        append = CacheAppend(memory.done, new, ids.shape[1], ids.device)
        layout = self.layout(append.segments, append.slots)
        condition = Condition.of(vectors, append.segments)
        x = self.run_blocks(self.blocks, append.take(ids), layout, condition, memory.stored, append)  # [T, H]
        changed = [row for row, count in enumerate(new) if count]
        memory.newest[changed] = x[append.segments.boundaries[1:][changed] - 1]
        memory.done = append.ends
