"""From hidden vectors to drawn tokens, a chunk of rows at a time."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline import arguments
from pipeline.config.evaluation import LARGEST_SETTING, LEAST_TEMPERATURE
from pipeline.errors import ConfigError
from pipeline.models.head import CHUNK_LOGITS, Head, chunk_rows

# Largest number of logits (rows x V) that are drawn from together in float64, by device type: 4 and 256 MiB.
_CHUNK_DOUBLES = {"cpu": 1 << 19, "cuda": 1 << 25}
_LEAST = math.log(torch.finfo(torch.float64).tiny)


@dataclass(frozen=True)
class Filters:
    """Changes to a distribution before a token is drawn from it.

    Attributes:
        temperature: logits are divided by it; 1e-6 to 1e6.
        top_k: only the k most likely tokens (None: all).
        top_p: only the most likely tokens that together reach this probability (nucleus; None: all).

    Raises:
        ConfigError: a value that leaves no distribution.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.temperature, int | float) and self.temperature == 0:
            raise ConfigError("temperature: 0; expected above 0; top_k=1 takes the likeliest token")
        arguments.number("temperature", self.temperature, LEAST_TEMPERATURE, LARGEST_SETTING)
        if self.top_k is not None:
            object.__setattr__(self, "top_k", arguments.integer("top_k", self.top_k, 1))
        if self.top_p is not None and arguments.number("top_p", self.top_p, 0, 1) == 0:
            raise ConfigError("top_p: 0; expected above 0 and at most 1, or None")


class Guidance(NamedTuple):
    """Classifier-free guidance: logits become `(1 + w) log p(x | c) - w log p(x)`.

    Attributes:
        unconditional: [Q, H] vectors of the same positions without class.
        weight: w.
    """

    unconditional: Float[Tensor, "Q H"]
    weight: float | Float[Tensor, ""]


class Drawn(NamedTuple):
    """Drawn tokens.

    Attributes:
        tokens: ids.
        log_prob: log-probability of every token, nats, float64; empty if `certainty` was not requested.
        entropy: entropy of the distribution that it was drawn from, nats, float64; empty as `log_prob`.
    """

    tokens: Int[Tensor, "*Q"]
    log_prob: Float[Tensor, "*Q"]
    entropy: Float[Tensor, "*Q"]


def draw_tokens(
    head: Head,
    hidden: Float[Tensor, "Q H"],
    noise: Float[Tensor, "Q"],
    filters: Filters = Filters(),
    guidance: Guidance | None = None,
    certainty: bool = False,
    places: Int[Tensor, "Q"] | None = None,
) -> Drawn:
    """Draw one token a row from softmax(head(hidden)) by inverting the cumulative distribution in float64.

    Low precision makes categorical draws less diverse than the model is (docs/method.md section 4). A row's token
    depends on its own vector and its own noise only, whatever rows are beside it.

    Args:
        head: maps vectors to logits; tensors with V entries a row exist for a chunk of rows only.
        hidden: vectors to draw from.
        noise: float64 uniforms in [0, 1), one a row.
        filters: temperature, top-k and nucleus, applied after guidance.
        guidance: vectors without class, and the weight of guidance.
        certainty: also compute log-probabilities and entropies, which takes several times as long.
        places: positions of the rows, for a head with modalities.

    Shape:
        hidden: [Q, H]; noise: [Q].

    Returns:
        Tokens [Q] and, with `certainty`, their log-probabilities and entropies.
    """
    # The head takes as many rows as suit its product; what follows takes fewer, which stay in a CPU's cache.
    head_rows, draw_rows = (
        chunk_rows(entries, head.vocab_size, hidden.device) for entries in (CHUNK_LOGITS, _CHUNK_DOUBLES)
    )
    drawn = [Drawn(noise[:0].long(), noise[:0], noise[:0])]
    for start in range(0, len(hidden), head_rows):
        part = slice(start, start + head_rows)
        own = None if places is None else places[part]
        logits = head(hidden[part], places=own)
        if guidance is not None:
            conditional, free = (
                x.double().log_softmax(-1) for x in (logits, head(guidance.unconditional[part], places=own))
            )
            logits = (1 + guidance.weight) * conditional - guidance.weight * free
        for chunk, uniform in zip(logits.split(draw_rows), noise[part].split(draw_rows), strict=True):
            drawn.append(_draw(_filtered(chunk.double(), filters), uniform, certainty))
    return Drawn(*(torch.cat(parts) for parts in zip(*drawn, strict=True)))


def _draw(logits: Float[Tensor, "q V"], noise: Float[Tensor, "q"], certainty: bool) -> Drawn:
    """Draw the ids at which the cumulative distribution passes the noise."""
    # The noise is scaled to the sum of the distribution, which needs no division.
    cumulative = (logits - logits.amax(-1, keepdim=True)).exp_().cumsum_(-1)
    # `right`: the first id whose cumulative probability exceeds the noise, so never one of probability 0.
    ids = torch.searchsorted(cumulative, (noise * cumulative[:, -1])[:, None], right=True)
    ids = ids.clamp(max=cumulative.shape[-1] - 1)
    if not certainty:
        return Drawn(ids.squeeze(1), noise[:0], noise[:0])
    log_prob = logits - logits.logsumexp(-1, keepdim=True)
    # 0 log 0 is 0. A product with the logarithm, since special.entr takes several times as long as the rest.
    entropy = -(log_prob.exp() * log_prob.clamp(min=_LEAST)).sum(-1)
    return Drawn(ids.squeeze(1), log_prob.gather(1, ids).squeeze(1), entropy)


def _filtered(logits: Float[Tensor, "q V"], filters: Filters) -> Float[Tensor, "q V"]:
    """Logits divided by the temperature, with everything outside top-k and the nucleus at minus infinity."""
    if filters.temperature != 1:
        logits = logits / filters.temperature
    if filters.top_k is not None and filters.top_k < logits.shape[-1]:
        smallest = logits.topk(filters.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if filters.top_p is not None and filters.top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        likely = ordered.softmax(-1)
        outside = likely.cumsum(-1) - likely >= filters.top_p  # the tokens before already reach top_p
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(1, index, outside), -torch.inf)
    return logits
