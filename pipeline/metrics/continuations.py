"""Continuations of prompts: bounds on their likelihood, and whether a model would generate them greedily."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int

from pipeline.diffusion.partition import draw_subset, stratified
from pipeline.errors import ConfigError
from pipeline.models.autoregressive import AR
from pipeline.models.batch import Batch, Roles
from pipeline.models.denoiser import Denoiser
from pipeline.models.head import CHUNK_LOGITS, chunk_rows
from pipeline.sampling.row_ends import RowEnds, with_end
from pipeline.seeds import text_seed

Pair = tuple[Sequence[int], Sequence[int]]  # ids of a prompt and of its continuation


@dataclass(frozen=True)
class Continuation:
    """The likelihood of a continuation of a prompt.

    Attributes:
        nats: bound on -log p(continuation | prompt), of the whole continuation; exact for AR.
        stderr: standard error over draws, 0 for AR; nan for a single draw.
        tokens: number of tokens of the continuation.
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
    progress: Callable[[int, int], None] | None = None,
    whole: bool = False,
) -> list[Continuation]:
    """Compute the `count` bound of continuations given prompts (the exact value for AR).

    The prompt is known in all draws; n tokens of the continuation are hidden, n uniform and stratified over the
    draws; positions behind the continuation are unknown to the model, or padding. The masks depend only on the ids of
    the continuation and the seed: a score does not depend on other pairs, and several prompts of one continuation
    compare with less noise.

    Args:
        model: in eval mode.
        pairs: ids of prompts and continuations.
        draws: maskings of every continuation.
        seed: of the maskings.
        bos: id of the token at position 0, if rows begin with one.
        batch: rows of a forward pass.
        progress: called with (pairs done, pairs) after every few of them.
        whole: rows end behind the continuation, as the answers do that a model was fine-tuned on; False: they go on,
            unknown to the model.

    Raises:
        ConfigError: an empty continuation, or a pair longer than a row.
    """
    _check(model, pairs, bos)
    draws, unknown = (1, 0.0) if model.left_to_right else (draws, math.nan)
    portion = max(1, batch // draws)
    scores = []
    for first in range(0, len(pairs), portion):
        part = pairs[first : first + portion]
        batches = _masked_rows(model, part, draws, seed, bos=bos, batch=batch, whole=whole)
        nats = torch.cat([model(rows).double().cpu() for rows in batches]).view(len(part), draws)
        for (_, continuation), values in zip(part, nats, strict=True):
            stderr = float(values.std()) / math.sqrt(draws) if draws > 1 else unknown
            scores.append(Continuation(float(values.mean()), stderr, len(continuation)))
        if progress is not None:
            progress(len(scores), len(pairs))
    return scores


@torch.inference_mode()
def greedy_matches(
    model: Denoiser, pairs: Sequence[Pair], bos: int | None = None, batch: int = 32, whole: bool = False
) -> list[bool]:
    """Tell whether every token of a continuation is the model's most likely one, in one pass.

    An autoregressive model sees, at each position, the continuation before it; other models see only the prompt,
    as when they draw the whole continuation in one step.

    Args:
        model: in eval mode.
        pairs: ids of prompts and continuations.
        bos: id of the token at position 0, if rows begin with one.
        batch: rows of a forward pass.
        whole: as in `score_continuations`.

    Raises:
        ConfigError: an empty continuation, or a pair longer than a row.
    """
    _check(model, pairs, bos)
    matches: list[bool] = []
    device = model.head.weight.device
    for first in range(0, len(pairs), batch):
        part = pairs[first : first + batch]
        prompts = [[*([] if bos is None else [bos]), *prompt] for prompt, _ in part]
        continuations = [continuation for _, continuation in part]
        lengths = [*map(len, continuations)]
        if isinstance(model, AR):
            (rows,) = _masked_rows(model, part, 1, 0, bos=bos, batch=len(part), whole=whole)
            hidden = model.target_vectors(rows)
        else:
            starts = [*map(len, prompts)]
            ends = [start + n for start, n in zip(starts, lengths, strict=True)]
            state = model.open(len(part), capacity=max(starts), extents=ends if whole else None)
            places = [list(range(n)) for n in starts]
            if model.causal:  # in a random order, as in training; BOS stays first
                begin = int(bos is not None)
                for row, prompt in zip(places, prompts, strict=True):
                    row[begin:] = np.random.default_rng(text_seed(0, prompt)).permutation(row[begin:])
            known = [[prompt[i] for i in row] for prompt, row in zip(prompts, places, strict=True)]
            model.extend(state, _packed(known, device), _packed(places, device), starts)
            positions = [range(start, start + n) for start, n in zip(starts, lengths, strict=True)]
            hidden = model.hidden(state, _packed(positions, device), lengths)
        chunk = chunk_rows(CHUNK_LOGITS, model.vocab_size, hidden.device)
        greedy = torch.cat([model.head(vectors).argmax(-1) for vectors in hidden.split(chunk)])
        hits = greedy == _packed(continuations, device)
        matches += [bool(row.all()) for row in hits.split(lengths)]
    return matches


def as_answers(pairs: Sequence[Pair], ends: RowEnds, room: int) -> list[Pair]:
    """Let continuations end as the answers do that a model was trained on: with end of text to the end of a block.

    Args:
        pairs: ids of prompts and answers.
        ends: how answers end.
        room: tokens of a row, without BOS.

    Returns:
        The pairs; an answer that leaves no room for its end has none.
    """
    assert ends.block is not None
    # What does not fit at all is left to who checks or cuts pairs.
    return [
        (prompt, with_end(answer, ends.eot, ends.block, max(room - len(prompt), len(answer))))
        for prompt, answer in pairs
    ]


def windows(prompt: Sequence[int], continuation: Sequence[int], room: int) -> list[Pair]:
    """Cut a prompt and a continuation of any length into pairs that fit in `room` tokens.

    The bounds of the pairs add up to a bound of the whole. A prompt loses its beginning; a continuation that leaves
    it less than half of the room is cut, and every piece is the prompt of the next one, as far back as fits.

    Args:
        prompt: ids.
        continuation: ids.
        room: tokens of a row.
    """
    whole = [*prompt, *continuation]
    pieces: list[Pair] = []
    done = len(prompt)
    while done < len(whole):
        new = min(len(whole) - done, max(room - done, room // 2, 1))
        pieces.append((whole[max(0, done + new - room) : done], whole[done : done + new]))
        done += new
    return pieces


def _check(model: Denoiser, pairs: Sequence[Pair], bos: int | None) -> None:
    """Refuse pairs that do not fit in a row."""
    room = model.length - (bos is not None)
    for number, (prompt, continuation) in enumerate(pairs):
        if not continuation or len(prompt) + len(continuation) > room:
            raise ConfigError(
                f"pair {number}: {len(prompt)} + {len(continuation)} tokens; expected a continuation of at least "
                f"one token and at most {room} in all"
            )


def _masked_rows(
    model: Denoiser,
    pairs: Sequence[Pair],
    draws: int,
    seed: int,
    *,
    bos: int | None,
    batch: int,
    whole: bool,
) -> list[Batch]:
    """Mask every pair `draws` times: some tokens of its continuation, which are targets, and all behind it."""
    start, length = int(bos is not None), model.length
    given, ends = np.zeros((2, len(pairs), draws), np.int64)
    tokens = np.zeros((len(pairs), draws, length), np.int64)
    groups = np.ones((len(pairs), draws, length), bool)
    # A row's order of revelation is that of its keys.
    weights, keys = np.zeros((2, len(pairs), draws, length))
    for pair, (prompt, continuation) in enumerate(pairs):
        begin, end = start + len(prompt), start + len(prompt) + len(continuation)
        tokens[pair, :, start:end] = [*prompt, *continuation]
        tokens[pair, :, :start] = bos or 0
        groups[pair, :, :end] = False
        given[pair], ends[pair] = begin, end
        if model.left_to_right:
            groups[pair, :, begin:end], weights[pair, :, begin:end] = True, 1
            continue
        rng = np.random.default_rng(text_seed(seed, continuation))
        n = 1 + np.floor(stratified(draws, rng) * len(continuation)).astype(np.int64)
        hidden: Bool[np.ndarray, "draws n"] = draw_subset(rng, n, len(continuation), bos=False)
        groups[pair, :, begin:end] = hidden
        weights[pair, :, begin:end] = hidden * (len(continuation) / n[:, None])
        keys[pair, :, begin:end] = 2 + rng.random((draws, len(continuation)))  # after the prompt
        keys[pair, :, start:begin] = 1 + rng.random((draws, len(prompt)))
    order = keys.argsort(axis=-1).argsort(axis=-1)
    fields = [x.reshape(-1, length) for x in (tokens, groups, weights > 0, weights, order)]
    roles, device = Roles(given.reshape(-1), ends.reshape(-1)), model.head.weight.device
    batches = []
    for first in range(0, len(fields[0]), batch):
        rows = slice(first, first + batch)
        *values, ranks = (x[rows] for x in fields)
        own = roles.rows(rows) if whole else None
        batches.append(Batch.of_arrays(*values, order=ranks, roles=own, device=device))
    return batches


def _packed(rows: Iterable[Sequence[int]], device: torch.device) -> Int[torch.Tensor, "T"]:
    """Pack ragged rows into one tensor."""
    return torch.tensor([i for row in rows for i in row], dtype=torch.int64, device=device)
