"""The interface between models and everything that trains, samples or scores with them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any

import torch
import torch.utils.checkpoint
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pipeline.config.evaluation import Precision
from pipeline.config.model import TrunkConfig
from pipeline.errors import CapabilityError
from pipeline.models.attention import Cache, CacheAppend, Segments
from pipeline.models.batch import Batch, Labels, NewTokens, State, packed
from pipeline.models.blocks import Block, EncoderReader, Layout, Stored
from pipeline.models.head import Head
from pipeline.models.layers import ClassVectors, Condition, FinalNorm, rotary

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Denoiser(nn.Module, ABC):
    """A model that predicts tokens at given positions from known tokens.

    Training calls the module: `forward(batch)` returns every row's weighted sum of cross-entropies. Inference is
    stateful: `open` rows, `extend` them with known tokens, compute `hidden` vectors at positions, and map chunks
    of those to logits with `head`. Positions count tokens, BOS included where the data has one.

    Class labels (`condition`) are 0 to C - 1 for a model with C classes, and C or None for "no class". Registers
    are vectors that blocks may use as scratch space: they lie before every row's tokens and shift the positions
    of these by their number, inside the model only.

    Args:
        config: sizes, classes and registers.
        vocab_size: V, number of ids that can be predicted.
        length: L of the data that the model is trained on, BOS included where it has one.
        ids: number of ids that the model reads: V, and the mask, BOS or start that lie beyond.

    Attributes:
        config: as given.
        vocab_size: logits cover exactly these ids.
        embedding: a row for every id that is read, then one for every register.
        both_groups: the model learns from the tokens of both groups in one pass, else from those of group 1.
        refreshes: the model can encode new tokens beside stored old ones, and all together at times.
        left_to_right: the model predicts only the next token of a row, from all before; it has no groups.
        causal: the model reads known tokens in their order of revelation, which batches and states must give.
        recompute: in training, do not keep the activations of blocks but compute them again for the backward
            pass.
    """

    both_groups: bool = False
    refreshes: bool = False
    left_to_right: bool = False
    causal: bool = False
    recompute: bool = False

    def __init__(self, config: TrunkConfig, vocab_size: int, length: int, ids: int):
        super().__init__()
        self.config = config
        self.vocab_size, self.length, self.registers = vocab_size, length, config.registers
        self.head_size, conditional = config.hidden // config.heads, config.classes is not None
        self.embedding = nn.Embedding(ids + config.registers, config.hidden)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.classes: nn.Embedding | None = None
        if config.classes is not None:
            self.classes = nn.Embedding(config.classes + 1, config.hidden)
            nn.init.normal_(self.classes.weight, std=0.02)
        self.final = FinalNorm(config.hidden, conditional)
        self.head = Head(config.hidden, vocab_size)

    def register_ids(self, device: torch.device) -> Int[Tensor, "R"]:
        """List the rows of the embedding that hold the registers.

        Args:
            device: of the result.

        Returns:
            [R] indices.
        """
        return torch.arange(self.registers, device=device) + self.embedding.num_embeddings - self.registers

    def class_vectors(self, labels: Labels, rows: int) -> ClassVectors:
        """Look up the vectors of class labels.

        Args:
            labels: class labels; None: "no class" for every row.
            rows: number of rows.

        Returns:
            [B, H], or None for a model without classes.
        """
        if self.classes is None:
            return None
        if labels is None:
            labels = torch.full((rows,), self.classes.num_embeddings - 1)
        return self.classes(labels.to(self.head.weight.device, non_blocking=True))

    def layout(self, segments: Segments, positions: Int[Tensor, "T"]) -> Layout:
        """Describe how packed tokens lie.

        Args:
            segments: that the tokens fill.
            positions: of the tokens, registers counted.

        Returns:
            The segments with the rotary codes of the positions.
        """
        return Layout(segments, rotary(positions, self.head_size, self.head.weight.dtype))

    def compile_blocks(self) -> None:
        """Compile what blocks compute before and after attention, when training first calls it (`blocks.part`)."""
        for module in self.modules():
            if isinstance(module, Block | EncoderReader):
                module.compiled = True

    def run_block(self, block: nn.Module, *inputs: Any) -> Float[Tensor, "T H"]:
        """Run one block of the trunk; with `recompute` its activations are computed again in the backward pass.

        Args:
            block: the block.
            *inputs: its arguments.

        Returns:
            [T, H] output of the block.
        """
        if self.recompute and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def run_blocks(
        self,
        blocks: Iterable[nn.Module],
        ids: Int[Tensor, "T"],
        layout: Layout,
        condition: Condition,
        stored: Iterable[Stored | None] = repeat(None),
        append: CacheAppend | None = None,
    ) -> Float[Tensor, "T H"]:
        """Embed packed ids and run them through self-attention blocks.

        Args:
            blocks: `SelfBlock`s.
            ids: rows of the embedding.
            layout: of the ids.
            condition: class vectors of the ids.
            stored: the tokens before, for each block; the ids are added to them. Default: none.
            append: where the ids belong in the caches.

        Returns:
            [T, H] outputs of the last block.
        """
        x = self.embedding(ids)
        for block, kept in zip(blocks, stored, strict=False):
            x = self.run_block(block, x, layout, condition, kept, append)
        return x

    def run_rows(
        self,
        blocks: Iterable[nn.Module],
        ids: Int[Tensor, "B W"],
        vectors: ClassVectors,
        extents: Sequence[int] | None = None,
    ) -> Float[Tensor, "T H"]:
        """Run rows through self-attention blocks, each row as one segment.

        Args:
            blocks: `SelfBlock`s.
            ids: rows of the embedding, registers first, then tokens and padding.
            vectors: class vector of every row.
            extents: tokens of every row, without registers and padding; None: rows have no padding.

        Returns:
            [T, H] outputs of the last block, packed row after row; see `row_starts`.
        """
        rows, width = ids.shape
        if extents is None:
            segments, tokens = Segments([width] * rows, ids.device), ids.flatten()
            positions = torch.arange(width, device=ids.device).repeat(rows)
        else:
            widths = [self.registers + extent for extent in extents]
            segments, (tokens,) = Segments(widths, ids.device), packed(widths, ids)
            positions = segments.offsets
        return self.run_blocks(
            blocks, tokens, self.layout(segments, positions), Condition.of(vectors, segments)
        )

    def row_starts(
        self, rows: Int[Tensor, "Q"], length: int, extents: Sequence[int] | None = None
    ) -> Int[Tensor, "Q"]:
        """Find where the tokens of rows begin, behind their registers, in what `run_rows` returns.

        Args:
            rows: indices of rows.
            length: tokens of every row, if there is no padding.
            extents: as for `run_rows`.

        Returns:
            [Q] indices of the rows' first tokens.
        """
        if extents is None:
            return rows * (self.registers + length) + self.registers
        widths = [self.registers + extent for extent in extents[:-1]]
        return torch.tensor([self.registers, *widths]).cumsum(0).to(rows.device, non_blocking=True)[rows]

    def empty_caches(self, layers: int, rows: int, slots: int) -> list[Cache]:
        """Allocate caches of keys and values.

        Args:
            layers: number of caches.
            rows: number of rows.
            slots: tokens that a row has room for.

        Returns:
            Caches of [rows, slots, N, D] keys and values, filled with zeros.
        """
        shape = (rows, slots, self.embedding.embedding_dim // self.head_size, self.head_size)
        zeros = self.head.weight.new_zeros
        return [Cache(zeros(shape), zeros(shape)) for _ in range(layers)]

    @property
    def foldable(self) -> bool:
        """Whether parameters can be read anywhere; under ZeRO-3 they exist only in the forward of their module."""
        return not any(hasattr(parameter, "ds_id") for parameter in self.parameters())

    def store(self, blocks: Sequence[Block], rows: int, slots: int) -> list[Stored]:
        """Make what blocks keep during sampling.

        Args:
            blocks: the blocks.
            rows: number of rows.
            slots: tokens that a row has room for.

        Returns:
            An empty cache for each block, with its norms and gates where they can be folded.
        """
        caches, fold = self.empty_caches(len(blocks), rows, slots), self.foldable
        return [
            Stored(cache, block.folded() if fold else None)
            for cache, block in zip(caches, blocks, strict=True)
        ]

    def forward(self, batch: Batch) -> Float[Tensor, "B"]:
        """Compute every row's loss.

        Args:
            batch: tokens, groups, targets and weights.

        Returns:
            [B] float32: the weighted sum over a row's targets of cross-entropies (nats), or of divergences from
            a teacher. Their gradient is that of their sum, times any factor; any other is NaN (`chunked_loss`).

        Raises:
            CapabilityError: class labels that the model has no vectors for, or targets that it cannot predict.
        """
        self.check_condition(batch.condition, batch.shape[0])
        possible = self.both_groups or self.left_to_right or not (batch.targets & ~batch.groups).any()
        assert possible, "a masked model predicts masked tokens only"
        hidden = self.target_vectors(batch)
        targets = batch.distill_targets or batch.sent.tokens
        return batch.row_sums(self.head(hidden, targets, batch.sent.weights, self.places_of(batch)))

    def places_of(self, batch: Batch) -> Int[Tensor, "Q"] | None:
        """Return the positions of the targets; None where the head does not need them.

        Args:
            batch: with the targets.
        """
        return None if self.head.modalities is None else batch.sent.places % batch.shape[1]

    def prepare(self, batch: Batch) -> None:
        """Compute what the forward pass needs of a batch on the host, and send it to the device.

        The forward pass does so itself if nobody has done it, ahead and in another thread.

        Args:
            batch: which keeps it.
        """
        batch.sent  # noqa: B018  computed once

    @abstractmethod
    def target_vectors(self, batch: Batch) -> Float[Tensor, "Q H"]:
        """Compute the vectors that the head maps to the targets' logits.

        Args:
            batch: tokens, groups and targets; its labels fit the model.

        Returns:
            [Q, H], in the order of `batch.target_index`.

        Raises:
            CapabilityError: targets that the model cannot predict.
        """

    def logits(
        self,
        tokens: Int[Tensor, "B L"],
        groups: Bool[Tensor, "B L"],
        condition: Labels = None,
        order: Int[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B L V"]:
        """Compute logits at every position from the tokens of the other group.

        Args:
            tokens: ids.
            groups: True = group 1.
            condition: class labels, or None.
            order: ranks of revelation for a causal encoder; None: ascending positions.

        Returns:
            [B, L, V] float32.

        Raises:
            CapabilityError: class labels that the model has no vectors for, or a model without groups.
        """
        self.check_condition(condition, len(tokens))
        device = self.head.weight.device
        every = torch.ones_like(groups, dtype=torch.bool, device="cpu")
        ranks = None if order is None else order.cpu()
        batch = Batch(tokens.cpu(), groups.cpu(), every, every.float(), condition, device, ranks)
        logits = self.head(self.target_vectors(batch), places=self.places_of(batch))
        out = torch.empty_like(logits)
        out[batch.target_index.to(device)] = logits
        return out.view(*tokens.shape, self.vocab_size)

    @abstractmethod
    def hidden(
        self, state: State, positions: Int[Tensor, "Q"], lengths: Sequence[int]
    ) -> Float[Tensor, "Q H"]:
        """Compute vectors for the head at positions that are not known.

        Args:
            state: rows and their known tokens.
            positions: packed row after row.
            lengths: number of positions in every row.

        Returns:
            [Q, H].

        Raises:
            CapabilityError: positions that the model cannot predict next.
        """

    def open(
        self,
        batch: int,
        condition: Labels = None,
        refresh_every: int = 1,
        capacity: int | None = None,
        extents: list[int] | None = None,
    ) -> State:
        """Begin to sample or score rows.

        Args:
            batch: number of rows.
            condition: class labels, or None.
            refresh_every: encode all known tokens at every so many predictions, and between them only the new
                ones, which read the stored keys and values of the old (1: exact).
            capacity: known tokens that a row has room for; None: L.
            extents: tokens that every row will have, the rest being padding; None: L.

        Returns:
            A state of rows without known tokens.

        Raises:
            CapabilityError: class labels that the model has no vectors for, or `refresh_every` for a model without
                encoder outputs, or with ones that never change.
        """
        if refresh_every != 1 and not self.refreshes:
            raise CapabilityError(
                f"refresh_every: {refresh_every} for {type(self).__name__}; expected 1, since only a PGM with a "
                "bidirectional encoder has encoder outputs that change"
            )
        self.check_condition(condition, batch)
        device = self.head.weight.device
        room = self.length if capacity is None else capacity
        tokens, positions = torch.zeros(2, batch, room, dtype=torch.int64, device=device)
        return State(tokens, positions, [0] * batch, condition, refresh_every=refresh_every, extents=extents)

    def extend(
        self, state: State, tokens: Int[Tensor, "T"], positions: Int[Tensor, "T"], lengths: Sequence[int]
    ) -> None:
        """Add known tokens to a state, in place.

        Args:
            state: rows to extend.
            tokens: packed row after row.
            positions: of the tokens.
            lengths: number of tokens in every row, 0 allowed.

        Raises:
            CapabilityError: tokens that the model cannot be given next.
        """
        append = CacheAppend(state.lengths, lengths, state.tokens.shape[1], state.tokens.device)
        append.put(state.tokens, tokens)
        append.put(state.positions, positions)
        state.lengths = append.ends

    def check_condition(self, labels: Tensor | None, rows: int) -> None:
        """Check that the model has vectors for class labels.

        Args:
            labels: class labels, or None.
            rows: number of rows that need one.

        Raises:
            CapabilityError: labels for a model without classes, not one for each row, or outside 0 to C.
        """
        if labels is None:
            return
        name = type(self).__name__
        if self.classes is None:
            raise CapabilityError(f"condition: {name} was built without classes; expected condition=None")
        none = self.classes.num_embeddings - 1
        if labels.shape != (rows,):
            raise CapabilityError(f"condition: shape {list(labels.shape)} for {rows} rows; expected [{rows}]")
        wrong = labels[(labels < 0) | (labels > none)]
        if len(wrong):
            raise CapabilityError(
                f"condition: label {int(wrong[0])} for {name} of {none} classes; "
                f"expected 0 to {none - 1}, or {none} for no class"
            )


class CachedDenoiser(Denoiser):
    """A model that can keep what it computed of known tokens, so that a step only computes new ones.

    Attributes:
        fixed_steps: steps can have fixed shapes: keys and values that never change are all that a step reads.
    """

    fixed_steps: bool = True

    @abstractmethod
    def _encode_new(self, state: State, vectors: ClassVectors, lengths: Sequence[int]) -> Any:
        """Encode the new tokens of the rows with `lengths[b]` positions to predict."""

    def encode(self, state: State, width: int) -> NewTokens:
        """Encode all known tokens of all rows, so that `hidden_fixed` can follow.

        Args:
            state: rows and their known tokens, in tensors with room for one more.
            width: tokens that the first step adds to every row.

        Returns:
            What the first step adds: `width` times no token. The caches are in `state.memory`.
        """
        rows, device = len(state.lengths), state.tokens.device
        self._encode_new(state, self.class_vectors(state.condition, rows), [1] * rows)
        ids, positions = torch.zeros(2, rows, width, dtype=torch.int64, device=device)
        return NewTokens(ids, positions, ids - 1, torch.tensor(state.memory.done, device=device))

    @abstractmethod
    def hidden_fixed(
        self, memory: Any, vectors: ClassVectors, new: NewTokens, positions: Int[Tensor, "B queries"]
    ) -> Float[Tensor, "B_times_queries H"]:
        """Add tokens and compute vectors at positions, in shapes that follow from those of the arguments alone.

        Attention runs over whole caches under a mask. Nothing is read from the host, so that the same kernels run at
        every step.

        Args:
            memory: of a state after `encode`; changed in place.
            vectors: class vectors of the rows.
            new: tokens to add.
            positions: to predict, as many in every row; any that are too many may be anything.

        Returns:
            [B * queries, H] vectors for the head.
        """
