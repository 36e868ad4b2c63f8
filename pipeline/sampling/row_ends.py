"""Rows with padding: how long a sample is, and where a row ends."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import NamedTuple, Optional

import numpy as np
import torch
from jaxtyping import Int, Integer
from torch import Tensor

from pipeline import arguments
from pipeline.config.data import TemplateName
from pipeline.errors import CapabilityError, ConfigError
from pipeline.models.denoiser import Denoiser
from pipeline.models.model_folder import DataFacts
from pipeline.sampling.sampler import Progress, SamplingRequest, sample
from pipeline.seeds import mix_seed


class RowEnds(NamedTuple):
    """How the rows end that a model was trained on: with an end of text, and padding behind it.

    Attributes:
        eot: id of the end of text.
        pad: id of padding.
        lengths: number of training rows of every length from 0 on.
        block: rows are prompts and answers, which go on with end of text up to a multiple of so many tokens; None:
            they are not.
        template: of the prompts.
    """

    eot: int
    pad: int
    lengths: tuple[int, ...]
    block: int | None = None
    template: TemplateName = "plain"

    @classmethod
    def of(cls, facts: DataFacts) -> Optional["RowEnds"]:
        """Return how rows end; None where they have no padding.

        Args:
            facts: what a model knows about its data.
        """
        if facts.pad is None or facts.eot is None or not facts.row_lengths:
            return None
        template = facts.template or "plain"
        return cls(facts.eot, facts.pad, facts.row_lengths, facts.answer_block, template)


def with_end(answer: Sequence[int], eot: int, block: int, room: int) -> list[int]:
    """Return an answer with its end: end of text up to a multiple of a block.

    Args:
        answer: ids.
        eot: id of the end of text.
        block: tokens of a block.
        room: tokens at most; an answer that leaves no room for an end of text has none.
    """
    blocks = -(-(len(answer) + 1) // block)
    return [*answer, *[eot] * (blocks * block - len(answer))][:room]


def sample_rows(
    model: Denoiser,
    request: SamplingRequest,
    ends: RowEnds | None,
    length: int | None = None,
    progress: Progress | None = None,
    revealed_at: Int[Tensor, "B L"] | None = None,
) -> Int[Tensor, "B L"]:
    """Draw rows as `sample` does, each with a length of its own where a model was trained on padded rows.

    A row of n tokens has the end of text at position n - 1, which is given, and padding from n on. An autoregressive
    model draws whole rows, and ends each at its first end of text. A model of prompts and answers draws as
    `sample_answers` does.

    Args:
        model: in eval mode.
        request: what to sample.
        ends: how rows end; None: rows have no padding, and this is `sample`.
        length: tokens of every row, BOS and end of text included; None: drawn from those of the training rows, as a
            function of the request's seed and the sample's index.
        progress: as in `sample`.
        revealed_at: as in `sample`.

    Returns:
        [num_samples, L] ids.

    Raises:
        ConfigError: a length that rows of the model cannot have; see also `sample`.
        CapabilityError: a length for rows without padding or for an autoregressive model.
    """
    if length is not None and (ends is None or ends.block or model.left_to_right):
        reason = "was trained on rows without padding" if ends is None else "decides itself where a text ends"
        raise CapabilityError(f"length: {length}, but the model {reason}; expected none")
    if ends is None:
        return sample(model, request, progress, revealed_at)
    arguments.integer("seed", request.seed, 0)
    if ends.block is not None:
        return sample_answers(model, request, ends, progress, revealed_at)
    start, places = int(request.bos is not None), torch.arange(model.length)
    if model.left_to_right:
        rows = sample(model, request, progress, revealed_at)
        ended = (rows.eq(ends.eot) & (places.to(rows.device) >= start)).cummax(1).values
        return rows.masked_fill(ended.roll(1, 1) & (places.to(rows.device) > start), ends.pad)
    count = request.num_samples
    indices = range(count) if request.indices is None else request.indices
    tokens, given = request.known or (
        torch.zeros(count, model.length, dtype=torch.int64),
        torch.zeros(count, model.length, dtype=torch.bool),
    )
    tokens, given = tokens.cpu(), given.cpu()
    least = np.maximum((given * (places + 1)).amax(1).numpy(), start) + 1  # given tokens, and the end of text
    if length is None:
        extents = _draw_lengths(ends.lengths, least, request.seed, indices)
    else:
        low = int(least.max())
        extents = np.full(count, arguments.integer("length", length, min(low, model.length), model.length))
    last = torch.from_numpy(extents)[:, None] - 1
    tokens, given = torch.where(places == last, ends.eot, tokens), given | (places == last)
    request = replace(request, known=(tokens, given), extents=extents.tolist())
    rows = sample(model, request, progress, revealed_at)
    return rows.masked_fill((places > last).to(rows.device), ends.pad)


def sample_answers(
    model: Denoiser,
    request: SamplingRequest,
    ends: RowEnds,
    progress: Progress | None = None,
    revealed_at: Int[Tensor, "B L"] | None = None,
) -> Int[Tensor, "B L"]:
    """Draw answers block after block, until a block holds the end of text.

    The given tokens at the start of a row are its prompt. While a block is drawn, later ones are in no segment.
    Training has seen what a block holds behind the end of text: there, an answer goes on with end of text to the end
    of its last block. If further tokens are given behind the prompt, the first block reaches up to the last of them.

    Args:
        model: in eval mode.
        request: what to sample; `steps` are those of a block, one for each token at most. An autoregressive model
            takes one for each.
        ends: how answers end.
        progress: called with (steps done, steps if no answer ends early) after every step, and once more at the end.
        revealed_at: as in `sample`.

    Returns:
        [num_samples, L] ids: prompt, answer, end of text, and padding.

    Raises:
        ConfigError, CapabilityError: as `sample`.
    """
    count, length, block = request.num_samples, model.length, ends.block or 1
    places, blank = torch.arange(length), torch.zeros(count, length, dtype=torch.int64)
    tokens, known = (x.cpu().clone() for x in request.known or (blank, blank.bool()))
    if request.bos is not None:
        tokens[:, 0], known[:, 0] = request.bos, True
    starts = known.long().cumprod(1).sum(1)
    behind = torch.maximum((known * (places + 1)).amax(1), starts)  # where the end of text may stand first
    reach = torch.maximum(behind - starts, (starts < length).long())
    extents = (starts + -(-reach // block) * block).clamp(max=length)
    steps = torch.zeros_like(tokens)
    indices = list(range(count)) if request.indices is None else [*request.indices]
    open_rows, done, number = (starts < length).nonzero()[:, 0], 0, 0
    while len(open_rows):
        inside = places < extents[open_rows, None]
        unknown = int((inside & ~known[open_rows]).sum(1).max())
        part = replace(
            request,
            num_samples=len(open_rows),
            steps=unknown if model.left_to_right else max(1, min(request.steps, unknown)),
            seed=mix_seed(request.seed, number) if number else request.seed,
            known=(tokens[open_rows], known[open_rows]),
            condition=None if request.condition is None else request.condition[open_rows],
            indices=[indices[row] for row in open_rows.tolist()],
            extents=extents[open_rows].tolist(),
        )
        revealed = torch.zeros_like(tokens[open_rows])
        left = -(-(length - int(extents[open_rows].min())) // block)
        total = done + part.steps * (1 + left)
        report = None if progress is None else _shifted(progress, done, total)
        drawn = sample(model, part, report, revealed).cpu()
        steps[open_rows] += torch.where(revealed > 0, revealed + done, 0)
        tokens[open_rows], known[open_rows] = torch.where(inside, drawn, 0), inside
        done, number = done + part.steps, number + 1
        ended = ((tokens == ends.eot) & known & (places >= behind[:, None])).any(1)
        open_rows = open_rows[~ended[open_rows] & (extents[open_rows] < length)]
        extents[open_rows] = (extents[open_rows] + block).clamp(max=length)
    if progress is not None and done:
        progress(done, done)
    if revealed_at is not None:
        revealed_at.copy_(steps)
    over = ((tokens == ends.eot) & known & (places >= behind[:, None])).cummax(1).values
    tokens = tokens.masked_fill(over.roll(1, 1) & (places > behind[:, None]), ends.pad)
    return tokens.to(model.head.weight.device)


def _shifted(progress: Progress, before: int, total: int) -> Progress:
    """Report the steps of a block as those of all blocks."""
    return lambda done, _: progress(before + done, total)


def _draw_lengths(
    histogram: Sequence[int], least: Int[np.ndarray, "B"], seed: int, indices: Sequence[int]
) -> Int[np.ndarray, "B"]:
    """Draw the length of every sample from the training rows that are long enough; by (seed, index) alone."""
    counts, lengths = np.array(histogram), []
    for index, low in zip(indices, least.tolist(), strict=True):
        shares = np.where(np.arange(len(counts)) < low, 0, counts).cumsum()
        if not shares[-1]:
            raise ConfigError(
                f"known: {low - 1} tokens up to the last given one, but no training row has more than "
                f"{int(counts.nonzero()[0].max())} with its end of text; expected fewer, or a length"
            )
        uniform = np.random.default_rng([seed, index, 2]).random()
        lengths.append(int(np.searchsorted(shares / shares[-1], uniform, side="right")))
    return np.array(lengths)


def row_lengths(rows: Integer[np.ndarray, "n L"], eot: int) -> Int[np.ndarray, "n"]:
    """Find the number of tokens of rows that may have padding: up to the first end of text behind position 0.

    Args:
        rows: token ids.
        eot: id of the end of text.
    """
    ends = rows[:, 1:] == eot
    return np.where(ends.any(1), ends.argmax(1) + 2, rows.shape[1])


def cut_rows(
    rows: Integer[np.ndarray, "n L"], eot: int | None, pad: int | None, start: int = 0
) -> Collection[Integer[np.ndarray, "length"]]:
    """Leave the padding of rows out.

    Args:
        rows: token ids.
        eot: id of the end of text, or None.
        pad: id of padding; None: the rows have none.
        start: first position that is kept, such as the one behind BOS.

    Returns:
        The rows, each up to its end of text; an array where rows have no padding.
    """
    if pad is None or eot is None:
        return rows[:, start:]
    return [row[start:length] for row, length in zip(rows, row_lengths(rows, eot).tolist(), strict=True)]


def texts_of(
    rows: Integer[np.ndarray, "n L"],
    eot: int | None,
    pad: int | None,
    decode: Callable[[Integer[np.ndarray, "length"]], str],
) -> list[str]:
    """Decode rows; of rows with padding only what lies between BOS and end of text.

    Args:
        rows: token ids.
        eot: id of the end of text, or None.
        pad: id of padding; None: the rows have none.
        decode: of a tokenizer.

    Returns:
        The text of every row.
    """
    if pad is None:
        return [decode(row) for row in rows]
    return [decode(row[1 : len(row) - int(row[-1] == eot)]) for row in cut_rows(rows, eot, pad)]
