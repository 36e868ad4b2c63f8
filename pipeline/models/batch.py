"""What models are given: a batch of rows for training and likelihoods, or the state of rows that are being drawn."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from pipeline.models.attention import CacheAppend
from pipeline.models.head import DistillTargets

T = TypeVar("T")
Labels = Int[Tensor, "B"] | None  # class labels of a batch's rows


class Roles(NamedTuple):
    """What the tokens of rows are: given ones, targets, and padding at the end.

    Attributes:
        given: position behind the given tokens of every row, which are known from the start. Both groups read them,
            and they are never targets. In a row of 0 a BOS is no target either, but of group 0 alone.
        lengths: tokens of every row; the others are padding, which no token reads and nothing is computed for.
        first: position of the first given token of every row; None: 0, so that `given` counts them, BOS included.

    Source:
        docs/method.md section 10.
    """

    given: Int[np.ndarray, "B"]
    lengths: Int[np.ndarray, "B"]
    first: Int[np.ndarray, "B"] | None = None

    @classmethod
    def concatenate(cls, parts: Sequence["Roles"]) -> "Roles":
        """Join the roles of rows whose given tokens begin at 0.

        Args:
            parts: one after the other.
        """
        return cls(*(np.concatenate(values) for values in zip(*(part[:2] for part in parts), strict=True)))

    def targets(self, length: int, bos: bool) -> Bool[np.ndarray, "B L"]:
        """Find the positions that can be predicted.

        Args:
            length: L.
            bos: position 0 holds BOS, which is no target.

        Returns:
            [B, L], True = neither given nor padding.
        """
        places = np.arange(length)
        return ~self.known(length) & (places >= bos) & (places < self.lengths[:, None])

    def known(self, length: int) -> Bool[np.ndarray, "B L"]:
        """Find the given positions.

        Args:
            length: L.
        """
        places = np.arange(length)
        known = places < self.given[:, None]
        return known if self.first is None else known & (places >= self.first[:, None])

    def counts(self, bos: bool) -> Int[np.ndarray, "B"]:
        """Count the positions of every row that can be predicted.

        Args:
            bos: position 0 holds BOS, which is no target.
        """
        if self.first is None:
            return self.lengths - np.maximum(self.given, int(bos))
        return self.targets(int(self.lengths.max(initial=0)), bos).sum(1)

    def rows(self, index: Int[np.ndarray, "m"] | slice) -> "Roles":
        """Select the roles of some rows.

        Args:
            index: of the rows.
        """
        return Roles(
            self.given[index], self.lengths[index], None if self.first is None else self.first[index]
        )


@dataclass(frozen=True)
class Batch:
    """Rows of tokens split into two groups, and which of them are predicted.

    Built on the host, so that every length and index that shapes a kernel call is known without waiting for a
    device.

    Attributes:
        tokens: [B, L] ids.
        groups: [B, L], True = group 1 (the masked side at time t).
        targets: [B, L], which positions are predicted; never BOS.
        weights: [B, L] float32 loss weight of every position.
        condition: [B] class labels, or None.
        device: where the model computes.
        order: [B, L] distinct ranks by which the tokens of every row are revealed, which a causal encoder reads them
            in; None: ascending positions.
        distill_targets: a teacher's predictions, to be learned in place of the tokens.
        lengths: [B] tokens of every row, as in `Roles`; None: rows have no padding.
        given: [B] position behind the given tokens of every row, as in `Roles`; None: rows have none.
        first: [B] position of the first given token of every row, as in `Roles`; None: 0.
        computed: what `once` keeps.
    """

    tokens: Int[Tensor, "B L"]
    groups: Bool[Tensor, "B L"]
    targets: Bool[Tensor, "B L"]
    weights: Float[Tensor, "B L"]
    condition: Labels = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    order: Int[Tensor, "B L"] | None = None
    distill_targets: DistillTargets | None = None
    lengths: Int[Tensor, "B"] | None = None
    given: Int[Tensor, "B"] | None = None
    first: Int[Tensor, "B"] | None = None
    computed: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of_arrays(
        cls,
        tokens: Int[np.ndarray, "B L"],
        groups: Bool[np.ndarray, "B L"],
        targets: Bool[np.ndarray, "B L"],
        weights: Float[np.ndarray, "B L"],
        *,
        labels: Int[np.ndarray, "B"] | None = None,
        order: Int[np.ndarray, "B L"] | None = None,
        roles: Roles | None = None,
        device: torch.device,
    ) -> "Batch":
        """Make a batch of NumPy arrays.

        Args:
            tokens: ids.
            groups: True = group 1.
            targets: which positions are predicted.
            weights: loss weight of every position.
            labels: class labels, or None.
            order: ranks of revelation, or None.
            roles: given tokens and padding of the rows; None: neither.
            device: where the model computes.

        Returns:
            The batch, on the host.
        """
        tensor = torch.from_numpy
        given, lengths, first = roles or (None, None, None)
        fields = (labels, order, lengths, given, first)
        condition, ranks, extents, behind, begin = (None if x is None else tensor(x) for x in fields)
        return cls(
            tensor(tokens),
            tensor(groups),
            tensor(targets),
            tensor(weights.astype(np.float32)),
            condition,
            device,
            ranks,
            lengths=extents,
            given=behind,
            first=begin,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(B, L)."""
        return self.tokens.shape[0], self.tokens.shape[1]

    @property
    def extents(self) -> list[int] | None:
        """`lengths` as host integers."""
        return None if self.lengths is None else self.lengths.tolist()

    @property
    def padding(self) -> Bool[Tensor, "B L"]:
        """Which positions hold no token."""
        if self.lengths is None:
            return torch.zeros_like(self.groups)
        return torch.arange(self.shape[1]) >= self.lengths[:, None]

    @property
    def known(self) -> Bool[Tensor, "B L"]:
        """Which positions hold given tokens."""
        if self.given is None:
            return torch.zeros_like(self.groups)
        places = torch.arange(self.shape[1])
        known = places < self.given[:, None]
        return known if self.first is None else known & (places >= self.first[:, None])

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """Compute something once for this batch and its copies by `replace`, perhaps ahead (`Denoiser.prepare`).

        Args:
            key: what it is.
            make: computes it.
        """
        if key not in self.computed:
            self.computed[key] = make()
        return self.computed[key]

    @property
    def target_index(self) -> Int[Tensor, "Q"]:
        """Flat indices of the targets: row by row, group 1 before group 0, then by position."""
        return self.once("target_index", self._target_index)

    @property
    def sent(self) -> "SentTargets":
        """The targets on the batch's device."""
        return self.once("sent", self._sent)

    @property
    def on_device(self) -> Iterator[Tensor]:
        """The tensors that were computed ahead on a GPU."""
        for value in self.computed.values():
            for part in value if isinstance(value, tuple) else [value]:
                if isinstance(part, Tensor) and part.is_cuda:
                    yield part

    def _target_index(self) -> Int[Tensor, "Q"]:
        """Compute `target_index`."""
        key = torch.where(self.targets, (~self.groups).long(), 2)  # 0: group 1, 1: group 0, 2: no target
        order = key.argsort(dim=1, stable=True) + torch.arange(self.shape[0])[:, None] * self.shape[1]
        return order[torch.arange(self.shape[1]) < self.targets.sum(1, keepdim=True)]

    def _sent(self) -> "SentTargets":
        """Send the targets to the device."""
        index = self.target_index
        values = self.gather(self.tokens, index), self.gather(self.weights, index)
        return SentTargets(self.send(index), self.send(index // self.shape[1]), *values)

    def send(self, values: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """Copy a tensor from the host to the batch's device, without waiting for either."""
        if self.device.type == "cuda":
            values = values.pin_memory()  # from other memory, the host waits for the copy
        return values.to(self.device, non_blocking=True)

    def gather(self, values: Shaped[Tensor, "B _"], index: Int[Tensor, "T"]) -> Shaped[Tensor, "T"]:
        """Select entries of a field.

        Args:
            values: the field, on the host.
            index: flat indices into it.

        Returns:
            [T] entries, on the batch's device.
        """
        return self.send(values.flatten()[index])

    def row_sums(self, values: Float[Tensor, "Q"]) -> Float[Tensor, "B"]:
        """Sum values of the targets over every row.

        Args:
            values: of the targets, in the order of `target_index`.

        Returns:
            [B] float32.
        """
        # float64: added one by one in float32, a thousand equal terms drift by 1e-5.
        sums = torch.zeros(self.shape[0], dtype=torch.float64, device=self.device)
        return sums.index_add(0, self.sent.rows, values.double()).float()


class SentTargets(NamedTuple):
    """The targets of a batch on its device, in the order of `Batch.target_index`.

    Attributes:
        places: `Batch.target_index`.
        rows: of the targets.
        tokens: their ids.
        weights: their loss weights.
    """

    places: Int[Tensor, "Q"]
    rows: Int[Tensor, "Q"]
    tokens: Int[Tensor, "Q"]
    weights: Float[Tensor, "Q"]


@dataclass
class State:
    """What a model knows of the rows that are being sampled or scored.

    Attributes:
        tokens: [B, L] known tokens of every row, in the order in which they were added.
        positions: [B, L] their positions.
        lengths: number of known tokens of every row, host integers.
        condition: [B] class labels, or None.
        memory: what the model keeps from one prediction to the next, if anything.
        refresh_every: predictions from one full encoding to the next.
        extents: tokens that every row will have, the rest being padding; None: L.
    """

    tokens: Int[Tensor, "B L"]
    positions: Int[Tensor, "B L"]
    lengths: list[int]
    condition: Labels = None
    memory: Any = None
    refresh_every: int = 1
    extents: list[int] | None = None

    def active(self, lengths: Sequence[int]) -> tuple["State", list[int]]:
        """Select the rows that a prediction is needed of.

        Args:
            lengths: number of positions to predict in every row.

        Returns:
            A state of the rows with at least one position, without their memory, and their `lengths`.
        """
        rows = [row for row, count in enumerate(lengths) if count]
        if len(rows) == len(lengths):
            return self, list(lengths)
        condition = None if self.condition is None else self.condition[rows]
        known = [self.lengths[row] for row in rows]
        index = torch.tensor(rows, dtype=torch.int64).to(self.tokens.device, non_blocking=True)
        state = State(self.tokens[index], self.positions[index], known, condition=condition)
        state.extents = None if self.extents is None else [self.extents[row] for row in rows]
        return state, [lengths[row] for row in rows]

    def known(self) -> tuple[Int[Tensor, "T"], Int[Tensor, "T"]]:
        """Collect the known tokens.

        Returns:
            Their ids and their positions, packed row after row.
        """
        tokens, positions = packed(self.lengths, self.tokens, self.positions)
        return tokens, positions


class NewTokens(NamedTuple):
    """Tokens to add to what a model keeps, as many in every row; some may stand for no token.

    Attributes:
        ids: of the tokens.
        positions: of the tokens.
        slots: of the tokens in the caches; -1 for those that stand for no token.
        filled: slots of every row that are filled afterwards.
    """

    ids: Int[Tensor, "B new"]
    positions: Int[Tensor, "B new"]
    slots: Int[Tensor, "B new"]
    filled: Int[Tensor, "B"]


def packed(lengths: Sequence[int], *fields: Shaped[Tensor, "B _ ..."]) -> list[Shaped[Tensor, "T ..."]]:
    """Select the first entries of every row.

    Args:
        lengths: number of entries in every row.
        *fields: tensors with the same rows.

    Returns:
        The first `lengths[b]` entries of row b of every field, packed row after row.
    """
    append = CacheAppend([0] * len(lengths), lengths, fields[0].shape[1], fields[0].device)
    return [append.take(values) for values in fields]
