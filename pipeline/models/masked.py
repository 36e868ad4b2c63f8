"""Masked diffusion (MDLM, MaskGIT) with the blocks of the partition model: one bidirectional segment a row."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pipeline.config.model import MDLMConfig
from pipeline.models.attention import Segments
from pipeline.models.batch import Batch, State
from pipeline.models.blocks import SelfBlock
from pipeline.models.denoiser import Denoiser
from pipeline.models.layers import ClassVectors, Condition


class MDLM(Denoiser):
    """Masked tokens are replaced by a mask token, id V, and predicted by a bidirectional transformer.

    The complementary form learns from a row under both of its maskings, group 1 hidden and group 0 hidden, in
    one doubled batch: what PGM learns from a row, without its architecture. Given tokens are never masked. With
    classes and registers this is the network of MaskGIT.

    Args:
        config: sizes, and whether the model is complementary.
        vocab_size: V.
        length: L.
        bos: the data's BOS, or None.

    Source:
        arXiv 2406.07524; arXiv 2505.18883, section 5 (complementary masking); docs/method.md section 3.
    """

    def __init__(self, config: MDLMConfig, vocab_size: int, length: int, bos: int | None = None):
        super().__init__(config, vocab_size, length, ids=max(vocab_size + 1, 0 if bos is None else bos + 1))
        self.both_groups = config.complementary
        self.blocks = nn.ModuleList(SelfBlock(config) for _ in range(config.blocks))

    @property
    def mask(self) -> int:
        """Id of the mask token."""
        return self.vocab_size

    def target_vectors(self, batch: Batch) -> Float[Tensor, "Q H"]:
        """Compute the targets' vectors: from one masking, or from both in a doubled batch if both have targets.

        Args:
            batch: tokens, groups and targets.

        Returns:
            [Q, H], in the order of `batch.target_index`.
        """
        canvas, labels = torch.where(batch.groups, self.mask, batch.tokens), batch.condition
        extents = batch.extents
        index, length = batch.target_index, batch.shape[1]
        in_group_0 = ~batch.groups.flatten()[index]
        if in_group_0.any():
            seen = batch.groups | batch.known
            canvas = torch.cat([canvas, torch.where(seen, batch.tokens, self.mask)])
            labels = None if labels is None else torch.cat([labels, labels])
            extents = extents and extents * 2
            index = index + in_group_0 * batch.tokens.numel()
        vectors = self.class_vectors(labels, len(canvas))
        x = self._trunk(batch.send(canvas), vectors, extents)
        index = batch.send(index)
        rows = index // length
        return self.final(
            x[self.row_starts(rows, length, extents) + index % length], Condition(vectors, rows)
        )

    def hidden(
        self, state: State, positions: Int[Tensor, "Q"], lengths: Sequence[int]
    ) -> Float[Tensor, "Q H"]:
        """Compute vectors at positions, with all unknown tokens masked.

        Args:
            state: rows and their known tokens.
            positions: packed row after row.
            lengths: number of positions in every row.

        Returns:
            [Q, H].
        """
        state, lengths = state.active(lengths)  # the other rows need not be computed
        vectors = self.class_vectors(state.condition, len(lengths))
        tokens, known = state.known()
        canvas = torch.full((len(lengths), self.length), self.mask, device=tokens.device)
        canvas[Segments(state.lengths, tokens.device).ids, known] = tokens
        x = self._trunk(canvas, vectors, state.extents)
        rows = Segments(lengths, positions.device).ids
        return self.final(
            x[self.row_starts(rows, self.length, state.extents) + positions], Condition(vectors, rows)
        )

    def _trunk(
        self, canvas: Int[Tensor, "B L"], vectors: ClassVectors, extents: Sequence[int] | None
    ) -> Float[Tensor, "T H"]:
        """Vectors of registers and tokens, before the final norm; see `Denoiser.run_rows`."""
        ids = torch.cat([self.register_ids(canvas.device).expand(len(canvas), -1), canvas], 1)  # [B, R + L]
        return self.run_rows(self.blocks, ids, vectors, extents)
