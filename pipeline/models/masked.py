"""Masked diffusion (MDLM, MaskGIT) on the trunk of the partition model: one bidirectional segment a row."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pipeline.config.schema import MDLMConfig
from pipeline.models.attention import Segments
from pipeline.models.blocks import SelfBlock
from pipeline.models.denoiser import Batch, Denoiser, State, conditioned
from pipeline.models.layers import rotary


class MDLM(Denoiser):
    """Masked tokens are replaced by a mask token, id V, and predicted by a bidirectional transformer.

    The complementary form learns from a row under both of its maskings, group 1 hidden and group 0 hidden, in
    one doubled batch: what PGM learns from a row, without its architecture. With classes and registers this
    is the network of MaskGIT.

    Source: arXiv 2406.07524; arXiv 2505.18883, section 5 (complementary masking); method.md section 3.
    """

    def __init__(self, config: MDLMConfig, vocab_size: int, length: int, bos: int | None = None):
        super().__init__(config, vocab_size, length, ids=max(vocab_size + 1, 0 if bos is None else bos + 1))
        self.both_groups = config.complementary
        self.blocks = nn.ModuleList(
            SelfBlock(config.hidden, config.heads, config.dropout, self.conditional)
            for _ in range(config.blocks)
        )

    @property
    def mask(self) -> int:
        """Id of the mask token."""
        return self.vocab_size

    def forward(self, batch: Batch) -> Float[Tensor, "B"]:
        self.check_condition(batch.condition, batch.shape[0])
        canvas, labels = torch.where(batch.groups, self.mask, batch.tokens), batch.condition
        index = batch.target_index
        in_zero = ~batch.groups.flatten()[index]
        if in_zero.any():
            assert self.both_groups, "a masked model predicts masked tokens only"
            canvas = torch.cat([canvas, torch.where(batch.groups, batch.tokens, self.mask)])
            labels = None if labels is None else torch.cat([labels, labels])
            index = index + in_zero * batch.tokens.numel()
        vectors = self.class_vectors(labels, len(canvas))
        x = self._trunk(canvas.to(batch.device, non_blocking=True), vectors)
        index = index.to(batch.device, non_blocking=True)
        x = self.final(x[index], conditioned(vectors, index // batch.shape[1]))
        return self.losses(x, batch)

    def logits(
        self,
        tokens: Int[Tensor, "B L"],
        groups: Bool[Tensor, "B L"],
        condition: Int[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B L V"]:
        """Two passes, one for each group as the masked one."""
        self.check_condition(condition, len(tokens))
        vectors = self.class_vectors(condition, len(tokens))
        rows = torch.arange(len(tokens), device=tokens.device).repeat_interleave(tokens.shape[1])
        one, zero = (
            self.head(
                self.final(
                    self._trunk(torch.where(masked, self.mask, tokens), vectors), conditioned(vectors, rows)
                )
            ).view(*tokens.shape, -1)
            for masked in (groups, ~groups)
        )
        return torch.where(groups[..., None], one, zero)

    def hidden(
        self, state: State, positions: Int[Tensor, "Q"], lengths: Sequence[int]
    ) -> Float[Tensor, "Q H"]:
        state, lengths = state.asked(lengths)  # the others need not be computed
        rows = len(lengths)
        width = max(self.length, state.tokens.shape[1])
        vectors = self.class_vectors(state.condition, rows)
        tokens, known = state.known()
        canvas = torch.full((rows, width), self.mask, device=tokens.device)
        canvas[Segments(state.lengths, tokens.device).ids, known] = tokens
        x = self._trunk(canvas, vectors)
        row = Segments(lengths, positions.device).ids
        return self.final(x[row * width + positions], conditioned(vectors, row))

    def _trunk(
        self, canvas: Int[Tensor, "B L"], vectors: Float[Tensor, "B H"] | None
    ) -> Float[Tensor, "B_times_L H"]:
        """Vectors of all tokens, registers left out, in front of the final norm."""
        rows = len(canvas)
        ids = torch.cat([self.register_ids(canvas.device).expand(rows, -1), canvas], 1)  # [B, R + L]
        segments = Segments([ids.shape[1]] * rows, canvas.device)
        code = rotary(torch.arange(ids.shape[1], device=canvas.device).repeat(rows), self.head_size)
        condition = conditioned(vectors, segments.ids)
        x = self.embedding(ids.flatten())
        for block in self.blocks:
            x = self.run_block(block, x, segments, code, condition)
        return x.unflatten(0, ids.shape)[:, self.registers :].flatten(0, 1)
