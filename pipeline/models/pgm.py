"""Partition Generative Model: two groups that cannot see each other, each predicted from the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from pipeline.config.model import PGMConfig
from pipeline.models.attention import CacheAppend, EqualSegments, Filled, FixedAppend, Segments
from pipeline.models.batch import Batch, NewTokens, State, packed
from pipeline.models.blocks import CrossBlock, EncoderReader, GroupSwap, Layout, SelfBlock, Stored
from pipeline.models.denoiser import CachedDenoiser
from pipeline.models.layers import ClassVectors, Condition, FoldedNorm, Rotary, rotary, rotate


class Packing(NamedTuple):
    """The tokens of a batch, packed by row and group.

    Attributes:
        tokens: rows of the embedding of all keys, registers among them.
        places: of the keys in rows of R + L.
        rows: of the keys.
        keys: segments of the keys: of every row group 0, then group 1.
        queries: segments of the targets: of every row group 1, then group 0.
    """

    tokens: Int[Tensor, "Tk"]
    places: Int[Tensor, "Tk"]
    rows: Int[Tensor, "Tk"]
    keys: Segments
    queries: Segments


@dataclass
class EncoderCache:
    """Encoder outputs that are kept between predictions, in which old tokens never read newer ones.

    With a causal encoder this is exact, with a bidirectional one it is an approximation.

    Attributes:
        encoder: what every encoder block keeps.
        swaps: what every swap keeps.
        decoder: what every decoder block keeps.
        decoder_weight: [2 H * blocks, H] maps normed encoder outputs to keys and values of all decoder blocks; None
            under ZeRO-3, where weights cannot be folded.
        code: rotary code of every position, registers counted.
        final: the final norm with its modulation folded in; None where it depends on a class, and under ZeRO-3.
        vectors: [B, R/2 + L, H] encoder outputs, for pooled swaps; empty for others, which read keys and values only.
        done: slots of every row that are encoded, registers first.
        age: predictions since all tokens were encoded together.
    """

    encoder: list[Stored]
    swaps: list[Stored]
    decoder: list[Stored]
    decoder_weight: Float[Tensor, "decoder_keys_and_values H"] | None
    code: Rotary
    final: FoldedNorm | None
    vectors: Float[Tensor, "B slots H"]
    done: list[int]
    age: int = 0


class Encoded(NamedTuple):
    """Encoder outputs of packed clean tokens, which the decoder reads.

    Attributes:
        vectors: the encoder outputs; empty where stored keys and values are all that is read.
        layout: of the tokens.
        stored: keys and values of these tokens, if they are stored.
    """

    vectors: Float[Tensor, "Tk H"]
    layout: Layout
    stored: EncoderCache | None = None


class PGM(CachedDenoiser):
    """Encoder within groups, GroupSwap, and a cross-attention decoder that computes only positions to predict.

    With `swap.every_block`, every decoder block but the first has one more swap before it, whose output is added
    to the decoder state. Of the registers the first half is in group 1 and the second half in group 0, where
    sampling knows it from the start.

    Given tokens stand in the segments of both groups, so that every prediction reads them; in the order of revelation
    they come first.

    With `encoder: causal`, a clean token reads in the encoder only the clean tokens of its group that were revealed
    before it, and itself. So no encoder output ever changes, and sampling encodes every token once.

    Args:
        config: sizes and the variant of GroupSwap.
        vocab_size: V.
        length: L.
        bos: the data's BOS, or None.

    Source:
        arXiv 2505.18883, section 4; docs/method.md sections 2 and 9.
    """

    both_groups = True

    def __init__(self, config: PGMConfig, vocab_size: int, length: int, bos: int | None = None):
        super().__init__(config, vocab_size, length, ids=max(vocab_size, 0 if bos is None else bos + 1))
        self.causal = config.encoder == "causal"
        self.refreshes = not self.causal
        self.fixed_steps = config.fixed_steps
        self.encoder = nn.ModuleList(SelfBlock(config, self.causal) for _ in range(config.encoder_blocks))
        swaps = config.decoder_blocks if config.swap.every_block else 1
        self.swap, *later = (GroupSwap(config.hidden, config.heads, config.swap) for _ in range(swaps))
        self.later_swaps = nn.ModuleList(later)
        for swap in later:  # 0 at the start, as every residual branch is
            nn.init.zeros_(swap.out.weight)
            nn.init.zeros_(swap.out.bias)
        self.decoder = nn.ModuleList(CrossBlock(config) for _ in range(config.decoder_blocks))

    def hidden(
        self, state: State, positions: Int[Tensor, "Q"], lengths: Sequence[int]
    ) -> Float[Tensor, "Q H"]:
        """Compute vectors at positions from the known tokens alone.

        Args:
            state: rows and their known tokens.
            positions: packed row after row.
            lengths: number of positions in every row.

        Returns:
            [Q, H].
        """
        keeps = self.causal or state.refresh_every > 1
        if not keeps:
            state, lengths = state.active(lengths)  # the other rows need not be encoded
        vectors = self.class_vectors(state.condition, len(state.lengths))
        if keeps:
            encoded = self._encode_new(state, vectors, lengths)
        else:
            ids, places, filled = self._slots(state)
            tokens, known = packed(filled, ids, places)
            segments = Segments(filled, tokens.device)
            encoded = self._encode(tokens, known, segments, Condition.of(vectors, segments))
        segments = Segments(lengths, positions.device)
        return self._decode(encoded, positions, self.length, segments, Condition.of(vectors, segments))

    def _slots(self, state: State) -> tuple[Int[Tensor, "B slots"], Int[Tensor, "B slots"], list[int]]:
        """Every row's clean tokens after the registers of group 0: ids, positions, and their number."""
        rows, device = len(state.lengths), state.tokens.device
        own = torch.arange(self.registers // 2, self.registers, device=device)
        ids = torch.cat([self.register_ids(device)[own].expand(rows, -1), state.tokens], 1)
        places = torch.cat([own.expand(rows, -1), state.positions + self.registers], 1)
        return ids, places, [len(own) + known for known in state.lengths]

    def _encode_new(self, state: State, vectors: ClassVectors, lengths: Sequence[int]) -> Encoded:
        """Encode the new tokens, or all of them when a refresh is due; both take the same path.

        A causal encoder encodes only those of the rows with `lengths[b]` positions to predict.
        """
        ids, places, filled = self._slots(state)
        (rows, slots), device = ids.shape, ids.device
        memory: EncoderCache | None = state.memory
        if memory is None:
            memory = state.memory = self._empty_cache(rows, slots)
        elif not self.causal and memory.age >= state.refresh_every:
            memory.done, memory.age = [0] * rows, 0
        memory.age += 1
        new = [
            known - done if count or not self.causal else 0
            for known, done, count in zip(filled, memory.done, lengths, strict=True)
        ]
        if any(new):
            append = CacheAppend(memory.done, new, slots, device, causal=self.causal)
            self._append(memory, append.take(ids), append.take(places), append, vectors)
            memory.done = append.ends
        segments = Segments(memory.done, device)
        outputs = memory.vectors.flatten(0, 1)
        if len(outputs):
            (outputs,) = packed(memory.done, memory.vectors)
        return Encoded(outputs, Layout(segments, memory.code[:0]), memory)  # stored keys have their code

    def _append(
        self,
        memory: EncoderCache,
        ids: Int[Tensor, "T"],
        places: Int[Tensor, "T"],
        append: CacheAppend,
        vectors: ClassVectors,
    ) -> None:
        """Encode new tokens, at places that count registers, and keep what later steps read of them."""
        code = memory.code[places]
        layout, condition = (
            Layout(append.segments, code),
            Condition.of(vectors, append.segments),
        )
        x = self.run_blocks(self.encoder, ids, layout, condition, memory.encoder, append)
        self._store_outputs(memory, x, code, append)

    def hidden_fixed(
        self, memory: EncoderCache, vectors: ClassVectors, new: NewTokens, positions: Int[Tensor, "B queries"]
    ) -> Float[Tensor, "B_times_queries H"]:
        """See `CachedDenoiser.hidden_fixed`."""
        capacity = memory.decoder[0].cache.keys.shape[1]
        append = FixedAppend(new.slots, capacity)
        self._append(memory, new.ids.flatten(), new.positions.flatten() + self.registers, append, vectors)
        filled = Layout(Filled(new.filled, capacity), memory.code[:0])
        queries = EqualSegments(len(positions), positions.shape[1], positions.device)
        condition = Condition.of(vectors, queries)
        encoded = Encoded(memory.vectors.flatten(0, 1), filled, memory)
        return self._decode(encoded, positions.flatten(), self.length, queries, condition)

    def _empty_cache(self, rows: int, slots: int) -> EncoderCache:
        """Allocate the cache, and fold the weights that only sampling can fold."""
        swaps, blocks = self._readers()
        every = torch.arange(self.registers + self.length, device=self.head.weight.device)
        pooled = self.swap.pooling != "none"
        fold, head = self.foldable, self.head.weight
        weights: list[Tensor] = []
        if fold:
            weights = [block.kv_proj.ordered(block.kv_proj.weight) * block.kv_norm.weight for block in blocks]
        return EncoderCache(
            encoder=self.store([*self.encoder], rows, slots),
            swaps=[
                Stored(cache, queries=swap.queries(every) if fold and not pooled else None)
                for cache, swap in zip(self.empty_caches(len(swaps), rows, slots), swaps, strict=True)
            ],
            decoder=self.store(blocks, rows, slots),
            decoder_weight=torch.cat(weights) if fold else None,
            code=rotary(every, self.head_size, head.dtype),
            final=self.final.folded() if fold else None,
            vectors=head.new_zeros(rows, slots if pooled else 0, self.embedding.embedding_dim),
            done=[0] * rows,
        )

    def _readers(self) -> tuple[list[GroupSwap], list[CrossBlock]]:
        """The modules that read encoder outputs: swaps and decoder blocks."""
        return [self.swap, *self.later_swaps], [*self.decoder]

    def _store_outputs(
        self, memory: EncoderCache, x: Float[Tensor, "T H"], code: Rotary, append: CacheAppend
    ) -> None:
        """Store what swaps and decoder blocks read of new encoder outputs."""
        if memory.vectors.shape[1]:
            append.put(memory.vectors, x)
        swaps, blocks = self._readers()
        readers: list[tuple[EncoderReader, Stored]] = [*zip(swaps, memory.swaps, strict=True)]
        if memory.decoder_weight is None:
            readers += zip(blocks, memory.decoder, strict=True)
        for reader, stored in readers:
            stored.cache.put(*reader.keys_values(x, code), append)
        if memory.decoder_weight is None:
            return
        # The blocks' norms differ in their weights only, which are folded into one product for all blocks.
        normed = F.layer_norm(x, x.shape[-1:])
        kv = F.linear(normed, memory.decoder_weight).unflatten(-1, (len(self.decoder), 2, -1, self.head_size))
        k, v = kv.unbind(2)  # [T, blocks, N, D]
        k = rotate(k.flatten(1, 2), code).view_as(k)
        for stored, keys, values in zip(memory.decoder, k.unbind(1), v.unbind(1), strict=True):
            stored.cache.put(keys, values, append)

    def target_vectors(self, batch: Batch) -> Float[Tensor, "Q H"]:
        """Compute the targets' vectors in one pass, each group's from the other group's tokens.

        Args:
            batch: tokens, groups and targets.

        Returns:
            [Q, H], in the order of `batch.target_index`.
        """
        length, (tokens, places, rows, keys, queries) = batch.shape[1], self._packing(batch)
        width = self.registers + length
        vectors = self.class_vectors(batch.condition, batch.shape[0])
        encoded = self._encode(
            tokens, places % width, keys, Condition(vectors, rows, keys.window is not None)
        )
        condition = Condition(vectors, batch.sent.rows, queries.window is not None)
        return self._decode(encoded, batch.sent.places % length, length, queries, condition)

    def prepare(self, batch: Batch) -> None:
        """Sort the tokens of a batch by their group as well; see `Denoiser.prepare`."""
        super().prepare(batch)
        self._packing(batch)

    def _packing(self, batch: Batch) -> Packing:
        """Return how `target_vectors` packs a batch; another model may pack it otherwise."""
        return batch.once(self, lambda: self._pack(batch))

    def _pack(self, batch: Batch) -> Packing:
        """Sort the tokens of a batch by their group, on the host."""
        rows = batch.shape[0]
        cpu = torch.device("cpu")  # where batches are
        in_group_1 = (torch.arange(self.registers) < self.registers // 2).expand(rows, -1)
        in_group_1 = torch.cat([in_group_1, batch.groups], 1)  # [B, R + L]
        ids = torch.cat([self.register_ids(cpu).expand(rows, -1), batch.tokens], 1)
        width, targets = ids.shape[1], batch.targets.sum(1)
        ones_targets = (batch.targets & batch.groups).sum(1)
        # Keys of row b: group 0, group 1. Queries: group 1, group 0. Query segment i reads key segment i.
        query_lengths = torch.stack([ones_targets, targets - ones_targets], 1)
        sides = 2 if query_lengths[:, 1].any() else 1  # if all targets are in group 1, it need not be encoded
        query_lengths = query_lengths[:, :sides]
        keys_of = torch.stack([~in_group_1, in_group_1][:sides], 1)  # [B, sides, R + L]
        ordinary = batch.lengths is None and batch.given is None
        if not ordinary:
            of_tokens = keys_of[..., self.registers :]
            of_tokens |= batch.known[:, None]  # given tokens are keys of both groups
            of_tokens &= ~batch.padding[:, None]
        key_index = self._key_order(batch, width)  # [B, R + L]
        in_segment = keys_of.gather(2, key_index[:, None].expand(-1, sides, -1))
        key_lengths = in_segment.sum(2)
        key_index = key_index + torch.arange(rows)[:, None] * width
        key_index = key_index[:, None].expand(-1, sides, -1)[in_segment]
        per_row = int(targets[:1].sum())
        window = per_row if sides == 2 and per_row and bool((targets == per_row).all()) else None
        whole = sides == 2 and ordinary  # the keys of a row fill a window
        keys = Segments(key_lengths.flatten().tolist(), batch.device, window=width if whole else None)
        queries = Segments(query_lengths.flatten().tolist(), batch.device, window=window)
        tokens = batch.gather(ids, key_index)
        return Packing(tokens, batch.send(key_index), batch.send(key_index // width), keys, queries)

    def _key_order(self, batch: Batch, width: int) -> Int[Tensor, "B R_plus_L"]:
        """The order in which a segment holds its tokens: registers, then by position or, if causal, as revealed."""
        if not self.causal or batch.order is None:
            return torch.arange(width).expand(batch.shape[0], -1)
        registers = torch.arange(self.registers).expand(batch.shape[0], -1)
        return torch.cat([registers, batch.order.argsort(1) + self.registers], 1)

    def _encode(
        self,
        tokens: Int[Tensor, "Tk"],
        positions: Int[Tensor, "Tk"],
        segments: Segments,
        condition: Condition,
    ) -> Encoded:
        """Encode clean tokens, registers among them, at positions that count registers."""
        layout = self.layout(segments, positions)
        return Encoded(self.run_blocks(self.encoder, tokens, layout, condition), layout)

    def _decode(
        self,
        encoded: Encoded,
        positions: Int[Tensor, "Q"],
        extent: int,
        segments: Segments,
        condition: Condition,
    ) -> Float[Tensor, "Q H"]:
        """Compute vectors for the head at `positions` below `extent`, which count tokens only."""
        positions, extent = positions + self.registers, extent + self.registers
        vectors, keys, memory = encoded
        count = len(self.decoder)
        stored_swaps: Sequence[Stored | None] = memory.swaps if memory else [None] * count
        stored: Sequence[Stored | None] = memory.decoder if memory else [None] * count
        queries = Layout(segments, memory.code[positions]) if memory else self.layout(segments, positions)
        x = self.swap(vectors, positions, extent, segments, keys, stored_swaps[0])
        for index, block in enumerate(self.decoder):
            if index and self.later_swaps:
                swap, kept = self.later_swaps[index - 1], stored_swaps[index]
                x = x + self.run_block(swap, vectors, positions, extent, segments, keys, kept)
            x = self.run_block(block, x, vectors, queries, keys, condition, stored[index])
        return memory.final(x) if memory and memory.final else self.final(x, condition)
