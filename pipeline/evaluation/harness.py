"""A model of this project as a model of lm-evaluation-harness (extra `harness`).

Likelihoods are bounds (exact for AR). The random draws of an example depend only on the example and the seed, so
results depend neither on the batch size nor on which examples are run.

Source: lm_eval.api.model.LM describes the requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, TypeVar

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from pipeline import arguments
from pipeline.api import Model
from pipeline.config.evaluation import MOST_STEPS
from pipeline.data.templates import Message, prompt_text
from pipeline.data.tokenizers import Tokenizer
from pipeline.errors import CapabilityError
from pipeline.metrics.continuations import (
    Pair,
    as_answers,
    greedy_matches,
    score_continuations,
    windows,
)
from pipeline.sampling.logits import Filters
from pipeline.sampling.orders import Order
from pipeline.sampling.row_ends import sample_rows
from pipeline.sampling.sampler import SamplingRequest, ragged_known
from pipeline.seeds import text_seed

T = TypeVar("T")

_MAX_NEW = 256  # tokens that are generated where a task does not say


@dataclass(frozen=True)
class HarnessSettings:
    """Settings of the evaluation.

    Attributes:
        draws: maskings of every continuation.
        seed: of all random draws.
        steps: of generating a row; fewer where fewer tokens are missing.
        rows: of a forward pass.

    Raises:
        ConfigError: a value outside its bounds.
    """

    draws: int = 32
    seed: int = 0
    steps: int = 64
    rows: int = 64

    def __post_init__(self) -> None:
        arguments.integer("draws", self.draws, 1, 10**6)
        arguments.integer("seed", self.seed, 0)
        arguments.integer("steps", self.steps, 1, MOST_STEPS)
        arguments.integer("rows", self.rows, 1)


class DenoiserLM(LM):
    """Answers the three kinds of requests, batched over examples and draws.

    Args:
        model: of text. Without a BOS, the end of the previous text stands in front of an example without context.
        settings: of the evaluation.

    Raises:
        CapabilityError: the model has no text tokenizer.
    """

    def __init__(self, model: Model, settings: HarnessSettings):
        super().__init__()
        if not isinstance(model.tokenizer, Tokenizer):
            raise CapabilityError("path: the model has no text tokenizer; expected a model of text")
        self._model, self._bos, self._tokenizer = model.denoiser, model.bos, model.tokenizer
        self._settings, self._device = settings, model.device  # lm-eval gathers its counts on the device
        self._room = model.denoiser.length - (model.bos is not None)
        self._prefix = [self._tokenizer.eot] if model.bos is None else []
        # Of a model of prompts and answers: contexts are prompts, and continuations whole answers.
        self._answers = model.answer_ends

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Compute bounds on log p(continuation | context).

        Args:
            requests: contexts and continuations.

        Returns:
            Bounds, and whether the continuation consists of the model's most likely tokens.
        """
        pairs = self._ended([self._pair(*request.args) for request in requests])
        pieces = [windows(*pair, self._room) for pair in pairs]
        rows, whole = self._settings.rows, self._answers is not None
        greedy = greedy_matches(self._model, [*chain(*pieces)], self._bos, rows, whole)
        matches = map(all, _by_example(greedy, pieces))
        answers = [(-nats, match) for nats, match in zip(self._nats(pieces), matches, strict=True)]
        self._cache("loglikelihood", requests, answers)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Compute bounds on log p of whole texts; texts beyond a row are cut into pieces that see half a row before.

        Args:
            requests: texts.
        """
        texts = self._encode([request.args[0] for request in requests])
        pairs = self._ended([(self._prefix, ids) for ids in texts])
        pieces = [windows(*pair, self._room) for pair in pairs]
        answers = [-nats for nats in self._nats(pieces)]
        self._cache("loglikelihood_rolling", requests, answers)
        return answers

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Continue contexts until a stop text, the end of the text or enough tokens.

        Without `do_sample`, or at temperature 0, the most likely tokens are taken, at the most confident positions
        first; else positions come in random order. The row behind a context is filled as a whole, and cut.

        Args:
            requests: contexts and settings.
        """
        by_settings: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            by_settings.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        answers = [""] * len(requests)
        for numbers in by_settings.values():
            for first in range(0, len(numbers), self._settings.rows):
                part = numbers[first : first + self._settings.rows]
                contexts, options = [requests[n].args[0] for n in part], requests[part[0]].args[1]
                texts = self._generate(contexts, options)
                self._cache("generate_until", [requests[n] for n in part], texts)
                for number, text in zip(part, texts, strict=True):
                    answers[number] = text
        return answers

    @property
    def tokenizer_name(self) -> str:
        """Return a name for lm-eval's caches of requests."""
        return self._tokenizer.hash

    def _cache(self, kind: str, requests: Sequence[Instance], answers: Sequence[Any]) -> None:
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial(kind, request.args, answer)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[*map(int, ids)] for ids in self._tokenizer.encode_batch(texts)]

    def _pair(self, context: str, continuation: str) -> Pair:
        """Encode; spaces between the two belong to the continuation, as in lm-eval's own models."""
        if self._answers is not None:
            prompt, answer = self._encode([self._prompt(context), continuation])
            return prompt, answer
        if not context:
            return self._prefix, self._encode([continuation])[0]
        whole, prompt = self._encode([context + continuation, context.rstrip()])
        return prompt, whole[len(prompt) :]

    def _prompt(self, context: str) -> str:
        """Return a context as the template writes prompts."""
        return (
            context
            if self._answers is None
            else prompt_text([Message("user", context)], self._answers.template)
        )

    def _ended(self, pairs: list[Pair]) -> list[Pair]:
        """Let continuations end as answers do, where the model was trained on answers."""
        return pairs if self._answers is None else as_answers(pairs, self._answers, self._room)

    def _nats(self, pieces: Sequence[Sequence[Pair]]) -> list[float]:
        """Sum the bounds of every example's pieces."""
        own = self._settings
        scores = score_continuations(
            self._model,
            [*chain(*pieces)],
            own.draws,
            own.seed,
            bos=self._bos,
            batch=own.rows,
            whole=self._answers is not None,
        )
        return [sum(score.nats for score in example) for example in _by_example(scores, pieces)]

    def _generate(self, contexts: Sequence[str], options: dict[str, Any]) -> list[str]:
        """Continue contexts with the same options."""
        until = [options["until"]] if isinstance(options.get("until"), str) else options.get("until") or []
        max_new = int(options.get("max_gen_toks", _MAX_NEW))
        temperature = float(options.get("temperature", 1.0 if options.get("do_sample") else 0.0))
        order, filters = Order("confidence", "linear", gumbel=0.0), Filters(top_k=1)
        if temperature and options.get("do_sample", temperature > 0):
            order, filters = Order(), Filters(temperature, options.get("top_k"), options.get("top_p"))
        if self._model.left_to_right:
            order = Order("left_to_right")
        prompts = [ids or self._prefix for ids in self._encode([*map(self._prompt, contexts)])]
        seed = self._settings.seed
        seeds = [text_seed(seed, ids) for ids in prompts]
        written: list[list[int]] = [[] for _ in prompts]
        open_rows, start = list(range(len(prompts))), int(self._bos is not None)
        while open_rows:
            known = []
            for row in open_rows:
                whole, left = [*prompts[row], *written[row]], max_new - len(written[row])
                known.append(whole[-max(self._room - left, self._room // 2) :])
            missing = self._room - min(map(len, known))
            steps = missing if self._model.left_to_right else min(self._settings.steps, missing)
            given = ragged_known([dict(enumerate(ids, start)) for ids in known], self._model.length)
            indices = [text_seed(seeds[row], written[row]) for row in open_rows]
            request = SamplingRequest(
                len(known), steps, seed, order, self._bos, known=given, filters=filters, indices=indices
            )
            filled = sample_rows(self._model, request, self._answers)[:, start:].tolist()
            for row, prompt, ids in zip(open_rows, known, filled, strict=True):
                written[row] = [*written[row], *ids[len(prompt) :]][:max_new]
            shorter = [row for row in open_rows if len(written[row]) < max_new]
            open_rows = [row for row in shorter if not self._stops(written[row], until)]
        return [_cut(self._text(ids), until) for ids in written]

    def _text(self, ids: list[int]) -> str:
        """Decode up to the end of the text."""
        eot = self._tokenizer.eot
        return self._tokenizer.decode(ids[: ids.index(eot)] if eot in ids else ids)

    def _stops(self, ids: list[int], until: Sequence[str]) -> bool:
        text = self._text(ids)
        return self._tokenizer.eot in ids or any(stop in text for stop in until)


def _by_example(values: Sequence[T], pieces: Sequence[Sequence[Pair]]) -> list[list[T]]:
    """Split the values of all pieces by example."""
    left = iter(values)
    return [list(islice(left, len(example))) for example in pieces]


def _cut(text: str, until: Sequence[str]) -> str:
    """Cut a text at the first stop text."""
    return text[: min((text.find(stop) for stop in until if stop and stop in text), default=len(text))]
