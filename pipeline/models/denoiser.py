"""The interface between models and everything that trains, samples or scores with them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.utils.checkpoint
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pipeline.config.schema import Precision, TrunkConfig
from pipeline.errors import CapabilityError
from pipeline.models.distill_loss import DistillTargets
from pipeline.models.layers import Condition, FinalNorm, Head

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Batch:
    """Rows of tokens split into two groups, and what is to be predicted from what.

    Built on the host: every length and index that shapes a kernel call is known without asking a device.

    Attributes:
        tokens: [B, L] ids.
        groups: [B, L], True = group 1 (the masked side at time t).
        targets: [B, L], which positions are predicted; never BOS.
        weights: [B, L] float32 loss weight of every position.
        condition: [B] class labels, or None.
        device: where the model computes.
        teaching: a teacher's view of the targets, which replaces the tokens themselves as what is learnt.
    """

    tokens: Int[Tensor, "B L"]
    groups: Bool[Tensor, "B L"]
    targets: Bool[Tensor, "B L"]
    weights: Float[Tensor, "B L"]
    condition: Int[Tensor, "B"] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    teaching: DistillTargets | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(B, L)."""
        return self.tokens.shape[0], self.tokens.shape[1]

    @cached_property
    def target_index(self) -> Int[Tensor, "Q"]:
        """Flat indices of the targets: row by row, group 1 before group 0, ascending positions within."""
        key = torch.where(self.targets, (~self.groups).long(), 2)  # 0: group 1, 1: group 0, 2: not asked
        order = key.argsort(dim=1, stable=True) + self.starts
        asked = torch.arange(self.shape[1]) < self.targets.sum(1, keepdim=True)
        return order[asked]

    @cached_property
    def starts(self) -> Int[Tensor, "B 1"]:
        """Flat index of every row's first token."""
        rows, length = self.shape
        return torch.arange(rows)[:, None] * length

    def gather(self, field_values: Tensor, index: Int[Tensor, "T"]) -> Tensor:
        """Entries of a [B, L] field at flat indices, on the batch's device."""
        return field_values.flatten()[index].to(self.device, non_blocking=True)

    def by_row(self, values: Float[Tensor, "Q"]) -> Float[Tensor, "B"]:
        """Weighted sum over the targets of every row."""
        # float64: added one by one in float32, a thousand equal terms drift by 1e-5.
        weighted = values.double() * self.gather(self.weights, self.target_index)
        rows = (self.target_index // self.shape[1]).to(self.device, non_blocking=True)
        return weighted.new_zeros(self.shape[0]).index_add(0, rows, weighted).float()


@dataclass
class State:
    """What a model remembers of rows that are being sampled or scored.

    Attributes:
        tokens, positions: [B, capacity] known tokens of every row, in the order they came.
        lengths: known tokens of every row, host integers.
        refresh_every: predictions from one full encoding to the next.
        memory: what the model keeps from one prediction to the next, if anything.
    """

    tokens: Int[Tensor, "B capacity"]
    positions: Int[Tensor, "B capacity"]
    lengths: list[int]
    condition: Int[Tensor, "B"] | None = None
    memory: Any = None
    refresh_every: int = 1

    def asked(self, lengths: Sequence[int]) -> tuple["State", list[int]]:
        """The rows of which something is asked, without their memory, and how much is asked of each."""
        rows = [row for row, count in enumerate(lengths) if count]
        if len(rows) == len(lengths):
            return self, list(lengths)
        condition = None if self.condition is None else self.condition[rows]
        known = [self.lengths[row] for row in rows]
        state = State(self.tokens[rows], self.positions[rows], known, condition)
        return state, [lengths[row] for row in rows]

    def known(self) -> tuple[Int[Tensor, "T"], Int[Tensor, "T"]]:
        """Known tokens and their positions, packed row after row."""
        tokens, positions = packed(self.lengths, self.tokens, self.positions)
        return tokens, positions


def packed(lengths: Sequence[int], *fields: Tensor) -> tuple[Tensor, ...]:
    """The first `lengths[b]` entries of row b of every [B, stride, ...] tensor, row after row."""
    count = max(lengths, default=0)
    if all(length == count for length in lengths):
        return tuple(field[:, :count].flatten(0, 1) for field in fields)
    index = flat_index(lengths, [0] * len(lengths), fields[0].shape[1]).to(fields[0].device)
    return tuple(field.flatten(0, 1)[index] for field in fields)


def flat_index(lengths: Sequence[int], starts: Sequence[int], stride: int) -> Int[Tensor, "T"]:
    """Flat indices of `lengths[b]` consecutive entries from `starts[b]` in row b of a [B, stride] tensor."""
    counts = torch.tensor(lengths, dtype=torch.int64)
    first = torch.arange(len(counts)) * stride + torch.tensor(starts, dtype=torch.int64)
    within = torch.arange(int(counts.sum())) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return torch.repeat_interleave(first, counts) + within


class Denoiser(nn.Module, ABC):
    """A model that predicts tokens at asked positions from known tokens.

    Training calls the module: `forward(batch)` gives every row's weighted sum of cross-entropies. Inference
    is stateful: `open` rows, `extend` them with known tokens, ask for `hidden` vectors at positions, and turn
    chunks of those into logits with `head`. Positions count tokens, BOS included where the data has one.

    Class labels (`condition`) are 0..C-1 for a model with C classes, and C or None for "no class". Registers
    are vectors that blocks may use as scratch space: they lie in front of every row and move its tokens'
    positions up by their number, inside the model only.

    Args:
        config: sizes, classes and registers.
        vocab_size: V, ids that can be predicted.
        length: L of the data that the model is trained on, BOS included where it has one.
        ids: ids that the model reads: V, and whatever mask, BOS or start there is beyond.

    Attributes:
        vocab_size: logits cover exactly these ids.
        embedding: a row for every id that is read, then one for every register.
        both_groups: learns from the tokens of both groups in one pass, else from those of group 1.
        reuses: can encode new tokens beside stored old ones.
        left_to_right: predicts a row's next token only, from all before; knows no groups.
        recompute: trade the memory of a block's activations for a second forward pass in training.
    """

    both_groups: bool = False
    reuses: bool = False
    left_to_right: bool = False
    recompute: bool = False

    def __init__(self, config: TrunkConfig, vocab_size: int, length: int, ids: int):
        super().__init__()
        self.vocab_size, self.length, self.registers = vocab_size, length, config.registers
        self.head_size, self.conditional = config.hidden // config.heads, config.classes is not None
        self.embedding = nn.Embedding(ids + config.registers, config.hidden)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.classes: nn.Embedding | None = None
        if config.classes is not None:
            self.classes = nn.Embedding(config.classes + 1, config.hidden)
            nn.init.normal_(self.classes.weight, std=0.02)
        self.final = FinalNorm(config.hidden, self.conditional)
        self.head = Head(config.hidden, vocab_size)

    def register_ids(self, device: torch.device) -> Int[Tensor, "R"]:
        """Rows of the embedding that hold the registers."""
        return torch.arange(self.registers, device=device) + self.embedding.num_embeddings - self.registers

    def losses(self, hidden: Float[Tensor, "Q H"], batch: Batch) -> Float[Tensor, "B"]:
        """Every row's weighted sum over its targets, from the vectors at `batch.target_index`."""
        if batch.teaching is not None:
            return batch.by_row(self.head(hidden, teaching=batch.teaching))
        return batch.by_row(self.head(hidden, batch.gather(batch.tokens, batch.target_index)))

    def class_vectors(self, labels: Int[Tensor, "B"] | None, rows: int) -> Float[Tensor, "B H"] | None:
        """The vector of every row's class, "no class" where there are no labels; None without classes."""
        if self.classes is None:
            return None
        if labels is None:
            labels = torch.full((rows,), self.classes.num_embeddings - 1)
        return self.classes(labels.to(self.head.weight.device, non_blocking=True))

    def run_block(self, block: nn.Module, *inputs: Any) -> Float[Tensor, "T H"]:
        """One block of the trunk; with `recompute` its activations are made again in the backward pass."""
        if self.recompute and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    @abstractmethod
    def forward(self, batch: Batch) -> Float[Tensor, "B"]:
        """Weighted sum over each row's targets of the cross-entropy, nats, float32."""

    @abstractmethod
    def logits(
        self,
        tokens: Int[Tensor, "B L"],
        groups: Bool[Tensor, "B L"],
        condition: Int[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B L V"]:
        """Logits at every position from the tokens of the other group.

        Raises:
            CapabilityError: class labels that the model has no vectors for, or a model without groups.
        """

    @abstractmethod
    def hidden(
        self, state: State, positions: Int[Tensor, "Q"], lengths: Sequence[int]
    ) -> Float[Tensor, "Q H"]:
        """Vectors for the head at packed positions, `lengths[b]` of them in row b."""

    def open(
        self,
        batch: int,
        condition: Int[Tensor, "B"] | None = None,
        capacity: int | None = None,
        refresh_every: int = 1,
    ) -> State:
        """A state of `batch` rows that know nothing yet and have room for `capacity` tokens each.

        Args:
            refresh_every: encode all known tokens at every so many predictions, and between them only the
                new ones, which read the stored keys and values of the old (1: exact).

        Raises:
            CapabilityError: class labels that the model has no vectors for, reuse where nothing is encoded.
        """
        if refresh_every != 1 and not self.reuses:
            raise CapabilityError(
                f"refresh_every: {refresh_every}; {type(self).__name__} keeps no encoder outputs, expected 1"
            )
        self.check_condition(condition, batch)
        capacity = self.length if capacity is None else capacity
        device = self.head.weight.device
        blank = torch.zeros(batch, capacity, dtype=torch.int64, device=device)
        return State(blank, blank.clone(), [0] * batch, condition, refresh_every=refresh_every)

    def extend(
        self, state: State, tokens: Int[Tensor, "T"], positions: Int[Tensor, "T"], lengths: Sequence[int]
    ) -> None:
        """Add packed known tokens, `lengths[b]` of them to row b."""
        assert max(map(sum, zip(state.lengths, lengths, strict=True))) <= state.tokens.shape[1], (
            "beyond capacity"
        )
        count, known = lengths[0], state.lengths[0]
        if all(n == count for n in lengths) and all(n == known for n in state.lengths):
            state.tokens[:, known : known + count] = tokens.view(len(lengths), -1)
            state.positions[:, known : known + count] = positions.view(len(lengths), -1)
        else:
            index = flat_index(lengths, state.lengths, state.tokens.shape[1]).to(state.tokens.device)
            state.tokens.view(-1)[index] = tokens
            state.positions.view(-1)[index] = positions
        state.lengths = [a + b for a, b in zip(state.lengths, lengths, strict=True)]

    def check_condition(self, labels: Tensor | None, rows: int) -> None:
        """Refuse class labels that this model has no vectors for.

        Raises:
            CapabilityError: labels for a model without classes, not one a row, or outside 0..C.
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


def conditioned(vectors: Float[Tensor, "B H"] | None, rows: Int[Tensor, "T"]) -> Condition | None:
    """Class vectors with the row that each packed token belongs to; None where there are no classes."""
    return None if vectors is None else Condition(vectors, rows)
