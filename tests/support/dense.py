"""The models once more as plain formulas: whole rows, one dense mask, no packing, sorting or caching."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.autoregressive import AR
from pipeline.models.blocks import CrossBlock, GroupSwap, SelfBlock
from pipeline.models.layers import rotary, sinusoid
from pipeline.models.masked import MDLM
from pipeline.models.pgm import PGM


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """[T, N, D] each, mask [T, T]; queries that see nothing get 0. Returns [T, H]."""
    scores = torch.einsum("qnd,knd->nqk", q, k) / q.shape[-1] ** 0.5
    seen = mask.any(1)
    scores = torch.where(seen[:, None], scores.masked_fill(~mask, -torch.inf), 0.0)
    return (torch.einsum("nqk,knd->qnd", scores.softmax(-1), v) * seen[:, None, None]).flatten(1)


def turn(x: Tensor) -> Tensor:
    """Rotary positions 0, 1, ..., by the formula for the two entries of every pair."""
    code = rotary(torch.arange(len(x)), x.shape[-1], x.dtype)
    even, odd = x[..., ::2], x[..., 1::2]
    turned = even * code.real - odd * code.imag, odd * code.real + even * code.imag
    return torch.stack(turned, -1).flatten(-2)


def self_block(block: SelfBlock, x: Tensor, mask: Tensor) -> Tensor:
    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation()
    q, k, v = block.qkv_proj(block.norm1(x, shift1, scale1)).chunk(3, 1)
    x = x + gate1 * F.linear(attention(turn(q), turn(k), v, mask), block.out.weight)
    up, down = block.mlp.up, block.mlp.down
    return x + gate2 * F.linear(up(block.norm2(x, shift2, scale2)), down.weight, down.bias)


def cross_block(block: CrossBlock, x: Tensor, read: Tensor, mask: Tensor) -> Tensor:
    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation()
    q = block.q_proj(block.q_norm(x, shift1, scale1))
    k, v = block.kv_proj(block.kv_norm(read)).chunk(2, 1)
    x = x + gate1 * F.linear(attention(turn(q), turn(k), v, mask), block.out.weight)
    up, down = block.mlp.up, block.mlp.down
    return x + gate2 * F.linear(up(block.norm2(x, shift2, scale2)), down.weight, down.bias)


def swap(module: GroupSwap, read: Tensor, mask: Tensor) -> Tensor:
    raw = module.base.expand(len(read), -1)
    if module.positional:
        raw = raw + sinusoid(torch.arange(len(read)), raw.shape[-1]).to(raw.dtype)
    if module.pooling != "none":
        pool = torch.mean if module.pooling == "mean" else torch.logsumexp
        raw = raw + torch.stack([pool(read[m], 0) if m.any() else torch.zeros_like(read[0]) for m in mask])
    q = module.query(module.norm(raw))
    k, v = module.kv_proj(read).chunk(2, 1)
    return module.out(attention(turn(q), turn(k), v, mask))


def all_logits(model: PGM | MDLM | AR, x: Tensor) -> Tensor:
    """[T, H] outputs of the last block -> [T, V], of all ids at every position."""
    return F.linear(model.final(x), model.head.weight, model.head.bias)


def pgm_logits(
    model: PGM,
    tokens: Tensor,
    groups: Tensor,
    given: int = 0,
    order: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """[L] ids, [L] groups -> [L, V]; both groups read tokens `first` to `given`, a causal encoder in `order`."""
    registers = torch.arange(model.registers)
    ids = torch.cat([model.register_ids(torch.device("cpu")), tokens])
    groups = torch.cat([registers < model.registers // 2, groups])
    places = torch.arange(len(ids)) - model.registers
    known = (places >= first) & (places < given)
    ranks = torch.arange(len(ids))
    if order is not None:
        ranks[model.registers :] = model.registers + order
    logits = []
    for side in (False, True):  # of the tokens that are read
        keys = (groups == side) | known
        mask = (keys[:, None] & keys).logical_and((ranks[:, None] >= ranks) | (not model.causal))
        reads = keys.expand(len(ids), -1)
        read = model.embedding(ids)
        for block in model.encoder:
            read = self_block(block, read, mask)
        x = swap(model.swap, read, reads)
        for index, block in enumerate(model.decoder):
            if index and model.later_swaps:
                x = x + swap(model.later_swaps[index - 1], read, reads)
            x = cross_block(block, x, read, reads)
        logits.append(all_logits(model, x))
    return torch.where(groups[:, None], *logits)[model.registers :]


def trunk_logits(model: MDLM | AR, ids: Tensor, causal: bool) -> Tensor:
    """Logits in every slot of a row behind the registers."""
    ids = torch.cat([model.register_ids(torch.device("cpu")), ids])
    mask = torch.ones(len(ids), len(ids), dtype=torch.bool)
    x = model.embedding(ids)
    for block in model.blocks:
        x = self_block(block, x, mask.tril() if causal else mask)
    return all_logits(model, x)[model.registers :]


def mdlm_logits(model: MDLM, tokens: Tensor, groups: Tensor) -> Tensor:
    """[L] ids, [L] groups -> [L, V]: each group hidden behind masks once."""
    one, zero = (
        trunk_logits(model, torch.where(hidden, model.mask, tokens), causal=False)
        for hidden in (groups, ~groups)
    )
    return torch.where(groups[:, None], one, zero)


def ar_logits(model: AR, tokens: Tensor) -> Tensor:
    """[L] ids -> [L, V]: at every position from all before it."""
    return trunk_logits(model, torch.cat([torch.tensor(model.starts), tokens[:-1]]), causal=True)
