"""A model of this project as a model of lm-evaluation-harness (extra `harness`).

Likelihoods are bounds (exact for AR). What is drawn or hidden for an example depends on the example and the seed
alone, so figures depend neither on the batch size nor on which examples are run.

Source: lm_eval.api.model.LM says what each request means.
"""

from collections.abc import Sequence
from itertools import islice
from typing import Any, TypeVar

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from pipeline.data.tokenizers import Tokenizer
from pipeline.metrics.continuations import Pair, greedy_matches, score_continuations, windows
from pipeline.models.denoiser import Denoiser
from pipeline.sampling.logits import Filters
from pipeline.sampling.orders import Order
from pipeline.sampling.sampler import SamplingRequest, ragged_known, sample
from pipeline.seeds import text_seed

T = TypeVar("T")

_MAX_NEW = 256  # tokens that are written where a task does not say


class DenoiserLM(LM):
    """Answers the three kinds of requests, batched over examples and draws.

    Args:
        bos: id that stands known at position 0. Without one, the end of the text before stands in front of an
            example without context.
        draws: maskings of every continuation.
        steps: of writing a row; fewer where fewer tokens are missing.
        rows: of a forward pass.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        bos: int | None,
        tokenizer: Tokenizer,
        draws: int,
        seed: int,
        steps: int,
        rows: int,
    ):
        super().__init__()
        self._model, self._bos, self._tokenizer = denoiser, bos, tokenizer
        self._draws, self._seed, self._steps, self._rows = draws, seed, steps, rows
        self._room = denoiser.length - (bos is not None)
        self._device = denoiser.head.weight.device  # lm-eval gathers its counts there

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Bound on log p(continuation | context), and whether the model's first choices are the continuation."""
        asked = [self._pair(*request.args) for request in requests]
        pieces = [windows(*pair, self._room) if pair[1] else [] for pair in asked]
        nats = self._nats(pieces)
        greedy = greedy_matches(self._model, _flat(pieces), self._bos, self._rows)
        matches = map(all, _by_example(greedy, pieces))
        found = [(-total, match) for total, match in zip(nats, matches, strict=True)]
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Bound on log p of whole texts, those beyond a row in pieces that see half a row before them."""
        pieces = []
        for request in requests:
            (ids,) = self._encode([request.args[0]])
            pieces.append(windows(self._prefix, ids, self._room) if ids else [])
        found = [-total for total in self._nats(pieces)]
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return found

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Write behind contexts until a stop text, the end of the text or enough tokens.

        Without `do_sample`, or at temperature 0, the likeliest tokens are taken, the surest positions first;
        else positions come in random order. The row behind a context is filled as a whole, and cut.
        """
        by_settings: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            by_settings.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        found = [""] * len(requests)
        for numbers in by_settings.values():
            asked = requests[numbers[0]].args[1]
            for first in range(0, len(numbers), self._rows):
                part = numbers[first : first + self._rows]
                for number, text in zip(
                    part, self._write([requests[n].args[0] for n in part], asked), strict=True
                ):
                    found[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return found

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's caches of requests."""
        return self._tokenizer.hash

    @property
    def _prefix(self) -> list[int]:
        return [self._tokenizer.eot] if self._bos is None else []

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[*map(int, ids)] for ids in self._tokenizer.encode_batch(texts)]

    def _pair(self, context: str, continuation: str) -> Pair:
        """Ids; spaces between the two belong to the continuation, as lm-eval's own models have it."""
        if not context:
            return self._prefix, self._encode([continuation])[0]
        kept = context.rstrip()
        whole, prompt = self._encode([context + continuation, kept])
        return prompt, whole[len(prompt) :]

    def _nats(self, pieces: Sequence[Sequence[Pair]]) -> list[float]:
        """The sum of every example's pieces."""
        found = score_continuations(
            self._model, _flat(pieces), self._draws, self._seed, self._bos, self._rows
        )
        return [sum(one.nats for one in some) for some in _by_example(found, pieces)]

    def _write(self, contexts: Sequence[str], asked: dict[str, Any]) -> list[str]:
        """Continuations of contexts with the same settings."""
        until = [asked["until"]] if isinstance(asked.get("until"), str) else list(asked.get("until") or [])
        most = int(asked.get("max_gen_toks", _MAX_NEW))
        temperature = float(asked.get("temperature", 0.0 if not asked.get("do_sample") else 1.0))
        order, filters = Order(), Filters(temperature or 1.0, asked.get("top_k"), asked.get("top_p"))
        if not asked.get("do_sample", temperature > 0) or not temperature:
            order, filters = Order("confidence", "linear", gumbel=0.0), Filters(top_k=1)
        if self._model.left_to_right:
            order = Order("left_to_right")
        prompts = [ids or self._prefix for ids in self._encode(contexts)]
        seeds = [text_seed(self._seed, ids) for ids in prompts]
        written: list[list[int]] = [[] for _ in prompts]
        left = list(range(len(prompts)))
        while left:
            wholes = {row: [*prompts[row], *written[row]] for row in left}
            known, new = [], []
            for row in left:
                keep = min(len(wholes[row]), max(self._room - (most - len(written[row])), self._room // 2))
                known.append(wholes[row][len(wholes[row]) - keep :])
                new.append(min(most - len(written[row]), self._room - keep))
            rows = self._fill(known, order, filters, [text_seed(seeds[row], written[row]) for row in left])
            for row, ids, prompt, count in zip(left, rows, known, new, strict=True):
                written[row] += ids[len(prompt) : len(prompt) + count]
            left = [row for row in left if len(written[row]) < most and not self._ended(written[row], until)]
        return [_cut(self._text(ids), until) for ids in written]

    def _fill(
        self, known: Sequence[Sequence[int]], order: Order, filters: Filters, seeds: Sequence[int]
    ) -> list[list[int]]:
        """Rows, without BOS, that begin with what is known."""
        start = int(self._bos is not None)
        given = ragged_known([dict(enumerate(ids, start)) for ids in known], self._model.length)
        missing = self._room - min(map(len, known))
        steps = missing if self._model.left_to_right else min(self._steps, missing)
        request = SamplingRequest(
            len(known), steps, self._seed, order, self._bos, known=given, filters=filters, indices=seeds
        )
        return sample(self._model, request)[:, start:].tolist()

    def _text(self, ids: list[int]) -> str:
        """Up to the end of the text."""
        eot = self._tokenizer.eot
        return self._tokenizer.decode(ids[: ids.index(eot)] if eot in ids else ids)

    def _ended(self, ids: list[int], until: Sequence[str]) -> bool:
        text = self._text(ids)
        return self._tokenizer.eot in ids or any(stop in text for stop in until)


def _flat(pieces: Sequence[Sequence[Pair]]) -> list[Pair]:
    return [pair for some in pieces for pair in some]


def _by_example(values: Sequence[T], pieces: Sequence[Sequence[Pair]]) -> list[list[T]]:
    """What was found for all pieces, example by example."""
    left = iter(values)
    return [list(islice(left, len(some))) for some in pieces]


def _cut(text: str, until: Sequence[str]) -> str:
    """Up to the first stop text."""
    return text[: min((text.find(stop) for stop in until if stop and stop in text), default=len(text))]
