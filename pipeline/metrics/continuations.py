"""What a model thinks of continuations of prompts: bounds on their likelihood, and whether it would write them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool

from pipeline.diffusion.partition import draw_subset, stratified
from pipeline.errors import ConfigError
from pipeline.models.autoregressive import AR
from pipeline.models.denoiser import Batch, Denoiser
from pipeline.models.layers import CHUNK_LOGITS, chunk_rows
from pipeline.seeds import text_seed

Pair = tuple[Sequence[int], Sequence[int]]  # ids of a prompt and of its continuation


@dataclass(frozen=True)
class Continuation:
    """What a model thinks of a continuation of a prompt.

    Attributes:
        nats: bound on -log p(continuation | prompt), of the whole continuation; exact for AR.
        stderr: standard error over draws.
        tokens: of the continuation.
    """

    nats: float
    stderr: float
    tokens: int


@torch.inference_mode()
def score_continuations(
    model: Denoiser,
    pairs: Sequence[Pair],
    draws: int = 32,
    seed: int = 0,
    bos: int | None = None,
    batch: int = 32,
) -> list[Continuation]:
    """The `count` bound of continuations given prompts (the exact value for AR), batched over pairs and draws.

    The prompt is known throughout; n tokens of the continuation are hidden, n uniform and stratified over the
    draws; what lies behind the continuation is unknown to the model. What is hidden depends on the continuation's
    ids and the seed: a score does not depend on other pairs, and prompts of one continuation compare with less noise.

    Args:
        batch: rows of a forward pass, of as many pairs as fit with all their draws.

    Raises:
        ConfigError: an empty continuation, or a pair longer than a row.
    """
    _check(model, pairs, bos)
    draws = 1 if model.left_to_right else draws
    portion = max(1, batch // draws)
    found: list[Continuation] = []
    for first in range(0, len(pairs), portion):
        part = pairs[first : first + portion]
        nats = torch.cat(
            [model(rows).double().cpu() for rows in _hidden_rows(model, part, draws, seed, bos, batch)]
        )
        for (_, continuation), values in zip(part, nats.view(len(part), draws), strict=True):
            spread = float(values.std()) / math.sqrt(draws) if draws > 1 else 0.0
            found.append(Continuation(float(values.mean()), spread, len(continuation)))
    return found


@torch.inference_mode()
def greedy_matches(
    model: Denoiser, pairs: Sequence[Pair], bos: int | None = None, batch: int = 32
) -> list[bool]:
    """Whether the likeliest token stands at every position of a continuation, in one pass.

    An autoregressive model sees, at each position, the continuation before it; the others see the prompt alone,
    as when they draw all of it in one step.

    Raises:
        ConfigError: an empty continuation, or a pair longer than a row.
    """
    _check(model, pairs, bos)
    found: list[bool] = []
    device = model.head.weight.device
    for first in range(0, len(pairs), batch):
        part = pairs[first : first + batch]
        given = [([] if bos is None else [bos], *pair) for pair in part]
        known = [[*start, *prompt] for start, prompt, _ in given]
        wanted = [list(continuation) for _, _, continuation in given]
        if isinstance(model, AR):
            (rows,) = _hidden_rows(model, part, 1, 0, bos, len(part))
            hidden = model.target_vectors(rows)
        else:
            state = model.open(len(part))
            model.extend(state, *_packed(known, [range(len(k)) for k in known], device), [*map(len, known)])
            places = [range(len(k), len(k) + len(w)) for k, w in zip(known, wanted, strict=True)]
            hidden = model.hidden(state, _packed(places, [], device)[0], [*map(len, wanted)])
        size = chunk_rows(CHUNK_LOGITS, model.vocab_size, hidden.device)
        likeliest = torch.cat([model.head(chunk).argmax(-1) for chunk in hidden.split(size)])
        hits = likeliest.cpu() == torch.tensor([token for ids in wanted for token in ids])
        found += [bool(row.all()) for row in hits.split([*map(len, wanted)])]
    return found


def windows(prompt: Sequence[int], continuation: Sequence[int], room: int) -> list[Pair]:
    """A prompt and a continuation of any length as pairs that fit in `room` tokens.

    Their bounds add up to one of the whole. A prompt loses its beginning; a continuation that leaves it less
    than half of the room is cut, and every piece is the prompt of the next, as far back as fits.
    """
    if len(continuation) <= max(room - len(prompt), room // 2):
        return [(prompt[len(prompt) - min(len(prompt), room - len(continuation)) :], continuation)]
    whole = [*prompt, *continuation]
    pieces: list[Pair] = []
    done = len(prompt)
    while done < len(whole):
        new = min(len(whole) - done, max(room - done, room // 2, 1))
        pieces.append((whole[max(0, done + new - room) : done], whole[done : done + new]))
        done += new
    return pieces


def _check(model: Denoiser, pairs: Sequence[Pair], bos: int | None) -> None:
    room = model.length - (bos is not None)
    for number, (prompt, continuation) in enumerate(pairs):
        if not continuation or len(prompt) + len(continuation) > room:
            raise ConfigError(
                f"pair {number}: {len(prompt)} + {len(continuation)} tokens; expected a continuation of at least "
                f"one token and at most {room} in all"
            )


def _hidden_rows(
    model: Denoiser, pairs: Sequence[Pair], draws: int, seed: int, bos: int | None, batch: int
) -> list[Batch]:
    """Every pair `draws` times, some of its continuation hidden and asked, and all that lies behind it hidden."""
    start, length = int(bos is not None), model.length
    tokens = np.zeros((len(pairs), draws, length), np.int64)
    groups = np.ones((len(pairs), draws, length), bool)
    weights = np.zeros((len(pairs), draws, length))
    for pair, (prompt, continuation) in enumerate(pairs):
        begin, end = start + len(prompt), start + len(prompt) + len(continuation)
        tokens[pair, :, start:end] = [*prompt, *continuation]
        tokens[pair, :, :start] = bos or 0
        groups[pair, :, :end] = False
        if model.left_to_right:
            groups[pair, :, begin:end], weights[pair, :, begin:end] = True, 1
            continue
        rng = np.random.default_rng(text_seed(seed, continuation))
        n = 1 + np.floor(stratified(draws, rng) * len(continuation)).astype(np.int64)
        hidden: Bool[np.ndarray, "draws n"] = draw_subset(rng, n, len(continuation), bos=False)
        groups[pair, :, begin:end] = hidden
        weights[pair, :, begin:end] = hidden * (len(continuation) / n[:, None])
    flat = [torch.from_numpy(x.reshape(-1, length)).split(batch) for x in (tokens, groups, weights)]
    device = model.head.weight.device
    return [Batch(t, g, w > 0, w.float(), device=device) for t, g, w in zip(*flat, strict=True)]


def _packed(
    first: Sequence[Sequence[int]], second: Sequence[Sequence[int]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged rows as packed tensors."""
    packed = [torch.tensor([i for row in rows for i in row], dtype=torch.int64) for rows in (first, second)]
    return packed[0].to(device), packed[1].to(device)
