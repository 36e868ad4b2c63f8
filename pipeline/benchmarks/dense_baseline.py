"""Simpler implementations of the same models for comparison: dense masks, all logits, all positions."""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.models.batch import Batch
from pipeline.models.blocks import CrossBlock, GroupSwap, SelfBlock
from pipeline.models.denoiser import Denoiser
from pipeline.models.layers import Rotary, rotary, rotate, sinusoid
from pipeline.models.pgm import PGM
from pipeline.sampling.logits import draw_tokens


def dense_loss(model: PGM, batch: Batch) -> Float[Tensor, "B"]:
    """Compute `model(batch)` from whole rows, with a dense mask for attention and all logits at once.

    Args:
        model: without registers, classes, pooling and further swaps.
        batch: with all positions as targets.

    Returns:
        The weighted loss of every row.
    """
    groups = batch.groups.to(batch.device)
    same = (groups[:, :, None] == groups[:, None, :])[:, None]  # [B, 1, L, L]
    rows, length = groups.shape
    places = torch.arange(length, device=batch.device)
    code = rotary(places.repeat(rows), model.head_size, model.head.weight.dtype)
    tokens = batch.tokens.to(batch.device)
    encoded = model.embedding(tokens.flatten())  # [B L, H]
    for encoder in model.encoder:
        assert isinstance(encoder, SelfBlock)
        encoded = _self_block(encoder, encoded, same, code)
    x = _swap(model.swap, encoded, places, ~same, code)
    for decoder in model.decoder:
        assert isinstance(decoder, CrossBlock)
        x = _cross_block(decoder, x, encoded, ~same, code)
    logits = model.head(model.final(x))  # [B L, V]
    losses = F.cross_entropy(logits, tokens.flatten(), reduction="none").view(rows, length)
    return (losses * batch.weights.to(batch.device)).sum(1)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Bool[Tensor, "B 1 L L"]) -> Float[Tensor, "T H"]:
    """Attention of all positions of a row; q, k and v are [B L, N, D]."""
    q, k, v = (x.unflatten(0, (len(mask), -1)).transpose(1, 2) for x in (q, k, v))  # [B, N, L, D]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return y.transpose(1, 2).flatten(0, 1).flatten(1)


def _self_block(block: SelfBlock, x: Tensor, mask: Tensor, code: Rotary) -> Tensor:
    """An encoder block."""
    modulated = block.modulated(None)
    q, k, v = block.qkv_proj(modulated.norm1(x)).chunk(3, 1)
    return block.residuals(x, _attention(rotate(q, code), rotate(k, code), v, mask), modulated)


def _cross_block(block: CrossBlock, x: Tensor, encoded: Tensor, mask: Tensor, code: Rotary) -> Tensor:
    """A decoder block."""
    modulated = block.modulated(None)
    q = block.q_proj(modulated.norm1(x))
    k, v = block.kv_proj(block.kv_norm(encoded)).chunk(2, 1)
    return block.residuals(x, _attention(rotate(q, code), rotate(k, code), v, mask), modulated)


def _swap(module: GroupSwap, encoded: Tensor, places: Tensor, mask: Tensor, code: Rotary) -> Tensor:
    """GroupSwap at all positions."""
    raw = module.base.expand(len(places), -1)
    if module.positional:
        raw = raw + sinusoid(places, raw.shape[-1])
    q = module.query(module.norm(raw)).repeat(len(mask), 1, 1)
    k, v = module.kv_proj(encoded).chunk(2, 1)
    return module.out(_attention(rotate(q, code), rotate(k, code), v, mask))


@torch.inference_mode()
def sample_every_position(model: Denoiser, rows: int, steps: int, seed: int) -> Int[Tensor, "B L"]:
    """Sample in the plain ancestral form: every step predicts all positions and draws over V in float64.

    Args:
        model: a masked model in eval mode.
        rows: number of rows.
        steps: number of steps.
        seed: of the noise.

    Returns:
        The tokens.

    Source:
        arXiv 2406.07524 (the posterior, drawn by Gumbel noise at every position).
    """
    length, vocab_size = model.length, model.vocab_size
    generator = torch.Generator().manual_seed(seed)
    state = model.open(rows)
    tokens = torch.full((rows, length), vocab_size)  # id V: hidden
    everywhere = torch.arange(length).repeat(rows)
    for step in range(steps):
        logits = model.head(model.hidden(state, everywhere, [length] * rows))
        probability = logits.double().softmax(-1)  # [B L, V]
        hidden_now, hidden_next = 1 - step / steps, 1 - (step + 1) / steps
        stays = probability.new_full((len(probability), 1), hidden_next)
        posterior = torch.cat([probability * (hidden_now - hidden_next), stays], -1)
        noise = torch.rand(posterior.shape, generator=generator, dtype=torch.float64)
        drawn = (posterior / -(noise + 1e-10).log()).argmax(-1).view(rows, length)
        new = (tokens == vocab_size) & (drawn != vocab_size)
        tokens = torch.where(new, drawn, tokens)
        model.extend(state, tokens[new], new.nonzero(as_tuple=True)[1], new.sum(1).tolist())
    return tokens


@torch.inference_mode()
def sample_every_hidden(model: Denoiser, rows: int, steps: int, seed: int) -> Int[Tensor, "B L"]:
    """Sample in uniform order, but predict and draw all hidden positions at every step and keep those of the step.

    Args:
        model: in eval mode.
        rows: number of rows.
        steps: number of steps.
        seed: of order and noise.

    Returns:
        The tokens.
    """
    length = model.length
    rng = np.random.default_rng(seed)
    hidden_positions = torch.from_numpy(np.stack([rng.permutation(length) for _ in range(rows)]))
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    state = model.open(rows)
    for step in range(steps):
        width = hidden_positions.shape[1]
        hidden = model.hidden(state, hidden_positions.flatten(), [width] * rows)
        noise = torch.from_numpy(rng.random(rows * width))
        count = length // steps + (step < length % steps)
        revealed, hidden_positions = hidden_positions[:, :count], hidden_positions[:, count:]
        drawn = draw_tokens(model.head, hidden, noise).tokens.view(rows, width)[:, :count]
        tokens.scatter_(1, revealed, drawn)
        model.extend(state, drawn.flatten(), revealed.flatten(), [count] * rows)
    return tokens
