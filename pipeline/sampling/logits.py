"""From hidden vectors to drawn tokens, a chunk of rows at a time."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.config.schema import SamplingConfig
from pipeline.errors import ConfigError
from pipeline.models.layers import LOGITS_AT_ONCE, Head, rows_at_once

# Entries of rows x V that are turned into draws together, by kind of device: 4 and 256 MiB.
_DOUBLES_AT_ONCE = {"cpu": 1 << 19, "cuda": 1 << 25}
_LEAST = math.log(torch.finfo(torch.float64).tiny)


@dataclass(frozen=True)
class Filters:
    """What is done to a distribution before a token is drawn from it.

    Attributes:
        temperature: logits are divided by it.
        top_k: only the k most likely tokens (None: all).
        top_p: only the most likely tokens that together reach this probability (nucleus; None: all).

    Raises:
        ConfigError: a value that leaves no distribution.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    @classmethod
    def of(cls, settings: SamplingConfig) -> "Filters":
        """The filters that a config names."""
        return cls(settings.temperature, settings.top_k, settings.top_p)

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(
                f"temperature: {self.temperature} is not above 0; use top_k=1 for the likeliest token"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k: {self.top_k}; expected at least 1, or None")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: {self.top_p}; expected above 0 and at most 1, or None")


class Drawn(NamedTuple):
    """Tokens, their log-probability and the entropy of what they were drawn from (nats, float64)."""

    tokens: Int[Tensor, "Q"]
    log_prob: Float[Tensor, "Q"]
    entropy: Float[Tensor, "Q"]


def draw_tokens(
    head: Head,
    hidden: Float[Tensor, "Q H"],
    noise: Float[Tensor, "Q"],
    filters: Filters = Filters(),
    unconditional: Float[Tensor, "Q H"] | None = None,
    guidance: float = 0.0,
) -> Drawn:
    """Draw one token a row from softmax(head(hidden)) by inverting the cumulative distribution in float64.

    Low precision makes categorical draws less diverse than the model is (method.md section 4). One uniform
    number a token, so what a sample draws depends on its own noise only, whatever rows are beside it.

    Args:
        unconditional: vectors of the same positions without class; with them logits are
            `(1 + w) log p(x | c) - w log p(x)` for w = `guidance`, before any filter.

    Shape:
        hidden: [Q, H]; noise: [Q] float64 uniforms in [0, 1); returns [Q] each. V-wide tensors exist for a
        chunk of rows only.
    """
    chunks = _chunks(head, hidden, noise, filters, unconditional, guidance)
    drawn = [_with_certainty(logits, u) for logits, u in chunks]
    if not drawn:
        return Drawn(noise.long(), noise, noise)
    return Drawn(*(torch.cat(parts) for parts in zip(*drawn, strict=True)))


def draw_ids(
    head: Head,
    hidden: Float[Tensor, "Q H"],
    noise: Float[Tensor, "Q"],
    filters: Filters = Filters(),
    unconditional: Float[Tensor, "Q H"] | None = None,
    guidance: float = 0.0,
) -> Int[Tensor, "Q"]:
    """The tokens of `draw_tokens` alone, for orders that do not ask how sure they are: several times as fast."""
    chunks = _chunks(head, hidden, noise, filters, unconditional, guidance)
    drawn = [_inverted(logits, u) for logits, u in chunks]
    return torch.cat(drawn) if drawn else noise.long()


def _chunks(
    head: Head,
    hidden: Float[Tensor, "Q H"],
    noise: Float[Tensor, "Q"],
    filters: Filters,
    unconditional: Float[Tensor, "Q H"] | None,
    guidance: float,
) -> Iterator[tuple[Float[Tensor, "q V"], Float[Tensor, "q"]]]:
    """Filtered logits in float64 and their noise, for some rows at a time.

    The head takes as many rows as its product likes, and what comes after it fewer, which stay in a CPU's cache.
    """
    rows, fewer = (
        rows_at_once(entries, head.vocab_size, hidden.device)
        for entries in (LOGITS_AT_ONCE, _DOUBLES_AT_ONCE)
    )
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        other = None if unconditional is None else unconditional[part]
        logits = _guided(head, hidden[part], other, guidance)
        for few, u in zip(logits.split(fewer), noise[part].split(fewer), strict=True):
            doubled = few.double()
            if filters.temperature != 1:
                doubled = doubled / filters.temperature
            yield _filtered(doubled, filters), u


def _guided(
    head: Head, hidden: Float[Tensor, "q H"], unconditional: Float[Tensor, "q H"] | None, guidance: float
) -> Float[Tensor, "q V"]:
    if unconditional is None:
        return head(hidden)
    with_class, without = (head(h).double().log_softmax(-1) for h in (hidden, unconditional))
    return (1 + guidance) * with_class - guidance * without


def _inverted(logits: Float[Tensor, "q V"], noise: Float[Tensor, "q"]) -> Int[Tensor, "q"]:
    """Ids at which the cumulative distribution passes the noise, which is stretched to the sum: no division."""
    cumulative = (logits - logits.amax(-1, keepdim=True)).exp_().cumsum_(-1)
    # `right`: the first id whose cumulative probability exceeds the noise, so never one of probability 0.
    found = torch.searchsorted(cumulative, (noise * cumulative[:, -1])[:, None], right=True)
    return found.clamp(max=cumulative.shape[-1] - 1).squeeze(1)


def _with_certainty(logits: Float[Tensor, "q V"], noise: Float[Tensor, "q"]) -> Drawn:
    log_prob = logits - logits.logsumexp(-1, keepdim=True)
    tokens = _inverted(logits, noise)
    # 0 log 0 is 0. A product with the logarithm: special.entr takes several times as long as all the rest.
    entropy = -(log_prob.exp() * log_prob.clamp(min=_LEAST)).sum(-1)
    return Drawn(tokens, log_prob.gather(1, tokens[:, None]).squeeze(1), entropy)


def _filtered(logits: Float[Tensor, "q V"], filters: Filters) -> Float[Tensor, "q V"]:
    """Logits with everything outside top-k and the nucleus at minus infinity."""
    if filters.top_k is not None and filters.top_k < logits.shape[-1]:
        smallest = logits.topk(filters.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if filters.top_p is not None and filters.top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        likely = ordered.softmax(-1)
        outside = likely.cumsum(-1) - likely >= filters.top_p  # what stands before already reaches top_p
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(1, index, outside), -torch.inf)
    return logits
