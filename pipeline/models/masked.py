"""Masked diffusion (MDLM) on the trunk of the partition model: one bidirectional segment a row."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pipeline.config.schema import MDLMConfig
from pipeline.models.attention import Segments
from pipeline.models.blocks import SelfBlock
from pipeline.models.denoiser import Batch, Denoiser, State
from pipeline.models.layers import Head, rotary


class MDLM(Denoiser):
    """Masked tokens are replaced by a mask token, id V, and predicted by a bidirectional transformer.

    Source: arXiv 2406.07524; method.md section 3.
    """

    def __init__(self, config: MDLMConfig, vocab_size: int, length: int):
        super().__init__()
        self.vocab_size, self.length = vocab_size, length
        self.head_size = config.hidden // config.heads
        self.embedding = nn.Embedding(vocab_size + 1, config.hidden)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(
            SelfBlock(config.hidden, config.heads, config.dropout) for _ in range(config.blocks)
        )
        self.head = Head(config.hidden, vocab_size)

    @property
    def mask(self) -> int:
        """Id of the mask token."""
        return self.vocab_size

    def forward(self, batch: Batch) -> Float[Tensor, "B"]:
        self.check_condition(batch.condition)
        assert not bool((batch.targets & ~batch.groups).any()), "a masked model predicts masked tokens only"
        canvas = torch.where(batch.groups, self.mask, batch.tokens).to(batch.device, non_blocking=True)
        x = self._trunk(canvas)[batch.target_index.to(batch.device, non_blocking=True)]
        return batch.by_row(self.head(x, batch.gather(batch.tokens, batch.target_index)))

    def logits(
        self,
        tokens: Int[Tensor, "B L"],
        groups: Bool[Tensor, "B L"],
        condition: Int[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B L V"]:
        """Two passes, one for each group as the masked one."""
        self.check_condition(condition)
        one, zero = (
            self.head(self._trunk(torch.where(masked, self.mask, tokens))).view(*tokens.shape, -1)
            for masked in (groups, ~groups)
        )
        return torch.where(groups[..., None], one, zero)

    def hidden(
        self, state: State, positions: Int[Tensor, "Q"], lengths: Sequence[int]
    ) -> Float[Tensor, "Q H"]:
        rows = len(state.lengths)
        width = max(self.length, state.tokens.shape[1])
        if state.memory is None:
            tokens, known = state.known()
            row = torch.repeat_interleave(torch.tensor(state.lengths)).to(tokens.device)
            canvas = torch.full((rows, width), self.mask, device=tokens.device)
            canvas[row, known] = tokens
            state.memory = self._trunk(canvas)
        row = torch.repeat_interleave(torch.tensor(list(lengths))).to(positions.device)
        return state.memory[row * width + positions]

    def _trunk(self, canvas: Int[Tensor, "B L"]) -> Float[Tensor, "B_times_L H"]:
        rows, length = canvas.shape
        segments = Segments([length] * rows, canvas.device)
        code = rotary(torch.arange(length, device=canvas.device).repeat(rows), self.head_size)
        x = self.embedding(canvas.flatten())
        for block in self.blocks:
            x = self.run_block(block, x, segments, code)
        return x
