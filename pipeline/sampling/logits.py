"""From hidden vectors to drawn tokens, a chunk of rows at a time."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.models.layers import LOGITS_AT_ONCE, Head


def draw_tokens(head: Head, hidden: Float[Tensor, "Q H"], noise: Float[Tensor, "Q"]) -> Int[Tensor, "Q"]:
    """Draw one token a row from softmax(head(hidden)) by inverting the cumulative distribution in float64.

    Low precision makes categorical draws less diverse than the model is (method.md section 4). One uniform
    number a token, so what a sample draws depends on its own noise only, whatever rows are beside it.

    Shape:
        hidden: [Q, H]; noise: [Q] float64 uniforms in [0, 1); returns [Q] ids. V-wide tensors exist for a
        chunk of rows only.
    """
    rows = max(1, LOGITS_AT_ONCE // head.vocab_size)
    drawn = [_invert(head(h), u) for h, u in zip(hidden.split(rows), noise.split(rows), strict=True)]
    return torch.cat(drawn) if drawn else noise.long()


def _invert(logits: Float[Tensor, "q V"], noise: Float[Tensor, "q"]) -> Int[Tensor, "q"]:
    cumulative = logits.double().softmax(-1).cumsum(-1)
    # `right`: the first id whose cumulative probability exceeds the noise, so never one of probability 0.
    found = torch.searchsorted(cumulative, (noise * cumulative[:, -1])[:, None], right=True)
    return found.squeeze(1).clamp(max=logits.shape[-1] - 1)
